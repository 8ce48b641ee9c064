"""Training of the network as int8 will compute it: quantisation-aware training inside the federation.

The weights that a step computes with are rounded, and the step changes the unrounded ones: with a gradient that passes
straight through the rounding (Bengio et al., 2013) these are two names of one thing, so every objective, and every
engine of differential privacy, runs as it is. Activations are rounded where the int8 file rounds them: at the input and
at the output of each convolution and linear layer, and behind the ReLUs of residual sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from trilemma.compression.calibration import ACTIVATION_LEVELS, Watched, grid_of, rounding
from trilemma.compression.fake_quantisation import WEIGHT_LEVELS
from trilemma.data.phantom import draw
from trilemma.data.records import Dataset
from trilemma.data.specs import Phantom
from trilemma.errors import UserError
from trilemma.federation.specs import TrainSpec
from trilemma.models.classifier import Classifier
from trilemma.models.norms import batch_norm_layers
from trilemma.models.vector import set_params
from trilemma.models.weight_standardisation import WeightStandardisedConv2d

_ROUNDED = (nn.Conv2d, nn.Linear, WeightStandardisedConv2d)


def phantoms_for(spec: TrainSpec, dataset: Dataset) -> Tensor | None:
    """Returns phantoms of the data's size and channels (N, C, H, W), or None where a training rounds nothing."""
    if spec.quantisation is None:
        return None
    count, size = spec.quantisation.num_calibration, dataset.image_size
    plan = Phantom(size=max(size, 16), train=count).plan()
    drawn = torch.from_numpy(draw(plan, "train", range(count))).to(torch.float32) / 255
    return adaptive_avg_pool2d(drawn, size).expand(-1, dataset.channels, -1, -1).contiguous()


def refuse_unfoldable(spec: TrainSpec, classifier: Classifier) -> None:
    """Refuses batch norm, which int8 folds into weights that training has not seen rounded.

    Raises:
        UserError: Naming the layer and the alternatives.
    """
    layers = batch_norm_layers(classifier)
    if spec.quantisation is not None and layers:
        raise UserError(
            "quantisation",
            f"layer '{layers[0]}' is a batch norm: int8 folds it into the weights before it rounds them, so rounding "
            "them unfolded would train another network",
            'Use norm = "weight" or "group"',
        )


@dataclass(frozen=True)
class Rounding:
    """How a round's network is rounded.

    Attributes:
        ranges: Layer -> the ranges of its input and output; a ReLU of a sum is rounded at its output alone.
    """

    ranges: dict[nn.Module, Watched]

    @contextmanager
    def activations(self) -> Iterator[None]:
        """Within the block the activations, and standardised weights, of the network are rounded."""
        handles = []
        for layer, watched in self.ranges.items():
            inside, outside = (grid_of(one) for one in watched)
            if not isinstance(layer, nn.ReLU):
                handles.append(layer.register_forward_pre_hook(_rounds_input(*inside)))
            handles.append(layer.register_forward_hook(_rounds_output(*outside)))
            if isinstance(layer, WeightStandardisedConv2d):
                layer.weight_rounding = rounded_weight
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.ranges:
                if isinstance(layer, WeightStandardisedConv2d):
                    layer.weight_rounding = None


def set_rounded(classifier: Classifier, params_P: Tensor) -> None:
    """Puts parameters into the classifier, plain layers' weights rounded; standardised ones round themselves."""
    set_params(classifier, params_P)
    with torch.no_grad():
        for layer in classifier.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and type(layer) is not WeightStandardisedConv2d:
                layer.weight.copy_(rounded_weight(layer.weight))


def rounding_of(
    spec: TrainSpec, classifier: Classifier, phantoms_NCHW: Tensor | None, rounds_done: int
) -> Rounding | None:
    """Returns how the next round's network is rounded, or None where it is not.

    Args:
        spec: The training.
        classifier: The workspace with the round's model in it.
        phantoms_NCHW: What `phantoms_for` gave.
        rounds_done: Before the round.
    """
    if spec.quantisation is None or not spec.quantisation.acts(rounds_done, spec.rounds):
        return None
    assert phantoms_NCHW is not None  # `prepare` draws them
    layers = [layer for layer in classifier.eval().modules() if type(layer) in _ROUNDED]
    return Rounding(rounding(classifier, layers, phantoms_NCHW))


def rounded_weight(weight: Tensor) -> Tensor:
    """Returns a weight on its int8 grid: one symmetric scale for each output channel, as in the file."""
    over = tuple(range(1, weight.ndim))
    scale = (weight.detach().abs().amax(over, keepdim=True) / WEIGHT_LEVELS).clamp_min(1e-12)
    return (weight / scale).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS) * scale


def _rounded(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Returns activations on their grid; gradients pass as if they were not, as in the twin that is attacked."""
    kept = x.detach()
    levels = (kept.float() / scale).round().clamp(-zero_point, ACTIVATION_LEVELS - zero_point) * scale
    return x + (levels.to(x.dtype) - kept)


def _rounds_input(scale: float, zero_point: int) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_rounded(inputs[0], scale, zero_point), *inputs[1:])

    return hook


def _rounds_output(scale: float, zero_point: int) -> Any:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _rounded(output, scale, zero_point)

    return hook

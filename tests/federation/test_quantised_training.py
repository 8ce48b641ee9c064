"""Training of the rounded network: it is what ships, gradients pass straight through, and nothing stays behind."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from helpers.tiny_federation import DP, equal_states, tiny_dataset, tiny_federation, trained_state
from trilemma.compression.calibration import grid_of
from trilemma.compression.fake_quantisation import quantise
from trilemma.data.roots import DataRoots
from trilemma.data.specs import Phantom
from trilemma.errors import UserError
from trilemma.federation.local_training import mean_gradient
from trilemma.federation.quantised_training import phantoms_for, rounded_weight, rounding_of, set_rounded
from trilemma.federation.smaller import Int8Training
from trilemma.federation.state import TrainingState
from trilemma.federation.training import guarantee
from trilemma.models.vector import get_params
from trilemma.models.weight_standardisation import WeightStandardisedConv2d
from trilemma.privacy import bookkeeping, clipping
from trilemma.privacy.clipping_rules import Flat
from trilemma.robustness.objectives import mean_cross_entropy
from trilemma.robustness.specs import NoDefence

QAT = {"quantisation": {"kind": "int8", "first": 0.5, "num_calibration": 16}, "rounds": 4}
NORMS = ("group", "weight", "none")
every_norm = pytest.mark.parametrize("norm", NORMS)


def federation_of(norm="group", **fields):
    return tiny_federation(**QAT, model={"kind": "resnet9", "width": 4, "norm": norm}, **fields)


def rounded(federation):
    """The rounding of a round in which it acts."""
    return rounding_of(federation.spec, federation.classifier, federation.phantoms_NCHW, 3)


@every_norm
def test_the_network_that_is_trained_is_the_one_that_ships(norm):
    federation = federation_of(norm)
    classifier, x = federation.classifier.eval(), tiny_dataset().test.x()
    twin = quantise(classifier, federation.phantoms_NCHW)
    exact, params_P = classifier(x).detach(), get_params(classifier)
    with rounded(federation).activations():
        set_rounded(classifier, params_P)
        found = classifier(x).detach()
    # The twin rounds biases too, to a hundred-millionth; a value on the border of two levels may fall to either side.
    near = (found - twin(x)).abs().max()
    assert near < 0.1 * (exact - twin(x)).abs().max() + 1e-6


@every_norm
def test_weights_lie_on_the_grids_of_the_file(norm):
    federation = federation_of(norm)
    twin = quantise(federation.classifier, federation.phantoms_NCHW)
    set_rounded(federation.classifier, get_params(federation.classifier))
    layers = dict(federation.classifier.named_modules())
    for name, layer in twin.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            own = layers[name]
            used = own.effective_weight() if isinstance(own, WeightStandardisedConv2d) else own.weight
            torch.testing.assert_close(rounded_weight(used), layer.weight, rtol=1e-5, atol=1e-7)


def test_a_rounded_weight_is_near_and_zero_stays_zero():
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2], weight[1, 0] = 0, 0
    found = rounded_weight(weight)
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 64
    assert bool(((found - weight).abs() <= step / 2 + 1e-7).all())
    assert not bool(found[weight == 0].any())
    assert torch.equal(rounded_weight(found), found)


@every_norm
def test_gradients_pass_straight_through(norm):
    """Each parameter's gradient is that of a network whose roundings are constants added to what they round."""
    federation = federation_of(norm)
    classifier, params_P = federation.classifier.eval(), get_params(federation.classifier)
    x, y = tiny_dataset().train.x(slice(0, 6)), tiny_dataset().train.y(slice(0, 6))
    objective, draws = NoDefence().make(0.0), torch.Generator()
    rounding = rounded(federation)
    with rounding.activations():
        set_rounded(classifier, params_P)
        gradient_P, _ = mean_gradient(classifier, objective, x, y, draws)
        shifts = constants_of(classifier, x, rounding.ranges)
    set_rounded(classifier, params_P)
    with added(classifier, shifts):
        expected_P, _ = mean_gradient(classifier, objective, x, y, draws)
    torch.testing.assert_close(gradient_P, expected_P, rtol=1e-4, atol=1e-6)
    plain_P, _ = mean_gradient(classifier, objective, x, y, draws)
    assert (plain_P - expected_P).abs().max() > 1e-4  # rounding does change the gradient


def constants_of(classifier, x, ranges):
    """What each layer's input and output rounding adds, on these images."""
    shifts, seen = {}, {}

    def before(layer, inputs):
        seen[layer] = inputs[0].detach()

    def after(layer, inputs, output):
        seen[layer, "out"] = output.detach()

    layers = list(ranges)
    # Hooks that stand before and after the rounding ones: what they see differs by what is added.
    handles = [layer.register_forward_pre_hook(before, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(after, prepend=True) for layer in layers]
    classifier(x)
    for handle in handles:
        handle.remove()
    for layer in layers:
        for key, observed in ((layer, ranges[layer].inside), ((layer, "out"), ranges[layer].outside)):
            scale, zero = grid_of(observed)
            shifts[key] = (seen[key] / scale).round().clamp(-zero, 255 - zero) * scale - seen[key]
    return shifts


@contextmanager
def added(classifier, shifts):
    """Adds constants to layers' inputs and outputs; standardised weights are rounded as in training."""
    handles, layers = [], [key for key in shifts if not isinstance(key, tuple)]
    for layer in layers:
        inside, outside = shifts[layer], shifts[layer, "out"]
        if not isinstance(layer, nn.ReLU):
            handles.append(layer.register_forward_pre_hook(lambda _, inputs, c=inside: (inputs[0] + c,)))
        handles.append(layer.register_forward_hook(lambda _, __, output, c=outside: output + c))
        if isinstance(layer, WeightStandardisedConv2d):
            layer.weight_rounding = rounded_weight
    yield
    for handle in handles:
        handle.remove()
    for layer in layers:
        if isinstance(layer, WeightStandardisedConv2d):
            layer.weight_rounding = None


@every_norm
def test_both_engines_of_privacy_agree_on_it(norm):
    federation = federation_of(norm)
    classifier, params_P = federation.classifier.train(), get_params(federation.classifier)
    x, y = tiny_dataset().train.x(slice(0, 6))[:, None], tiny_dataset().train.y(slice(0, 6))
    assert bookkeeping.why_slow(classifier, torch.Size((1, 8, 8))) is None
    with rounded(federation).activations():
        set_rounded(classifier, params_P)
        fast = bookkeeping.clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
        exact = clipping.clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    torch.testing.assert_close(fast.norms_B, exact.norms_B, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast.sum_P, exact.sum_P, rtol=1e-3, atol=1e-5)
    plain = bookkeeping.clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    assert (plain.norms_B - fast.norms_B).abs().max() > 1e-4


@every_norm
def test_nothing_stays_behind_and_weights_stay_unrounded(norm):
    federation = federation_of(norm)
    state = trained_state(federation)
    for layer in federation.classifier.modules():
        assert not layer._forward_hooks and not layer._forward_pre_hooks
        assert getattr(layer, "weight_rounding", None) is None
    set_rounded(federation.classifier, state.params_P)
    if norm != "weight":
        assert (get_params(federation.classifier) - state.params_P).abs().max() > 1e-5


def test_before_it_begins_nothing_is_different_and_then_something_is():
    plain, trained = tiny_federation(rounds=4), federation_of("group")
    assert torch.equal(trained_state(plain, 2).params_P, trained_state(trained, 2).params_P)
    moved = (trained_state(plain).params_P - trained_state(trained).params_P).abs().max()
    assert moved > 1e-5
    assert [Int8Training(first=0.5).acts(done, 5) for done in range(5)] == [False, False, False, True, True]
    assert Int8Training(first=0).acts(0, 5)


@pytest.mark.parametrize("privacy", [DP, {**DP, "trust": "distributed"}], ids=["local", "distributed"])
def test_it_costs_no_privacy(privacy):
    local = {"batch_size": 8, "steps": 1, "momentum": 0}
    federation = federation_of(privacy=privacy, local=local)
    plain = tiny_federation(rounds=4, privacy=privacy, local=local)
    assert guarantee(federation, trained_state(federation)) == guarantee(plain, trained_state(plain))


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": {"kind": "centralised"}},
        {"defence": {"kind": "pgd", "radius": "4/255", "steps": 2}},
        {"local": {"precision": "bfloat16"}},
        {"pruning": {"kind": "gradual", "sparsity": 0.5}},
        {"aggregation": {"kind": "fltrust", "num_images": 5}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_it_goes_with_everything_else(fields):
    state = trained_state(federation_of("weight", **fields))
    assert bool(state.params_P.isfinite().all()) and state.history[-1]["loss"] is not None


def test_a_resumed_training_is_the_same():
    half = trained_state(federation_of(), 3)
    again = TrainingState.unpack(*half.pack(), torch.device("cpu"))
    assert equal_states(trained_state(federation_of(), state=again), trained_state(federation_of()))


def test_batch_norm_is_refused():
    with pytest.raises(UserError, match="is a batch norm: int8 folds it"):
        federation_of("batch")


def test_phantoms_are_those_that_int8_is_calibrated_on(tmp_path):
    """The first of the same drawing, of the data's size and channels."""
    found = phantoms_for(federation_of().spec, tiny_dataset(size=16))
    drawn = Phantom(size=16, train=40).load(DataRoots(tmp_path / "data", tmp_path / "cache")).train.x(slice(0, 16))
    assert torch.equal(found, drawn)
    assert phantoms_for(federation_of().spec, tiny_dataset(size=8)).shape == (16, 1, 8, 8)
    assert phantoms_for(tiny_federation().spec, tiny_dataset()) is None

"""Better initial weights from public images: training before the first round, at no cost of privacy.

It depends on the seed, the public images and the network alone, so it can be done again with the same result.
"""

from collections.abc import Iterator

import torch

from trilemma.data.records import Dataset
from trilemma.errors import UserError
from trilemma.federation.local_training import load_batch, mean_gradient
from trilemma.federation.public import refuse_other_classes, refuse_other_form, refuse_shared
from trilemma.federation.specs import Pretraining, TrainSpec
from trilemma.models.classifier import Classifier
from trilemma.models.vector import get_params, set_params
from trilemma.randomness import generator, global_seed


def pretrain(spec: TrainSpec, public: Dataset, classifier: Classifier) -> None:
    """Trains weights on the training split of `public` and puts them into `classifier`, in place of its own.

    Raises:
        UserError: If the weights become infinite, or the images do not fit the network.
    """
    assert spec.pretraining is not None  # whoever has a data set for it asks for it
    model = spec.model.make(public.channels, public.image_size, len(public.classes), spec.seed).to(classifier.device)
    _train(spec, spec.pretraining, public, model)
    if not get_params(model).isfinite().all():
        raise UserError(
            "pretraining.learning_rate",
            f"{spec.pretraining.learning_rate:g} is too large: the weights became infinite on {public.name}",
            "Use a smaller one, such as a third of it",
        )
    transfer(model, classifier)


def transfer(source: Classifier, target: Classifier) -> None:
    """Copies parameters and floating-point buffers of equal name and shape, and leaves the target's others alone.

    Between two networks of one spec that differ in their number of classes the others are those of the last layer.

    Raises:
        UserError: If anything but the number of classes makes them differ.
    """
    theirs, own = source.state_dict(), target.state_dict()
    alike = {name: value for name, value in theirs.items() if name in own and value.shape == own[name].shape}
    classes = (source.num_classes, target.num_classes)
    for name in sorted((theirs.keys() | own.keys()) - alike.keys()):
        sizes = [value[name].shape if name in value else () for value in (theirs, own)]
        if len(sizes[0]) != len(sizes[1]) or any(a != b and (a, b) != classes for a, b in zip(*sizes, strict=True)):
            raise UserError(
                "pretraining.data",
                f"makes '{name}' of the network {list(sizes[0])} and the study's own images make it {list(sizes[1])}",
                "Use images of the size and channels of the study's own",
            )
    target.load_state_dict({**own, **{name: value for name, value in alike.items() if value.is_floating_point()}})


def refuse_unfit(dataset: Dataset, public: Dataset, looked_at: bool = False) -> None:
    """Refuses public images that the study's network could not take, or that are not public at all.

    Args:
        dataset: The study's own images.
        public: Those to pretrain on.
        looked_at: Whether early stopping looks at the public validation images: these are checked too, and the classes
            must be as many, for the model that looks at them answers with the study's own.

    Raises:
        UserError: If sizes or channels differ, or an image is one of the study's own.
    """
    refuse_other_form("pretraining.data", dataset, public)
    refuse_shared("pretraining.data", dataset, public, "training", public.train)
    if not looked_at:
        return
    refuse_other_classes("early_stopping.split", dataset, public)
    refuse_shared("pretraining.data", dataset, public, "validation", public.val)


def _train(spec: TrainSpec, how: Pretraining, public: Dataset, model: Classifier) -> None:
    changes = generator(spec.seed, "pretraining", "augmentation")
    crafting = generator(spec.seed, "pretraining", "defence", device=model.device)
    optimizer, params_P, num_steps = how.make(), get_params(model), _num_steps(len(public.train), how)
    state = optimizer.init(params_P)
    model.train()
    with global_seed(spec.seed, "pretraining", "dropout"):
        parts = _batches(len(public.train), how, generator(spec.seed, "pretraining", "batches"))
        for step, index in enumerate(parts):
            objective = how.defence.make(step / num_steps)
            x_BCHW, y_B = load_batch(how.augmentation, public.train, index, changes, model.device)
            gradient_P, _ = mean_gradient(model, objective, x_BCHW, y_B, crafting)
            params_P, state = optimizer.step(params_P, gradient_P, state, how.learning_rate)
            set_params(model, params_P)


def _batches(num_records: int, how: Pretraining, draws: torch.Generator) -> Iterator[list[int]]:
    """Yields the positions of each step's images, from shuffled passes; of one image batch norm has no variance."""
    for _ in range(how.epochs):
        order = torch.randperm(num_records, generator=draws).tolist()
        parts = [order[start : start + how.batch_size] for start in range(0, num_records, how.batch_size)]
        yield from (part for part in parts if len(part) > 1)


def _num_steps(num_records: int, how: Pretraining) -> int:
    whole, rest = divmod(num_records, how.batch_size)
    return how.epochs * (whole + (rest > 1))

"""Every compression once on the untrained network: what cannot be shall be said before anything is trained for it."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.compression.step import ImageShape, Looks, Material, Step
from trilemma.errors import UserError
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator
from trilemma.study.plan import Cell
from trilemma.study.workplace import Workplace

#: (model, compression, shape of an image, classes, own images) -> why it cannot be. What this process has tried: a
#: second start, and another study of the same networks, need not wait for it again.
_TRIED: dict[tuple[str, str, tuple[int, int, int], int, tuple[tuple[str, int], ...]], str | None] = {}
#: Images that are enough for every compression.
_ENOUGH = 2


def rehearse(cells: Iterable[Cell], place: Workplace) -> None:
    """Compresses and exports untrained networks as the trained ones will be, on noise for images.

    Whether a network can be traced and written, and a share of it be left, depends on its layers and not on what they
    learn. Of a budget after channel pruning that is not so, and it is not tried. Nothing is kept.

    Raises:
        UserError: If one cannot be compressed so, or its file cannot be written or run, naming both.
    """
    place.enter()
    for cell in cells:
        spec = cell.training.spec
        dataset = place.dataset(spec.data)
        shape = (dataset.channels, dataset.image_size, dataset.image_size)
        own = {"train": min(len(dataset.train), _ENOUGH), "val": min(len(dataset.val), _ENOUGH)}
        name = (spec.model.key, cell.compression.key, shape, len(dataset.classes), tuple(own.items()))
        if name not in _TRIED:
            classifier = spec.model.make(shape[0], shape[1], len(dataset.classes), 0).eval()
            _TRIED[name] = _problem(classifier, cell.compression, shape, own)
        problem = _TRIED[name]
        if problem is not None:
            where = f"compressions, {cell.compression.label} of {cell.training.configuration}"
            raise UserError(where, problem, "Change this compression or this model, or leave one of them out")


def _problem(classifier: Classifier, compression: Step, shape: ImageShape, own: Mapping[str, int]) -> str | None:
    """Returns why a compression of a network cannot be, or None where it can; `own` counts the hospitals' images."""

    def images(looks: Looks) -> Tensor:
        count = min(looks.count, own.get(looks.source, _ENOUGH))
        return torch.rand(count, *shape, generator=generator(0, "rehearsal"))

    try:
        twin = compression.rehearsed().apply(classifier, Material(classifier, images, shape, 0)).eval()
    except UserError as error:  # of a student's network
        return f"{error.problem}. {error.remedy}"
    except ValueError as error:
        return str(error).rstrip(".")
    try:
        Session(export_onnx(twin, *shape[:2])).predict(torch.rand(1, *shape, generator=generator(0, "rehearsal")))
    except (MemoryError, OSError):
        raise
    except Exception as error:  # the exporter and the runtime raise whatever a user's own network leads them to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        return f"the network cannot be written to an ONNX file and run from it: {reason}"
    return None

"""Every compression once on the untrained network: what cannot be shall be said before anything is trained for it."""

from collections.abc import Iterable

import torch

from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.compression.step import Looks, Material, Step
from trilemma.errors import UserError
from trilemma.models.specs import ModelSpec
from trilemma.randomness import generator
from trilemma.study.plan import Cell
from trilemma.study.workplace import Workplace

#: What this process has tried: a second start, and another study of the same networks, need not wait for it again.
_TRIED: dict[tuple[str, str, tuple[int, int, int], int], str | None] = {}
_IMAGES = 2


def rehearse(cells: Iterable[Cell], place: Workplace) -> None:
    """Compresses and exports untrained networks as the trained ones will be, on noise for images.

    Whether a network can be traced, a share of it be left or a budget be kept depends on its layers and not on what
    they learn. Nothing is kept.

    Raises:
        UserError: If one cannot be compressed so, or its file cannot be written or run, naming both.
    """
    for cell in cells:
        spec = cell.training.spec
        dataset = place.dataset(spec.data)
        shape = (dataset.channels, dataset.image_size, dataset.image_size)
        name = (spec.model.key, cell.compression.key, shape, len(dataset.classes))
        if name not in _TRIED:
            _TRIED[name] = _problem(spec.model, cell.compression, shape, len(dataset.classes))
        problem = _TRIED[name]
        if problem is not None:
            where = f"compressions, {cell.compression.label} of {cell.training.configuration}"
            raise UserError(where, problem, "Change this compression or this model, or leave one of them out")


def _problem(model: ModelSpec, compression: Step, shape: tuple[int, int, int], num_classes: int) -> str | None:
    """Returns why a compression of a model cannot be, or None where it can."""
    classifier = model.make(shape[0], shape[1], num_classes, 0).eval()

    def images(looks: Looks) -> torch.Tensor:
        return torch.rand(min(looks.count, _IMAGES), *shape, generator=generator(0, "rehearsal"))

    try:
        twin = compression.rehearsed().apply(classifier, Material(classifier, images, shape, 0)).eval()
        Session(export_onnx(twin, *shape[:2])).predict(torch.rand(1, *shape, generator=generator(0, "rehearsal")))
    except UserError as error:  # of a student's model
        return str(error)
    except ValueError as error:
        return str(error).rstrip(".")
    except Exception as error:  # the exporter and the runtime raise whatever a user's own network leads them to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        return f"the network cannot be written to an ONNX file and run from it: {reason}"
    return None

"""The job that turns a trained model into what would be shipped: an ONNX file and its differentiable twin."""

import time

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from trilemma.atomic import atomic_write
from trilemma.compression.export import export_onnx
from trilemma.compression.pruning import sparsity
from trilemma.compression.specs import CompressionSpec
from trilemma.data.records import Dataset
from trilemma.data.specs import Phantom
from trilemma.privacy.guarantee import Guarantee
from trilemma.randomness import numpy_generator
from trilemma.study.files import save_tensors
from trilemma.study.plan import Cell
from trilemma.study.rows import ArtefactRow
from trilemma.study.workplace import Workplace


def compress_job(place: Workplace, cell: Cell, claimed: Guarantee) -> ArtefactRow:
    """Compresses and exports a trained model; the guarantee comes along, or is void with the reason.

    Args:
        place: Where.
        cell: Which training, and what to turn it into.
        claimed: The training's guarantee.
    """
    place.enter()
    started = time.perf_counter()
    spec = cell.training.spec
    dataset = place.dataset(spec.data)
    classifier = place.trained(spec, cell.training.key).cpu()
    twin = cell.compression.apply(classifier, calibration_images(cell.compression, place, dataset, spec.seed)).eval()
    private = cell.compression.private_data
    guarantee = claimed.voided(private) if private and not claimed.void else claimed
    model = export_onnx(twin, dataset.channels, dataset.image_size, shipped_with(cell.key, guarantee))
    save_tensors(place.files.twin(cell.key), dict(twin.state_dict()))
    atomic_write(place.files.model(cell.key), model)
    return ArtefactRow(
        key=cell.key,
        run_key=cell.training.key,
        compression={**cell.compression.model_dump(mode="json"), "label": cell.compression.label},
        file_bytes=len(model),
        sparsity=sparsity(twin),
        guarantee=guarantee,
        seconds=time.perf_counter() - started,
    )


def shipped_with(key: str, guarantee: Guarantee) -> dict[str, str]:
    """Returns what the file of an artefact says of itself: its key, and its guarantee as JSON and in plain words."""
    return {
        "trilemma.key": key,
        "trilemma.guarantee": guarantee.model_dump_json(),
        "trilemma.guarantee_in_words": guarantee.in_words(),
    }


def calibration_images(spec: CompressionSpec, place: Workplace, dataset: Dataset, seed: int) -> Tensor | None:
    """Returns the images that a compression looks at, drawn by the seed, or None where it looks at none.

    "public" images are phantoms of the data's size: they exist for everybody and cost no privacy. Smaller ones than
    can be drawn are area means of the smallest.
    """
    if not spec.needs_calibration:
        return None
    split = getattr(spec, "calibration", "public")
    count = getattr(spec, "num_calibration", 256)
    if split == "public":
        phantoms = Phantom(size=max(dataset.image_size, 16), train=max(count, 16)).load(place.roots)
        x_BCHW = adaptive_avg_pool2d(phantoms.train.x(slice(0, count)), dataset.image_size)
        return x_BCHW.expand(-1, dataset.channels, -1, -1).contiguous()
    records = dataset.train if split == "train" else dataset.val
    order = numpy_generator(seed, "calibration").permutation(len(records))[:count]
    return records.x(order)

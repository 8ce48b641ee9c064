"""The job that turns a trained model into what would be shipped: an ONNX file and its differentiable twin."""

import time

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from trilemma.atomic import atomic_write
from trilemma.compression.export import export_onnx
from trilemma.compression.packing import pack
from trilemma.compression.pruning import sparsity
from trilemma.compression.step import Looks, Material
from trilemma.compression.synthetic import synthetic_images
from trilemma.data.records import Dataset
from trilemma.data.specs import Phantom
from trilemma.errors import UserError
from trilemma.federation.public import refuse_other_form, refuse_shared
from trilemma.models.classifier import Classifier
from trilemma.privacy.guarantee import Guarantee
from trilemma.randomness import generator, numpy_generator
from trilemma.study.files import save_tensors
from trilemma.study.plan import Cell
from trilemma.study.rows import ArtefactRow
from trilemma.study.workplace import Workplace

#: From this share of zeros on a file is packed: its zeros are then no bytes.
SPARSE = 0.3


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
    private = cell.compression.private_data
    guarantee = claimed.voided(private) if private and not claimed.void else claimed
    try:
        twin = cell.compression.apply(classifier, material(place, classifier, dataset, spec.seed)).eval()
        model = export_onnx(twin, dataset.channels, dataset.image_size, shipped_with(cell.key, guarantee))
    except ValueError as error:
        where = f"compressions, {cell.compression.label}"
        raise UserError(where, str(error).rstrip("."), "Change this compression, or leave it out") from error
    zeros = sparsity(twin)
    if zeros >= SPARSE:
        model = pack(model)
    save_tensors(place.files.twin(cell.key), dict(twin.state_dict()))
    atomic_write(place.files.model(cell.key), model)
    return ArtefactRow(
        key=cell.key,
        run_key=cell.training.key,
        compression={**cell.compression.model_dump(mode="json"), "label": cell.compression.label},
        file_bytes=len(model),
        sparsity=zeros,
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


def material(place: Workplace, teacher: Classifier, dataset: Dataset, seed: int) -> Material:
    """Returns what compressions of a trained model work with.

    Phantoms are of the data's size: they exist for everybody and cost no privacy. Smaller ones than can be drawn are
    area means of the smallest.
    """
    shape = (dataset.channels, dataset.image_size, dataset.image_size)

    def images(looks: Looks) -> Tensor:
        if looks.source == "synthetic":
            return synthetic_images(teacher, looks.count, shape, generator(seed, "synthetic"))
        if looks.data is not None:
            public = looks.data.load(place.roots)
            refuse_unfit(dataset, public)  # again: a guarantee rests on it
            records = public.train
        elif looks.source in ("public", "phantom"):
            phantoms = Phantom(size=max(dataset.image_size, 16), train=max(looks.count, 16)).load(place.roots)
            x_NCHW = adaptive_avg_pool2d(phantoms.train.x(slice(0, looks.count)), dataset.image_size)
            return x_NCHW.expand(-1, dataset.channels, -1, -1).contiguous()
        else:
            records = dataset.train if looks.source == "train" else dataset.val
        order = numpy_generator(seed, "calibration").permutation(len(records))[: looks.count]
        return records.x(order)

    return Material(teacher, images, shape, seed)


def refuse_unfit(dataset: Dataset, public: Dataset) -> None:
    """Refuses images that a compression takes for public and that are of another form or not public at all.

    Args:
        dataset: The study's own images.
        public: Those that the compression names; it looks at their training split.

    Raises:
        UserError: If sizes or channels differ, or an image is one of the study's own.
    """
    refuse_other_form("compressions.data", dataset, public)
    refuse_shared("compressions.data", dataset, public, "training", public.train)

"""What the compression benchmark trains, and what it turns a trained model into."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from trilemma.compression.export import export_onnx
from trilemma.compression.multiply_adds import multiply_adds
from trilemma.compression.packing import pack, unpack
from trilemma.compression.pruning import sparsity
from trilemma.compression.session import Session
from trilemma.compression.specs import CompressionSpec
from trilemma.compression.step import Looks, Material
from trilemma.compression.synthetic import synthetic_images
from trilemma.data.records import Dataset, Records
from trilemma.data.roots import default_roots
from trilemma.data.specs import DataSpec, Medmnist, Phantom, Pneumonia
from trilemma.errors import UserError
from trilemma.federation.round import run_round
from trilemma.federation.specs import Local, TrainSpec
from trilemma.federation.training import initial_state, prepare, trained_model
from trilemma.models.classifier import Classifier
from trilemma.models.norms import batch_norm_layers
from trilemma.models.specs import ModelSpec, Resnet9, Resnet18
from trilemma.randomness import generator, numpy_generator
from trilemma.study.compress_job import SPARSE
from trilemma.study.files import load_tensors, save_tensors

NETWORKS: dict[str, type[Resnet9] | type[Resnet18]] = {"resnet9": Resnet9, "resnet18": Resnet18}
#: What a norm is called in a row: standardised weights are folded when a model ships.
NORMS = {"group": "group", "weight": "fold"}


class Setting(NamedTuple):
    """How long one data set is trained on.

    Attributes:
        data: Which images.
        width: Of both networks.
        rounds: Of the federation of three hospitals.
        steps: Of a hospital in a round, of 64 images each; None: one pass.
        prepared: Whether there are trainings for single compressions too; they triple the time.
    """

    data: DataSpec
    width: int
    rounds: int
    steps: int | None
    prepared: bool


SETTINGS = {
    "pneumoniamnist-28": Setting(Medmnist(name="pneumoniamnist"), 16, 15, None, True),
    "chest-xray-64": Setting(Pneumonia(classes=2, size=64), 16, 12, 10, True),
}
QUICK_SETTINGS = {"phantom-16": Setting(Phantom(size=16, classes=2, train=128, val=32, test=64), 4, 2, 2, True)}

#: On training images, as nothing is private here; phantoms do not bring pruned networks back.
_DISTIL = {"kind": "distil", "images": "train", "num_images": 2000, "epochs": 8}
_INT8 = {"kind": "int8"}
_SYNTHETIC = {"kind": "int8", "calibration": "synthetic"}
#: Of both norms.
SIMPLE: dict[str, dict[str, Any]] = {"fp32": {"kind": "none"}, "int8": _INT8, "int8-synthetic": _SYNTHETIC}
#: Of the folding norm alone.
MORE: dict[str, dict[str, Any]] = {
    "int8-percentile": {"kind": "int8", "ranges": "percentile"},
    "int8-mse": {"kind": "int8", "ranges": "mse"},
    "int4": {"kind": "int4"},
    "bfloat16": {"kind": "bfloat16"},
    "prune90-int8": {"kind": "chain", "steps": [{"kind": "prune", "sparsity": 0.9}, _INT8]},
    "prune90-distil-int8": {"kind": "chain", "steps": [{"kind": "prune", "sparsity": 0.9}, _DISTIL, _INT8]},
    "channels50": {"kind": "channels", "multiply_adds": 0.5},
    "channels50-distil": {"kind": "chain", "steps": [{"kind": "channels", "multiply_adds": 0.5}, _DISTIL]},
    "channels50-distil-int8": {"kind": "chain", "steps": [{"kind": "channels", "multiply_adds": 0.5}, _DISTIL, _INT8]},
}


class Prepared(NamedTuple):
    """A training of its own for one compression.

    Attributes:
        field: Of `TrainSpec`.
        value: What it is set to.
        compression: Of the trained model.
        norms: Of the networks that are trained so.
    """

    field: str
    value: dict[str, Any]
    compression: dict[str, Any]
    norms: tuple[str, ...] = ("weight",)


PREPARED = {
    "int8-qat": Prepared("quantisation", {"kind": "int8"}, _INT8),
    "gradual90-int8": Prepared("pruning", {"kind": "gradual", "sparsity": 0.9}, _SYNTHETIC, ("group", "weight")),
}


@dataclass(frozen=True)
class Shipped:
    """One model as it ships.

    Attributes:
        num_bytes: Of the file, packed where it is sparse.
        session: On the file.
        twin: Its differentiable twin.
        multiply_adds: Of one image.
    """

    num_bytes: int
    session: Session
    twin: Classifier
    multiply_adds: int


def loaded(setting: Setting) -> Dataset | str:
    """Returns the data set, or a sentence that says why it is skipped."""
    try:
        return setting.data.load(default_roots())
    except UserError as error:
        return f"{setting.data.label} is skipped: {error}"


def training(setting: Setting, model: ModelSpec, **prepared: dict[str, Any]) -> TrainSpec:
    """Returns a training of three hospitals without privacy; Adam, a cosine, seed 0."""
    local = Local(optimizer="adam", learning_rate=0.003, batch_size=64, steps=setting.steps, schedule="cosine")
    return TrainSpec.model_validate(
        {"data": setting.data, "model": model, "local": local, "rounds": setting.rounds, "seed": 0, **prepared}
    )


def trained(spec: TrainSpec, dataset: Dataset, cache: Path) -> Classifier:
    """Returns the trained classifier, from the cache where it is there; the key is the training's."""
    federation = prepare(spec, dataset, torch.device("cpu"))
    assert not batch_norm_layers(federation.classifier)  # weights are all that is kept
    path = cache / f"{spec.key.replace(':', '-')}.safetensors"
    if path.exists():
        weights = load_tensors(path)[0]
        federation.classifier.load_state_dict(weights)
        return federation.classifier.eval()
    state = initial_state(federation)
    while state.round < spec.rounds:
        state = run_round(federation, state)
    classifier = trained_model(federation, state)
    save_tensors(path, dict(classifier.state_dict()))
    return classifier


def material(teacher: Classifier, image_shape: tuple[int, int, int], train: Records | None) -> Material:
    """Returns what compressions look at: phantoms of the images' size, images made from the model, training images."""

    def images(looks: Looks) -> Tensor:
        assert looks.source in ("public", "synthetic", "train") and looks.data is None
        if looks.source == "synthetic":
            return synthetic_images(teacher, looks.count, image_shape, generator(0, "synthetic"))
        if looks.source == "train":
            assert train is not None
            return train.x(numpy_generator(0, "calibration").permutation(len(train))[: looks.count])
        phantoms = Phantom(size=max(image_shape[1], 16), train=max(looks.count, 16)).load(default_roots())
        order = numpy_generator(0, "calibration").permutation(len(phantoms.train))[: looks.count]
        return adaptive_avg_pool2d(phantoms.train.x(order), image_shape[1])

    return Material(teacher, images, image_shape, 0)


def shipped(
    classifier: Classifier, compression: dict[str, Any], image_shape: tuple[int, int, int], train: Records | None = None
) -> Shipped:
    """Returns a model compressed and exported as a study does it."""
    spec = TypeAdapter(CompressionSpec).validate_python(compression)
    twin = spec.apply(classifier, material(classifier, image_shape, train)).eval()
    model = export_onnx(twin, *image_shape[:2])
    if sparsity(twin) >= SPARSE:
        packed = pack(model)
        return Shipped(len(packed), Session(unpack(packed)), twin, multiply_adds(twin, image_shape))
    return Shipped(len(model), Session(model), twin, multiply_adds(twin, image_shape))

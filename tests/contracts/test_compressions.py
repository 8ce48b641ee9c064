"""What every compression promises, on the networks and normalisations that a study may name."""

import copy
from functools import cache
from typing import NamedTuple, get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load, save

from helpers.small_problem import stripes, trained
from helpers.tiny_study import PRIVATE, plan_of, roots_below, run_plan, write_study
from trilemma.compression.export import export_onnx
from trilemma.compression.fake_quantisation import QuantConv2d, QuantLinear
from trilemma.compression.multiply_adds import multiply_adds
from trilemma.compression.packing import is_packed, pack, unpack
from trilemma.compression.pruning import sparsity
from trilemma.compression.session import Session
from trilemma.compression.specs import (
    BFloat16,
    Chain,
    ChannelPruning,
    CompressionSpec,
    Distillation,
    Int4,
    Int8,
    MagnitudePruning,
    MixedPrecision,
    NoCompression,
    NOfM,
    StepSpec,
)
from trilemma.compression.step import Material, weight_names
from trilemma.compression.stored_weights import stored_weights
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9, Resnet18
from trilemma.study.store import Store

SHAPE = (1, 16, 16)
FEW = Distillation(num_images=16, epochs=1, batch_size=8)

#: Every kind with numbers that are quick, and chains of each with what may follow it.
SPECS = {
    "none": NoCompression(),
    "prune": MagnitudePruning(sparsity=0.7),
    "n_of_m": NOfM(),
    "channels": ChannelPruning(multiply_adds=0.6),
    "distil": FEW,
    "distil_student": FEW.model_copy(update={"student": Resnet9(width=4, norm="weight")}),
    "int8": Int8(num_calibration=32),
    "int8_mse": Int8(num_calibration=32, ranges="mse"),
    "int4": Int4(group_size=16),
    "bfloat16": BFloat16(),
    "mixed": MixedPrecision(num_calibration=2, budget=0.25),
    "chain": Chain(steps=(MagnitudePruning(sparsity=0.7), FEW, Int8(num_calibration=32))),
    "chain_channels": Chain(steps=(ChannelPruning(multiply_adds=0.6), FEW, Int4())),
    "chain_channels_int8": Chain(steps=(ChannelPruning(multiply_adds=0.6), Int8(num_calibration=32))),
    "chain_n_of_m": Chain(steps=(NOfM(n=1, m=4), BFloat16())),
    "chain_student": Chain(steps=(FEW.model_copy(update={"student": Resnet9(width=4)}), MagnitudePruning(), Int4())),
}
#: Those of every network; the others on one each.
EVERYWHERE = ("none", "prune", "n_of_m", "channels", "distil", "int8", "int4", "bfloat16", "mixed", "chain")
#: The norms fold, or do not, in one network as in the other.
MODELS = [("resnet9", norm) for norm in ("group", "batch", "weight", "none")]
MODELS += [("resnet18", norm) for norm in ("group", "weight")]
CASES = [(*model, name) for model in MODELS for name in EVERYWHERE]
CASES += [("resnet9", "batch", name) for name in SPECS if name not in EVERYWHERE]
CASES += [("resnet18", "weight", "chain_channels"), ("resnet18", "group", "chain_channels_int8")]

INTEGERS = {"int8", "int8_mse", "chain", "chain_channels_int8"}
every = pytest.mark.parametrize(("make", "norm", "name"), CASES, ids=lambda part: part)


class Made(NamedTuple):
    """A compressed network and its file."""

    twin: Classifier
    file: bytes


@cache
def images() -> torch.Tensor:
    return stripes(96, size=16, num_classes=2).x(slice(0, 40))


@cache
def network(make: str, norm: str) -> Classifier:
    """A network that has learnt a little, so that its norms and statistics are no longer those it started with."""
    spec = Resnet9(width=8, norm=norm) if make == "resnet9" else Resnet18(width=4, norm=norm)
    return trained(spec.make(1, 16, 2, 0), stripes(96, size=16, num_classes=2), steps=8)


def material(teacher: Classifier, images_of=None) -> Material:
    return Material(teacher, images_of or (lambda looks: images()[: looks.count]), SHAPE, 0)


def compressed(make: str, norm: str, name: str) -> Classifier:
    return SPECS[name].apply(network(make, norm), material(network(make, norm))).eval()


@cache
def made(make: str, norm: str, name: str) -> Made:
    twin = compressed(make, norm, name)
    return Made(twin, export_onnx(twin, 1, 16))


def answers(classifier: Classifier) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images())


def test_every_member_is_here():
    members = set(get_args(get_args(CompressionSpec)[0]))
    assert {type(spec) for spec in SPECS.values()} == members
    assert {type(SPECS[name]) for name in EVERYWHERE} == members
    chained = {type(step) for spec in SPECS.values() if isinstance(spec, Chain) for step in spec.steps}
    assert chained == set(get_args(get_args(StepSpec)[0])) - {MixedPrecision}


@every
def test_the_given_model_is_unchanged_and_nothing_is_random(make, norm, name):
    given, state = network(make, norm), torch.get_rng_state()
    before, modules = copy.deepcopy(given.state_dict()), [(n, type(m)) for n, m in given.named_modules()]
    asked = []

    def shown(looks):
        asked.append(looks)
        return images()[: looks.count]

    twin = SPECS[name].apply(given, material(given, shown))
    assert tuple(asked) == SPECS[name].looks, "it looks at what it says, and at nothing else"
    assert [(n, type(m)) for n, m in given.named_modules()] == modules and not given.training
    assert given.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[n]) for n, value in given.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    first = made(make, norm, name).twin.state_dict()
    assert twin.state_dict().keys() == first.keys()
    assert all(torch.equal(value, first[n]) for n, value in twin.state_dict().items())


@every
def test_the_file_answers_like_its_twin(make, norm, name):
    twin, file = made(make, norm, name)
    expected, found = answers(twin), Session(file).predict(images())
    difference = (expected - found).abs()
    assert expected.isfinite().all() and float(expected.std()) > 0
    if name in INTEGERS:  # one level of one activation may round the other way
        assert (expected.argmax(1) == found.argmax(1)).float().mean() > 0.97
        assert difference.max() < 0.1 * expected.std() and difference.mean() < 0.01 * expected.std()
    else:
        assert difference.max() < 1e-4 * expected.abs().max()


@every
def test_a_stored_state_gives_the_twin_again(make, norm, name):
    twin = made(make, norm, name).twin
    stored = load(save({n: value.contiguous() for n, value in twin.state_dict().items()}))
    fresh = (Resnet9(width=8, norm=norm) if make == "resnet9" else Resnet18(width=4, norm=norm)).make(1, 16, 2, 5)
    before = copy.deepcopy(fresh.state_dict())
    skeleton = SPECS[name].skeleton(fresh, stored, SHAPE)
    skeleton.load_state_dict(stored, strict=True)
    assert torch.equal(answers(skeleton.eval()), answers(twin))
    assert all(torch.equal(value, before[n]) for n, value in fresh.state_dict().items())
    assert {n: one.bits for n, one in stored_weights(skeleton).items()} == {
        n: one.bits for n, one in stored_weights(twin).items()
    }
    if make == "resnet9":
        assert export_onnx(skeleton, 1, 16) == made(make, norm, name).file


@pytest.mark.parametrize(("make", "norm", "name"), [case for case in CASES if case[:2] == ("resnet9", "batch")])
def test_packing_loses_nothing_and_saves_where_much_is_zero(make, norm, name):
    twin, file = made(make, norm, name)
    packed = pack(file)
    assert is_packed(packed) and not is_packed(file) and unpack(packed) == file
    if sparsity(twin) >= 0.3:
        assert len(packed) < 0.9 * len(file)


@every
def test_every_pixel_of_a_twin_has_a_gradient(make, norm, name):
    x = images()[:4].clone().requires_grad_(True)
    logits_BK = made(make, norm, name).twin(x)
    (gradient,) = torch.autograd.grad((logits_BK[:, 0] - logits_BK[:, 1]).sum(), x)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize(("make", "norm"), MODELS)
def test_what_is_asked_for_is_achieved(make, norm):
    given, twin = network(make, norm), lambda name: made(make, norm, name).twin
    plain = SPECS["prune"].skeleton(given, {}, SHAPE)
    weights = sum(plain.get_parameter(n).numel() for n in weight_names(plain))
    assert sparsity(twin("prune")) == pytest.approx(0.7, abs=1 / weights)
    assert sparsity(twin("chain")) >= 0.7 - 1 / weights, "distillation and int8 leave zeros zero"
    for n in weight_names(twin("n_of_m")):
        rows = twin("n_of_m").get_parameter(n).movedim(1, -1).flatten(1)
        whole = rows[:, : rows.shape[1] // 4 * 4].unflatten(1, (-1, 4))
        assert ((whole != 0).sum(-1) <= 2).all()
    assert multiply_adds(twin("channels"), SHAPE) <= 0.6 * multiply_adds(given, SHAPE)
    assert multiply_adds(twin("channels"), SHAPE) > 0.4 * multiply_adds(given, SHAPE)
    for name in ("prune", "n_of_m", "distil", "int8", "int4", "bfloat16", "mixed", "chain"):
        assert multiply_adds(twin(name), SHAPE) == multiply_adds(given, SHAPE)


@pytest.mark.parametrize(("make", "norm"), MODELS)
def test_files_are_as_small_as_their_bits(make, norm):
    size = {name: len(made(make, norm, name).file) for name in EVERYWHERE}
    assert size["int4"] < size["mixed"] < size["bfloat16"] < size["none"]
    assert size["int4"] < size["int8"] < size["bfloat16"]
    assert size["channels"] < size["none"] and size["prune"] == size["n_of_m"] == size["distil"]
    plain = SPECS["prune"].skeleton(network(make, norm), {}, SHAPE)
    in_full = 4 * sum(plain.get_parameter(n).numel() for n in weight_names(plain))
    rest = size["none"] - in_full
    twin = made(make, norm, "mixed").twin
    stored = stored_weights(twin)
    assert sum(one.num_bytes for one in stored.values()) <= 0.25 * in_full
    assert list(stored) == weight_names(twin) and {one.bits for one in stored.values()} > {4}
    # Beside the numbers a file holds little: names, shapes and the nodes that unpack them.
    assert size["bfloat16"] < in_full / 2 + rest + 100 * len(stored)
    four = sum(one.num_bytes for one in stored_weights(made(make, norm, "int4").twin).values())
    assert four < in_full / 5 and size["int4"] < four + rest + 400 * len(stored)


@pytest.mark.parametrize(("make", "norm"), MODELS)
def test_weights_stand_in_the_file_in_their_bits_and_nowhere_else(make, norm):
    for name, kind in (("int4", TensorProto.INT4), ("bfloat16", TensorProto.BFLOAT16), ("int8", TensorProto.INT8)):
        model = onnx.load_from_string(made(make, norm, name).file)
        numbers: dict[int, int] = {}
        for tensor in model.graph.initializer:
            numbers[tensor.data_type] = numbers.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
        plain = SPECS["prune"].skeleton(network(make, norm), {}, SHAPE)
        weights = sum(plain.get_parameter(n).numel() for n in weight_names(plain))
        assert numbers[kind] >= weights
        assert numbers.get(TensorProto.FLOAT, 0) < 0.05 * weights
        opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
        assert (opset >= 21) == (name == "int4")


def test_int8_is_where_it_was_asked_for():
    for make, norm, name in CASES:
        layers = [type(module) for module in made(make, norm, name).twin.modules()]
        assert bool({QuantConv2d, QuantLinear} & set(layers)) == (name in INTEGERS)


def readers(source: str) -> list:
    """Every member that looks at images, told whose."""
    found = []
    for member in get_args(get_args(CompressionSpec)[0]):
        field = next((name for name in ("calibration", "images") if name in member.model_fields), None)
        if field:
            found.append(member(**{field: source}))
    return found


def test_every_member_that_looks_at_images_says_at_whose():
    assert len(readers("train")) == 3
    for source, images_of in (("train", "training"), ("val", "validation")):
        for spec in readers(source):
            assert spec.private_data is not None and spec.private_data.endswith(f" reads the {images_of} images")
            chain = Chain(steps=(MagnitudePruning(), spec))
            assert chain.private_data == spec.private_data and chain.looks == spec.looks
    for source in ("public", "phantom", "synthetic"):
        assert [spec.private_data for spec in readers(source)] == [None] * 3
    without = {type(spec) for spec in SPECS.values() if not spec.looks}
    assert without == {NoCompression, MagnitudePruning, NOfM, ChannelPruning, Int4, BFloat16, Chain}
    both = Chain(steps=(Distillation(images="train"), Int8(calibration="val")))
    assert both.private_data == ("distillation reads the training images; int8 calibration reads the validation images")


GUARANTEED = (
    PRIVATE.replace("rounds = 3", "rounds = 1")
    + """
compressions = [
    { kind = "none" },
    { kind = "int8", num_calibration = 8, calibration = "phantom" },
    { kind = "int8", num_calibration = 8, calibration = "synthetic" },
    { kind = "mixed", num_calibration = 8, calibration = "synthetic" },
    { kind = "int4" },
    { kind = "channels" },
    { kind = "chain", steps = [
        { kind = "prune" },
        { kind = "distil", num_images = 8, epochs = 1, images = "synthetic" },
        { kind = "int8", num_calibration = 8 },
    ] },
    { kind = "int8", num_calibration = 8, calibration = "train" },
    { kind = "mixed", num_calibration = 8, calibration = "val" },
    { kind = "distil", num_images = 8, epochs = 1, images = "train" },
    { kind = "chain", steps = [
        { kind = "distil", num_images = 8, epochs = 1, images = "val" },
        { kind = "prune" },
        { kind = "int8", num_calibration = 8, calibration = "phantom" },
    ] },
]
"""
)
VOID = [None] * 7 + [
    "int8 calibration reads the training images",
    "mixed precision reads the validation images",
    "distillation reads the training images",
    "distillation reads the validation images",
]


def test_a_guarantee_is_void_where_private_images_were_read_and_stands_elsewhere(tmp_path):
    plan = plan_of(write_study(tmp_path, GUARANTEED))
    run_plan(plan, tmp_path / "store", roots_below(tmp_path))
    with Store(tmp_path / "store") as store:
        rows = [store.artefact(cell.key) for cell in plan.cells]
    kept = rows[0].guarantee
    assert kept.epsilon is not None and kept.epsilon > 0 and not kept.void
    assert len(rows) == len(VOID)
    for row, void in zip(rows, VOID, strict=True):
        guarantee = row.guarantee
        if void is None:
            assert guarantee == kept
        else:
            assert guarantee.epsilon is None and guarantee.void == (void,)
            assert guarantee.epsilon_by_client == kept.epsilon_by_client

"""What a study may say about compression; what every kind must do stands in tests/contracts/test_compressions.py."""

import copy

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from trilemma.compression.fake_quantisation import QuantConv2d
from trilemma.compression.pruning import sparsity
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
)
from trilemma.compression.step import Looks, Material
from trilemma.data.specs import Medmnist, Phantom
from trilemma.models.specs import Resnet9

MEMBERS = [NoCompression(), MagnitudePruning(sparsity=0.25), Int8(num_calibration=8)]
read = TypeAdapter(CompressionSpec).validate_python


def material(x, teacher=None):
    """What works with the first of some images, whoever asks for them."""
    teacher = teacher or Resnet9(width=4).make(1, 16, 2, 0).eval()
    return Material(teacher, lambda looks: x[: looks.count], (1, 16, 16), 0)


def test_a_kind_selects_its_class():
    assert [type(read({"kind": spec.kind})) for spec in MEMBERS] == [type(spec) for spec in MEMBERS]
    others = [NOfM(), ChannelPruning(), Distillation(), Int4(), BFloat16(), MixedPrecision()]
    assert [read({"kind": spec.kind}) for spec in others] == others
    chain = read({"kind": "chain", "steps": [{"kind": "prune"}, {"kind": "int8"}]})
    assert chain == Chain(steps=(MagnitudePruning(), Int8()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "int2"},
        {"kind": "prune", "sparsity": 0},
        {"kind": "prune", "sparsity": 1},
        {"kind": "int8", "num_calibration": 0},
        {"kind": "int8", "num_calibration": 100_001},
        {"kind": "int8", "calibration": "test"},
        {"kind": "int8", "bits": 4},
        {"kind": "int8", "ranges": "entropy"},
        {"kind": "int8", "ranges": "percentile", "percentile": 50},
        {"kind": "int8", "ranges": "percentile", "percentile": 100},
        {"kind": "int4", "group_size": 3},
        {"kind": "mixed", "budget": 0},
        {"kind": "mixed", "budget": 1},
        {"kind": "channels", "multiply_adds": 1},
        {"kind": "distil", "images": "test"},
        {"kind": "distil", "num_images": 1},
        {"kind": "distil", "temperature": 0},
        {"kind": "chain", "steps": []},
        {"kind": "chain", "steps": [{"kind": "prune"}]},
        {"kind": "chain", "steps": [{"kind": "none"}, {"kind": "int8"}]},
        {"kind": "chain", "steps": [{"kind": "prune"}, {"kind": "chain", "steps": [{"kind": "prune"}] * 2}]},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        read(wrong)


PUBLIC = {"kind": "phantom", "size": 16}
LAST = "leaves no network of floats to the steps after it; put it last"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "n_of_m", "n": 4, "m": 4}, "n = 4 of m = 4 weights stay: nothing would leave; give a smaller n"),
        ({"kind": "int8", "percentile": 99.9}, "percentile belongs to ranges = 'percentile'"),
        ({"kind": "int8", "ranges": "mse", "percentile": 99.9}, "percentile belongs to ranges = 'percentile'"),
        ({"kind": "int8", "calibration": "train", "data": PUBLIC}, "calibration is 'train'; use 'public'"),
        ({"kind": "mixed", "calibration": "phantom", "data": PUBLIC}, "calibration is 'phantom'; use 'public'"),
        ({"kind": "distil", "images": "synthetic", "data": PUBLIC}, "images is 'synthetic'; use 'public'"),
        *(
            ({"kind": "chain", "steps": [{"kind": kind}, {"kind": "prune"}]}, f"'{kind}' {LAST}")
            for kind in ("int8", "int4", "bfloat16", "mixed")
        ),
        (
            {"kind": "chain", "steps": [{"kind": "prune"}, {"kind": "distil", "student": {"kind": "resnet9"}}]},
            "a step before a student's distillation does nothing, for the student starts afresh; put it first",
        ),
    ],
)
def test_what_cannot_go_together_is_told_in_a_sentence(wrong, said):
    with pytest.raises(ValidationError) as error:
        read(wrong)
    assert said in str(error.value)


def test_labels_tell_members_apart():
    specs = [*MEMBERS, MagnitudePruning(sparsity=0.5), Int8(calibration="train"), Int8(calibration="val")]
    assert [spec.label for spec in specs] == [
        "fp32",
        "pruned 25 %",
        "int8",
        "pruned 50 %",
        "int8 (train calibration)",
        "int8 (val calibration)",
    ]
    assert len({spec.key for spec in specs}) == len(specs)


def test_labels_tell_the_later_kinds_apart():
    told = {
        "pruned 2:4": NOfM(),
        "channels for 50 % of multiply-adds": ChannelPruning(),
        "channels for 50 % of multiply-adds, one by one": ChannelPruning(multiple=1),
        "channels for 50 % of multiply-adds, 16 at a time": ChannelPruning(multiple=16),
        "int4 weights": Int4(),
        "int4 weights in groups of 64": Int4(group_size=64),
        "bfloat16 weights": BFloat16(),
        "int8 (percentile 99.99)": Int8(ranges="percentile"),
        "int8 (percentile 99.9, synthetic calibration)": Int8(
            ranges="percentile", percentile=99.9, calibration="synthetic"
        ),
        "int8 (least error, phantom 16 calibration)": Int8(ranges="mse", data=Phantom(size=16)),
        "mixed bits in 20 %": MixedPrecision(),
        "mixed bits in 20 %, groups of 16, 8 images, val calibration": MixedPrecision(
            group_size=16, num_calibration=8, calibration="val"
        ),
        "distilled on phantoms": Distillation(),
        "distilled on synthetic images (4 epochs)": Distillation(images="synthetic", epochs=4),
        "distilled into ResNet-9 w4 GN on phantom 16 (100 images, 3 epochs, rate 0.01, batches of 8, temperature 4)": (
            Distillation(
                student=Resnet9(width=4), data=Phantom(size=16), num_images=100, epochs=3, learning_rate=0.01,
                batch_size=8, temperature=4,
            )
        ),
        "pruned 50 % + distilled on phantoms + int8": Chain(steps=(MagnitudePruning(), Distillation(), Int8())),
    }  # fmt: skip
    assert [spec.label for spec in told.values()] == list(told)


def test_fields_that_came_later_leave_keys_alone():
    """Stores of a version without them answer a study of this one."""
    assert Int8(num_calibration=16).model_dump(mode="json") == {
        "kind": "int8", "calibration": "public", "num_calibration": 16,
    }  # fmt: skip
    assert MagnitudePruning().model_dump(mode="json") == {"kind": "prune", "sparsity": 0.5}


def test_only_private_calibration_is_said_to_be_private():
    assert [spec.private_data for spec in MEMBERS] == [None, None, None]
    assert Int8(calibration="train").private_data == "int8 calibration reads the training images"
    assert Int8(calibration="val").private_data == "int8 calibration reads the validation images"
    public = Medmnist(name="chestmnist", size=28)
    for source in ("public", "phantom", "synthetic"):
        specs = [Int8(calibration=source), MixedPrecision(calibration=source), Distillation(images=source)]
        assert [spec.private_data for spec in specs] == [None, None, None]
    assert [Int8(data=public).private_data, Distillation(data=public).private_data] == [None, None]


def test_a_chain_names_each_step_that_reads_private_images():
    steps = (MagnitudePruning(), Distillation(images="val"), MixedPrecision(calibration="train"))
    assert Chain(steps=steps).private_data == (
        "distillation reads the validation images; mixed precision reads the training images"
    )
    assert Chain(steps=steps).looks == (Looks("val", 2000), Looks("train", 256))
    assert Chain(steps=(MagnitudePruning(), Distillation())).private_data is None
    assert [Chain(steps=(NOfM(), step)).last for step in (Int8(), Distillation())] == [True, False]


@pytest.mark.parametrize("norm", ["batch", "weight"])
@pytest.mark.parametrize("spec", MEMBERS, ids=lambda spec: spec.kind)
def test_every_member_keeps_its_argument_and_round_trips_through_its_skeleton(spec, norm):
    classifier = Resnet9(width=4, norm=norm).make(1, 16, 2, 0).eval()
    before = copy.deepcopy(classifier.state_dict())
    x = torch.rand(16, 1, 16, 16)
    assert bool(spec.looks) == (spec.kind == "int8")
    twin = spec.apply(classifier, material(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    fresh = Resnet9(width=4, norm=norm).make(1, 16, 2, 1)
    skeleton = spec.skeleton(fresh, twin.state_dict(), (1, 16, 16)).eval()
    skeleton.load_state_dict(twin.state_dict())
    with torch.no_grad():
        assert torch.equal(skeleton(x), twin(x))
    assert any(isinstance(module, QuantConv2d) for module in twin.modules()) == (spec.kind == "int8")


def test_pruning_and_calibration_use_their_numbers():
    classifier = Resnet9(width=4).make(1, 16, 2, 0).eval()
    x = torch.rand(16, 1, 16, 16)
    pruned = MagnitudePruning(sparsity=0.25).apply(classifier, material(x))
    assert sparsity(pruned) == pytest.approx(0.25, abs=1e-3)
    few, many = (Int8(num_calibration=count).apply(classifier, material(x)) for count in (2, 16))
    assert any(not torch.equal(a, b) for a, b in zip(few.buffers(), many.buffers(), strict=True))
    with pytest.raises(ValueError, match="at least one image"):
        Int8().apply(classifier, material(x[:0]))


def test_rules_of_ranges_are_used():
    classifier = Resnet9(width=4).make(1, 16, 2, 0).eval()
    x = torch.rand(16, 1, 16, 16)
    specs = [Int8(), Int8(ranges="min_max"), Int8(ranges="percentile"), Int8(ranges="percentile", percentile=90)]
    state = [spec.apply(classifier, material(x)).state_dict() for spec in [*specs, Int8(ranges="mse")]]
    scales = [torch.stack([value for name, value in one.items() if name.endswith("grid.scale")]) for one in state]
    assert torch.equal(scales[0], scales[1])
    assert all((narrow <= scales[0]).all() and (narrow < scales[0]).any() for narrow in scales[2:])
    assert (scales[3] <= scales[2]).all() and (scales[3] < scales[2]).any()

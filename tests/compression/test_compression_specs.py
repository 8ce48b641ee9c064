import copy

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from trilemma.compression.fake_quantisation import QuantConv2d
from trilemma.compression.pruning import sparsity
from trilemma.compression.specs import CompressionSpec, Int8, MagnitudePruning, NoCompression
from trilemma.models.specs import Resnet9

MEMBERS = [NoCompression(), MagnitudePruning(sparsity=0.25), Int8(num_calibration=8)]
read = TypeAdapter(CompressionSpec).validate_python


def test_a_kind_selects_its_class():
    assert [type(read({"kind": spec.kind})) for spec in MEMBERS] == [type(spec) for spec in MEMBERS]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "int4"},
        {"kind": "prune", "sparsity": 0},
        {"kind": "prune", "sparsity": 1},
        {"kind": "int8", "num_calibration": 0},
        {"kind": "int8", "num_calibration": 100_001},
        {"kind": "int8", "calibration": "test"},
        {"kind": "int8", "bits": 4},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        read(wrong)


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


def test_only_private_calibration_is_said_to_be_private():
    assert [spec.private_data for spec in MEMBERS] == [None, None, None]
    assert Int8(calibration="train").private_data == "int8 calibration reads the training images"
    assert Int8(calibration="val").private_data == "int8 calibration reads the validation images"


@pytest.mark.parametrize("norm", ["batch", "weight"])
@pytest.mark.parametrize("spec", MEMBERS, ids=lambda spec: spec.kind)
def test_every_member_keeps_its_argument_and_round_trips_through_its_skeleton(spec, norm):
    classifier = Resnet9(width=4, norm=norm).make(1, 16, 2, 0).eval()
    before = copy.deepcopy(classifier.state_dict())
    x = torch.rand(16, 1, 16, 16)
    twin = spec.apply(classifier, x if spec.needs_calibration else None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    skeleton = spec.skeleton(Resnet9(width=4, norm=norm).make(1, 16, 2, 1)).eval()
    skeleton.load_state_dict(twin.state_dict())
    with torch.no_grad():
        assert torch.equal(skeleton(x), twin(x))
    assert any(isinstance(module, QuantConv2d) for module in twin.modules()) == (spec.kind == "int8")


def test_pruning_and_calibration_use_their_numbers():
    classifier = Resnet9(width=4).make(1, 16, 2, 0).eval()
    assert sparsity(MagnitudePruning(sparsity=0.25).apply(classifier)) == pytest.approx(0.25, abs=1e-3)
    x = torch.rand(16, 1, 16, 16)
    few, many = Int8(num_calibration=2).apply(classifier, x), Int8(num_calibration=16).apply(classifier, x)
    assert any(not torch.equal(a, b) for a, b in zip(few.buffers(), many.buffers(), strict=True))
    with pytest.raises(ValueError, match="at least one image"):
        Int8().apply(classifier, None)

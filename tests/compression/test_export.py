import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from helpers.small_problem import stripes, trained
from trilemma.compression.export import _round_once, export_onnx
from trilemma.compression.fake_quantisation import quantise
from trilemma.compression.pruning import prune
from trilemma.compression.session import Session
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Monai, Resnet9, Resnet18
from trilemma.models.weight_standardisation import WeightStandardisedConv2d
from trilemma.randomness import global_seed


def _operations(model_bytes, folder):
    """The operations that ONNX Runtime makes of a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def test_a_float_file_answers_like_the_network(net, records):
    x = records.x(slice(64))
    with torch.no_grad():
        logits = net(x)
    assert torch.allclose(Session(export_onnx(net, 1, 28)).predict(x), logits, atol=1e-4)


def test_an_int8_file_answers_like_its_twin(net, records):
    x = records.x(slice(100, 400))
    twin = quantise(net, records.x(slice(100)))
    with torch.no_grad():
        twin_NK, float_NK = twin(x), net(x)
    shipped_NK = Session(export_onnx(twin, 1, 28)).predict(x)
    difference = (twin_NK - shipped_NK).abs()
    assert (twin_NK.argmax(1) == shipped_NK.argmax(1)).float().mean() > 0.99
    assert difference.max() < 0.1 * float_NK.std()  # one level of one activation may round the other way
    assert difference.mean() < 0.2 * (float_NK - shipped_NK).abs().mean()


@pytest.mark.parametrize("norm", ["group", "batch", "weight"])
@pytest.mark.parametrize("width", [16, 32])
def test_int8_files_are_at_least_three_and_a_half_times_smaller(norm, width):
    net = Resnet9(width=width, norm=norm).make(1, 28, 3, 0).eval()
    twin = quantise(net, stripes(16).x())
    assert len(export_onnx(net, 1, 28)) / len(export_onnx(twin, 1, 28)) >= 3.5


def test_convolutions_run_on_integers(net, records, tmp_path):
    twin = quantise(net, records.x(slice(32)))
    operations = _operations(export_onnx(twin, 1, 28), tmp_path)
    num_convolutions = sum(isinstance(module, nn.Conv2d) for module in twin.modules())
    assert operations.count("QLinearConv") == num_convolutions
    assert operations.count("QGemm") == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "BatchNormalization"} & set(operations)


@pytest.mark.parametrize("norm", ["weight", "batch", "none"])
@pytest.mark.parametrize("make", [Resnet9, Resnet18])
def test_a_network_without_norms_of_activations_stays_in_integers(make, norm, tmp_path):
    net = make(width=4, norm=norm).make(1, 16, 2, 0).eval()
    operations = _operations(export_onnx(quantise(net, stripes(16, size=16).x()), 1, 16), tmp_path)
    last = {"Add": 1, "Relu": 1 if make is Resnet18 else 0}  # before the global pooling, where numbers are few
    assert {name: operations.count(name) for name in last} == last
    assert operations.count("QuantizeLinear") == 2  # the image, and what was pooled
    assert operations.count("DequantizeLinear") == 3  # both sides of the last sum, and the logits
    assert "MaxPool" not in operations
    assert operations.count("NhwcMaxPool") == (3 if make is Resnet9 else 0)
    assert operations.count("QLinearAdd") == (1 if make is Resnet9 else 7)


def _chain(scale, zero_point, next_scale, pooled):
    """A graph that rounds, rectifies, perhaps pools and rounds again; a sum reads what lies before."""
    pool = helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2])
    before = "p" if pooled else "r"
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Relu", ["d"], ["r"]),
        *([pool] if pooled else []),
        helper.make_node("Neg", [before], ["n"]),  # reads before the rounding does
        helper.make_node("QuantizeLinear", [before, "s2", "z"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "s2", "z"], ["d2"]),
        helper.make_node("Mul", ["d2", "d2"], ["m"]),
        helper.make_node("Add", ["m", "n"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, None, None]) for name in "xy"]
    numbers = {"s": np.float32(scale), "s2": np.float32(next_scale), "z": np.uint8(zero_point)}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("scale", "zero_point", "next_scale", "relus", "rounded"),
    [(0.037, 0, 0.037, 0, 1), (0.037, 9, 0.037, 1, 2), (0.037, 0, 0.036, 0, 2)],
)
def test_only_idle_operations_are_taken_out(scale, zero_point, next_scale, relus, rounded, pooled):
    before, after = (_chain(scale, zero_point, next_scale, pooled) for _ in range(2))
    _round_once(after)
    onnx.checker.check_model(after, full_check=True)
    operations = [node.op_type for node in after.graph.node]
    assert operations.count("Relu") == relus
    assert (
        operations.count("QuantizeLinear")
        == operations.count("DequantizeLinear")
        == rounded + (pooled and rounded == 1)
    )
    x = np.random.default_rng(0).uniform(-12, 12, (1, 1, 40, 40)).astype(np.float32)
    expected, got = (ReferenceEvaluator(model).run(None, {"x": x})[0] for model in (before, after))
    np.testing.assert_array_equal(got, expected)
    if pooled and rounded == 1:
        (minus,) = [node for node in after.graph.node if node.op_type == "Neg"]
        assert minus.input[0] == "d2"  # nobody reads the pooling as a float


def test_weights_are_stored_as_int8_only(group_norm_net, records):
    model = onnx.load_from_string(export_onnx(quantise(group_norm_net, records.x(slice(32))), 1, 28))
    kinds = {}
    for tensor in model.graph.initializer:
        kinds[tensor.data_type] = kinds.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    num_weights = sum(m.weight.numel() for m in group_norm_net.modules() if type(m) in (nn.Conv2d, nn.Linear))
    assert num_weights <= kinds[onnx.TensorProto.INT8] <= 1.02 * num_weights  # and their zero points
    assert kinds[onnx.TensorProto.FLOAT] < 0.05 * num_weights


def test_equal_networks_give_equal_bytes_in_any_process(group_norm_net, records):
    twin = quantise(group_norm_net, records.x(slice(32)))
    assert export_onnx(twin, 1, 28) == export_onnx(twin, 1, 28)
    program = (
        "import hashlib, torch; torch.set_num_threads(1)\n"
        "from trilemma.compression.export import _round_once, export_onnx\n"
        "from trilemma.compression.fake_quantisation import quantise\n"
        "from trilemma.models.specs import Resnet9\n"
        "net = Resnet9(width=4, norm='batch').make(1, 16, 2, 0).eval()\n"
        "x = torch.linspace(0, 1, 512).reshape(2, 1, 16, 16)\n"
        "print(hashlib.sha256(export_onnx(net, 1, 16) + export_onnx(quantise(net, x), 1, 16)).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(program, {})
    assert here.getvalue() == done.stdout != ""


def test_the_file_says_nothing_about_where_it_was_made(group_norm_net):
    model = onnx.load_from_string(export_onnx(group_norm_net, 1, 28))
    names = {tensor.name for tensor in model.graph.initializer}
    assert all(name.isdigit() for name in names)
    for node in model.graph.node:
        assert node.name == node.doc_string == ""
        assert all(name.isdigit() or name in ("image", "logits") for name in (*node.input, *node.output))
    assert model.doc_string == model.graph.doc_string == ""


def test_what_a_file_says_of_itself_changes_no_answer(group_norm_net, records):
    twin, x = quantise(group_norm_net, records.x(slice(32))), records.x(slice(8))
    said = {"b.words": 'δ 1e-05; "any one image"', "a.key": "s1:0"}
    plain, labelled = export_onnx(twin, 1, 28), export_onnx(twin, 1, 28, said)
    assert torch.equal(Session(plain).predict(x), Session(labelled).predict(x))
    assert labelled == export_onnx(twin, 1, 28, dict(reversed(said.items())))
    model = onnx.load_from_string(labelled)
    assert {p.key: p.value for p in model.metadata_props} == said
    del model.metadata_props[:]
    assert model == onnx.load_from_string(plain)


def test_exporting_leaves_the_network_alone(batch_norm_net, records):
    twin = quantise(batch_norm_net, records.x(slice(16)))
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    modules = dict(twin.named_modules())
    export_onnx(twin, 1, 28)
    assert dict(twin.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())


def test_pruned_zeros_stay_zero_in_the_file(group_norm_net):
    model = onnx.load_from_string(export_onnx(prune(group_norm_net, 0.75), 1, 28))
    weights = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) in (2, 4)]
    weights = np.concatenate([w.ravel() for w in weights if w.size > 64])
    assert 0.7 < (weights == 0).mean() < 0.8


@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_standardised_weights_ship_as_plain_convolutions(activation, records):
    x = records.x(slice(16))
    plain, standardised = (
        Resnet18(width=4, norm=norm, activation=activation).make(1, 28, 3, 0).eval() for norm in ("none", "weight")
    )
    files = [export_onnx(net, 1, 28) for net in (plain, standardised)]
    graphs = [onnx.load_from_string(file).graph for file in files]
    assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]
    assert not {node.op_type for node in graphs[1].node} & {"Sqrt", "ReduceSum", "Equal", "Not"}
    assert [list(tensor.dims) for tensor in graphs[0].initializer] == [list(t.dims) for t in graphs[1].initializer]
    assert any(isinstance(module, WeightStandardisedConv2d) for module in standardised.modules())  # it is as it was
    with torch.no_grad():
        assert torch.allclose(Session(files[1]).predict(x), standardised(x), atol=1e-5)


class _Tokens(nn.Module):
    """Linear layers on sequences, which ONNX writes as a product with a transposed matrix."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 2)

    def forward(self, x):
        tokens_BTC = x.reshape(x.shape[0], -1, 16)
        return self.second(torch.relu(self.first(tokens_BTC))).mean(1)


class _Odd(nn.Module):
    """Strides, groups, dilation, other padding, no bias, a size that does not divide."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, (3, 5), stride=2, groups=3, bias=False),
            nn.ELU(),
            nn.Conv2d(6, 8, 3, dilation=2, padding="same"),
            nn.ReLU6(),
            nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect"),
        )

    def forward(self, x):
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize(("make", "channels", "size"), [(_Tokens, 1, 16), (_Odd, 3, 19)])
def test_unusual_layers_survive(make, channels, size):
    with global_seed(0, "unusual"):
        module = make()
    g = torch.Generator().manual_seed(1)
    x = torch.rand(64, channels, size, size, generator=g)
    classifier = Classifier(module, 2 if channels == 1 else 5).eval()
    twin = quantise(classifier, x)
    with torch.no_grad():
        float_NK, twin_NK = classifier(x), twin(x)
    shipped_NK = Session(export_onnx(twin, channels, size)).predict(x)
    assert (twin_NK - shipped_NK).abs().max() < 0.1 * (float_NK.abs().max())
    assert (twin_NK - float_NK).abs().max() < 0.25 * float_NK.abs().max()


def test_transposed_weights_are_stored_transposed(tmp_path):
    twin = quantise(Classifier(_Tokens(), 2).eval(), torch.linspace(0, 1, 2048).reshape(8, 1, 16, 16))
    model_bytes = export_onnx(twin, 1, 16)
    assert not any(node.op_type == "Transpose" for node in onnx.load_from_string(model_bytes).graph.node)
    assert not {"MatMul", "Gemm"} & set(_operations(model_bytes, tmp_path))


def test_a_monai_densenet_ships_as_int8():
    records = stripes(96, size=32, num_classes=2)
    small = {"init_features": 8, "growth_rate": 8, "block_config": [2, 2]}
    net = trained(Monai(network="DenseNet", arguments=small).make(1, 32, 2, 0), records, steps=10)
    twin = quantise(net, records.x(slice(64)))
    shipped_NK = Session(export_onnx(twin, 1, 32)).predict(records.x())
    with torch.no_grad():
        twin_NK, float_NK = twin(records.x()), net(records.x())
    assert (twin_NK.argmax(1) == shipped_NK.argmax(1)).float().mean() > 0.97
    assert (shipped_NK - float_NK).abs().mean() < 0.2 * float_NK.std()


@pytest.mark.slow
def test_the_full_densenet121_ships_as_int8():
    net = Monai(network="DenseNet121").make(1, 64, 3, 0).eval()
    twin = quantise(net, torch.rand(32, 1, 64, 64))
    small, large = export_onnx(twin, 1, 64), export_onnx(net, 1, 64)
    assert len(large) / len(small) > 3.5
    assert torch.isfinite(Session(small).predict(torch.rand(4, 1, 64, 64))).all()

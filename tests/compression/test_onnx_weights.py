"""Few bits in an ONNX graph: what ONNX reads of them, and what ONNX Runtime computes with them."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from trilemma.compression.export import export_onnx
from trilemma.compression.onnx_weights import INT4_OPSET, store_in_few_bits
from trilemma.compression.session import Session
from trilemma.compression.specs import BFloat16, Int4, MixedPrecision
from trilemma.compression.step import Material
from trilemma.compression.stored_weights import store, store_weights, stored_weights
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Monai
from trilemma.randomness import global_seed


def graph_of(weights, opset=17):
    """A graph of the exporter's form whose answer is the weights, flattened, whatever the image."""
    flat = numpy_helper.from_array(np.array([1, -1], np.int64), "flat")
    tensors = [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()]
    nodes = [helper.make_node("Reshape", [name, "flat"], [f"{name}/row"]) for name in weights]
    nodes.append(helper.make_node("Concat", [f"{name}/row" for name in weights], ["logits"], axis=1))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 2, 2])
    total = sum(value.numel() for value in weights.values())
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, total])
    graph = helper.make_graph(nodes, "g", [image], [logits], [flat, *tensors])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def computed(model):
    onnx.checker.check_model(model, full_check=True)
    return Session(model.SerializeToString()).predict(torch.zeros(1, 1, 2, 2))[0]


def opset_of(model):
    return next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(1, 1), (3, 5), (2, 7), (4, 3, 3, 3), (1, 33), (5, 2, 1, 3)]),
    bits=st.sampled_from([4, 8, 16]),
    group_size=st.sampled_from([4, 5, 32]),
    magnitude=st.sampled_from([1e-8, 1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_a_session_computes_with_exactly_what_is_stored(shape, bits, group_size, magnitude, seed):
    """Also where scales are the smallest numbers of float16, which some processors take for zero."""
    weight = magnitude * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    one = store(weight, bits, group_size if bits == 4 else None)
    model = store_in_few_bits(graph_of({"w": weight, "other": torch.ones(2)}), {"w": one})
    np.testing.assert_array_equal(computed(model).numpy(), np.append(one.weight().numpy().ravel(), [1, 1]))
    assert opset_of(model) == (INT4_OPSET if bits == 4 else 17)
    kind = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.BFLOAT16}[bits]
    (levels,) = [tensor for tensor in model.graph.initializer if tensor.data_type == kind]
    bytes_of_scales = sum(len(t.raw_data) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16)
    assert len(levels.raw_data) + bytes_of_scales == one.num_bytes
    if bits != 16:
        read = numpy_helper.to_array(levels)
        np.testing.assert_array_equal(read.astype(np.int8), one.levels_OGg.numpy())


def test_two_levels_share_a_byte_the_first_in_its_lower_half():
    one = store(torch.tensor([[1.0, -7.0, 7.0]]), 4, 4)
    assert one.levels_OGg.flatten().tolist() == [1, -7, 7]
    model = store_in_few_bits(graph_of({"w": torch.zeros(1, 3)}), {"w": one})
    (levels,) = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4]
    assert levels.raw_data == bytes([0x91, 0x07])  # 1 and -7 = 0b1001; then 7, and nothing


def test_metadata_is_kept():
    model = graph_of({"w": torch.ones(2, 4)})
    helper.set_model_props(model, {"trilemma.key": "s2:0", "a": "δ"})
    model = store_in_few_bits(model, {"w": store(torch.ones(2, 4), 4, 4)})
    assert {prop.key: prop.value for prop in model.metadata_props} == {"trilemma.key": "s2:0", "a": "δ"}


def test_an_older_operator_set_stays_where_no_int4_is():
    weights = {"w": torch.ones(2, 4), "v": torch.ones(3)}
    assert store_in_few_bits(graph_of(weights), {}) == graph_of(weights)
    assert opset_of(store_in_few_bits(graph_of(weights), {"w": store(weights["w"], 8)})) == 17
    newer = graph_of(weights, opset=22)
    newer.ir_version = 11
    newer = store_in_few_bits(newer, {"w": store(weights["w"], 8)})
    assert (opset_of(newer), newer.ir_version) == (22, 11)


def test_a_weight_that_the_graph_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=r"no weight 'gone', so it cannot be stored in 4 bits\.$"):
        store_in_few_bits(graph_of({"w": torch.ones(2, 4)}), {"gone": store(torch.full((2, 4), 3.0), 4, 4)})


def agree(twin, size, channels=1):
    """The file of a network in few bits, which must answer as the network does and hold no large float32 weight."""
    file = export_onnx(twin, channels, size)
    x = torch.rand(6, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = twin(x)
    assert (Session(file).predict(x) - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1e-6)
    model = onnx.load_from_string(file)
    largest = max(one.levels_OGg.numel() for one in stored_weights(twin).values())
    floats = [int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert max(floats, default=0) < largest
    return model


class Layers(nn.Module):
    """Linear layers of one shape on images (as a product and a sum) or on their rows (as a product alone)."""

    def __init__(self, num_layers, rows):
        super().__init__()
        self.layers, self.rows = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_layers)), rows

    def forward(self, x):
        x = x.reshape(x.shape[0], -1, 8)
        x = x if self.rows else x.mean(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.mean(1) if self.rows else x


def network(num_layers, rows):
    with global_seed(0, "layers"):
        return Classifier(Layers(num_layers, rows), 8).eval()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_layers_on_images_and_on_sequences(rows, bits):
    net = network(3, rows)
    model = agree(store_weights(net, {f"module.layers.{i}.weight": bits for i in range(3)}, 4), 8)
    kind = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.BFLOAT16}[bits]
    assert sum(tensor.data_type == kind for tensor in model.graph.initializer) == 3


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_weights_that_the_exporter_keeps_once(rows, value):
    """Layers that were pruned away, for example: all of their weights are zero."""
    net = network(4, rows)
    with torch.no_grad():
        for i in (0, 1, 3):
            net.module.layers[i].weight.fill_(value)
    agree(store_weights(net, {f"module.layers.{i}.weight": 4 for i in range(4)}, 4), 8)


@pytest.mark.parametrize("spec", [Int4(), BFloat16(), MixedPrecision(num_calibration=4)], ids=lambda spec: spec.kind)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DenseNet", {"init_features": 8, "growth_rate": 8, "block_config": [2, 2]}),
        ("ViT", {"patch_size": 16, "hidden_size": 32, "mlp_dim": 64, "num_layers": 2, "num_heads": 2}),
    ],
)
def test_networks_of_monai_ship_in_few_bits(spec, name, arguments):
    net = Monai(network=name, arguments=arguments).make(1, 32, 2, 0).eval()
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    agree(spec.apply(net, Material(net, lambda looks: x, (1, 32, 32), 0)), 32)

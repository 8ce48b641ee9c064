import pytest

from helpers.small_problem import stripes, trained
from trilemma.compression.export import export_onnx
from trilemma.compression.fake_quantisation import quantise
from trilemma.compression.session import Session
from trilemma.evaluation.harness import Target
from trilemma.models.specs import Resnet9


@pytest.fixture(scope="session")
def test_records():
    return stripes(150, size=16, seed=1)


@pytest.fixture(scope="session")
def network():
    return trained(Resnet9(width=8, norm="batch").make(1, 16, 3, 0), stripes(400, size=16), steps=25)


@pytest.fixture(scope="session")
def float_target(network):
    return Target("float", Session(export_onnx(network, 1, 16)).predict, network)


@pytest.fixture(scope="session")
def int8_target(network):
    twin = quantise(network, stripes(64, size=16, seed=2).x())
    return Target("int8", Session(export_onnx(twin, 1, 16)).predict, twin)


@pytest.fixture(params=["float_target", "int8_target"])
def target(request):
    return request.getfixturevalue(request.param)

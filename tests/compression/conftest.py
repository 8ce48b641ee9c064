import pytest

from helpers.small_problem import stripes, trained
from trilemma.models.specs import Resnet9, Resnet18


@pytest.fixture(scope="session")
def records():
    return stripes(400)


@pytest.fixture(scope="session")
def group_norm_net(records):
    return trained(Resnet9(width=16).make(1, 28, 3, 0), records)


@pytest.fixture(scope="session")
def batch_norm_net(records):
    return trained(Resnet9(width=16, norm="batch").make(1, 28, 3, 0), records)


@pytest.fixture(scope="session")
def standardised_net(records):
    return trained(Resnet9(width=16, norm="weight").make(1, 28, 3, 0), records)


@pytest.fixture(scope="session")
def residual_net(records):
    return trained(Resnet18(width=8, norm="batch").make(1, 28, 3, 0), records)


@pytest.fixture(params=["group_norm_net", "batch_norm_net", "standardised_net", "residual_net"])
def net(request):
    return request.getfixturevalue(request.param)

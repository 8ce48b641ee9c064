import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.models.specs import Resnet9
from trilemma.models.vector import get_buffers, get_params, num_params, set_buffers, set_params


@settings(deadline=None, max_examples=20)
@given(shapes=st.lists(st.lists(st.integers(1, 4), min_size=0, max_size=3), max_size=5), seed=st.integers(0, 99))
def test_round_trip_keeps_every_number_and_order(shapes, seed):
    module = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    params_P = torch.randn(num_params(module), generator=torch.Generator().manual_seed(seed))
    set_params(module, params_P)
    assert torch.equal(get_params(module), params_P)
    offset = 0
    for parameter in module:
        assert torch.equal(parameter.detach().flatten(), params_P[offset : offset + parameter.numel()])
        offset += parameter.numel()


def test_the_vector_is_a_copy():
    module = nn.Linear(2, 2)
    before = get_params(module)
    set_params(module, before + 1)
    assert torch.equal(get_params(module), before + 1)
    assert not before.requires_grad
    before.zero_()
    assert get_params(module).abs().sum() > 0
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_only_trainable_parameters_travel():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    fixed = module[0].weight.clone()
    set_params(module, torch.arange(4.0))
    assert num_params(module) == 4
    assert torch.equal(module[0].weight, fixed)
    assert module[1].weight.flatten().tolist() == [0, 1, 2]


def test_buffers_are_the_floating_ones():
    classifier = Resnet9(width=4, norm="batch").make(1, 16, 2, seed=0)
    buffers_Q = get_buffers(classifier)
    assert buffers_Q.shape == (2 * (4 + 3 * 8 + 4 * 16),)
    classifier(torch.rand(8, 1, 16, 16))
    assert not torch.equal(get_buffers(classifier), buffers_Q)
    set_buffers(classifier, buffers_Q)
    assert torch.equal(get_buffers(classifier), buffers_Q)
    assert int(classifier.module.conv1.norm.num_batches_tracked) == 1


def test_no_buffers_is_an_empty_vector():
    module = nn.Linear(1, 1)
    assert get_buffers(module).shape == (0,)
    set_buffers(module, torch.empty(0))


@pytest.mark.parametrize("shape", [(3,), (5,), (2, 2), ()])
def test_a_vector_that_does_not_fit_is_refused(shape):
    module = nn.Linear(3, 1)
    before = get_params(module)
    with pytest.raises(ValueError, match="does not fit 4 trainable parameters"):
        set_params(module, torch.zeros(shape))
    assert torch.equal(get_params(module), before)

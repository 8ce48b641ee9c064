import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.compression.folding import fold_weight_standardisation
from trilemma.compression.pruning import prune, sparsity
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.weight_standardisation import WeightStandardisedConv2d


def _weights(classifier):
    layers = [module for module in classifier.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return np.concatenate([layer.weight.detach().numpy().ravel() for layer in layers])


@settings(deadline=None, max_examples=20)
@given(fraction=st.floats(0, 1), seed=st.integers(0, 5))
def test_exactly_the_requested_count_of_the_smallest_weights_is_zero(fraction, seed):
    classifier = Resnet9(width=4).make(1, 16, 2, seed)
    before = _weights(classifier)
    after = _weights(prune(classifier, fraction))
    count = round(fraction * len(before))
    assert (after == 0).sum() == count
    smallest = np.argsort(np.abs(before), kind="stable")[:count]  # the naive twin
    expected = before.copy()
    expected[smallest] = 0
    np.testing.assert_array_equal(after, expected)


def test_equal_magnitudes_still_give_the_exact_count():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
    nn.init.constant_(network[1].weight, 0.5)
    classifier = Classifier(network, 5)
    pruned = prune(classifier, 0.35)
    assert (_weights(pruned) == 0).sum() == 7
    assert (_weights(pruned)[:7] == 0).all()


def test_the_argument_and_all_but_the_weights_stay():
    classifier = Resnet9(width=4).make(1, 16, 2, 0)
    state = copy.deepcopy(classifier.state_dict())
    pruned = prune(classifier, 0.5)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, state[name])
        if "bias" in name or "norm" in name:
            assert torch.equal(pruned.state_dict()[name], tensor)


def test_a_shared_layer_is_counted_once():
    shared = nn.Linear(4, 4)
    classifier = Classifier(nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared), 4)
    pruned = prune(classifier, 0.25)
    assert sparsity(pruned) == 4 / 16
    assert pruned.module[1] is pruned.module[3]


def test_sparsity_is_what_was_achieved():
    classifier = Resnet9(width=4).make(1, 16, 2, 0)
    assert sparsity(classifier) == 0
    assert sparsity(prune(classifier, 0.9)) == pytest.approx(0.9, abs=1e-4)
    assert sparsity(Classifier(nn.Flatten(), 2)) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(fraction):
    with pytest.raises(ValueError, match="must lie in"):
        prune(Resnet9(width=4).make(1, 16, 2, 0), fraction)


def test_of_standardised_weights_the_smallest_that_are_computed_with_go():
    classifier = Resnet9(width=4, norm="weight").make(1, 16, 2, 0)
    with torch.no_grad():
        for module in classifier.modules():
            if isinstance(module, WeightStandardisedConv2d):
                module.weight.mul_(1 + 9 * torch.rand(len(module.weight), 1, 1, 1))  # which changes nothing
    plain = copy.deepcopy(classifier)
    fold_weight_standardisation(plain)
    before, after = _weights(plain), _weights(prune(classifier, 0.4))
    expected = before.copy()
    expected[np.argsort(np.abs(before), kind="stable")[: round(0.4 * len(before))]] = 0
    np.testing.assert_array_equal(after, expected)


def test_zeros_of_standardised_weights_stay_zeros_when_folded():
    classifier = Resnet9(width=4, norm="weight").make(1, 16, 2, 0)
    with torch.no_grad():
        for module in classifier.modules():
            if isinstance(module, WeightStandardisedConv2d):
                module.weight.masked_fill_(module.weight.abs() < module.weight.abs().median(), 0.0)
    share = sparsity(classifier)
    assert share > 0.4
    fold_weight_standardisation(classifier)
    assert sparsity(classifier) == share

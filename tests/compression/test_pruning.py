import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.compression.folding import fold_weight_standardisation
from trilemma.compression.pruning import layer_adaptive, prunable, prune, prune_n_of_m, smallest_P, sparsity
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.vector import get_params
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


def _naive_n_of_m(weight, n, m):
    """Filter by filter, row by row; the input channels of one kernel position stand together."""
    pruned = weight.clone()
    for index in range(len(weight)):
        places = [(index, *rest) for rest in np.ndindex(*weight.shape[1:])]
        places.sort(key=lambda place: (place[2:], place[1]))
        for start in range(0, len(places), m):
            row = places[start : start + m]
            row.sort(key=lambda place: -abs(float(weight[place])))  # stable: the earlier of equal ones stays
            for place in row[n:]:
                pruned[place] = 0
    return pruned


@settings(deadline=None, max_examples=40)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3)), st.tuples(*[st.integers(1, 9)] * 2)
    ),
    m=st.integers(1, 6),
    data=st.data(),
)
def test_n_of_m_is_its_naive_twin(shape, m, data):
    n = data.draw(st.integers(1, m))
    out, inside, kernel = (*shape, None)[:3]
    layer = nn.Linear(inside, out) if kernel is None else nn.Conv2d(inside, out, (kernel, 2))
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    with torch.no_grad():  # few values, so that there are ties
        layer.weight.copy_(torch.randint(-3, 4, layer.weight.shape, generator=draws))
    pruned = prune_n_of_m(Classifier(layer, 2), n, m).module
    assert torch.equal(pruned.weight, _naive_n_of_m(layer.weight.detach(), n, m))
    assert torch.equal(pruned.bias, layer.bias)


def test_two_of_four_runs_over_input_channels_as_sparse_tensor_cores_read_them():
    classifier = Resnet9(width=4).make(1, 16, 2, 0)
    pruned = prune_n_of_m(classifier, 2, 4)
    for layer in pruned.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels % 4 == 0:
            rows = layer.weight.permute(2, 3, 0, 1).reshape(-1, 4)
            assert ((rows != 0).sum(1) == 2).all()
    assert sparsity(pruned) == pytest.approx(0.5, abs=0.01)
    assert sparsity(classifier) == 0


def test_a_tail_keeps_what_it_may():
    layer = nn.Linear(6, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.5, -0.5]]))
    kept = [prune_n_of_m(Classifier(layer, 2), n, 4).module.weight.flatten().tolist() for n in (1, 2, 4)]
    assert kept == [[0, -4, 0, 0, 0.5, 0], [0, -4, 3, 0, 0.5, -0.5], [1, -4, 3, 2, 0.5, -0.5]]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 2), (0, 0)])
def test_an_impossible_pattern_is_refused(n, m):
    with pytest.raises(ValueError, match="n must lie between 1 and m"):
        prune_n_of_m(Resnet9(width=4).make(1, 16, 2, 0), n, m)


@settings(deadline=None, max_examples=20)
@given(fraction=st.floats(0, 1), seed=st.integers(0, 3), norm=st.sampled_from(["group", "none"]))
def test_the_mask_of_a_vector_is_what_prune_does(fraction, seed, norm):
    classifier = Resnet9(width=4, norm=norm).make(1, 16, 2, seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in classifier.parameters():  # few values and none zero: ties across layers, biases among them
            parameter.copy_(torch.randint(1, 9, parameter.shape, generator=draws) / 8)
    params_P, prunable_P = get_params(classifier), prunable(classifier)
    leaves_P = smallest_P(params_P, prunable_P, fraction)
    assert not (leaves_P & ~prunable_P).any()
    assert torch.equal(params_P.masked_fill(leaves_P, 0), get_params(prune(classifier, fraction)))


def test_only_trainable_weights_of_layers_are_prunable():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 2))
    classifier = Classifier(network, 2)
    expected = [True] * 18 + [False] * (2 + 2 + 2) + [True] * 16 + [False] * 2
    assert prunable(classifier).tolist() == expected
    network[0].weight.requires_grad_(False)
    assert prunable(classifier).tolist() == expected[18:]
    assert len(prunable(Classifier(nn.Flatten(), 2))) == 0


def test_not_a_number_leaves_last():
    params_P = torch.tensor([float("nan"), 2.0, -1.0, float("inf")])
    leaves_P = smallest_P(params_P, torch.ones(4, dtype=torch.bool), 0.75)
    assert leaves_P.tolist() == [False, True, True, True]


def test_a_vector_is_pruned_by_a_possible_share_only():
    with pytest.raises(ValueError, match="must lie in"):
        smallest_P(torch.ones(3), torch.ones(3, dtype=torch.bool), 1.5)


def naive_layer_adaptive(weights):
    """Equation 5 of the paper, weight by weight."""
    squares = np.asarray(weights, dtype=np.float64).flatten() ** 2
    order = np.argsort(squares, kind="stable")
    found = np.empty(len(squares))
    for position, place in enumerate(order):
        rest = squares[order[position:]].sum()
        found[place] = squares[place] / rest if rest else 0
    return found


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_layer_adaptive_scores_are_those_of_a_naive_twin_whatever_the_scale(weights, scale):
    weight = torch.tensor(weights, dtype=torch.float64)[:, None]
    found = layer_adaptive(weight * scale)
    np.testing.assert_allclose(found.flatten().numpy(), naive_layer_adaptive(weights), rtol=1e-9)
    assert float(found.max()) == (1.0 if any(weights) else 0.0)


def test_of_standardised_weights_those_go_that_say_least_in_their_layer():
    classifier = Resnet9(width=4, norm="weight").make(1, 16, 2, 0)
    with torch.no_grad():
        for module in classifier.modules():
            if isinstance(module, WeightStandardisedConv2d):
                module.weight.mul_(1 + 9 * torch.rand(len(module.weight), 1, 1, 1))  # which changes nothing
    plain = copy.deepcopy(classifier)
    fold_weight_standardisation(plain)
    before, after = _weights(plain), _weights(prune(classifier, 0.4))
    layers = [module for module in plain.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    scores = np.concatenate([naive_layer_adaptive(layer.weight.detach()) for layer in layers])
    expected = before.copy()
    expected[np.argsort(scores.astype(np.float32), kind="stable")[: round(0.4 * len(before))]] = 0
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

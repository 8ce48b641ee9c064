"""Weights that leave while a federation trains: how many, which, that they stay away, and that it costs no privacy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from helpers.tiny_federation import DP, equal_states, tiny_federation, tiny_spec, trained_state
from trilemma.compression.pruning import prunable, sparsity
from trilemma.federation.gradual_pruning import kept, pruned
from trilemma.federation.round import run_round
from trilemma.federation.smaller import GradualPruning
from trilemma.federation.state import TrainingState
from trilemma.federation.training import guarantee, initial_state, trained_model
from trilemma.models.vector import get_params

PRUNING = {"pruning": {"kind": "gradual", "sparsity": 0.8, "first": 0.25, "last": 0.75}, "rounds": 4}
NORMS = ("group", "batch", "weight", "none")


def model(norm):
    return {"kind": "resnet9", "width": 4, "norm": norm}


def states_of(federation):
    states = [initial_state(federation)]
    while states[-1].round < federation.spec.rounds:
        states.append(run_round(federation, states[-1]))
    return states


@given(st.floats(0.01, 0.99), st.floats(0, 0.98), st.floats(0.01, 1), st.integers(1, 60))
def test_the_share_rises_from_nothing_to_all_that_was_asked(asked, first, length, rounds):
    last = min(1.0, first + max(length * (1 - first), 0.01))
    spec = GradualPruning(sparsity=asked, first=first, last=last)
    shares = [spec.share(done, rounds) for done in range(rounds + 1)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(asked)
    for done, share in enumerate(shares):
        if done / rounds <= first:
            assert share == 0
        elif done / rounds >= last:
            assert share == pytest.approx(asked)
        else:  # Zhu and Gupta 2017, equation 1, with nothing pruned at first
            left = 1 - (done / rounds - first) / (last - first)
            assert share == pytest.approx(asked + (0 - asked) * left**3, abs=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_the_model_is_as_sparse_as_asked_and_what_has_left_stays_away(norm):
    federation = tiny_federation(**PRUNING, model=model(norm))
    states, gone = states_of(federation), torch.tensor(False)
    weights_P = prunable(federation.classifier)
    for state in states[1:]:
        zero_P = (state.params_P == 0) & weights_P
        share = federation.spec.pruning.share(state.round, federation.spec.rounds)
        assert int(zero_P.sum()) == round(share * int(weights_P.sum()))
        assert not bool((gone & ~zero_P).any())
        gone = zero_P
    final = trained_model(federation, states[-1])
    # A standardised filter with a single weight left is a filter of zeros.
    assert sparsity(final) == pytest.approx(0.8, abs=1e-3)
    assert not bool(((states[-1].params_P == 0) & ~weights_P & (states[0].params_P != 0)).any())


def test_the_smallest_leave():
    federation = tiny_federation(**PRUNING)
    params_P, weights_P = get_params(federation.classifier), prunable(federation.classifier)
    left_P = pruned(federation.spec, federation.classifier, params_P, 4) == 0
    gone, stay = params_P[left_P & weights_P].abs(), params_P[~left_P & weights_P].abs()
    assert gone.max() <= stay.min()
    assert pruned(federation.spec, federation.classifier, params_P, 1) is not params_P  # nothing yet, the same numbers
    assert torch.equal(pruned(federation.spec, federation.classifier, params_P, 1), params_P)


def test_of_standardised_weights_no_layer_vanishes():
    """By magnitude alone the layers with the most inputs would, for their filters are as long as the others'."""
    federation = tiny_federation(**PRUNING, model={"kind": "resnet9", "width": 16, "norm": "weight"})
    params_P = get_params(federation.classifier)
    left_P = pruned(federation.spec, federation.classifier, params_P, 4)
    shares, start = [], 0
    for parameter in federation.classifier.parameters():
        part = left_P[start : start + parameter.numel()]
        start += parameter.numel()
        if parameter.ndim > 1:
            shares.append(float((part != 0).float().mean()))
    assert min(shares) > 0.05


def test_clients_keep_zeros_and_change_everything_else():
    federation = tiny_federation(**PRUNING)
    state = states_of(federation)[2]
    keep_P = kept(federation.spec, federation.classifier, state.params_P)
    after = run_round(federation, state)
    moved_P = after.params_P - state.params_P
    assert not bool(moved_P[~keep_P].any())
    assert float((moved_P[keep_P] != 0).float().mean()) > 0.5
    assert kept(tiny_spec(), federation.classifier, state.params_P) is None


def test_without_pruning_nothing_is_different():
    plain = trained_state(tiny_federation(rounds=4))
    late = {"kind": "gradual", "sparsity": 0.5, "first": 0.99, "last": 1.0}
    before = trained_state(tiny_federation(rounds=4, pruning=late), 3)
    assert torch.equal(trained_state(tiny_federation(rounds=4), 3).params_P, before.params_P)
    assert not bool((plain.params_P == 0)[prunable(tiny_federation().classifier)].any())


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": {"kind": "centralised"}},
        {"algorithm": {"kind": "local_only", "client": 1}},
        {"server": {"kind": "sgd", "momentum": 0.9}},
        {"server": {"kind": "adam"}},
        {"aggregation": {"kind": "median"}},
        {"downlink": {"kind": "dense", "numbers": "int8"}, "codec": {"kind": "top_k", "share": 0.1}},
        {"averaging": {"decay": 0.9}},
        {"defence": {"kind": "fgsm", "radius": "4/255"}},
        {"threat": {"kind": "sign_flip", "num_malicious": 1}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_it_goes_with_everything_else(fields):
    federation = tiny_federation(**PRUNING, **fields)
    state = trained_state(federation)
    assert sparsity(trained_model(federation, state)) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    "privacy",
    [DP, {**DP, "trust": "distributed", "num_colluding": 1}, {**DP, "unit": "client", "trust": "central"}],
    ids=["local", "distributed", "client"],
)
def test_it_costs_no_privacy(privacy):
    """The server's model, which is released, says which weights leave: the guarantee is the same."""
    local = {"batch_size": 8, "steps": 1, "momentum": 0}
    federation = tiny_federation(**PRUNING, privacy=privacy, local=local)
    plain = tiny_federation(rounds=4, privacy=privacy, local=local)
    state = trained_state(federation)
    assert sparsity(trained_model(federation, state)) == pytest.approx(0.8, abs=1e-3)
    assert guarantee(federation, state) == guarantee(plain, trained_state(plain))


def test_a_resumed_training_is_the_same():
    half = trained_state(tiny_federation(**PRUNING), 2)
    again = TrainingState.unpack(*half.pack(), torch.device("cpu"))
    assert equal_states(
        trained_state(tiny_federation(**PRUNING), state=again), trained_state(tiny_federation(**PRUNING))
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="first must be below last"):
        GradualPruning(first=0.5, last=0.5)
    stopping = {"attack": {"kind": "pgd", "radius": "4/255", "steps": 1}}
    with pytest.raises(ValidationError, match="may choose a round before pruning has ended"):
        tiny_spec(**PRUNING, early_stopping=stopping)

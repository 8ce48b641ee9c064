"""What every codec promises: its error, its bytes, what it remembers, and that nothing else is read as an update."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilemma.federation.codecs.codec import num_values
from trilemma.federation.codecs.numbers import Numbers
from trilemma.federation.codecs.specs import CodecSpec, Dense, PowerSgd, RandomK, RandomProjection, TopK

SHAPES = [(8, 3, 3, 3), (8,), (16, 8, 3, 3), (16,), (10, 64), (10,), ()]
SIZE = num_values(SHAPES)
CODECS = [
    *(Dense(numbers=numbers, error_feedback=numbers == "sign") for numbers in get_args(Numbers)),
    TopK(share=0.05),
    TopK(share=0.02, numbers="int8"),
    TopK(share=1.0),
    RandomK(share=0.1),
    RandomK(share=0.1, numbers="float16", error_feedback=False),
    RandomProjection(share=0.2),
    RandomProjection(share=0.2, numbers="int8", error_feedback=False),
    PowerSgd(rank=1),
    PowerSgd(rank=2, numbers="float16"),
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.label} {codec.remembers}")


def update(seed: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_member_is_here():
    assert {type(codec) for codec in CODECS} == set(get_args(get_args(CodecSpec)[0]))
    assert len({codec.number for codec in CODECS}) == 5
    assert len({(codec.label, codec.remembers) for codec in CODECS}) == len(CODECS)


@every_codec
def test_an_update_comes_back_of_its_shape_and_the_draws_alone_decide(codec):
    payload, _ = codec.encode(update(), {}, draws(1), SHAPES)
    torch.manual_seed(5)
    again, _ = codec.encode(update(), {}, draws(1), SHAPES)
    got_P = codec.decode(payload, SHAPES)
    assert payload == again and got_P.shape == (SIZE,) and got_P.dtype == torch.float32
    assert len(payload) <= codec.largest(SHAPES)


@every_codec
def test_nothing_is_nothing(codec):
    payload, memory = codec.encode(torch.zeros(SIZE), {}, draws(), SHAPES)
    assert not codec.decode(payload, SHAPES).any()
    assert not any(bool(value.any()) for value in memory.values())


@every_codec
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(codec, odd):
    sent_P = update()
    sent_P[100] = odd
    payload, memory = codec.encode(sent_P, {}, draws(), SHAPES)
    got_P = codec.decode(payload, SHAPES)
    assert not got_P.isfinite().all()  # also where it is not among those that are sent
    assert all(bool(value.isfinite().all()) for value in memory.values())
    following, _ = codec.encode(update(1), memory, draws(1), SHAPES)
    assert codec.decode(following, SHAPES).isfinite().all()


@every_codec
def test_what_was_left_unsaid_is_remembered_exactly_where_it_says_so(codec):
    payload, memory = codec.encode(update(), {}, draws(), SHAPES)
    assert ("residue" in memory) == codec.remembers
    if codec.remembers:
        assert torch.allclose(memory["residue"] + codec.decode(payload, SHAPES), update(), atol=1e-6)


REMEMBERING = [codec for codec in CODECS if codec.remembers]


@pytest.mark.parametrize("codec", REMEMBERING, ids=lambda codec: codec.label)
def test_with_error_feedback_everything_is_said_in_the_end(codec):
    # What arrived together is what was sent together but for the last residue, and that falls behind it.
    memory, arrived_P, lengths = {}, torch.zeros(SIZE), []
    for step in range(60):
        payload, memory = codec.encode(update(), memory, draws(step), SHAPES)
        arrived_P = arrived_P + codec.decode(payload, SHAPES)
        lengths.append(float(memory["residue"].norm()))
    assert torch.allclose(arrived_P + memory["residue"], 60 * update(), atol=1e-2)
    assert lengths[-1] <= 0.6 * 60 * float(update().norm())
    assert lengths[-1] - lengths[-20] <= 0.3 * 20 * float(update().norm())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.floats(0.001, 1.0))
def test_top_k_keeps_the_largest_and_loses_no_more_than_the_rest_of_the_share(seed, share):
    sent_P = update(seed)
    payload, _ = TopK(share=share).encode(sent_P, {}, draws(), SHAPES)
    got_P = TopK(share=share).decode(payload, SHAPES)
    kept_P = got_P != 0
    count = min(SIZE, max(1, round(share * SIZE)))
    assert int(kept_P.sum()) == count and torch.equal(got_P[kept_P], sent_P[kept_P])
    assert count == SIZE or sent_P[kept_P].abs().min() >= sent_P[~kept_P].abs().max()
    assert (sent_P - got_P).square().sum() <= (1 - count / SIZE) * sent_P.square().sum() + 1e-4


@pytest.mark.parametrize("codec", [RandomK(share=0.1), RandomProjection(share=0.1)], ids=lambda codec: codec.label)
def test_random_codecs_shorten_the_error_by_their_share_with_feedback_and_are_right_on_average_without(codec):
    sent_P, runs = update(), 300
    got = [codec.decode(codec.encode(sent_P, {}, draws(seed), SHAPES)[0], SHAPES) for seed in range(runs)]
    errors = torch.stack([(sent_P - got_P).square().sum() / sent_P.square().sum() for got_P in got])
    share = codec.share / (1 + codec.share) if codec.kind == "random_projection" else codec.share
    assert float(errors.mean()) == pytest.approx(1 - share, abs=0.02)
    unbiased = codec.model_copy(update={"error_feedback": False})
    mean_P = sum(unbiased.decode(unbiased.encode(sent_P, {}, draws(s), SHAPES)[0], SHAPES) for s in range(runs)) / runs
    assert float(mean_P @ sent_P / sent_P.square().sum()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_power_sgd_is_exact_for_matrices_of_its_rank_and_its_rounds_come_nearer_to_the_best(rank):
    low = torch.randn(10, rank, generator=draws(3)) @ torch.randn(rank, 64, generator=draws(4))
    codec, shapes = PowerSgd(rank=rank, error_feedback=False), [(10, 64), (10,)]
    sent_P = torch.cat([low.flatten(), torch.arange(10.0)])
    payload, _ = codec.encode(sent_P, {}, draws(), shapes)
    assert torch.allclose(codec.decode(payload, shapes), sent_P, atol=1e-3)
    assert len(payload) == 4 * (rank * 74 + 10)
    full_P, memory, errors = torch.randn(650, generator=draws(5)), {}, []
    for step in range(30):
        payload, memory = codec.encode(full_P, memory, draws(step), shapes)
        errors.append(float((full_P - codec.decode(payload, shapes)).norm()))
    tail = torch.linalg.svdvals(full_P[:640].reshape(10, 64))[rank:].square().sum().sqrt()
    assert errors[-1] == pytest.approx(float(tail), rel=0.02) and errors[-1] <= errors[0]


@every_codec
@settings(max_examples=40, deadline=None)
@given(junk=st.binary(max_size=300), data=st.data())
def test_bytes_that_are_no_update_are_refused_or_read_as_one_of_its_shape(codec, junk, data):
    payload, _ = codec.encode(update(), {}, draws(), SHAPES)
    cut = payload[: data.draw(st.integers(0, len(payload)))]
    for hostile in (junk, cut, payload + junk, cut + junk):
        try:
            got_P = codec.decode(hostile, SHAPES)
        except ValueError:
            continue
        assert got_P.shape == (SIZE,)
    if junk:
        with pytest.raises(ValueError, match="bytes|positions"):
            codec.decode(payload + b"\0\0\0\0", SHAPES)

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilemma.randomness import derive_seed, generator, global_seed, numpy_generator

roles = st.lists(st.integers(0, 20) | st.sampled_from(["noise", "batches", "1", "1 1"]), max_size=3)


def test_golden_seed():
    # Half of BLAKE2b of '0', 'str:noise', 'int:1', 'int:2'. A change of this changes every result of every study.
    assert derive_seed(0, "noise", 1, 2) == 95335453844130929


@given(one=roles, other=roles, seed=st.integers(0, 5))
def test_roles_never_share_a_seed(one, other, seed):
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (derive_seed(seed, *one) == derive_seed(seed, *other)) == same
    assert derive_seed(seed, *one) != derive_seed(seed + 1, *one)
    assert 0 <= derive_seed(seed, *one) < 2**63


def test_a_generator_is_the_same_wherever_it_is_asked_for():
    first = torch.rand(4, generator=generator(3, "batches", 0))
    torch.manual_seed(99)
    assert torch.equal(first, torch.rand(4, generator=generator(3, "batches", 0)))
    assert not torch.equal(first, torch.rand(4, generator=generator(3, "batches", 1)))
    one, again = (numpy_generator(3, "x").random(4) for _ in range(2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, numpy_generator(4, "x").random(4))


def test_ten_thousand_streams_start_apart():
    starts = {float(torch.rand((), generator=generator(0, "a", i), dtype=torch.float64)) for i in range(10_000)}
    assert len(starts) > 9_990


def test_torch_shares_streams_that_numpy_tells_apart():
    # Torch's generator on the CPU has 32 bits of the seed, so that of 120 000 roles some two draw the same.
    first: dict[int, int] = {}
    number = next(n for n in range(300_000) if first.setdefault(derive_seed(0, "noise", n) & 0xFFFFFFFF, n) != n)
    other = first[derive_seed(0, "noise", number) & 0xFFFFFFFF]
    torchs = [torch.rand(5, generator=generator(0, "noise", n)) for n in (number, other)]
    numpys = [numpy_generator(0, "noise", n).standard_normal(5) for n in (number, other)]
    assert torch.equal(*torchs)
    assert not np.array_equal(*numpys)


def test_the_global_seed_holds_within_and_is_put_back():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with global_seed(1, "dropout"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(RuntimeError), global_seed(1, "dropout"):
        assert torch.equal(torch.rand(3), inside)
        raise RuntimeError
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)

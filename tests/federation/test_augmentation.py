import pytest
import torch

from trilemma.federation.augmentation import augment


def images(batch=3, size=5):
    return torch.rand(batch, 2, size, size, generator=torch.Generator().manual_seed(0))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def shifted(x_CHW, down, right):
    """A slow twin: every pixel looks up where it came from, at the border its nearest neighbour."""
    size = x_CHW.shape[-1]
    result = torch.empty_like(x_CHW)
    for row in range(size):
        for column in range(size):
            source = min(max(row + down, 0), size - 1), min(max(column + right, 0), size - 1)
            result[:, row, column] = x_CHW[:, source[0], source[1]]
    return result


@pytest.mark.parametrize("shift", [1, 2, 7])
def test_every_image_is_shifted_by_at_most_so_many_pixels(shift):
    x = images(batch=40)
    moves = range(-shift, shift + 1)
    found = set()
    for before, after in zip(x, augment(x, shift, False, draws()), strict=True):
        possible = [(d, r) for d in moves for r in moves if torch.equal(shifted(before, d, r), after)]
        assert possible
        found |= set(possible)
    assert len(found) > 5
    if shift == 1:
        assert found == {(d, r) for d in moves for r in moves}


def test_flips_about_half_and_only_left_to_right():
    x = images(batch=200)
    result = augment(x, 0, True, draws())
    flipped = [torch.equal(after, before.flip(2)) for before, after in zip(x, result, strict=True)]
    same = [torch.equal(after, before) for before, after in zip(x, result, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True))
    assert 70 < sum(flipped) < 130


def test_nothing_asked_nothing_drawn():
    x, g = images(), draws()
    assert torch.equal(augment(x, 0, False, g), x)
    assert torch.equal(torch.rand(2, generator=g), torch.rand(2, generator=draws()))


def test_the_generator_alone_decides_and_the_images_stay():
    x = images()
    before = x.clone()
    first, again, other = (augment(x, 2, True, draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x, before)

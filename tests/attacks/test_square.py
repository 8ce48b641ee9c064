import functools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.asked import Asked, Refusing, always, toolbox_estimator
from helpers.small_problem import stripes, trained
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.geometry import project
from trilemma.attacks.evasion.losses import margin
from trilemma.attacks.evasion.square import _dipole, _pyramid, _sides, square
from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9

BUDGETS = {"linf": Budget("linf", 0.1), "l2": Budget("l2", 1.0)}
every_norm = pytest.mark.parametrize("norm", ["linf", "l2"])
every_channels = pytest.mark.parametrize("channels", [1, 3])
nobody = Classifier(Refusing(), 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def problem(channels: int, num_classes: int):
    records = stripes(200, size=12, channels=channels, num_classes=num_classes)
    classifier = trained(Resnet9(width=4).make(channels, 12, num_classes, 0), records, steps=40)
    return classifier, records.x(slice(0, 100)), records.y(slice(0, 100))


def accuracy(classifier, x, y) -> float:
    with torch.no_grad():
        return float((classifier(x).argmax(1) == y).float().mean())


def smooth(channels: int, seed: int = 0) -> Asked:
    """A random network of tanh, in double precision."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * 81, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    return Asked(lambda x: network(x.double() - 0.5))


def one_image(channels: int):
    return torch.rand(1, channels, 9, 9, generator=generator(3), dtype=torch.float64), torch.tensor([0])


@every_norm
def test_asks_exactly_so_often(norm):
    x, y = torch.rand(4, 1, 9, 9), torch.zeros(4, dtype=torch.long)
    for queries in (2, 3, 40):
        robust, broken = Asked(always(0)), Asked(always(1))
        square(nobody, x, y, BUDGETS[norm], generator(), queries=queries, answers=robust)
        assert [len(images) for images in robust.images] == [4] * queries
        assert torch.equal(square(nobody, x, y, BUDGETS[norm], generator(), queries=queries, answers=broken), x)
        assert [len(images) for images in broken.images] == [4]  # misclassified before anything was changed
        driven = Asked(always(1))
        square(nobody, x, y, BUDGETS[norm], generator(), queries=queries, answers=driven, stop=False)
        assert [len(images) for images in driven.images] == [4] * queries


@every_norm
def test_a_broken_image_is_not_asked_about_again(norm):
    network, budget = smooth(1), {"linf": Budget("linf", 0.3), "l2": Budget("l2", 3.0)}[norm]
    x = torch.rand(8, 1, 9, 9, generator=generator(1), dtype=torch.float64)
    y = network.answer(x).argmax(1)
    together = Asked(network.answer)
    x_adv = square(nobody, x, y, budget, generator(), queries=60, answers=together)
    sizes = [len(images) for images in together.images]
    assert sizes[0] == 8
    assert sizes == sorted(sizes, reverse=True)
    still_right = int((network.answer(x_adv).argmax(1) == y).sum())
    assert 8 > sizes[-1] >= still_right
    for record in range(8):
        alone = Asked(network.answer)
        index = torch.tensor([record])
        square(nobody, x[index], y[index], budget, generator(), queries=60, answers=alone)
        wrong = torch.cat(alone.logits).argmax(1) != y[record]
        assert not wrong[:-1].any()
        assert wrong[-1] or alone.count == 60


@every_norm
@every_channels
def test_the_highest_margin_that_was_ever_asked_comes_back(norm, channels):
    asked, (x, y) = smooth(channels), one_image(channels)
    x_adv = square(nobody, x, y, BUDGETS[norm], generator(), queries=150, answers=asked, stop=False)
    margins = margin(torch.cat(asked.logits), y.expand(150))
    assert margin(asked.answer(x_adv), y) == margins.max()
    assert margins.max() > margins[:2].max()  # the search found what the start had not
    kept = margins[1:].cummax(0).values
    assert (kept.diff() > 0).sum() > 10


@every_channels
def test_linf_proposes_one_square_at_the_surface_and_none_twice(channels):
    asked, (x, y), radius = smooth(channels), one_image(channels), 0.1
    square(nobody, x, y, Budget("linf", radius), generator(), queries=200, answers=asked, stop=False)
    margins, images = margin(torch.cat(asked.logits), y.expand(200)), torch.cat(asked.images)
    low, high = (x - radius).clamp(0, 1), (x + radius).clamp(0, 1)
    assert torch.equal(images[0], x[0])
    assert ((images[1:] == low) | (images[1:] == high)).all()
    signs = (images[1] == high[0]).double()
    assert torch.equal(signs, signs[:, :1].expand_as(signs))  # upright stripes
    at, best, split = images[1], margins[1], 0
    for step, side in enumerate(_sides(200, 0.8, Budget("linf", radius), (9, 9)), start=2):
        changed = images[step] != at
        assert changed.any()
        rows, columns = changed.any(0).any(1).nonzero().squeeze(1), changed.any(0).any(0).nonzero().squeeze(1)
        assert rows.max() - rows.min() < side
        assert columns.max() - columns.min() < side
        split += len({bool((images[step][c] == high[0, c])[rows[0], columns[0]]) for c in range(channels)}) - 1
        if margins[step] > best:
            at, best = images[step], margins[step]
    assert (split > 0) == (channels > 1)  # every channel has its own sign


@every_channels
def test_l2_keeps_the_length_and_moves_it(channels):
    asked, y, radius = smooth(channels), torch.tensor([0]), 0.8
    x = torch.full((1, channels, 9, 9), 0.5, dtype=torch.float64)  # nothing is cut off
    square(nobody, x, y, Budget("l2", radius), generator(), queries=120, answers=asked, stop=False)
    deltas, margins = torch.cat(asked.images) - x, margin(torch.cat(asked.logits), y.expand(120))
    assert torch.allclose(deltas[1:].flatten(1).norm(dim=1), torch.tensor(radius, dtype=torch.float64))
    at, best = deltas[1], margins[1]
    for step, side in enumerate(_sides(120, 0.8, Budget("l2", radius), (9, 9)), start=2):
        changed = ((deltas[step] - at).abs() > 1e-9).any(0)
        assert changed.sum() <= 2 * side * side
        if margins[step] > best:
            at, best = deltas[step], margins[step]


def test_squares_reach_every_pixel():
    asked = Asked(always(0))
    x, y = torch.full((1, 1, 5, 7), 0.5), torch.tensor([0])
    square(nobody, x, y, Budget("linf", 0.1), generator(), queries=900, first_share=0.1, answers=asked)
    assert (torch.cat(asked.images[2:]) != asked.images[1]).any(0).all()
    # In the end single pixels, all alike: chi squared of 34 degrees of freedom is below 70 with probability .9997.
    counts = (torch.cat(asked.images[-400:]) != asked.images[1]).flatten(1).sum(0)
    assert counts.sum() == 400
    assert ((counts - 400 / 35) ** 2 / (400 / 35)).sum() < 70


def test_sides_shrink_as_in_the_paper():
    # sqrt(0.8 / 2^k * 784), the paper's schedule for 10 000 questions on images of 28 x 28
    sides = _sides(10_000, 0.8, Budget("linf", 0.1), (28, 28))
    assert len(sides) == 9_998
    for step, side in [(0, 25), (10, 25), (11, 18), (51, 13), (201, 9), (501, 6), (1001, 4), (2001, 3), (4001, 2)]:
        assert sides[step] == side
        assert sides[step - 1] >= side or step == 0
    assert sides[6001] == 2 and sides[8001] == 1
    assert _sides(1_000, 0.8, Budget("linf", 0.1), (28, 28))[:7] == [25, 25, 18, 18, 18, 18, 13]
    assert set(_sides(10_000, 0.8, Budget("l2", 0.1), (28, 28))) == {25, 19, 13, 9, 7, 5, 3}
    assert set(_sides(50, 1.0, Budget("l2", 0.1), (2, 9))) == {2}
    assert max(_sides(50, 1.0, Budget("linf", 0.1), (4, 9))) == 4


def test_dipole_by_hand():
    # n = 1: 1/1 + 1/4 in the middle, 1/4 one pixel away
    pyramid = torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25], [0.25, 0.25, 0.25]], dtype=torch.float64)
    assert torch.allclose(_pyramid(3, 3), pyramid / pyramid.norm())
    upright, lying = _dipole(6).unflatten(1, (6, 6))
    assert torch.allclose(upright, lying.T)
    assert torch.allclose(upright.norm(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(upright[:3], -upright[3:])
    assert (upright[:3] > 0).all()
    assert upright[:3].argmax() == 1 * 6 + 3  # the middle of the upper half
    assert torch.equal(_dipole(1), torch.tensor([[-1.0], [-1.0]], dtype=torch.float64))


@settings(deadline=None, max_examples=25)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    radius=st.floats(1e-4, 1.0),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    channels=st.sampled_from([1, 2, 3]),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_stays_in_the_budget_at_every_question(norm, radius, height, width, channels, double, seed):
    dtype = torch.float64 if double else torch.float32
    x = (torch.rand(3, channels, height, width, generator=generator(seed)) * 1.4 - 0.2).clamp(0, 1).to(dtype)
    y = torch.tensor([0, 1, 2])
    asked = Asked(lambda z: (z.flatten(1).cumsum(1) * 7).sin()[:, -1:] * torch.tensor([1.0, -1.0, 0.5]).to(z))
    x_before = x.clone()
    x_adv = square(
        nobody, x, y, Budget(norm, radius), generator(seed), queries=25, answers=asked, stop=False, first_share=0.5
    )
    assert torch.equal(x, x_before)
    assert x_adv.dtype == dtype
    for images in [*asked.images, x_adv]:
        assert images.min() >= 0 and images.max() <= 1
        delta = (images - x).flatten(1)
        length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert (length <= radius * (1 + 1e-5) + 1e-7).all()


@every_norm
def test_no_result_and_no_later_draw_depends_on_other_images(norm):
    asked = smooth(1)
    x = torch.rand(6, 1, 9, 9, generator=generator(1), dtype=torch.float64)
    other = torch.rand(6, 1, 9, 9, generator=generator(2), dtype=torch.float64)
    other[4] = x[4]
    first, second = generator(), generator()
    y_right = asked.answer(x).argmax(1)  # nobody is broken from the start
    alone = square(nobody, x, y_right, BUDGETS[norm], first, queries=60, answers=asked)
    mixed = square(nobody, other, y_right, BUDGETS[norm], second, queries=60, answers=asked)
    assert torch.allclose(alone[4], mixed[4], atol=1e-12)
    assert torch.equal(first.get_state(), second.get_state())
    assert not torch.equal(alone, square(nobody, x, y_right, BUDGETS[norm], generator(1), queries=60, answers=asked))


@every_norm
def test_an_answer_that_is_no_number_moves_nothing_out_of_the_numbers(norm):
    x, y = one_image(1)
    for stop in (True, False):
        for answer in (np.nan, np.inf, -np.inf):
            silent = Asked(lambda z, answer=answer: torch.full((len(z), 3), answer))
            x_adv = square(nobody, x, y, BUDGETS[norm], generator(), queries=20, answers=silent, stop=stop)
            assert torch.isfinite(x_adv).all()


@every_norm
def test_a_layout_with_channels_last_changes_nothing(norm):
    asked = smooth(3)
    x, y = torch.rand(4, 3, 9, 9, generator=generator(1), dtype=torch.float64), torch.arange(4) % 3
    plain = square(nobody, x, y, BUDGETS[norm], generator(), queries=40, answers=asked, stop=False)
    last = x.contiguous(memory_format=torch.channels_last)
    x_adv = square(nobody, last, y, BUDGETS[norm], generator(), queries=40, answers=asked, stop=False)
    assert torch.allclose(x_adv, plain, atol=1e-12)


@every_norm
def test_breaks_a_model_whose_gradient_is_zero_everywhere(norm):
    classifier, x, y = problem(1, 3)
    steps = Asked(lambda z: classifier((z * 32).round() / 32))
    budget = {"linf": Budget("linf", 0.1), "l2": Budget("l2", 1.2)}[norm]
    x_adv = square(nobody, x, y, budget, generator(), queries=150, answers=steps)
    with torch.no_grad():
        assert float((steps.answer(x).argmax(1) == y).float().mean()) > 0.95
        assert float((steps.answer(x_adv).argmax(1) == y).float().mean()) < 0.6


@every_norm
def test_breaks_the_file_that_ships_and_asks_nothing_else(norm):
    classifier, x, y = problem(1, 3)
    session = Session(export_onnx(classifier, 1, 12))
    x_adv = square(nobody, x, y, BUDGETS[norm], generator(), queries=100, answers=session.predict)
    robust = float((session.predict(x_adv).argmax(1) == y).float().mean())
    assert robust < 0.7
    own = square(classifier, x, y, BUDGETS[norm], generator(), queries=100)
    assert robust == pytest.approx(accuracy(classifier, own, y), abs=0.03)


@pytest.mark.parametrize(
    ("channels", "classes", "norm", "radius"), [(1, 3, "linf", 0.09), (1, 3, "l2", 1.0), (3, 2, "linf", 0.12)]
)
def test_at_least_as_strong_as_the_toolbox(channels, classes, norm, radius):
    classifier, x, y = problem(channels, classes)
    budget = Budget(norm, radius)
    estimator, _ = toolbox_estimator(classifier, tuple(x.shape[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the toolbox's own imports
        from art.attacks.evasion import SquareAttack
    attack = SquareAttack(
        estimator, norm=np.inf if norm == "linf" else 2, max_iter=98, eps=radius, p_init=0.8, verbose=False
    )
    np.random.seed(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # the toolbox divides by a length of 0
        theirs = torch.from_numpy(attack.generate(x.numpy(), y.numpy())).nan_to_num(nan=0.5)
    theirs = project(theirs, x, budget)
    ours = square(classifier, x, y, budget, generator(), queries=100)
    assert accuracy(classifier, ours, y) < accuracy(classifier, x, y) - 0.02  # it is an attack
    assert accuracy(classifier, ours, y) <= accuracy(classifier, theirs, y) + 0.01

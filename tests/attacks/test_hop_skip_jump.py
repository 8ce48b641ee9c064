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
from trilemma.attacks.evasion.hop_skip_jump import hop_skip_jump
from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9

every_norm = pytest.mark.parametrize("norm", ["linf", "l2"])
nobody = Classifier(Refusing(), 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def problem(channels: int, num_classes: int):
    records = stripes(200, size=12, channels=channels, num_classes=num_classes)
    classifier = trained(Resnet9(width=4).make(channels, 12, num_classes, 0), records, steps=40)
    return classifier, records.x(slice(0, 100)), records.y(slice(0, 100))


def accuracy(answer, x, y) -> float:
    with torch.no_grad():
        return float((answer(x).argmax(1) == y).float().mean())


def linear(size: int = 20):
    """Two classes and a plane between them; images of moderate contrast, their labels and their distances to it."""
    g = generator(4)
    weight = torch.randn(2, size * size, generator=g, dtype=torch.float64)
    x = torch.rand(12, 1, size, size, generator=g, dtype=torch.float64) * 0.4 + 0.3
    asked = Asked(lambda z: (z.flatten(1) - 0.5) @ weight.T)
    logits, difference = asked.answer(x), weight[1] - weight[0]
    gap = (logits[:, 1] - logits[:, 0]).abs()
    return asked, x, logits.argmax(1), {"l2": gap / difference.norm(), "linf": gap / difference.abs().sum()}


def length(delta, norm):
    return delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)


@pytest.mark.parametrize(("norm", "most"), [("l2", 1.3), ("linf", 1.7)])
def test_comes_near_the_distance_to_a_plane(norm, most):
    asked, x, y, distances = linear()
    for radius_over_distance, breaks in [(0.99, False), (most, True)]:
        for record in range(12) if breaks else range(2):
            index = torch.tensor([record])
            budget = Budget(norm, float(distances[norm][record]) * radius_over_distance)
            x_adv = hop_skip_jump(nobody, x[index], y[index], budget, generator(), queries=2500, answers=asked)
            assert bool(asked.answer(x_adv).argmax(1) != y[index]) == breaks
            assert length(x_adv - x[index], norm) <= budget.radius * (1 + 1e-6)


@every_norm
@pytest.mark.parametrize("queries", [100, 101, 399, 1000])
def test_never_asks_more_than_it_may_and_leaves_little(norm, queries):
    asked, x, y, _ = linear(8)
    hop_skip_jump(nobody, x[:1], y[:1], Budget(norm, 1e-9), generator(), queries=queries, answers=asked)
    assert queries - 32 <= asked.count <= queries


@every_norm
def test_images_cost_the_same_together_and_alone(norm):
    asked, x, y, distances = linear(8)
    budget = Budget(norm, float(distances[norm].median()) * 1.5)
    x_adv = hop_skip_jump(nobody, x, y, budget, generator(), queries=500, answers=asked)
    together, alone = asked.count, []
    for record in range(12):
        one, index = Asked(asked.answer), torch.tensor([record])
        x_one = hop_skip_jump(nobody, x[index], y[index], budget, generator(), queries=500, answers=one)
        assert torch.allclose(x_one, x_adv[index], atol=1e-9)
        alone.append(one.count)
    assert together == sum(alone)
    assert min(alone) < 400 and max(alone) > 460  # the broken leave, the others go on


@every_norm
def test_few_questions_are_kept_to_as_well(norm):
    asked, x, y, _ = linear(8)
    for queries in (1, 2, 10, 30, 60):
        asked.images.clear()
        x_adv = hop_skip_jump(nobody, x[:3], y[:3], Budget(norm, 0.1), generator(), queries=queries, answers=asked)
        assert asked.count <= 3 * queries
        assert torch.isfinite(x_adv).all()


@every_norm
def test_only_the_class_counts(norm):
    asked, x, y, distances = linear(8)
    budget = Budget(norm, float(distances[norm].median()) * 1.5)
    decided = Asked(lambda z: nn.functional.one_hot(asked.answer(z).argmax(1), 2))
    with_logits = hop_skip_jump(nobody, x, y, budget, generator(), queries=400, answers=asked)
    assert torch.equal(hop_skip_jump(nobody, x, y, budget, generator(), queries=400, answers=decided), with_logits)


@every_norm
def test_what_cannot_be_broken_and_what_is_broken_already_comes_back_unchanged(norm):
    x, y = torch.rand(3, 1, 9, 9), torch.zeros(3, dtype=torch.long)
    robust, broken = Asked(always(0)), Asked(always(1))
    assert torch.equal(hop_skip_jump(nobody, x, y, Budget(norm, 0.5), generator(), queries=300, answers=robust), x)
    assert robust.count == 3 * (1 + 30)  # a tenth of the questions for a start
    assert torch.equal(hop_skip_jump(nobody, x, y, Budget(norm, 0.5), generator(), queries=300, answers=broken), x)
    assert broken.count == 3


def test_finds_a_start_that_noise_of_single_pixels_is_not():
    # Bright images are of class 1; noise of any grain is as bright as grey.
    asked = Asked(lambda z: torch.stack([torch.full((len(z),), 0.8), z.mean(dim=(1, 2, 3))], dim=1))
    x, y = torch.full((2, 1, 16, 16), 0.5), torch.zeros(2, dtype=torch.long)
    x_adv = hop_skip_jump(nobody, x, y, Budget("linf", 0.36), generator(), queries=1000, answers=asked)
    assert (asked.answer(x_adv).argmax(1) == 1).all()


@settings(deadline=None, max_examples=20)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    radius=st.floats(1e-4, 1.0),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from([1, 2, 3]),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_stays_in_the_budget_and_asks_about_images(norm, radius, height, width, channels, double, seed):
    dtype = torch.float64 if double else torch.float32
    x = (torch.rand(3, channels, height, width, generator=generator(seed)) * 1.4 - 0.2).clamp(0, 1).to(dtype)
    asked = Asked(lambda z: (z.flatten(1).cumsum(1) * 7).sin()[:, -1:] * torch.tensor([1.0, -1.0, 0.5]).to(z))
    y, x_before = asked.answer(x).argmax(1), x.clone()
    x_adv = hop_skip_jump(nobody, x, y, Budget(norm, radius), generator(seed), queries=150, answers=asked)
    assert torch.equal(x, x_before)
    assert x_adv.dtype == dtype
    assert (length(x_adv - x, norm) <= radius * (1 + 1e-5) + 1e-7).all()
    for images in [*asked.images, x_adv]:
        assert images.min() >= 0 and images.max() <= 1


@every_norm
def test_an_answer_that_is_no_number_moves_nothing_out_of_the_numbers(norm):
    _, x, y, _ = linear(8)
    for clean in (True, False):
        # Right on the clean images only, or on half of all images.
        def answer(z, clean=clean):
            logits = torch.full((len(z), 2), np.nan, dtype=z.dtype)
            right = (z[:, None] == x).flatten(2).all(2).any(1) if clean else z[:, 0, 0, 0] > 0.4
            logits[right] = torch.tensor([1.0, 0.0], dtype=z.dtype)
            return logits

        asked = Asked(answer)
        x_adv = hop_skip_jump(nobody, x, y * 0, Budget(norm, 1e-9), generator(), queries=300, answers=asked)
        assert torch.isfinite(x_adv).all()
        assert all(torch.isfinite(images).all() for images in asked.images)


@every_norm
def test_no_later_draw_depends_on_the_images(norm):
    asked, x, y, _ = linear(8)
    first, second = generator(), generator()
    hop_skip_jump(nobody, x, y, Budget(norm, 1e-9), first, queries=200, answers=asked)
    hop_skip_jump(nobody, x, y, Budget(norm, 0.9), second, queries=200, answers=asked)
    assert torch.equal(first.get_state(), second.get_state())


@every_norm
def test_breaks_a_model_that_rounds_its_input_and_the_file_that_ships(norm):
    classifier, x, y = problem(1, 3)
    x, y = x[y > 0][:30], y[y > 0][:30]
    session = Session(export_onnx(classifier, 1, 12))
    budget = Budget(norm, {"linf": 0.12, "l2": 1.1}[norm])
    for answer in (lambda z: classifier((z * 64).round() / 64), session.predict):
        with torch.no_grad():
            asked = Asked(answer)
        x_adv = hop_skip_jump(nobody, x, y, budget, generator(), queries=400, answers=asked)
        assert accuracy(answer, x, y) > 0.9
        assert accuracy(answer, x_adv, y) < 0.4


@pytest.mark.parametrize(
    ("channels", "classes", "norm", "radius"), [(1, 3, "linf", 0.1), (1, 3, "l2", 0.8), (3, 2, "l2", 1.5)]
)
def test_at_least_as_strong_as_the_toolbox(channels, classes, norm, radius):
    classifier, x, y = problem(channels, classes)
    budget = Budget(norm, radius)
    estimator, asked = toolbox_estimator(classifier, tuple(x.shape[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the toolbox's own imports
        from art.attacks.evasion import HopSkipJump
    attack = HopSkipJump(
        estimator, norm=np.inf if norm == "linf" else 2, max_iter=2, init_eval=100, init_size=20, verbose=False
    )
    np.random.seed(0)
    theirs = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    # Where it finds no start it asks 21 times and once for all images before and after.
    started = int(((theirs - x).flatten(1).abs().amax(1) > 0).sum())
    assert started >= 40
    queries = (sum(asked) - 22 * (100 - started)) // started
    ours = hop_skip_jump(classifier, x, y, budget, generator(), queries=queries)
    assert accuracy(classifier, ours, y) < accuracy(classifier, x, y) - 0.02  # it is an attack
    assert accuracy(classifier, ours, y) <= accuracy(classifier, project(theirs, x, budget), y) + 0.01

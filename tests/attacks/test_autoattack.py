from functools import partial

import pytest
import torch
from torch import nn

from helpers.gratings import disturbed, gratings, hardened
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion import autoattack as module
from trilemma.attacks.evasion.apgd import apgd
from trilemma.attacks.evasion.autoattack import autoattack, variant
from trilemma.attacks.evasion.fab import fab
from trilemma.attacks.evasion.pgd import pgd
from trilemma.attacks.evasion.specs import AutoAttack
from trilemma.attacks.evasion.square import square
from trilemma.attacks.evasion.types import Access
from trilemma.models.classifier import Classifier

RADII = {2: 14 / 255, 3: 12 / 255, 5: 9 / 255}
quick = partial(autoattack, effort="quick")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def errors(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) != y


def problem(classes: int, images: int = 12):
    return hardened(classes), *gratings(images, num_classes=classes, seed=7)


def test_the_variants_have_names():
    assert [variant(classes) for classes in (2, 3, 4, 10)] == ["binary variant", "3-class variant", *["standard"] * 2]
    spec = AutoAttack(radii=(4 / 255,))
    assert spec.name(2) == "AutoAttack binary variant Linf"
    assert AutoAttack(radii=(0.5,), norm="l2", effort="quick").name(8) == "quick AutoAttack standard L2"


def parts_of(classes: int, **given):
    """The parts as (attack, the settings that are not defaults), without the model that ships."""
    parts = module._parts(linear(classes), **given)
    hidden = ("answers", "surrogates", "attack")
    return [(part.func, {name: v for name, v in part.keywords.items() if name not in hidden}) for part in parts]


def linear(classes: int) -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, classes)), classes)


@pytest.mark.parametrize(("effort", "steps", "queries"), [("full", 100, 5000), ("quick", 20, 1000)])
def test_the_parts_of_every_variant(effort, steps, queries):
    def parts(classes):
        return parts_of(classes, effort=effort, answers=None, surrogates=())

    ce, last = (apgd, {"steps": steps}), (square, {"queries": queries})
    assert parts(2) == [
        ce,
        (apgd, {"steps": steps, "loss": "margin", "restarts": 5}),
        (fab, {"steps": steps, "num_targets": 1}),
        last,
    ]
    assert parts(3) == [
        ce,
        (apgd, {"steps": steps, "loss": "dlr"}),
        (apgd, {"steps": steps, "loss": "margin", "num_targets": 2}),
        (fab, {"steps": steps, "num_targets": 2}),
        last,
    ]
    for classes, targets in ((4, 3), (10, 9), (100, 9)):
        assert parts(classes) == [
            ce,
            (apgd, {"steps": steps, "loss": "dlr", "num_targets": targets}),
            (fab, {"steps": steps, "num_targets": targets}),
            last,
        ]


def test_transfer_is_tried_from_other_models_and_from_a_twin_that_does_not_ship():
    classifier, surrogate = hardened(2), hardened(3)

    def sources(answers, surrogates):
        parts = module._parts(classifier, "full", answers, surrogates)
        return [list(part.keywords["surrogates"]) for part in parts if "surrogates" in part.keywords]

    assert sources(None, ()) == []
    assert sources(None, [surrogate]) == [[surrogate]]
    assert sources(classifier, ()) == [[classifier]]
    assert sources(classifier, [surrogate]) == [[classifier, surrogate]]


@pytest.mark.parametrize(("classes", "norm"), [(2, "linf"), (2, "l2"), (3, "linf"), (5, "l2")])
def test_at_least_as_strong_as_its_members(classes, norm):
    classifier, x, y = problem(classes)
    budget = Budget(norm, RADII[classes] if norm == "linf" else RADII[classes] * 9)
    broken = errors(classifier, quick(classifier, x, y, budget, generator()), y)
    assert 0 < broken.sum() < len(x)
    members = [
        partial(pgd, steps=20, restarts=2),
        partial(apgd, steps=20),
        partial(apgd, steps=20, loss="margin", restarts=2),
        partial(fab, steps=20),
        partial(square, queries=300),
    ]
    for member in members:
        assert broken.sum() >= errors(classifier, member(classifier, x, y, budget, generator(1)), y).sum()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_model_that_ships_is_judge(classes):
    classifier, x, y = problem(classes, images=24)
    budget, ships = Budget("linf", RADII[classes]), disturbed(classifier, amount=0.7)
    answers = Recorded(ships)
    against_twin = quick(classifier, x, y, budget, generator())
    against_shipped = quick(classifier, x, y, budget, generator(), answers=answers)
    assert errors(ships, against_shipped, y).sum() > errors(ships, against_twin, y).sum()
    assert (against_shipped - x).abs().max() <= budget.radius * (1 + 1e-5)
    assert len(answers.asked) > 500  # by Square too
    assert answers.asked[0] == len(x)


class Recorded:
    """A model that gives answers only, and how many images each question had."""

    def __init__(self, model):
        self.model = model
        self.asked: list[int] = []

    def __call__(self, x_BCHW):
        self.asked.append(len(x_BCHW))
        return self.model(x_BCHW)


def test_square_breaks_through_a_twin_without_gradients():
    ships, x, y = problem(2)
    layer = nn.Linear(256, 2)
    layer.weight.data.zero_()
    useless = Classifier(nn.Sequential(nn.Flatten(), layer), 2)
    budget = Budget("linf", 20 / 255)
    broken = errors(ships, quick(useless, x, y, budget, generator(), answers=ships), y).sum()
    assert broken > 0
    helped = quick(useless, x, y, budget, generator(), answers=ships, surrogates=[hardened(2)])
    assert errors(ships, helped, y).sum() >= broken


def test_no_image_depends_on_the_others():
    classifier, x, y = problem(3, images=9)
    classifier, x = classifier.double(), x.double()
    budget = Budget("linf", RADII[3])
    attack = AutoAttack(radii=(RADII[3],), effort="quick").make(Access(surrogates=(classifier,)))
    alone = attack(classifier, x[:6], y[:6], budget, generator())
    mixed = attack(classifier, torch.cat([x[6:9], x[3:6]]), torch.cat([y[6:9], y[3:6]]), budget, generator())
    assert torch.allclose(alone[3:], mixed[3:], atol=1e-9)
    assert not torch.equal(alone, x[:6])


@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_nothing_to_do(radius):
    classifier, x, y = problem(2)
    assert quick(classifier, x[:0], y[:0], Budget("l2", radius), generator()).shape == (0, 1, 16, 16)
    assert torch.equal(quick(classifier, x, y, Budget("l2", 0.0), generator()), x)

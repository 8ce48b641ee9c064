from functools import partial

import pytest
import torch

from helpers.gratings import disturbed, gratings, hardened
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.all_at_once import in_turn
from trilemma.attacks.evasion.geometry import random_start
from trilemma.attacks.evasion.losses import margin
from trilemma.attacks.evasion.mifgsm import mifgsm
from trilemma.attacks.evasion.pgd import pgd
from trilemma.attacks.evasion.transfer import transfer

BUDGET = Budget("linf", 14 / 255)
IMAGES = 48
driven = partial(pgd, steps=6, loss="margin", stop=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def problem():
    x, y = gratings(IMAGES, num_classes=3, seed=5)
    return hardened(3), x, y


def other_model(seed: int = 0, amount: float = 0.15):
    return disturbed(hardened(3), amount=amount, seed=seed)


def logits_of(model, x):
    with torch.no_grad():
        return model(x)


def errors(model, x, y):
    return logits_of(model, x).argmax(1) != y


def tinted(amount):
    """A part that darkens every image by a share of the budget, whatever the model."""
    return lambda classifier, x, y, budget, generator: (x - amount * budget.radius).clamp(0, 1)


def test_transferred_images_break_the_model_that_ships(problem):
    classifier, x, y = problem
    surrogate = other_model()
    x_adv = transfer(classifier, x, y, BUDGET, generator(), surrogates=[surrogate], attack=driven)
    noise = random_start(x, BUDGET, generator())
    assert errors(classifier, x_adv, y).sum() > errors(classifier, noise, y).sum() + 5
    assert (x_adv - x).abs().max() <= BUDGET.radius * (1 + 1e-5)


def test_only_the_model_that_ships_is_asked(problem):
    classifier, x, y = problem
    ships = other_model()

    class Untouched(type(classifier)):
        def forward(self, x_BCHW):
            raise AssertionError("the twin was asked")

    twin = Untouched(classifier.module, 3)
    x_adv = transfer(twin, x, y, BUDGET, generator(), surrogates=[classifier], attack=driven, answers=ships)
    assert errors(ships, x_adv, y).any()


def test_each_image_is_the_first_that_breaks_or_the_worst(problem):
    classifier, x, y = problem
    surrogates = [other_model(seed) for seed in range(3)]
    attack = partial(mifgsm, steps=5, stop=False)  # draws nothing, so it can be run again here
    x_adv = transfer(classifier, x, y, BUDGET, generator(), surrogates=surrogates, attack=attack)
    candidates = [x, *(attack(surrogate, x, y, BUDGET, generator()) for surrogate in surrogates)]
    logits = [logits_of(classifier, candidate) for candidate in candidates]
    seen = set()
    for i in range(IMAGES):
        broken = [int(z[i].argmax()) != int(y[i]) for z in logits]
        margins = [float(margin(z[i : i + 1], y[i : i + 1])) for z in logits]
        expected = broken.index(True) if any(broken) else margins.index(max(margins))
        seen.add((any(broken), expected))
        assert torch.equal(x_adv[i], candidates[expected][i])
    assert len({any_broken for any_broken, _ in seen}) == 2  # both rules were met
    assert len(seen) > 3


def test_several_surrogates_break_at_least_what_one_breaks(problem):
    classifier, x, y = problem
    surrogates = [other_model(seed) for seed in range(3)]
    attack = partial(mifgsm, steps=5, stop=False)
    one, three = (
        transfer(classifier, x, y, BUDGET, generator(), surrogates=chosen, attack=attack)
        for chosen in (surrogates[:1], surrogates)
    )
    assert (errors(classifier, three, y) >= errors(classifier, one, y)).all()


def test_surrogates_are_left_as_found(problem):
    classifier, x, y = problem
    surrogate = other_model()
    surrogate.train()
    surrogate.module[0].eval()
    flags = [module.training for module in surrogate.modules()]
    transfer(classifier, x, y, BUDGET, generator(), surrogates=[surrogate], attack=driven)
    assert [module.training for module in surrogate.modules()] == flags
    assert all(parameter.grad is None and parameter.requires_grad for parameter in surrogate.parameters())


@pytest.mark.parametrize("radius", [0.0, 0.05])
def test_nothing_to_do(problem, radius):
    classifier, x, y = problem
    budget = Budget("linf", radius)
    assert torch.equal(transfer(classifier, x, y, budget, generator(), surrogates=[], attack=driven), x)
    empty = transfer(classifier, x[:0], y[:0], budget, generator(), surrogates=[classifier], attack=driven)
    assert empty.shape == (0, 1, 16, 16)


# --- in turn --------------------------------------------------------------------------------------------------------


def test_in_turn_keeps_the_first_success(problem):
    classifier, x, y = problem
    strong = partial(pgd, steps=10)
    x_adv = in_turn([strong, tinted(1.0)], classifier, x, y, BUDGET, generator())
    first = in_turn([strong], classifier, x, y, BUDGET, generator())
    broken = errors(classifier, first, y)
    assert 0 < broken.sum() < IMAGES
    assert torch.equal(x_adv[broken], first[broken])


def test_in_turn_is_as_strong_as_each_part(problem):
    classifier, x, y = problem
    parts = [tinted(1.0), tinted(-1.0), partial(pgd, steps=4), partial(mifgsm, steps=4)]
    together = errors(classifier, in_turn(parts, classifier, x, y, BUDGET, generator()), y)
    for position in (0, 1, 3):  # those that draw nothing
        alone = parts[position](classifier, x, y, BUDGET, generator())
        assert (together >= errors(classifier, alone, y)).all()


def test_a_part_gets_broken_images_in_the_place_of_clean_ones(problem):
    classifier, x, y = problem
    given = []

    def look(classifier, x, y, budget, generator):
        given.append(x.clone())
        return x

    strong = partial(pgd, steps=10)
    x_adv = in_turn([strong, look], classifier, x, y, BUDGET, generator())
    broken = errors(classifier, x_adv, y)
    assert torch.equal(given[0][broken], x_adv[broken])
    assert torch.equal(given[0][~broken], x[~broken])  # whole, not what the first part left of it


def test_no_part_runs_once_every_image_is_broken(problem):
    classifier, x, y = problem

    def never(*_):
        raise AssertionError("no image stands")

    wrong = (logits_of(classifier, x).argmax(1) + 1) % 3
    assert torch.equal(in_turn([never], classifier, x, wrong, BUDGET, generator()), x)


def test_a_part_draws_the_same_whatever_ran_before(problem):
    classifier, x, y = problem

    def thirsty(classifier, x, y, budget, generator):
        torch.rand(int(x.sum()), generator=generator)
        return x

    def idle(classifier, x, y, budget, generator):
        return x

    after = [
        in_turn([before, partial(pgd, steps=3)], classifier, x, y, BUDGET, generator()) for before in (thirsty, idle)
    ]
    assert torch.equal(*after)


def test_no_image_depends_on_the_others(problem):
    classifier = problem[0].double()
    try:
        parts = [partial(pgd, steps=3, restarts=2), tinted(1.0), partial(pgd, steps=6, loss="margin")]
        x, y = problem[1][:8].double(), problem[2][:8]
        alone = in_turn(parts, classifier, x, y, BUDGET, generator())
        others, y_others = problem[1][8:16].double(), problem[2][8:16]
        for i in range(8):
            x_mixed, y_mixed = others.clone(), y_others.clone()
            x_mixed[i], y_mixed[i] = x[i], y[i]
            mixed = in_turn(parts, classifier, x_mixed, y_mixed, BUDGET, generator())
            assert torch.allclose(mixed[i], alone[i], atol=1e-9)
    finally:
        classifier.float()


def test_in_turn_believes_the_model_that_ships_and_takes_its_type(problem):
    classifier, x, y = problem
    ships = other_model(amount=0.5)

    def answers(x_BCHW):
        return ships(x_BCHW.float())

    twin = hardened(3).double()
    parts = [partial(mifgsm, steps=8), partial(transfer, surrogates=[twin], attack=driven, answers=answers)]
    x_adv = in_turn(parts, twin, x.double(), y, BUDGET, generator(), answers=answers)
    assert x_adv.dtype == torch.float64
    twin_only = mifgsm(classifier, x, y, BUDGET, generator(), steps=8)
    assert errors(ships, x_adv.float(), y).sum() > errors(ships, twin_only, y).sum()

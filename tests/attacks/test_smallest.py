import pytest
import torch

from helpers.smallest_problem import answered, grey, linear
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.smallest import Smallest, length


def standing(radius: float = 0.2, answers=None, num_images: int = 3, norm="linf"):
    classifier, x = linear(3), grey(num_images)
    y = answered(classifier, x)
    smallest = Smallest(classifier, x, y, Budget(norm, radius), answers=answers)
    return smallest, x, y, torch.arange(num_images)


def logits(y, excess):
    """Logits whose margin is `excess` on every image."""
    z = torch.zeros(len(y), 3, dtype=torch.float64)
    return z.scatter(1, ((y + 1) % 3)[:, None], torch.as_tensor(excess, dtype=torch.float64).expand(len(y))[:, None])


def test_nothing_was_found_at_first():
    smallest, x, _, everything = standing()
    assert torch.equal(smallest.active(), everything)
    assert torch.equal(smallest.images(), x)
    assert smallest.images() is not x
    assert smallest.distance_B.isinf().all()


def test_an_image_that_is_wrong_already_is_broken_as_it_is():
    classifier, x = linear(3), grey(3)
    y = answered(classifier, x)
    y[1] = (y[1] + 1) % 3
    smallest = Smallest(classifier, x, y, Budget("l2", 0.1))
    assert smallest.broken_B.tolist() == [False, True, False]
    assert torch.equal(smallest.images(), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_only_the_nearest_wrong_image_is_kept_and_only_one_inside_breaks(norm):
    smallest, x, y, everything = standing(0.3, norm=norm)
    step = torch.zeros_like(x)
    step[..., 0, 0] = 1.0
    stay, wrong = smallest.offer(everything, x + 0.4 * step, logits(y, 1.0))
    assert stay.all()
    assert wrong.all()
    smallest.offer(everything, x + 0.45 * step, logits(y, 1.0))  # wrong and farther
    smallest.offer(everything, x + 0.1 * step, logits(y, -1.0))  # right and nearer
    assert torch.allclose(smallest.distance_B, torch.tensor(0.4, dtype=torch.float64))
    assert torch.allclose(smallest.images(), x + 0.3 * step)  # into the budget
    stay, _ = smallest.offer(everything, x + 0.2 * step, logits(y, [1.0, -1.0, 1.0]))
    assert stay.tolist() == [False, True, False]
    assert smallest.active().tolist() == [1]
    assert torch.allclose(length(smallest.images() - x, norm), torch.tensor([0.2, 0.3, 0.2], dtype=torch.float64))


def test_the_model_that_ships_is_asked_only_where_its_word_matters():
    asked = []

    def ships(x):
        asked.append(len(x))
        return torch.zeros(len(x), 3).double()  # answers class 0

    smallest, x, y, everything = standing(0.2, answers=ships, num_images=4)
    y[:] = 0
    smallest.offer(everything, x, logits(y, -1.0))  # right
    smallest.offer(everything, (x + 0.3).clamp(0, 1), logits(y, 1.0))  # outside
    assert asked == []
    smallest.offer(everything, x + 0.1, logits(y, [1.0, -1.0, 1.0, 1.0]))
    assert asked == [3]


def test_where_it_disagrees_the_boundary_moves_for_that_record_alone():
    def ships(x):  # errs where the first pixel is bright
        return torch.stack([torch.full((len(x),), 0.6).double(), x[:, 0, 0, 0], torch.zeros(len(x)).double()], dim=1)

    classifier, x = linear(3), torch.full((2, 1, 6, 6), 0.5, dtype=torch.float64)
    y, everything = torch.zeros(2, dtype=torch.long), torch.arange(2)
    smallest = Smallest(classifier, x, y, Budget("linf", 0.3), answers=ships)
    moved = x.clone()
    moved[0, 0, 0, 0], moved[1, 0, 0, 0] = 0.55, 0.7
    stay, wrong = smallest.offer(everything, moved, logits(y, 0.25))
    assert stay.tolist() == [True, False]
    assert wrong.tolist() == [False, True]
    assert smallest.broken_B.tolist() == [False, True]
    assert 0.5 < smallest.lead_B[0] < 0.6
    assert smallest.lead_B[1] == 0
    # A margin within the lead no longer counts, one beyond it does.
    first = everything[:1]
    assert not smallest.offer(first, moved[:1], logits(y[:1], 0.4))[1].any()
    assert torch.allclose(smallest.gaps(first, logits(y[:1], 0.8)), 0.8 - smallest.lead_B[:1])
    before = smallest.lead_B[0].clone()
    smallest.offer(first, moved[:1], logits(y[:1], 0.8))
    assert smallest.lead_B[0] >= 2 * 0.8 > before
    moved[0, 0, 0, 0] = 0.65
    assert not smallest.offer(first, moved[:1], logits(y[:1], 2.0))[0].any()
    assert smallest.broken_B.all()


def test_an_answer_that_is_not_a_number_is_wrong():
    smallest, x, y, everything = standing()
    smallest.offer(everything, x + 0.1, torch.full((3, 3), float("nan"), dtype=torch.float64))
    assert smallest.broken_B.all()


def test_likeliest_wrong_classes():
    smallest, _, y, _ = standing()
    order = smallest.likeliest_wrong()
    assert order.shape == (3, 2)
    assert not (order == y[:, None]).any()
    z = smallest.clean_logits_BK
    assert (z.gather(1, order[:, :1]) >= z.gather(1, order[:, 1:])).all()
    assert torch.equal(smallest.likeliest_wrong(1), order[:, :1])
    assert torch.equal(smallest.likeliest_wrong(7), order)

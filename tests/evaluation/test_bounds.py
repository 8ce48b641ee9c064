"""A robust accuracy that something else shows to be too high is marked, and no other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from trilemma.evaluation.bounds import Known, known_from, marked
from trilemma.evaluation.measurement import Measurement

N = 600


def measured(accuracy: float, radius: float = 0.1, n: int = N, **fields) -> Measurement:
    return Measurement("robust_accuracy", accuracy, accuracy - 0.04, accuracy + 0.04, n, radius=radius, **fields)


def attack(accuracy: float, radius: float = 0.1, n: int = N) -> tuple[Measurement, ...]:
    return (
        measured(accuracy, radius, n),
        Measurement("sensitivity", 0.8, 0.7, 0.9, n, radius=radius),
        Measurement("robust_auroc", None, status="undefined", reason="one class", radius=radius),
    )


def why(own, *known: Known, norm="linf") -> str:
    first, *rest = marked("PGD", norm, own, known)
    for before, after in zip(own, (first, *rest), strict=True):
        assert after._replace(status=before.status, reason=before.reason) == before  # no number is changed
    assert all(m.status == first.status for m in rest if m.value is not None)
    assert all(m == before for before, m in zip(own[1:], rest, strict=True) if before.value is None)
    return first.reason if first.status == "bound" else ""


def test_another_attack_that_leaves_more_than_a_point_less():
    """Of 600 images 6 are a point, and 13 are more than that at the level of 1 %."""
    assert binom.sf(12, N, 0.01) < 0.01 < binom.sf(11, N, 0.01)
    own = attack(0.5)
    assert why(own, Known("AutoAttack", "linf", 0.1, 0.5 - 13 / N, N)) == "an upper bound: “AutoAttack” leaves less"
    assert why(own, Known("AutoAttack", "linf", 0.1, 0.5 - 12 / N, N)) == ""
    assert why(own, Known("AutoAttack", "linf", 0.1, 0.6, N)) == ""


def test_only_within_the_ball():
    own = attack(0.5)
    assert why(own, Known("FGSM", "linf", 0.2, 0.1, N)) == ""
    assert why(own, Known("FGSM", "l2", 0.1, 0.1, N)) == ""
    smaller = why(own, Known("FGSM", "linf", 0.05, 0.1, N))
    assert smaller == "an upper bound: “FGSM” leaves less within a smaller radius, 0.05"


def test_the_lowest_is_named():
    known = [Known("FGSM", "linf", 0.1, 0.4, N), Known("Square", "linf", 0.1, 0.2, N), Known("", "linf", 0.1, 0.3, 256)]
    assert why(attack(0.5), *known) == "an upper bound: “Square” leaves less"


@pytest.mark.parametrize(("left", "told"), [(90, True), (110, False), (125, False)])
def test_what_the_diagnostics_leave_of_their_sample_must_be_beyond_chance(left, told):
    """With 49 % as the truth, 105 of 256 or fewer are met once in a hundred times."""
    assert binom.cdf(106, 256, 0.49) < 0.01 < binom.cdf(108, 256, 0.49)
    reason = why(attack(0.5), Known("", "linf", 0.1, left / 256, 256))
    assert reason == ("an upper bound: the attacks of the diagnostics leave less" if told else "")


def test_every_radius_by_itself():
    own = (*attack(0.6, 0.1), *attack(0.5, 0.2))
    known = [Known("AutoAttack", "linf", 0.2, 0.1, N)]
    found = marked("PGD", "linf", own, known)
    assert [m.status for m in found] == ["ok", "ok", "undefined", "bound", "bound", "undefined"]


def test_what_is_known_from_measurements():
    own = (*attack(0.5), measured(0.2, source="other"), measured(0.1, client="A"))
    bound = Measurement("robust_accuracy_bound", 0.4, 0.3, 0.5, 256, radius=0.1)
    assert known_from("PGD", "linf", own) == [Known("PGD", "linf", 0.1, 0.5, N)]
    assert known_from("", "linf", [bound]) == [Known("", "linf", 0.1, 0.4, 256)]
    assert known_from("PGD", "linf", [measured(0.5)._replace(value=None)]) == []


@given(st.floats(0, 1), st.integers(1, 1000), st.integers(1, 1000))
def test_no_attack_marks_itself(accuracy, n, sample):
    own = attack(accuracy, n=n)
    assert why(own, *known_from("PGD", "linf", own), Known("", "linf", 0.1, accuracy, sample)) == ""

"""A robust accuracy that something else shows to be too high is marked, and no other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from trilemma.evaluation.bounds import Known, known_from, marked, told
from trilemma.evaluation.measurement import Measurement

N = 600


def measured(accuracy: float, radius: float = 0.1, n: int = N, **fields) -> Measurement:
    return Measurement("robust_accuracy", accuracy, accuracy - 0.04, accuracy + 0.04, n, radius=radius, **fields)


def attack(accuracy: float, radius: float = 0.1, n: int = N) -> tuple[Measurement, ...]:
    return (
        measured(accuracy, radius, n),
        Measurement("robust_accuracy_among_correct", min(1.0, 1.1 * accuracy), n=n, radius=radius),
        Measurement("attack_success_rate", max(0.0, 1 - 1.1 * accuracy), n=n, radius=radius),
        Measurement("sensitivity", 0.8, 0.7, 0.9, n, radius=radius),
        Measurement("above_majority", 0.0, n=n, unit="count", reason="no more than a constant", radius=radius),
        Measurement("robust_auroc", 0.7, 0.6, 0.8, n, radius=radius),
        measured(accuracy, radius, n, source="another artefact"),
    )


def by(label: str, left: float, radius: float = 0.1, norm="linf") -> Known:
    return Known(f"key of {label}", label, norm, radius, left, N)


def why(own, *known: Known, key="own", norm="linf") -> str:
    """The remark on an attack's robust accuracy, or ""; no number is changed, and nothing else is marked."""
    found = marked(key, "PGD", norm, own, known)
    added = [m for m in found if m.metric == "robust_accuracy_known"]
    kept = [m for m in found if m.metric != "robust_accuracy_known"]
    for before, after in zip(own, kept, strict=True):
        if after.status == "bound":
            assert after.metric in ("robust_accuracy", "robust_accuracy_among_correct") and after.source is None
            assert after._replace(status=before.status, reason=before.reason) == before
        else:
            assert after == before
    assert [m.status == "bound" for m in kept[:2]] == [bool(added)] * 2
    for m in added:
        assert m.value <= own[0].value and m.reason == kept[0].reason
        if not any(k.sample for k in known):
            assert m.value == min(k.left for k in known if k.norm == norm)
    return kept[0].reason


@pytest.mark.parametrize("n", [20, N])
def test_another_attack_that_leaves_more_than_a_point_less(n):
    """Of the same images of the same model: nothing is left to chance."""
    own = attack(0.5, n=n)
    assert why(own, by("AutoAttack", 0.489)) == "an upper bound: “AutoAttack” leaves less"
    assert why(own, by("AutoAttack", 0.491)) == why(own, by("AutoAttack", 0.6)) == why(own) == ""


def test_only_within_the_ball():
    own = attack(0.5)
    assert why(own, by("FGSM", 0.1, radius=0.2)) == why(own, by("FGSM", 0.1, norm="l2")) == ""
    smaller = why(own, by("FGSM", 0.1, radius=0.05))
    assert smaller == "an upper bound: “FGSM” leaves less within a smaller radius, 0.05"


def test_the_lowest_is_named():
    known = [by("FGSM", 0.4), by("Square", 0.2), Known("d", "", "linf", 0.1, 0.3, 256)]
    assert why(attack(0.5), *known) == "an upper bound: “Square” leaves less"


@pytest.mark.parametrize(("more", "marks"), [(7, False), (8, True)])
def test_what_the_diagnostics_leave_of_their_images_is_compared_with_what_the_attack_leaves_of_them(more, marks):
    """8 of 256 are more than a point, whatever is left of all images."""
    diagnosed = Known("d", "", "linf", 0.1, 0.4, 256, {"own": 0.4 + more / 256, "other": 0.9})
    reason = why(attack(0.5), diagnosed)
    assert reason == ("an upper bound: the attacks of the diagnostics leave less" if marks else "")


def test_the_least_is_never_more_than_was_measured():
    """On the sample the attack leaves 46 % and the diagnostics 42 %: 4 points less than its 40 % of all are left."""
    diagnosed = Known("d", "", "linf", 0.1, 0.42, 256, {"own": 0.46})
    found = {m.metric: m.value for m in marked("own", "PGD", "linf", attack(0.4), [diagnosed])}
    assert found["robust_accuracy_known"] == pytest.approx(0.36)
    smaller = {m.metric: m.value for m in marked("own", "PGD", "linf", attack(0.9, 0.2), [diagnosed])}
    assert smaller["robust_accuracy_known"] == pytest.approx(0.42)


def test_what_an_attack_leaves_of_them_within_another_radius_says_nothing():
    diagnosed = Known("d", "", "linf", 0.1, 0.4, 256, {"own": 0.5})
    assert why(attack(0.5), diagnosed) and not why(attack(0.0, radius=0.2), diagnosed)
    assert why(attack(0.6, radius=0.2), diagnosed).endswith("within a smaller radius, 0.1")


@pytest.mark.parametrize(("left", "marks"), [(90, True), (110, False), (125, False)])
def test_where_that_is_not_known_it_must_be_less_beyond_chance(left, marks):
    """With 49 % as the truth, 106 of 256 or fewer are met once in a hundred times."""
    assert binom.cdf(106, 256, 0.49) < 0.01 < binom.cdf(108, 256, 0.49)
    assert bool(why(attack(0.5), Known("d", "", "linf", 0.1, left / 256, 256, {"other": 0.9}))) == marks


def test_every_radius_by_itself():
    own = (*attack(0.6, 0.1), *attack(0.5, 0.2))
    found = marked("own", "PGD", "linf", own, [by("AutoAttack", 0.1, radius=0.2)])
    assert [m.radius for m in found if m.status == "bound"] == [0.2] * 2


def test_what_is_known_from_measurements():
    own = (*attack(0.5), measured(0.1, client="A"))
    assert known_from("key", "PGD", "linf", own) == [Known("key", "PGD", "linf", 0.1, 0.5, N)]
    bound = Measurement("robust_accuracy_bound", 0.4, 0.3, 0.5, 256, radius=0.1)
    of_pgd = Measurement("robust_accuracy_on_sample", 0.45, n=256, radius=0.1, source="key")
    assert known_from("d", "", "linf", [bound, of_pgd]) == [Known("d", "", "linf", 0.1, 0.4, 256, {"key": 0.45})]
    assert told([bound, of_pgd]) == (bound,)
    assert known_from("key", "PGD", "linf", [measured(0.5)._replace(value=None)]) == []


def test_what_has_no_value_gets_none():
    own = tuple(m._replace(value=None, status="undefined", reason="no image") for m in attack(0.5))
    assert marked("own", "PGD", "linf", own, [by("FGSM", 0.0)]) == own


@given(st.floats(0, 1), st.integers(1, 1000), st.integers(1, 1000))
def test_no_attack_marks_itself(accuracy, n, sample):
    own = attack(accuracy, n=n)
    assert why(own, *known_from("own", "PGD", "linf", own), Known("d", "", "linf", 0.1, accuracy, sample)) == ""

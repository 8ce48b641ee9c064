import numpy as np
import pytest
from sklearn import metrics as sk

from trilemma.evaluation.clean import clean_measurements
from trilemma.evaluation.intervals import wilson

NAMES = [
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "mcc",
    "sensitivity",
    "specificity",
    "expected_calibration_error",
    "majority_accuracy",
]


def _case(num_classes=2, n=200, seed=0):
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(num_classes, size=n)
    logits_NK = rng.normal(size=(n, num_classes)).astype(np.float32)
    logits_NK[np.arange(n), labels_N] += 1.0
    return logits_NK, labels_N


def _measure(logits_NK, labels_N, units_N=None, client_N=None, clients=("a", "b"), seed=0):
    n = len(labels_N)
    units_N = np.arange(n) if units_N is None else units_N
    client_N = np.arange(n) % len(clients) if client_N is None else client_N
    found = clean_measurements(logits_NK, labels_N, units_N, client_N, clients, seed)
    return {(m.metric, m.client): m for m in found}, found


@pytest.mark.parametrize("num_classes", [2, 3])
def test_every_metric_has_its_value_its_interval_and_its_n(num_classes):
    logits_NK, labels_N = _case(num_classes)
    by_name, found = _measure(logits_NK, labels_N)
    assert [m.metric for m in found if m.client is None] == NAMES
    assert len(by_name) == len(found) == len(NAMES) + 2 * 3
    for m in found:
        assert m.status == "ok" and m.reason == "" and m.radius is None and m.split == "test"
        assert m.low <= m.value <= m.high and m.n > 0
    answers = logits_NK.argmax(1)
    assert by_name["accuracy", None].value == pytest.approx(sk.accuracy_score(labels_N, answers))
    assert by_name["mcc", None].value == pytest.approx(sk.matthews_corrcoef(labels_N, answers))
    assert by_name["mcc", None].unit == "coefficient"
    assert by_name["majority_accuracy", None].value == np.bincount(labels_N).max() / len(labels_N)
    if num_classes == 2:
        assert by_name["sensitivity", None].value == pytest.approx(sk.recall_score(labels_N, answers))
        assert by_name["sensitivity", None].n == labels_N.sum()
        assert by_name["auroc", None].value == pytest.approx(
            sk.roc_auc_score(labels_N, logits_NK[:, 1] - logits_NK[:, 0])
        )


def test_accuracy_has_wilsons_interval():
    logits_NK, labels_N = _case()
    accuracy = _measure(logits_NK, labels_N)[0]["accuracy", None]
    assert (accuracy.low, accuracy.high) == wilson(int((logits_NK.argmax(1) == labels_N).sum()), 200)


def test_the_bootstrap_of_auroc_is_near_its_known_spread():
    # Hanley and McNeil (1982): the standard error of an AUROC A with n1 and n2 records.
    logits_NK, labels_N = _case(n=400)
    auroc = _measure(logits_NK, labels_N)[0]["auroc", None]
    a, n1, n2 = auroc.value, labels_N.sum(), (1 - labels_N).sum()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + (n1 - 1) * (q1 - a * a) + (n2 - 1) * (q2 - a * a)) / (n1 * n2))
    assert auroc.high - auroc.low == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_repeated_images_of_a_patient_do_not_narrow_an_interval():
    logits_NK, labels_N = _case(3, n=80)
    once = _measure(logits_NK, labels_N)[0]
    patients = np.repeat(np.arange(80), 4)
    often = _measure(np.repeat(logits_NK, 4, 0), np.repeat(labels_N, 4), patients, client_N=np.zeros(320))[0]
    for name in NAMES:
        a, b = once[name, None], often[name, None]
        assert b.value == pytest.approx(a.value)
        assert b.high - b.low == pytest.approx(a.high - a.low, rel=0.12)
        assert (a.n, b.n) in ((80, 320), (a.n, 4 * a.n))


def test_the_worst_client_is_the_one_with_the_lowest_accuracy():
    logits_NK, labels_N = _case()
    client_N = np.arange(200) % 2
    wrong = np.flatnonzero(client_N == 1)[:60]
    logits_NK[wrong] = -logits_NK[wrong]
    by_name, _ = _measure(logits_NK, labels_N, client_N=client_N)
    for metric in ("accuracy", "auroc"):
        assert by_name[metric, "worst"] == by_name[metric, "b"]._replace(client="worst")
    assert by_name["accuracy", "b"].value < by_name["accuracy", "a"].value
    assert by_name["accuracy", "b"].n == 100


def test_a_client_without_records_is_undefined_and_never_the_worst():
    logits_NK, labels_N = _case()
    by_name, _ = _measure(logits_NK, labels_N, clients=("a", "b", "empty"), client_N=np.arange(200) % 2)
    empty = by_name["accuracy", "empty"]
    assert empty.value is None and empty.status == "undefined" and empty.n == 0 and "no test record" in empty.reason
    assert by_name["auroc", "empty"].value is None
    assert by_name["accuracy", "worst"].value is not None


def test_one_class_only_is_undefined_where_two_are_needed():
    logits_NK, labels_N = _case(3)
    by_name, _ = _measure(logits_NK, np.zeros_like(labels_N))
    for name in ("auroc", "mcc", "balanced_accuracy", "sensitivity"):
        m = by_name[name, None]
        assert (m.value, m.low, m.high, m.status) == (None, None, None, "undefined")
        assert m.reason
    assert by_name["auroc", None].reason == "no record of class 1, 2"
    assert by_name["accuracy", None].status == "ok"


def test_a_rare_class_that_most_draws_miss_has_a_value_without_an_interval():
    logits_NK, labels_N = _case(2, n=50)
    labels_N[:] = 0
    labels_N[7] = 1
    units_N = np.arange(50)
    units_N[:40] = 0  # 11 patients, of whom a draw often misses the one who matters
    auroc = _measure(logits_NK, labels_N, units_N, client_N=np.zeros(50))[0]["auroc", None]
    assert auroc.value is not None and auroc.status == "ok"


def test_answers_that_are_not_finite_are_wrong_and_have_no_ranking():
    logits_NK, labels_N = _case()
    logits_NK[:50] = np.nan
    by_name, _ = _measure(logits_NK, labels_N)
    expected = (logits_NK[50:].argmax(1) == labels_N[50:]).sum() / 200
    assert by_name["accuracy", None].value == pytest.approx(expected)
    for name in ("auroc", "expected_calibration_error"):
        assert by_name[name, None].value is None
        assert by_name[name, None].reason == "the answers to 50 of 200 images are not finite"


def test_no_records_give_no_numbers():
    _, found = _measure(np.zeros((0, 2), np.float32), np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))
    assert {m.status for m in found} == {"undefined"}
    assert all(m.value is None and m.reason for m in found)


def test_the_seed_decides_the_bootstrap():
    logits_NK, labels_N = _case(3)
    first, again, other = (_measure(logits_NK, labels_N, seed=seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [m.value for m in first] == [m.value for m in other]

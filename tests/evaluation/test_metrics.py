import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from trilemma.evaluation import metrics


def _case(seed, n=120, num_classes=3, ties=False):
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(num_classes, size=n)
    labels_N[:num_classes] = np.arange(num_classes)
    logits_NK = rng.normal(size=(n, num_classes)).astype(np.float32)
    logits_NK[np.arange(n), labels_N] += 0.7
    if ties:
        logits_NK = np.round(logits_NK)
    weights_RN = rng.integers(0, 4, size=(5, n)).astype(np.float64)
    weights_RN[:, :num_classes] += 1
    weights_RN[0] = 1
    return logits_NK, labels_N, weights_RN


def _table(logits_NK, labels_N, weights_RN):
    return metrics.confusion(metrics.predictions(logits_NK), labels_N, logits_NK.shape[1], weights_RN)


cases = pytest.mark.parametrize("num_classes", [2, 3, 7])
seeds = pytest.mark.parametrize("seed", range(4))


@cases
@seeds
def test_confusion_metrics_agree_with_scikit_learn(seed, num_classes):
    logits_NK, y, weights_RN = _case(seed, num_classes=num_classes)
    answers = metrics.predictions(logits_NK)
    table = _table(logits_NK, y, weights_RN)
    for r, w in enumerate(weights_RN):
        assert metrics.accuracy(table)[r] == pytest.approx(sk.accuracy_score(y, answers, sample_weight=w))
        assert metrics.balanced_accuracy(table)[r] == pytest.approx(
            sk.balanced_accuracy_score(y, answers, sample_weight=w)
        )
        assert metrics.mcc(table)[r] == pytest.approx(sk.matthews_corrcoef(y, answers, sample_weight=w))
        average = "binary" if num_classes == 2 else "macro"
        assert metrics.sensitivity(table)[r] == pytest.approx(
            sk.recall_score(y, answers, sample_weight=w, average=average)
        )
        rest = sk.multilabel_confusion_matrix(y, answers, sample_weight=w)
        specificities = rest[:, 0, 0] / rest[:, 0].sum(1)
        expected = specificities[1] if num_classes == 2 else specificities.mean()
        assert metrics.specificity(table)[r] == pytest.approx(expected)


@cases
@seeds
@pytest.mark.parametrize("ties", [False, True])
def test_auroc_agrees_with_scikit_learn(seed, num_classes, ties):
    logits_NK, y, weights_RN = _case(seed, num_classes=num_classes, ties=ties)
    scores = metrics.probabilities(logits_NK)
    got_R = metrics.auroc(logits_NK, y, weights_RN)
    for got, w in zip(got_R, weights_RN, strict=True):
        if num_classes == 2:
            expected = sk.roc_auc_score(y, logits_NK[:, 1] - logits_NK[:, 0], sample_weight=w)
        else:
            expected = np.mean([sk.roc_auc_score(y == k, scores[:, k], sample_weight=w) for k in range(num_classes)])
        assert got == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(
    scores=st.lists(st.integers(-3, 3), min_size=2, max_size=12),
    data=st.data(),
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(scores, data):
    labels = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    logits_NK = np.stack([np.zeros(len(scores)), np.array(scores)], axis=1)
    pairs = [
        (a, b) for a, la in zip(scores, labels, strict=True) for b, lb in zip(scores, labels, strict=True) if la > lb
    ]
    got = metrics.auroc(logits_NK, np.array(labels).astype(int), np.ones((1, len(scores))))[0]
    if not pairs:
        assert np.isnan(got)
    else:
        assert got == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))


@cases
def test_whole_weights_are_repeated_records(num_classes):
    logits_NK, y, weights_RN = _case(3, num_classes=num_classes)
    index = np.repeat(np.arange(len(y)), weights_RN[1].astype(int))
    ones = np.ones((1, len(index)))
    for score in (metrics.auroc, metrics.expected_calibration_error):
        assert score(logits_NK, y, weights_RN[1:2])[0] == pytest.approx(score(logits_NK[index], y[index], ones)[0])
    weighted, repeated = _table(logits_NK, y, weights_RN[1:2]), _table(logits_NK[index], y[index], ones)
    np.testing.assert_allclose(weighted, repeated)


@seeds
def test_calibration_error_agrees_with_a_loop(seed):
    logits_NK, y, weights_RN = _case(seed)
    confidence = metrics.probabilities(logits_NK).max(1)
    correct = metrics.predictions(logits_NK) == y
    for r, w in enumerate(weights_RN):
        error = 0.0
        for low in range(15):
            mine = (confidence > low / 15) & (confidence <= (low + 1) / 15)
            if w[mine].sum():
                gap = abs(np.average(confidence[mine], weights=w[mine]) - np.average(correct[mine], weights=w[mine]))
                error += w[mine].sum() / w.sum() * gap
        assert metrics.expected_calibration_error(logits_NK, y, weights_RN)[r] == pytest.approx(error)


def test_calibration_error_by_hand():
    # Four answers with confidence 0.75 of which two are right: |0.75 - 0.5|.
    logits_NK = np.log(np.array([[0.75, 0.25]] * 4))
    error = metrics.expected_calibration_error(logits_NK, np.array([0, 0, 1, 1]), np.ones((1, 4)))
    assert error[0] == pytest.approx(0.25)


def test_matthews_coefficient_by_hand():
    # 6 true positives, 3 true negatives, 1 false positive, 2 false negatives: (6*3 - 1*2) / sqrt(7*8*4*5).
    y = np.array([1] * 8 + [0] * 4)
    answers = np.array([1] * 6 + [0] * 2 + [1] + [0] * 3)
    table = metrics.confusion(answers, y, 2, np.ones((1, 12)))
    assert metrics.mcc(table)[0] == pytest.approx(16 / np.sqrt(7 * 8 * 4 * 5))


def test_a_constant_answer_has_no_correlation_and_half_the_balanced_accuracy():
    y = np.array([0, 0, 1, 1, 1])
    logits_NK = np.tile([0.0, 1.0], (5, 1))
    table = _table(logits_NK, y, np.ones((1, 5)))
    assert metrics.mcc(table)[0] == 0
    assert metrics.balanced_accuracy(table)[0] == 0.5
    assert metrics.auroc(logits_NK, y, np.ones((1, 5)))[0] == 0.5
    assert (metrics.sensitivity(table)[0], metrics.specificity(table)[0]) == (1, 0)


@cases
def test_an_absent_class_is_undefined_and_not_zero(num_classes):
    logits_NK, y, _ = _case(0, num_classes=num_classes)
    y[:] = 0
    ones = np.ones((1, len(y)))
    table = _table(logits_NK, y, ones)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undefined = [metrics.balanced_accuracy(table), metrics.mcc(table), metrics.auroc(logits_NK, y, ones)]
        undefined.append(metrics.sensitivity(table))
    assert all(np.isnan(value[0]) for value in undefined)
    assert not np.isnan(metrics.accuracy(table)[0])


def test_no_records_at_all_are_undefined():
    logits_NK, y, ones = np.zeros((0, 3)), np.zeros(0, dtype=int), np.ones((1, 0))
    assert np.isnan(metrics.accuracy(_table(logits_NK, y, ones))[0])
    assert np.isnan(metrics.auroc(logits_NK, y, ones)[0])


def test_an_answer_that_is_not_a_number_is_wrong_for_everyone():
    logits_NK = np.array([[np.nan, 1.0], [0.0, np.inf], [5.0, np.nan], [-np.inf, -np.inf]])
    assert metrics.predictions(logits_NK).tolist() == [2, 1, 2, 0]
    y = np.array([1, 1, 0, 0])
    table = _table(logits_NK, y, np.ones((1, 4)))
    assert metrics.accuracy(table)[0] == 0.5
    assert (metrics.sensitivity(table)[0], metrics.specificity(table)[0]) == (0.5, 0.5)


def test_the_majority_class():
    assert metrics.majority_class(np.array([2, 1, 2, 0])) == 2
    assert metrics.majority_class(np.array([1, 0])) == 0
    assert metrics.majority_class(np.array([], dtype=int)) == 0

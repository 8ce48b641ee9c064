"""Public shares of the classes make a model answer as if all were equally frequent, with privacy and without."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.small_problem import stripes
from helpers.tiny_federation import CPU, DP, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.data.records import Dataset
from trilemma.errors import UserError
from trilemma.federation import local_training
from trilemma.federation.local_training import load_model
from trilemma.federation.training import prepare

#: Share of the second class among the images that are trained on.
RARE = 0.15


def unbalanced() -> Dataset:
    """Hardly any striped images to train on, so faint that many look like the others; as many of both to test."""
    records = stripes(800, num_classes=2, size=8)
    faint = (128 + 0.35 * (records.images_NCHW.astype(float) - 128)).round().astype(np.uint8)
    noise = np.random.default_rng(0).normal(scale=20, size=faint.shape)
    images = (faint + noise).clip(0, 255).round().astype(np.uint8)
    labels = records.labels_N
    rare, usual = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    train = np.sort(np.concatenate([rare[:30], usual[:170]]))
    test = np.sort(np.concatenate([rare[100:250], usual[180:330]]))
    noisy = replace(records, images_NCHW=images)
    split = {"train": noisy.subset(train), "val": noisy.subset(test[:20]), "test": noisy.subset(test)}
    return Dataset("faint", ("flat", "lying"), ("everywhere",), *split.values(), True, "drawn here", "f1")


@pytest.fixture(scope="module")
def dataset():
    return unbalanced()


def answered_as_rare(dataset, shares) -> float:
    """The share of balanced test images that a small training takes for the rare class."""
    local = {"batch_size": 50, "epochs": 1, "class_shares": shares}
    federation = tiny_federation(dataset, partition={"kind": "iid", "num_clients": 2}, local=local, rounds=20)
    state = trained_state(federation)
    load_model(federation.classifier, state.model_P, state.buffers_Q)
    with torch.no_grad():
        return float((federation.classifier.eval()(dataset.test.x()).argmax(1) == 1).double().mean())


def test_decisions_move_towards_balance(dataset):
    assert (dataset.train.labels_N == 1).mean() == RARE and (dataset.test.labels_N == 1).mean() == 0.5
    plain, balanced, equal = (answered_as_rare(dataset, shares) for shares in (None, (1 - RARE, RARE), (0.5, 0.5)))
    assert plain < 0.1 and balanced == pytest.approx(0.5, abs=0.1)
    assert equal == pytest.approx(plain, abs=0.05)  # negative control: shares that say nothing change nothing


def test_a_private_training_has_the_adjusted_loss(dataset, monkeypatch):
    """Each unit's gradient is that of its own adjusted loss: what is clipped and noised is nothing else."""
    seen = []
    real = local_training.unit_gradient_sum

    def watched(plan, classifier, loss, views, sizes_U, clip):
        seen.append(loss)
        return real(plan, classifier, loss, views, sizes_U, clip)

    monkeypatch.setattr(local_training, "unit_gradient_sum", watched)
    shares = (1 - RARE, RARE)
    federation = tiny_federation(
        dataset, partition={"kind": "iid", "num_clients": 2}, privacy=DP, rounds=1,
        local={"batch_size": 20, "steps": 1, "class_shares": shares},
    )  # fmt: skip
    trained_state(federation)
    logits_BVK, y_B = torch.randn(5, 1, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1])
    expected_B = torch.nn.functional.cross_entropy(logits_BVK[:, 0] + torch.tensor(shares).log(), y_B, reduction="none")
    assert seen
    for loss in seen:
        torch.testing.assert_close(loss(logits_BVK, y_B), expected_B)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.25, 0.25, 0.25, 0.25)])
def test_shares_of_other_classes_are_refused_before_anything_is_trained(shares):
    data = tiny_dataset()
    with pytest.raises(UserError, match=f"has {len(shares)} numbers, and stripes has 3 classes") as caught:
        prepare(tiny_spec(local={"batch_size": 16, "steps": 1, "class_shares": shares}), data, CPU)
    assert caught.value.where == "local.class_shares" and "flat, lying, upright" in caught.value.remedy
    prepare(tiny_spec(local={"batch_size": 16, "steps": 1, "class_shares": (0.2, 0.3, 0.5)}), data, CPU)


@pytest.mark.parametrize("shares", [(0.5, 0.6, 0.1), (0.2, 0.2), (1.0,), (0.0, 1.0), (-0.5, 1.5), (0.5, float("nan"))])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match=r"class_shares"):
        tiny_spec(local={"class_shares": shares})


def test_rounded_shares_will_do_and_are_named():
    assert tiny_spec(local={"class_shares": (0.333, 0.333, 0.333)}).local.label.endswith(", balanced")
    assert "balanced" not in tiny_spec().local.label

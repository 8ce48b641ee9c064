"""What every train-time threat on data promises."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.attacks.poisoning.label_flip import label_flip
from trilemma.attacks.poisoning.specs import AdversarialSamples, LabelFlip, NoThreat, ThreatSpec
from trilemma.data.records import Records
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.vector import get_buffers, get_params

CLASSES = 3
THREATS = [
    NoThreat(),
    LabelFlip(num_malicious=1),
    LabelFlip(num_malicious=1, mode="next", share=0.3),
    AdversarialSamples(num_malicious=1, steps=2),
    AdversarialSamples(num_malicious=1, share=1.0, norm="l2", radius=0.5, steps=2),
    AdversarialSamples(num_malicious=1, share=0.4, radius=2.6 / 255, steps=2),
]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.label)
every_dtype = pytest.mark.parametrize("dtype", [np.uint8, np.float32])


def make_records(dtype=np.uint8, num: int = 17, channels: int = 1) -> Records:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num, channels, 16, 16)).astype(np.uint8)
    if dtype == np.float32:
        images = images.astype(np.float32) / 255
    labels = rng.integers(0, CLASSES, num)
    return Records(
        images, labels, np.arange(num) // 2, np.zeros(num, np.int64), np.array([f"r{i}" for i in range(num)])
    )


def poisoned(threat, records, seed=0, classifier=None):
    classifier = classifier or Resnet9(width=4).make(records.images_NCHW.shape[1], 16, CLASSES, seed=1)
    return threat.poison(records, classifier, CLASSES, torch.Generator().manual_seed(seed))


def test_every_member_is_here():
    assert set(get_args(get_args(ThreatSpec)[0])) == {type(threat) for threat in THREATS}


@every_threat
@every_dtype
def test_only_what_it_says_changes(threat, dtype):
    records = make_records(dtype)
    images, labels = records.images_NCHW.copy(), records.labels_N.copy()
    result = poisoned(threat, records)
    assert np.array_equal(records.images_NCHW, images)
    assert np.array_equal(records.labels_N, labels)
    for name in ("patients_N", "sites_N", "names_N"):
        assert np.array_equal(getattr(result, name), getattr(records, name))
    assert result.images_NCHW.dtype == dtype
    assert result.images_NCHW.shape == images.shape
    assert result.labels_N.dtype == labels.dtype
    assert ((result.labels_N >= 0) & (result.labels_N < CLASSES)).all()
    changed_images = (result.images_NCHW != images).any((1, 2, 3))
    changed_labels = result.labels_N != labels
    expected = round(getattr(threat, "share", 0) * len(records))
    if threat.kind == "adversarial_samples":
        assert changed_images.sum() == expected
        assert not (changed_labels & ~changed_images).any()
    else:
        assert not changed_images.any()
        assert changed_labels.sum() == expected


@every_threat
@every_dtype
def test_the_generator_alone_decides(threat, dtype):
    records = make_records(dtype)
    first = poisoned(threat, records)
    torch.manual_seed(3)
    again = poisoned(threat, records)
    assert np.array_equal(first.images_NCHW, again.images_NCHW)
    assert np.array_equal(first.labels_N, again.labels_N)
    other = poisoned(threat, records, seed=1)
    same = np.array_equal(first.images_NCHW, other.images_NCHW) and np.array_equal(first.labels_N, other.labels_N)
    assert same == (threat.kind == "none")


@every_threat
def test_the_classifier_is_left_as_found(threat):
    classifier = Resnet9(width=4, norm="batch").make(1, 16, CLASSES, seed=1)
    params, buffers = get_params(classifier), get_buffers(classifier)
    poisoned(threat, make_records(), classifier=classifier)
    assert classifier.training
    assert all(p.requires_grad and p.grad is None for p in classifier.parameters())
    assert torch.equal(get_params(classifier), params)
    assert torch.equal(get_buffers(classifier), buffers)


@pytest.mark.parametrize("threat", [t for t in THREATS if t.kind == "adversarial_samples"], ids=lambda t: t.label)
@every_dtype
@pytest.mark.parametrize("channels", [1, 3])
def test_adversarial_samples_stay_in_the_budget_and_carry_the_models_answer(threat, dtype, channels):
    records = make_records(dtype, channels=channels)
    classifier = Resnet9(width=4).make(channels, 16, CLASSES, seed=1)
    result = poisoned(threat, records, classifier=classifier)
    changed = (result.images_NCHW != records.images_NCHW).any((1, 2, 3))
    x, x_adv = records.x(changed), result.x(changed)
    delta = (x_adv - x).flatten(1)
    length = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
    assert (length <= threat.radius + 1e-5).all()
    assert length.max() > threat.radius * 0.7  # an 8-bit image loses at most the part of a level
    with torch.no_grad():
        assert np.array_equal(classifier.eval()(x_adv).argmax(1).numpy(), result.labels_N[changed])
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_whole_levels_are_used_in_full():
    # Every level from 0 to 255 once; the closed form against a linear model is 8 levels towards the other class.
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    nothing = np.zeros(1, np.int64)
    records = Records(images, nothing, nothing, nothing, nothing)
    layer = nn.Linear(256, 2)
    layer.weight.data = torch.stack([torch.zeros(256), torch.tensor([1e-3, -1e-3]).repeat(128)])
    classifier = Classifier(nn.Sequential(nn.Flatten(), layer), 2)
    threat = AdversarialSamples(num_malicious=1, share=1.0, radius="8/255", steps=4)
    result = threat.poison(records, classifier, 2, torch.Generator().manual_seed(0))
    expected = (images.astype(int).ravel() + np.array([8, -8] * 128)).clip(0, 255)
    assert np.array_equal(result.images_NCHW.ravel(), expected)


def test_radius_0_keeps_the_images_and_takes_the_models_answers():
    records = make_records()
    classifier = Resnet9(width=4).make(1, 16, CLASSES, seed=1)
    result = poisoned(AdversarialSamples(num_malicious=1, share=1.0, radius=0), records, classifier=classifier)
    assert np.array_equal(result.images_NCHW, records.images_NCHW)
    with torch.no_grad():
        assert np.array_equal(result.labels_N, classifier.eval()(records.x()).argmax(1).numpy())


def test_more_records_than_one_batch(monkeypatch):
    import trilemma.attacks.poisoning.adversarial_samples as room

    threat, records = AdversarialSamples(num_malicious=1, share=0.7, steps=1), make_records()
    monkeypatch.setattr(room, "_BATCH_SIZE", 5)
    result = poisoned(threat, records)
    assert (result.images_NCHW != records.images_NCHW).any((1, 2, 3)).sum() == 12


@settings(deadline=None, max_examples=30)
@given(num=st.integers(0, 40), classes=st.integers(2, 6), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_flips_are_exact_for_any_share(num, classes, share, seed):
    labels = np.random.default_rng(seed).integers(0, classes, num)
    nothing = np.zeros(num, np.int64)
    records = Records(np.zeros((num, 1, 1, 1), np.uint8), labels, nothing, nothing, nothing)
    for mode in ("random", "next"):
        flipped = label_flip(records, classes, torch.Generator().manual_seed(seed), mode=mode, share=share).labels_N
        assert (flipped != labels).sum() == round(share * num)
        assert ((flipped >= 0) & (flipped < classes)).all()
        if mode == "next":
            assert set(((flipped - labels) % classes).tolist()) <= {0, 1}


def test_random_flips_reach_every_other_class_equally():
    num = 6000
    nothing = np.zeros(num, np.int64)
    records = Records(np.zeros((num, 1, 1, 1), np.uint8), nothing + 1, nothing, nothing, nothing)
    flipped = label_flip(records, 4, torch.Generator().manual_seed(0)).labels_N
    counts = np.bincount(flipped, minlength=4)
    assert counts[1] == 0
    assert np.abs(counts[[0, 2, 3]] - num / 3).max() < 5 * np.sqrt(num * 2 / 9)


def test_records_that_a_round_does_not_draw_are_not_worth_the_work():
    threat = AdversarialSamples(num_malicious=1, share=0.5, radius=8 / 255, steps=1)
    records, classifier = make_records(num=20), Resnet9(width=4).make(1, 16, CLASSES, seed=0)
    draws = [torch.Generator().manual_seed(0) for _ in range(3)]
    everything = threat.poison(records, classifier, CLASSES, draws[0])
    touched = np.flatnonzero((everything.images_NCHW != records.images_NCHW).any((1, 2, 3)))
    drawn = np.sort(np.concatenate([touched[:3], np.setdiff1d(np.arange(20), touched)[:2]]))
    some = threat.poison(records, classifier, CLASSES, draws[1], drawn)
    changed = (some.images_NCHW != records.images_NCHW).any((1, 2, 3))
    assert np.flatnonzero(changed).tolist() == touched[:3].tolist()
    again = threat.poison(records, classifier, CLASSES, draws[2], np.arange(20))
    assert np.array_equal(again.images_NCHW, everything.images_NCHW)

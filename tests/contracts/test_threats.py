"""What every train-time threat on data promises."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.attacks.poisoning.label_flip import label_flip
from trilemma.attacks.poisoning.on_records import AdversarialSamples, Backdoor, InflatedCount, LabelFlip
from trilemma.attacks.poisoning.specs import NoThreat, ThreatSpec
from trilemma.attacks.poisoning.threat import Rounds, Threat
from trilemma.attacks.poisoning.triggers import Blended, Patch, SideMarker, Vignette, part_of, triggered
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
    LabelFlip(num_malicious=1, mode="targeted", target=1),
    LabelFlip(num_malicious=1, mode="targeted", target=1, source=2, share=0.5),
    LabelFlip(num_malicious=1, source=0),
    Backdoor(num_malicious=1),
    Backdoor(num_malicious=1, target=2, share=0.3, trigger=Blended(), boost=3.0),
    Backdoor(num_malicious=1, target=1, trigger=SideMarker(), distributed=True, share=1.0),
    Backdoor(num_malicious=1, target=1, trigger=Vignette(), clean_label=True, steps=2, share=1.0),
    InflatedCount(num_malicious=1),
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
    on_records = {kind for kind in get_args(get_args(ThreatSpec)[0]) if kind.poison is not Threat.poison}
    assert on_records | {NoThreat} == {type(threat) for threat in THREATS}


def test_labels_tell_threats_apart():
    labels = [threat.label for threat in THREATS]
    assert len(set(labels)) == len(labels)


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
    may_change = changeable(threat, labels)
    expected = round(getattr(threat, "share", 0) * may_change.sum())
    assert not ((changed_images | changed_labels) & ~may_change).any()
    if threat.kind == "adversarial_samples":
        assert changed_images.sum() == expected
        assert not (changed_labels & ~changed_images).any()
    elif threat.kind == "backdoor":
        assert changed_images.sum() == expected
        assert np.array_equal(changed_labels, changed_images & (not threat.clean_label))
        assert (result.labels_N[changed_images] == threat.target).all()
    else:
        assert not changed_images.any()
        assert changed_labels.sum() == expected


def changeable(threat, labels):
    """Which records a threat may change."""
    if threat.kind == "backdoor":
        return (labels == threat.target) == threat.clean_label
    source, target = getattr(threat, "source", None), getattr(threat, "target", None)
    return (labels == source if source is not None else labels >= 0) & (labels != (-1 if target is None else target))


@every_threat
def test_it_knows_which_records_it_may_change(threat):
    labels = make_records().labels_N
    assert np.array_equal(threat.may_change(labels), changeable(threat, labels))


@every_threat
@every_dtype
def test_the_generator_alone_decides(threat, dtype):
    records = make_records(dtype)
    first = poisoned(threat, records)
    torch.manual_seed(3)
    again = poisoned(threat, records)
    assert np.array_equal(first.images_NCHW, again.images_NCHW)
    assert np.array_equal(first.labels_N, again.labels_N)
    nothing_drawn = threat.kind == "none" or (threat.share == 1 and named(threat))
    others = [poisoned(threat, records, seed=seed) for seed in range(1, 2 if nothing_drawn else 6)]
    same = [
        np.array_equal(first.images_NCHW, other.images_NCHW) and np.array_equal(first.labels_N, other.labels_N)
        for other in others
    ]
    assert all(same) == nothing_drawn


def named(threat):
    """Whether it says what becomes of every record that it changes."""
    return getattr(threat, "mode", "") == "targeted" or (threat.kind == "backdoor" and not threat.clean_label)


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


TRIGGERS = [
    Patch(),
    Patch(size=5, corner="top left", margin=0),
    Blended(),
    SideMarker(),
    SideMarker(letter="L"),
    Vignette(),
]
every_trigger = pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.label)


@every_trigger
@every_dtype
@pytest.mark.parametrize("channels", [1, 3])
def test_a_trigger_is_the_same_mark_on_every_image_and_stays_in_the_range(trigger, dtype, channels):
    images = make_records(dtype, channels=channels).images_NCHW
    before, mark = images.copy(), trigger.mark(16)
    marked = triggered(images, mark)
    assert np.array_equal(images, before)
    assert marked.dtype == dtype and marked.shape == images.shape
    top = 255 if dtype == np.uint8 else 1
    assert marked.min() >= 0 and marked.max() <= top
    untouched = mark.cover_HW == 0
    assert np.array_equal(marked[..., untouched], images[..., untouched])
    expected = (1 - mark.cover_HW) * images.astype(float) + mark.cover_HW * mark.picture_HW * top
    assert np.abs(marked - expected).max() <= (0.51 if dtype == np.uint8 else 1e-5)
    assert (marked != images).any()


@every_trigger
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_the_parts_of_a_trigger_are_disjoint_and_together_the_trigger(trigger, num_parts):
    mark = trigger.mark(16)
    parts = [part_of(mark, number, num_parts) for number in range(num_parts)]
    np.testing.assert_array_equal(sum(part.cover_HW for part in parts), mark.cover_HW)
    sizes = [int((part.cover_HW > 0).sum()) for part in parts]
    assert sum(sizes) == (mark.cover_HW > 0).sum() and max(sizes) - min(sizes) <= 1
    images = make_records().images_NCHW
    one_by_one = images
    for part in parts:
        one_by_one = triggered(one_by_one, part)
    assert np.array_equal(one_by_one, triggered(images, mark))


def test_each_malicious_client_of_a_distributed_backdoor_has_its_part():
    threat, records = Backdoor(num_malicious=2, distributed=True, share=1.0, target=1), make_records()
    draws = [torch.Generator().manual_seed(0) for _ in range(3)]
    classifier = Resnet9(width=4).make(1, 16, CLASSES, seed=1)
    halves = [
        threat.poison(records, classifier, CLASSES, draws[number], None, (number, 2)).images_NCHW for number in range(2)
    ]
    whole = threat.model_copy(update={"distributed": False}).poison(records, classifier, CLASSES, draws[2]).images_NCHW
    changed = [(half != records.images_NCHW).any((0, 1)) for half in halves]
    assert not (changed[0] & changed[1]).any() and (changed[0] | changed[1]).any()
    assert np.array_equal(np.where(changed[0], halves[0], halves[1]), whole)


def test_different_triggers_are_not_called_alike():
    others = [Patch(corner="top right"), Patch(margin=0), Blended(seed=1), SideMarker(corner="top right")]
    others += [SideMarker(scale=2), SideMarker(brightness=0.5)]
    labels = [trigger.label for trigger in [*TRIGGERS, *others]]
    assert len(set(labels)) == len(labels)


def test_a_trigger_that_does_not_fit_is_refused_with_its_size():
    with pytest.raises(ValueError, match="9 x 9 pixels, 1 from the edge, does not fit 8 pixels"):
        Patch(size=9).mark(8)
    with pytest.raises(ValueError, match="does not fit 8 pixels"):
        Backdoor(num_malicious=1, trigger=Patch(size=9)).check(2, 8)
    with pytest.raises(ValueError, match="target = 3 is no class: there are 3"):
        Backdoor(num_malicious=1, target=3).check(3, 16)
    with pytest.raises(ValueError, match="source = 5"):
        LabelFlip(num_malicious=1, source=5).check(3, 16)


def test_a_clean_label_backdoor_makes_its_images_hard_to_tell_first():
    threat = Backdoor(num_malicious=1, target=1, clean_label=True, share=1.0, steps=4, radius="16/255")
    records, classifier = make_records(), Resnet9(width=4).make(1, 16, CLASSES, seed=1)
    result = poisoned(threat, records, classifier=classifier)
    of_target = records.labels_N == 1
    only_triggered = triggered(records.images_NCHW[of_target], threat.trigger.mark(16)).astype(int)
    gap = np.abs(result.images_NCHW[of_target].astype(int) - only_triggered)
    assert 8 <= gap.max() <= 16
    with torch.no_grad():
        classifier.eval()
        y = torch.as_tensor(records.labels_N[of_target])
        before = torch.nn.functional.cross_entropy(classifier(records.x(of_target)), y)
        after = torch.nn.functional.cross_entropy(classifier(result.x(of_target)), y)
    assert after > before


@pytest.mark.parametrize(
    ("when", "rounds"),
    [
        (Rounds(), range(10)),
        (Rounds(first=3), range(2, 10)),
        (Rounds(first=2, last=4), (1, 2, 3)),
        (Rounds(first=2, every=3), (1, 4, 7)),
    ],
    ids=str,
)
def test_in_which_rounds_they_act(when, rounds):
    threat = LabelFlip(num_malicious=1, when=when)
    assert [index for index in range(10) if threat.acts(index)] == list(rounds)
    assert threat.label.endswith(when.label)


def test_what_cannot_be_is_refused():
    for fields in (
        {"mode": "targeted"},
        {"target": 1},
        {"mode": "targeted", "source": 1, "target": 1},
        {"boost": -1.0},
        {"when": {"first": 3, "last": 2}},
    ):
        with pytest.raises(ValueError, match=r"target|boost|last"):
            LabelFlip.model_validate({"num_malicious": 1, **fields})

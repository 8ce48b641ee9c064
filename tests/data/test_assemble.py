"""The checks that every source ends with, held-out patients and duplicates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilemma.data.assemble import assemble, plain_records
from trilemma.data.records import Records
from trilemma.data.split import hold_out
from trilemma.errors import UserError


def records(labels, patients=None, seed=0, size=8, channels=1) -> Records:
    labels_N = np.array(labels, dtype=np.int64)
    images = np.random.default_rng(seed).integers(0, 256, (len(labels_N), channels, size, size)).astype(np.uint8)
    plain = plain_records(images, labels_N)
    if patients is None:
        return plain
    return Records(plain.images_NCHW, plain.labels_N, np.array(patients), plain.sites_N, plain.names_N)


def splits(train=None, val=None, test=None) -> dict[str, Records]:
    return {
        "train": train if train is not None else records([0, 1, 0, 1], seed=1),
        "val": val if val is not None else records([0, 1], seed=2),
        "test": test if test is not None else records([0, 1], seed=3),
    }


def put(given_splits, classes=("a", "b")):
    return assemble("tiny", classes, ("all",), given_splits, "made up")


def test_a_clean_set_has_no_warnings():
    data = put(splits())
    assert data.warnings == () and data.channels == 1 and data.image_size == 8


@pytest.mark.parametrize(
    ("given_splits", "message"),
    [
        (splits(train=records([0, 0])), "class 'b' has no record"),
        (splits(test=records([])), "tiny: test: holds no records"),
        (splits(val=records([0, 2])), "record 1 has label 2, outside 0..1"),
        (splits(val=records([0, -1])), "record 1 has label -1"),
        (splits(train=records([0, 1], channels=2)), r"images of shape \(2, 2, 8, 8\)"),
        (
            splits(train=records([0, 1], [5, 6]), test=records([0, 1], [7, 6])),
            "patient of record 1 also has records in train",
        ),
    ],
)
def test_wrong_records_are_refused(given_splits, message):
    with pytest.raises(UserError, match=message):
        put(given_splits)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="only one class"):
        put(splits(), classes=("a",))


def test_a_class_missing_from_test_is_a_warning():
    assert "Class 'b' has no record in test" in put(splits(test=records([0, 0], seed=9))).warnings[0]


def test_duplicates_are_counted_within_across_and_under_other_labels():
    train = records([0, 1, 0, 1, 0], seed=1)
    train.images_NCHW[4] = train.images_NCHW[0]
    test = records([0, 1], seed=3)
    test.images_NCHW[0] = train.images_NCHW[1]  # label 1 in train, 0 in test
    within, across, conflict = put(splits(train=train, test=test)).warnings
    assert within == "1 image of train repeats another one there pixel for pixel."
    assert "1 image of test is in train too, pixel for pixel (record 0)" in across
    assert conflict == "1 group of identical images carries more than one label (train 1 and test 0)."


def test_the_fingerprint_follows_every_pixel_label_and_patient():
    prints = {put(splits()).fingerprint}
    changed = splits()
    changed["val"].images_NCHW[1, 0, 3, 3] ^= 1
    prints.add(put(changed).fingerprint)
    changed = splits()
    changed["train"].labels_N[:2] = [1, 0]
    prints.add(put(changed).fingerprint)
    prints.add(put(splits(train=records([0, 1, 0, 1], [0, 1, 2, 3], seed=1))).fingerprint)
    assert len(prints) == 4
    assert put(splits()).fingerprint in prints


@settings(deadline=None, max_examples=60)
@given(
    units=st.lists(st.integers(0, 20), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 1000),
)
def test_hold_out_takes_whole_units_of_each_class(units, fraction, seed):
    units_N = np.array(units)
    labels_N = units_N % 3
    held_N = hold_out(units_N, labels_N, fraction, np.random.default_rng(seed))
    assert not set(units_N[held_N]) & set(units_N[~held_N])
    for label in np.unique(labels_N):
        number = len(np.unique(units_N[labels_N == label]))
        taken = len(np.unique(units_N[(labels_N == label) & held_N]))
        assert taken == (0 if number == 1 else min(max(round(fraction * number), 1), number - 1))

"""The paediatric chest X-rays: real numbers, names, patients, cache."""

import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from helpers.pictures import roots_of, write_images
from trilemma.data.pneumonia import parse_name
from trilemma.data.roots import DataRoots
from trilemma.data.specs import Iid, Pneumonia
from trilemma.data.summary import client_rows
from trilemma.errors import UserError

NAMES = [
    *(f"train/NORMAL/IM-{study:04d}-0001.jpeg" for study in range(10)),
    "train/NORMAL/NORMAL2-IM-0003-0001-0002.jpeg",
    *(f"train/PNEUMONIA/person{number}_bacteria_{image}.jpeg" for number in range(8) for image in (1, 2)),
    *(f"train/PNEUMONIA/person{number}_virus_{image}.jpeg" for number in range(20, 28) for image in (3, 4)),
    "test/NORMAL/IM-0001-0001.jpeg",
    "test/PNEUMONIA/person1_virus_6.jpeg",
    "test/PNEUMONIA/person1_bacteria_7.jpeg",
]


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    start = time.perf_counter()
    data = Pneumonia().load(DataRoots(real_data, cache, offline=True))
    first = time.perf_counter() - start
    start = time.perf_counter()
    again = Pneumonia().load(DataRoots(real_data, cache, offline=True))
    return data, again, first, time.perf_counter() - start


def both(records, other) -> np.ndarray:
    return np.concatenate([records, other])


@pytest.mark.real_data
def test_the_real_set_has_its_published_numbers(real):
    data = real[0]
    labels = both(data.train.labels_N, data.val.labels_N)
    assert np.bincount(labels).tolist() == [1341, 2530, 1345]
    assert np.bincount(data.test.labels_N).tolist() == [234, 242, 148]
    patients = both(data.train.patients_N, data.val.patients_N)
    assert len(np.unique(patients[labels == 0])) == 1000
    assert len(np.unique(patients[labels > 0])) == 1635
    assert data.classes == ("normal", "bacterial", "viral")
    assert data.train.images_NCHW.shape[1:] == (1, 64, 64) and data.train.images_NCHW.dtype == np.uint8
    assert not set(data.train.patients_N) & set(data.val.patients_N)
    assert not set(data.test.patients_N) & set(patients)  # numbers start again in test
    share = len(np.unique(data.val.patients_N)) / 2635
    assert 0.09 < share < 0.11


@pytest.mark.real_data
def test_the_real_set_is_cached(real):
    data, again, first, second = real
    assert again.fingerprint == data.fingerprint
    assert first < 25.0 and second < 1.0
    assert isinstance(again.train.images_NCHW, np.memmap)


@pytest.mark.real_data
def test_real_duplicates_stay_within_splits_and_classes(real):
    warnings = " ".join(real[0].warnings)
    assert "of train repeat another one there" in warnings
    assert "test are in" not in warnings and "more than one label" not in warnings


@pytest.mark.real_data
def test_real_patients_are_dealt_whole(real):
    data = real[0]
    rows = client_rows(data, Iid(num_clients=3).make()(data, 0))
    assert sum(row["patients"] for row in rows) == len(np.unique(data.train.patients_N))


@pytest.mark.real_data
def test_two_classes_are_the_three_with_both_pneumonias_joined(real, real_data, tmp_path):
    data = Pneumonia(classes=2).load(DataRoots(real_data, tmp_path, offline=True))
    np.testing.assert_array_equal(data.test.labels_N, real[0].test.labels_N > 0)
    assert data.classes == ("normal", "pneumonia")


@pytest.mark.parametrize(
    ("name", "patient", "diagnosis"),
    [
        ("PNEUMONIA/person1301_virus_2241.jpeg", "person1301", 2),
        ("PNEUMONIA/person78_bacteria_378.jpeg", "person78", 1),
        ("PNEUMONIA/person1424_virus_2437_0002.jpeg", "person1424", 2),
        ("NORMAL/IM-0115-0001.jpeg", "IM-0115", 0),
        ("NORMAL/IM-0543-0001-0002.jpeg", "IM-0543", 0),
        ("NORMAL/NORMAL2-IM-1427-0001.jpeg", "IM-1427", 0),
    ],
)
def test_names_tell_patient_and_diagnosis(name, patient, diagnosis):
    assert parse_name(Path(name)) == (patient, diagnosis)


@pytest.mark.parametrize("name", ["NORMAL/person1_virus_6.jpeg", "PNEUMONIA/IM-0115-0001.jpeg", "NORMAL/scan.jpeg"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="does not tell patient and diagnosis"):
        parse_name(Path(name))


def test_patients_are_held_out_whole_and_a_val_folder_joins_train(tmp_path):
    roots = roots_of(tmp_path)
    write_images(roots.data / "chest_xray", [*NAMES, "val/NORMAL/IM-0003-0009.jpeg"])
    data = Pneumonia(size=8, val_fraction=0.3).load(roots)
    assert len(data.train) + len(data.val) == len(NAMES) - 3 + 1 and len(data.test) == 3
    assert not set(data.train.patients_N) & set(data.val.patients_N)
    assert set(data.val.labels_N) == {0, 1, 2}


def test_colour_and_size(tmp_path):
    roots = roots_of(tmp_path)
    write_images(roots.data / "elsewhere", NAMES)
    data = Pneumonia(size=12, mode="rgb", folder="elsewhere").load(roots)
    assert data.train.images_NCHW.shape[1:] == (3, 12, 12)


def test_a_missing_folder_and_a_damaged_image_are_named(tmp_path):
    roots = roots_of(tmp_path)
    with pytest.raises(UserError, match="chest_xray/train/NORMAL: holds no JPEG images"):
        Pneumonia().load(roots)
    write_images(roots.data / "chest_xray", NAMES)
    damaged = roots.data / "chest_xray" / NAMES[4]
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(UserError, match=NAMES[4]):
        Pneumonia(size=8).load(roots)
    assert not list((roots.cache / "decoded").iterdir())


def test_a_replaced_image_is_decoded_again(tmp_path):
    roots = roots_of(tmp_path)
    write_images(roots.data / "chest_xray", NAMES)
    first = Pneumonia(size=8).load(roots)
    (roots.data / "chest_xray" / NAMES[0]).write_bytes((roots.data / "chest_xray" / NAMES[1]).read_bytes())
    second = Pneumonia(size=8).load(roots)
    assert first.fingerprint != second.fingerprint and any("repeat" in w or "in train" in w for w in second.warnings)


@pytest.mark.parametrize("wrong", [{"classes": 4}, {"size": 4}, {"mode": "colour"}, {"val_fraction": 0.0}])
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        Pneumonia(**wrong)

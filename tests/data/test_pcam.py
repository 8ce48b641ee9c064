"""PatchCamelyon's HDF5 files, made small."""

import h5py
import numpy as np
import pytest

from helpers.pictures import roots_of
from trilemma.data.specs import Pcam
from trilemma.errors import UserError

NUMBERS = {"train": 12, "valid": 6, "test": 8}


@pytest.fixture
def roots(tmp_path):
    made = roots_of(tmp_path)
    (made.data / "pcam").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, number in NUMBERS.items():
        put(made, split, "x", rng.integers(0, 256, (number, 96, 96, 3)).astype(np.uint8))
        put(made, split, "y", (np.arange(number) % 2).astype(np.uint8).reshape(-1, 1, 1, 1))
    return made


def file_of(roots, split, part):
    return roots.data / "pcam" / f"camelyonpatch_level_2_split_{split}_{part}.h5"


def put(roots, split, part, array, name=None):
    with h5py.File(file_of(roots, split, part), "w") as file:
        file.create_dataset(name or part, data=array)


def test_patches_arrive_unchanged(roots):
    data = Pcam().load(roots)
    assert [len(r) for r in (data.train, data.val, data.test)] == [12, 6, 8]
    assert data.classes == ("normal", "tumour") and data.test.labels_N.tolist() == [0, 1] * 4
    with h5py.File(file_of(roots, "valid", "x")) as file:
        np.testing.assert_array_equal(data.val.images_NCHW, file["x"][:].transpose(0, 3, 1, 2))
    assert Pcam().load(roots).fingerprint == data.fingerprint


def test_the_number_of_records_can_be_limited(roots):
    data = Pcam(max_records=4).load(roots)
    assert [len(r) for r in (data.train, data.val, data.test)] == [4, 4, 4]
    assert Pcam(max_records=4).label == "PatchCamelyon, 4 per split"


def test_a_missing_file_says_where_to_get_it(roots):
    file_of(roots, "test", "y").unlink()
    with pytest.raises(
        UserError, match="split_test_y.h5: does not exist. Get it from https://zenodo.org/records/2546921"
    ):
        Pcam().load(roots)


@pytest.mark.parametrize(
    ("part", "array", "name", "message"),
    [
        ("x", np.zeros((12, 95, 96, 3), np.uint8), None, "'x' is uint8"),
        ("x", np.zeros((12, 96, 96, 3), np.float32), None, "'x' is float32"),
        ("x", np.zeros((12, 96, 96, 3), np.uint8), "images", "has no array 'x'"),
        ("y", np.zeros((11, 1, 1, 1), np.uint8), None, "'y' is uint8"),
        ("y", np.zeros((12, 1, 1, 2), np.uint8), None, "'y' is uint8"),
        ("y", np.full((12, 1, 1, 1), 2, np.uint8), None, "record 0 has label 2, outside 0..1"),
        ("y", np.zeros((12, 1, 1, 1), np.uint8), None, "class 'tumour' has no record"),
    ],
)
def test_other_contents_are_refused(roots, part, array, name, message):
    put(roots, "train", part, array, name)
    with pytest.raises(UserError, match=message):
        Pcam().load(roots)


def test_a_damaged_file_is_refused(roots):
    path = file_of(roots, "valid", "x")
    for content in (b"", b"no HDF5", path.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="split_valid_x.h5.*cannot be read as HDF5"):
            Pcam().load(roots)

"""The user's own folders."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from helpers.pictures import roots_of, write_image, write_images
from trilemma.data.specs import Folder
from trilemma.errors import UserError

NAMES = [
    *(f"mine/train/cat/p{p}_{i}.png" for p in range(6) for i in range(2)),
    *(f"mine/train/dog/q{p}_{i}.jpg" for p in range(6) for i in range(2)),
    "mine/test/cat/p0_9.tif",
    "mine/test/dog/q7_9.png",
]


@pytest.fixture
def roots(tmp_path):
    made = roots_of(tmp_path)
    write_images(made.data, NAMES)
    return made


def test_validation_comes_from_train_by_patient(roots):
    data = Folder(path="mine", size=8, val_fraction=0.3, patient="^([pq]\\d)_").load(roots)
    assert data.classes == ("cat", "dog") and not data.synthetic
    assert [len(r) for r in (data.train, data.val, data.test)] == [16, 8, 2]
    assert not set(data.train.patients_N) & set(data.val.patients_N)
    (warning,) = data.warnings
    assert "1 patient ids of test also occur in train or val (p0 is one)" in warning


def test_without_patients_every_image_is_its_own(roots):
    data = Folder(path="mine", size=8, val_fraction=0.3).load(roots)
    assert (data.train.patients_N == -1).all() and len(data.val) == 8
    (warning,) = data.warnings
    assert "every image counts as a patient of its own" in warning


def test_a_val_folder_is_used_and_other_spellings_are_known(roots):
    write_images(roots.data / "mine", ["val/cat/a.png", "val/dog/b.png"])
    (roots.data / "mine" / "train").rename(roots.data / "mine" / "Training")
    (roots.data / "mine" / "test").rename(roots.data / "mine" / "Testing")
    data = Folder(path=str(roots.data / "mine"), size=8).load(roots)
    assert [len(r) for r in (data.train, data.val, data.test)] == [24, 2, 2]


def test_a_patient_in_train_and_val_is_refused(roots):
    write_images(roots.data / "mine", ["val/cat/p0_7.png", "val/dog/q8_1.png"])
    with pytest.raises(UserError, match="patient of record val/cat/p0_7.png also has records in train"):
        Folder(path="mine", size=8, patient="^([pq]\\d)_").load(roots)


def test_one_deep_image_makes_all_float(roots):
    deep = np.full((8, 8), 65535, np.uint16)
    Image.fromarray(deep).save(roots.data / "mine/train/cat/p0_0.png")
    data = Folder(path="mine", size=8).load(roots)
    images = [records.x() for records in (data.train, data.val, data.test)]
    assert all(records.images_NCHW.dtype == np.float32 for records in (data.train, data.val, data.test))
    assert max(float(x.max()) for x in images) == 1.0 and min(float(x.min()) for x in images) >= 0.0
    assert float(images[0].mean()) == pytest.approx(0.5, abs=0.1)  # the 8-bit ones too are in [0, 1]


def test_what_is_missing_is_named(roots, tmp_path):
    mine = roots.data / "mine"
    with pytest.raises(UserError, match="absent: is not a folder"):
        Folder(path="absent").load(roots)
    (mine / "test/bird").mkdir()
    with pytest.raises(UserError, match="test/bird: is no class of train"):
        Folder(path="mine").load(roots)
    (mine / "test/bird").rename(mine / "train/bird")
    with pytest.raises(UserError, match="train/bird: holds no images"):
        Folder(path="mine").load(roots)
    (mine / "train/bird").rmdir()
    (mine / "test").rename(mine / "tset")
    with pytest.raises(UserError, match="has no folder 'test'"):
        Folder(path="mine").load(roots)
    (mine / "tset").rename(mine / "test")
    (mine / "Training").mkdir()
    with pytest.raises(UserError, match="several folders for train"):
        Folder(path="mine").load(roots)
    with pytest.raises(UserError, match="fewer than two class folders"):
        write_image(tmp_path / "data/one/train/cat/a.png")
        write_image(tmp_path / "data/one/test/cat/a.png")
        Folder(path="one").load(roots)


def test_an_unreadable_image_is_named(roots):
    (roots.data / "mine/train/dog/q3_1.jpg").write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    with pytest.raises(UserError, match="q3_1.jpg"):
        Folder(path="mine", size=8).load(roots)


def test_a_name_without_its_patient_is_named(roots):
    with pytest.raises(UserError, match=r"q0_0.jpg: the pattern .* finds no patient"):
        Folder(path="mine", size=8, patient="^(p\\d)_").load(roots)


@pytest.mark.parametrize("pattern", ["p(", "p\\d", "(p)(\\d)"])
def test_patterns_need_one_group(pattern):
    with pytest.raises(ValidationError, match="regular expression|group"):
        Folder(path="mine", patient=pattern)

"""MedMNIST files: the real PneumoniaMNIST, small made-up ones in the same layout, and broken ones."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from trilemma.data.medmnist_facts import PUBLISHED
from trilemma.data.roots import DataRoots
from trilemma.data.specs import Medmnist
from trilemma.errors import UserError

NUMBERS = {"train": 40, "val": 20, "test": 20}


def arrays(name="breastmnist", size=28, seed=0) -> dict[str, np.ndarray]:
    rng, published = np.random.default_rng(seed), PUBLISHED[name]
    shape = (size, size) if published.channels == 1 else (size, size, 3)
    made = {}
    for split, number in NUMBERS.items():
        made[f"{split}_images"] = rng.integers(0, 256, (number, *shape)).astype(np.uint8)
        if name == "chestmnist":
            made[f"{split}_labels"] = (rng.random((number, 14)) < 0.05).astype(np.uint8)
        else:
            made[f"{split}_labels"] = (np.arange(number) % len(published.classes)).astype(np.uint8)[:, None]
    return made


def put(tmp_path, content, file="breastmnist.npz") -> DataRoots:
    (tmp_path / "data" / "medmnist").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(tmp_path / "data" / "medmnist" / file, **content)
    return DataRoots(tmp_path / "data", tmp_path / "cache", offline=True)


@pytest.mark.real_data
def test_the_real_pneumoniamnist(real_data, tmp_path):
    data = Medmnist(name="pneumoniamnist").load(DataRoots(real_data, tmp_path, offline=True))
    assert [len(r) for r in (data.train, data.val, data.test)] == [4708, 524, 624]
    assert data.classes == ("normal", "pneumonia") and data.train.images_NCHW.shape[1:] == (1, 28, 28)
    shares = [round(100 * records.labels_N.mean(), 1) for records in (data.train, data.val, data.test)]
    assert shares == [74.2, 74.2, 62.5]
    text = " ".join(data.warnings)
    assert "18 images of train repeat another one there" in text
    assert "8 images of val are in train too" in text
    assert "test are in train" not in text and "test is in train" not in text
    assert "not the published file" in text  # the same images in another order


@pytest.mark.parametrize(("name", "size"), [("breastmnist", 28), ("bloodmnist", 28), ("retinamnist", 64)])
def test_images_and_labels_arrive_unchanged(tmp_path, name, size):
    content = arrays(name, size)
    file = f"{name}.npz" if size == 28 else f"{name}_{size}.npz"
    roots = put(tmp_path, content, file)
    for _ in range(2):  # decoded, then from the cache
        data = Medmnist(name=name, size=size).load(roots)
        images = content["test_images"]
        expected = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(data.test.images_NCHW, expected)
        np.testing.assert_array_equal(data.test.labels_N, content["test_labels"][:, 0])
        assert data.classes == PUBLISHED[name].classes and (data.train.patients_N == -1).all()


def test_chestmnist_becomes_any_finding(tmp_path):
    content = arrays("chestmnist")
    data = Medmnist(name="chestmnist").load(put(tmp_path, content, "chestmnist.npz"))
    np.testing.assert_array_equal(data.train.labels_N, content["train_labels"].any(1))
    assert data.classes == ("no finding", "any finding")
    assert any("14 labels" in warning for warning in data.warnings)


def test_a_changed_file_is_read_again(tmp_path):
    first = Medmnist(name="breastmnist").load(put(tmp_path, arrays(seed=0)))
    second = Medmnist(name="breastmnist").load(put(tmp_path, arrays(seed=1)))
    assert first.fingerprint != second.fingerprint


def test_a_missing_file_says_where_it_was_looked_for_and_where_to_get_it(tmp_path):
    roots = DataRoots(tmp_path / "data", tmp_path / "cache", offline=True)
    with pytest.raises(UserError) as caught:
        Medmnist(name="organamnist", size=64).load(roots)
    text = str(caught.value)
    assert str(tmp_path / "data" / "medmnist" / "organamnist_64.npz") in text
    assert str(tmp_path / "cache" / "medmnist" / "organamnist_64.npz") in text
    assert "https://zenodo.org/records/10519652/files/organamnist_64.npz?download=1" in text


def test_a_file_in_the_cache_is_found(tmp_path):
    roots = put(tmp_path, arrays())
    (tmp_path / "cache").mkdir()
    (tmp_path / "data" / "medmnist").rename(tmp_path / "cache" / "medmnist")
    assert len(Medmnist(name="breastmnist").load(roots).train) == 40


def changed(**arrays_or_none) -> dict:
    content = arrays() | arrays_or_none
    return {name: array for name, array in content.items() if array is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(val_labels=None), "has no array 'val_labels'"),
        (changed(train_images=np.zeros((40, 28, 27), np.uint8)), r"'train_images' is uint8 \(40, 28, 27\)"),
        (changed(train_images=np.zeros((40, 28, 28), np.float32)), "is float32"),
        (changed(train_labels=np.zeros((39, 1), np.uint8)), r"'train_labels' is uint8 \(39, 1\)"),
        (changed(test_labels=np.full((20, 1), 2, np.uint8)), "has 2 at record 0, outside 0..1"),
        (changed(test_labels=np.full((20, 1), -1, np.int64)), "has -1 at record 0"),
        (changed(train_images=np.zeros((547, 28, 28), np.uint8), train_labels=np.zeros((547, 1), np.uint8)), "has 546"),
        (changed(val_images=np.zeros((0, 28, 28), np.uint8), val_labels=np.zeros((0, 1), np.uint8)), "has 0 records"),
        (changed(train_labels=np.zeros((40, 1), np.uint8)), "class 'normal, benign' has no record"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        Medmnist(name="breastmnist").load(put(tmp_path, content))


def broken_file(tmp_path, content: bytes) -> DataRoots:
    roots = put(tmp_path, {})
    (roots.data / "medmnist" / "breastmnist.npz").write_bytes(content)
    return roots


def test_damaged_archives_are_refused(tmp_path):
    roots = put(tmp_path, arrays())
    path = roots.data / "medmnist" / "breastmnist.npz"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[5000] ^= 0xFF
    for content in (b"", b"no archive", good[: len(good) // 2], bytes(flipped)):
        with pytest.raises(UserError, match="breastmnist.npz"):
            Medmnist(name="breastmnist").load(broken_file(tmp_path, content))


def test_pickled_objects_are_refused_unread(tmp_path):
    roots = put(tmp_path, {})
    np.savez(roots.data / "medmnist" / "breastmnist.npz", train_images=np.array([{}, []], dtype=object))
    with pytest.raises(UserError, match="Python objects"):
        Medmnist(name="breastmnist").load(roots)


def test_a_zip_bomb_is_refused_from_its_header(tmp_path):
    """A member of 64 MB of zeros packs into 64 kB; its header declares 40 small images."""
    roots = put(tmp_path, arrays())
    path = roots.data / "medmnist" / "breastmnist.npz"
    np.save(tmp_path / "small.npy", arrays()["train_images"])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", (tmp_path / "small.npy").read_bytes() + bytes(1 << 26))
    with pytest.raises(UserError, match="declares .* bytes and holds"):
        Medmnist(name="breastmnist").load(roots)


def test_facts_are_complete():
    assert len(PUBLISHED) == 12
    checksums = [md5 for facts in PUBLISHED.values() for md5 in facts.md5.values()]
    assert len(set(checksums)) == 48 and all(len(md5) == 32 for md5 in checksums)
    assert PUBLISHED["pneumoniamnist"].num_records == (4708, 524, 624)
    for name in PUBLISHED:
        for size in (28, 64, 128, 224):
            assert Medmnist(name=name, size=size).label == f"{name} {size}"


@pytest.mark.parametrize("wrong", [{"name": "nodulemnist3d"}, {"name": "breastmnist", "size": 32}, {}])
def test_unknown_sets_are_refused(wrong):
    with pytest.raises(ValidationError):
        Medmnist(**wrong)


def test_default_roots_follow_the_environment(monkeypatch):
    from trilemma.data.roots import default_roots

    monkeypatch.setenv("TRILEMMA_DATA", "/images")
    monkeypatch.setenv("TRILEMMA_CACHE", "/kept")
    monkeypatch.setenv("TRILEMMA_OFFLINE", "1")
    assert default_roots() == DataRoots(Path("/images"), Path("/kept"), True)
    monkeypatch.delenv("TRILEMMA_DATA")
    monkeypatch.delenv("TRILEMMA_CACHE")
    monkeypatch.delenv("TRILEMMA_OFFLINE")
    assert default_roots() == DataRoots(Path("data"), Path("~/.cache/trilemma").expanduser(), False)


def test_the_home_of_nobody_is_named(monkeypatch, tmp_path):
    from trilemma.data.roots import default_roots

    with pytest.raises(UserError, match="~nobody-of-this-name/x: begins with a home folder"):
        DataRoots(tmp_path, tmp_path).locate("~nobody-of-this-name/x")
    monkeypatch.setenv("TRILEMMA_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(UserError, match="~nobody-of-this-name/cache"):
        default_roots()

"""CIFAR-10 batches: read without unpickling; a planted pickle that would run code does not."""

import contextlib
import pickle
import pickletools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pictures import roots_of
from trilemma.data.inert_pickle import read_inert
from trilemma.data.specs import Cifar10
from trilemma.errors import UserError

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def batch(seed: int, number: int = 20) -> tuple[np.ndarray, list[int]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (number, 3072)).astype(np.uint8)
    return pixels, [i % 10 for i in range(number)]


def published(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Returns the batch as Python 2 wrote the published files: protocol 2, byte strings, cPickle's memo."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85" + short(b"b") + b"\x87Rq\x04"
    dtype = b"cnumpy\ndtype\nq\x05" + short(b"u1") + b"K\x00K\x01\x87Rq\x06"
    dtype += b"(K\x03" + short(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    data = pixels.tobytes()
    state = b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    listed = b"]q\x07(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = short(b"data") + array + state + short(b"labels") + listed + short(b"batch_label") + short(b"batch 1 of 5")
    return b"\x80\x02}q\x01(" + items + b"u."


def put(tmp_path, write):
    roots = roots_of(tmp_path)
    folder = roots.data / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(BATCHES):
        write(folder, name, *batch(seed))
    return roots


def as_published(folder, name, pixels, labels):
    (folder / name).write_bytes(published(pixels, labels))


def as_binary(folder, name, pixels, labels):
    rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1)
    (folder / f"{name}.bin").write_bytes(rows.tobytes())


def as_python3(folder, name, pixels, labels):
    (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2))


@pytest.mark.parametrize("write", [as_published, as_binary, as_python3])
def test_batches_become_images(tmp_path, write):
    data = Cifar10().load(put(tmp_path, write))
    assert [len(r) for r in (data.train, data.val, data.test)] == [90, 10, 20]
    pixels, labels = batch(5)
    np.testing.assert_array_equal(data.test.images_NCHW.reshape(20, -1), pixels)
    assert data.test.x().shape == (20, 3, 32, 32)
    assert data.test.labels_N.tolist() == labels and data.train.images_NCHW.shape[1:] == (3, 32, 32)
    assert data.classes[3] == "cat" and np.bincount(data.val.labels_N).tolist() == [1] * 10


def test_the_python2_fixture_is_what_pickle_means_by_it():
    pixels, labels = batch(0, 3)
    names = {
        name for name, _, _ in ((op.name, arg, pos) for op, arg, pos in pickletools.genops(published(pixels, labels)))
    }
    assert {"GLOBAL", "REDUCE", "BUILD", "BINSTRING"} <= names


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_not_executed(tmp_path, protocol):
    planted = tmp_path / "planted"
    content = pickle.dumps({"data": Malicious(planted), "labels": [1]}, protocol=protocol)
    roots = put(tmp_path, as_published)
    (roots.data / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3.*malicious"):
        Cifar10().load(roots)
    assert not planted.exists()
    pickle.loads(content)["data"].close()  # the plant is real: unpickling does open the file
    assert planted.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 11]}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, "a"]}, protocol=2),
        pickle.dumps([1, 2]),
        pickle.dumps({"data": {1, 2}}),
        b"",
        b"\x80\x02",
        b"garbage",
        b"\x80\x02}q\x01(u",
        b"\x80\x02e.",
        b"\x80\x02h\x05.",
    ],
)
def test_other_contents_are_refused(tmp_path, content):
    roots = put(tmp_path, as_published)
    (roots.data / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match="test_batch"):
        Cifar10().load(roots)


def test_missing_and_torn_batches_are_named(tmp_path):
    roots = put(tmp_path, as_binary)
    path = roots.data / "cifar-10-batches-py" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="data_batch_2.bin: is not a CIFAR-10 batch"):
        Cifar10().load(roots)
    path.unlink()
    with pytest.raises(UserError, match="data_batch_2: cannot be read.*cifar-10-python.tar.gz"):
        Cifar10().load(roots)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=120)
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_data_are_read_as_pickle_reads_them(value, protocol):
    assert read_inert(pickle.dumps(value, protocol=protocol)) == value


def test_an_escape_that_no_writer_makes_is_damage():
    """Python only warns of it, and users would see that."""
    with pytest.raises(ValueError, match="damaged: DeprecationWarning"):
        read_inert(b"S'\\u'\n.")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_pickles_end_in_a_value_error(data):
    content = bytearray(published(*batch(0, 1)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        read_inert(bytes(content[: data.draw(st.integers(0, len(content)))]))

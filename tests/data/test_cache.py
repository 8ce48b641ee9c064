"""The cache of decoded images: all or nothing, and broken entries are rebuilt."""

import errno
import threading

import numpy as np
import pytest

from trilemma.data.cache import cached_arrays, new_array
from trilemma.errors import Failure


def builder(calls: list[int], number: int = 3000):
    def build(folder):
        calls.append(1)
        array = new_array(folder, "train", (number, 2), np.uint8)
        array[:] = np.arange(number * 2).reshape(number, 2) % 251
        np.save(folder / "labels.npy", np.arange(number), allow_pickle=False)

    return build


def check(arrays, number=3000):
    np.testing.assert_array_equal(arrays["train"], np.arange(number * 2).reshape(number, 2) % 251)
    np.testing.assert_array_equal(arrays["labels"], np.arange(number))


def entry(tmp_path):
    (found,) = [path for path in (tmp_path / "decoded").iterdir() if not path.name.endswith(".tmp")]
    return found


def test_an_entry_is_built_once_and_mapped(tmp_path):
    calls = []
    for _ in range(3):
        arrays = cached_arrays(tmp_path, "s1:abc", builder(calls))
        check(arrays)
    assert len(calls) == 1 and isinstance(arrays["train"], np.memmap)
    assert [path.name for path in (tmp_path / "decoded").iterdir()] == ["s1-abc"]
    arrays["train"][:] = 0  # copy-on-write: reaches this array only
    check(cached_arrays(tmp_path, "s1:abc", builder(calls)))
    cached_arrays(tmp_path, "s1:other", builder(calls))
    assert len(calls) == 2


def damage_index(folder):
    (folder / "index.json").write_text("{")


def damage_header(folder):
    content = (folder / "train.npy").read_bytes()
    (folder / "train.npy").write_bytes(b"XXXXXX" + content[6:])


def damage_length(folder):
    content = (folder / "train.npy").read_bytes()
    (folder / "train.npy").write_bytes(content[:-7])


def remove_array(folder):
    (folder / "labels.npy").unlink()


def list_index(folder):
    (folder / "index.json").write_text("[1]")


def plant_pickle(folder):
    import json

    np.save(folder / "labels.npy", np.array([{}], dtype=object), allow_pickle=True)
    size = (folder / "labels.npy").stat().st_size
    index = json.loads((folder / "index.json").read_text()) | {"labels": size}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("damage", [damage_index, damage_header, damage_length, remove_array, list_index, plant_pickle])
def test_a_broken_entry_is_rebuilt(tmp_path, damage):
    calls = []
    cached_arrays(tmp_path, "k", builder(calls))
    damage(entry(tmp_path))
    check(cached_arrays(tmp_path, "k", builder(calls)))
    assert len(calls) == 2
    check(cached_arrays(tmp_path, "k", builder(calls)))
    assert len(calls) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupted(folder):
        builder([])(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_arrays(tmp_path, "k", interrupted)
    assert list((tmp_path / "decoded").iterdir()) == []
    check(cached_arrays(tmp_path, "k", builder([])))


def test_a_full_disk_is_a_failure_with_its_reason(tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Failure, match="No space left on device"):
        cached_arrays(tmp_path, "k", full)
    assert list((tmp_path / "decoded").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="TRILEMMA_CACHE"):
        cached_arrays(tmp_path / "file", "k", builder([]))


def test_builders_at_the_same_time_do_no_harm(tmp_path):
    both = threading.Barrier(2, timeout=20)
    results = []

    def build(folder):
        builder([])(folder)
        both.wait()

    def work():
        results.append(cached_arrays(tmp_path, "k", build))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 2
    for arrays in results:
        check(arrays)
    assert [path.name for path in (tmp_path / "decoded").iterdir()] == ["k"]


def test_an_empty_array_is_kept(tmp_path):
    def build(folder):
        new_array(folder, "none", (0, 1, 4, 4), np.uint8)

    assert cached_arrays(tmp_path, "k", build)["none"].shape == (0, 1, 4, 4)

import errno
import os

import pytest

from trilemma.atomic import atomic_folder, atomic_write
from trilemma.errors import Failure


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_is_written_and_replaced_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert names_in(path.parent) == ["file.bin"]


def test_name_and_content_are_on_the_disk_before_it_returns(tmp_path, monkeypatch):
    path, flushed = tmp_path / "file.bin", []

    def fsync(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(path, b"new")
    assert flushed == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "Free some space"), (errno.EACCES, "may be written to")])
@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch, number, remedy, when):
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, when, fail)
    if when == "replace":
        monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(Failure, match=remedy) as failed:
        atomic_write(path, b"new")
    assert str(path) in str(failed.value)
    assert os.strerror(number) in str(failed.value)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("name", ["in the way/file.bin", "in the way/deeper/file.bin", "n" * 300])
def test_a_place_that_cannot_hold_a_file_is_said(tmp_path, name):
    (tmp_path / "in the way").write_text("a file, not a folder")
    with pytest.raises(Failure, match="could not be written"):
        atomic_write(tmp_path / name, b"x")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_written_and_replaced_whole(tmp_path):
    folder = tmp_path / "new" / "export"
    atomic_folder(folder, {"a": b"one", "b": b"two"})
    assert contents(folder) == {"a": b"one", "b": b"two"}
    atomic_folder(folder, {"a": b"three"})
    assert contents(folder) == {"a": b"three"} and names_in(folder.parent) == ["export"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_folder_that_cannot_take_its_name_leaves_the_older_one(tmp_path, monkeypatch, nth):
    folder, calls = tmp_path / "export", []
    atomic_folder(folder, {"a": b"old"})
    rename = type(folder).rename

    def fail(path, target):
        calls.append(path)
        if len(calls) == nth:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(type(folder), "rename", fail)
    with pytest.raises(Failure, match="could not be written"):
        atomic_folder(folder, {"a": b"new"})
    assert contents(folder) == {"a": b"old"} and names_in(tmp_path) == ["export"]


@pytest.mark.parametrize("name", ["deeper/a", "n" * 300])
def test_a_file_that_cannot_be_written_leaves_the_older_folder(tmp_path, name):
    atomic_folder(tmp_path / "export", {"a": b"old"})
    with pytest.raises(Failure, match="could not be written"):
        atomic_folder(tmp_path / "export", {"a": b"new", name: b"x"})
    assert contents(tmp_path / "export") == {"a": b"old"} and names_in(tmp_path) == ["export"]

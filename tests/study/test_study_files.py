"""Files are whole or not there; damaged ones are named and never unpickled."""

import pickle
import subprocess
import sys

import pytest
import torch

from trilemma.atomic import atomic_write
from trilemma.errors import Failure
from trilemma.study.files import StoreFiles, load_tensors, open_model, save_tensors

WRITE = """
import resource, signal, sys
from pathlib import Path
from trilemma.atomic import atomic_write
from trilemma.errors import Failure
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    atomic_write(Path(sys.argv[1]), b"x" * 20_000)
except Failure as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_write_that_does_not_fit_leaves_the_old_file(tmp_path):
    """The kernel itself refuses: a limit on file sizes stands for a full disk."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", WRITE, str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "Free some space" in done.stdout and str(path) in done.stdout
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_whole_files(tmp_path):
    path = tmp_path / "new folder" / "file"
    for content in (b"a" * 1000, b"b"):
        atomic_write(path, content)
        assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="could not be written"):
        atomic_write(tmp_path / "file" / "below", b"")


def test_tensors_and_texts_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7), "c": torch.zeros(0)}
    save_tensors(tmp_path / "t", tensors, {"history": '[{"round": 1}]'})
    loaded, texts = load_tensors(tmp_path / "t")
    assert set(loaded) == set(tensors) and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert texts == {"history": '[{"round": 1}]'}


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 7, b"\xff" * 100, b"\x08" + b"\x00" * 7 + b"not json", pickle.dumps(Trap()), None],
    ids=["empty", "short", "huge header", "no json", "pickle", "cut short"],
)
def test_damaged_tensors_are_a_failure(tmp_path, content):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(Failure, match="cannot be read") as caught:
        load_tensors(path)
    assert caught.value.where == str(path)


def test_missing_files_are_a_failure(tmp_path):
    with pytest.raises(Failure, match="is missing"):
        load_tensors(tmp_path / "none")
    with pytest.raises(Failure, match="is missing"):
        open_model(tmp_path / "none", 1)


def test_a_model_that_is_none(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\x01\x02\x03")
    with pytest.raises(Failure, match="cannot be read") as caught:
        open_model(tmp_path / "m.onnx", 1)
    assert caught.value.where == str(tmp_path / "m.onnx")


def test_every_kind_of_file_has_a_place_of_its_own(tmp_path):
    files = StoreFiles(tmp_path)
    kinds = ("weights", "checkpoint", "progress", "model", "twin", "log")
    paths = [getattr(files, kind)(key) for kind in kinds for key in ("s1:aa", "s1:ab")]
    assert len(set(paths)) == 12
    assert all(":" not in path.name and path.is_relative_to(tmp_path) for path in paths)

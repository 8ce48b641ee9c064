"""Decoded image sets on disk: a folder of .npy files per key, memory-mapped when read, written all or nothing.

An entry appears by one rename of a finished, flushed folder, so a reader sees all of it or none, and two processes
that build the same entry at once do no harm. An entry that cannot be read (cut short, foreign bytes, a missing file)
is built again. Nothing is evicted: the folder may be deleted at any time.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trilemma.errors import Failure

_INDEX = "index.json"
_STALE_SECONDS = 24 * 3600.0
_SMALL_BYTES = 4096

Build = Callable[[Path], None]


def cached_arrays(cache: Path, key: str, build: Build) -> dict[str, np.ndarray]:
    """Returns the arrays of entry `key`, building it first if it is missing or broken.

    Args:
        cache: The cache folder; made if it does not exist.
        key: Content key of everything that the arrays depend on.
        build: Writes each array as `NAME.npy` into the folder it is given (see `new_array`).

    Returns:
        Name -> memory-mapped array; writing to it changes this process's copy only.

    Raises:
        Failure: The cache cannot be written or read (a full disk, no permission).
    """
    entry = cache / "decoded" / key.replace(":", "-")
    try:
        arrays = _read(entry)
        if arrays is None:
            _build(entry, build)
            arrays = _read(entry)
    except OSError as error:
        raise Failure(
            str(entry),
            f"the cache of decoded images cannot be written or read ({error.strerror or error})",
            "Free space, or set TRILEMMA_CACHE to a folder with room that you may write to",
        ) from error
    if arrays is None:
        raise Failure(str(entry), "a cache entry cannot be read back right after it was written", "Check the disk")
    return arrays


def new_array(folder: Path, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Returns a new writable memory-mapped array `folder/NAME.npy`; for use in a `build` function."""
    if 0 in shape:  # an empty file cannot be mapped
        np.save(folder / f"{name}.npy", np.zeros(shape, dtype), allow_pickle=False)
        return np.zeros(shape, dtype)
    # The blocks are reserved first: a full disk then is an error here, not a bus error when a page is written.
    array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        with (folder / f"{name}.npy").open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
    return array


def _read(entry: Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of an entry, None if it is missing or broken."""
    try:
        index = json.loads((entry / _INDEX).read_text())
        return {name: _open(entry / f"{name}.npy", size) for name, size in index.items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError, EOFError, SyntaxError):
        return None


def _open(path: Path, num_bytes: int) -> np.ndarray:
    if path.stat().st_size != num_bytes:
        raise ValueError(f"{path} has another size than when it was written")
    if num_bytes < _SMALL_BYTES:
        return np.load(path, allow_pickle=False)
    # Copy-on-write: to torch and numpy it is an ordinary array, and nothing that is written reaches the file.
    return np.load(path, mmap_mode="c", allow_pickle=False)


def _build(entry: Path, build: Build) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(entry)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".tmp", dir=entry.parent))
    try:
        build(temporary)
        index = {path.stem: path.stat().st_size for path in sorted(temporary.glob("*.npy"))}
        (temporary / _INDEX).write_text(json.dumps(index))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        if entry.exists() and _read(entry) is None:
            shutil.rmtree(entry)
        try:
            temporary.rename(entry)
        except OSError:
            if _read(entry) is None:  # not merely that another process was faster
                raise
        _flush(entry.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(entry: Path) -> None:
    """Removes what builds of this entry left behind when they were killed more than a day ago."""
    for path in entry.parent.glob(f".{entry.name}.*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # its builder finished just now

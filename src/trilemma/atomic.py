"""Files that are either whole or not there, whatever is killed when."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from trilemma.errors import Failure


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file by way of a temporary one in the same folder, flushed to disk before and after it takes the name.

    Raises:
        Failure: If the disk is full or the folder cannot be written; an older file of that name stays as it was,
            unless only the last flush failed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # what stopped the writing may stop this too
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def flush_folder(folder: Path) -> None:
    """Brings the names of a folder's files to the disk: without that, a file may be lost that is itself on it.

    Raises:
        OSError: If that fails.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> Failure:
    """Returns the failure that says why a file could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some space" if full else "Check that the folder exists and may be written to"
    return Failure(str(path), f"could not be written ({error.strerror})", f"{remedy} and run the same command again")

"""Files that are either whole or not there, whatever is killed when."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from trilemma.errors import Failure


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file by way of a temporary one in the same folder, flushed to disk before it takes the name.

    Raises:
        Failure: If the disk is full or the folder cannot be written; an older file of that name stays as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):  # what stopped the writing may stop this too
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> Failure:
    """Returns the failure that says why a file could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some space" if full else "Check that the folder exists and may be written to"
    return Failure(str(path), f"could not be written ({error.strerror})", f"{remedy} and run the same command again")

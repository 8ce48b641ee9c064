"""Files and folders that are either whole or not there, whatever is killed when."""

import errno
import os
import shutil
from collections.abc import Mapping
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


def atomic_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files by way of a temporary one beside it, flushed to disk before it takes the name.

    A folder of that name is replaced with all that it holds: whoever calls this has looked at what that is. It stands
    aside while the new one takes its name, and comes back where that fails.

    Args:
        folder: Its name; the folders above it are made where they are missing.
        files: File name -> content.

    Raises:
        Failure: If the disk is full or the place cannot be written; an older folder stays as it was.
    """
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("part", "old"))
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            with (partial / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        flush_folder(partial)
        _take_name(partial, folder, old)
        flush_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise cannot_write(folder, error) from error
    shutil.rmtree(old, ignore_errors=True)


def _take_name(partial: Path, folder: Path, old: Path) -> None:
    """Renames a folder to a name that another one may have, which gets the name `old`."""
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if replaces:
            old.rename(folder)
        raise


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

"""Files that are there whole or not at all."""

import os
import tempfile
from pathlib import Path

from trilemma.errors import Failure


def write_atomically(path: Path, text: str) -> None:
    """Writes UTF-8 text to a path: into a temporary file of the same folder, which then takes its name.

    Raises:
        Failure: If the folder cannot be made or the disk takes no more; what was there before stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        remedy = "Choose a folder that can be written to and has room; the results are safe in the store"
        raise Failure(str(path), f"it cannot be written ({error.strerror or error})", remedy) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

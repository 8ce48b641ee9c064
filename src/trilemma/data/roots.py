"""Where images are looked for and where decoded or downloaded ones are kept."""

import os
from dataclasses import dataclass
from pathlib import Path

from trilemma.errors import UserError


@dataclass(frozen=True)
class DataRoots:
    """The two folders that every source works with.

    Attributes:
        data: The user's images; relative paths in a study are relative to it. Never written to.
        cache: Downloads and decoded images; may be deleted at any time.
        offline: True forbids downloads.
    """

    data: Path
    cache: Path
    offline: bool = False

    def locate(self, path: str) -> Path:
        """Returns a study's path: as it is if absolute, below `data` otherwise. There need not be anything there.

        Raises:
            UserError: If it cannot be a path, or begins with the home of a user whom this machine does not know.
        """
        return possible(self.data / _expanded(path), f"data path {path!r}")


def possible(place: Path, said: str) -> Path:
    """Returns a path at which the system can look, whether or not anything is there.

    Args:
        place: The path.
        said: What to call it in a message; of a long one, the beginning.

    Raises:
        UserError: If it is too long, holds a NUL character, or leads through a folder that may not be entered.
    """
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        where = said if len(said) <= 100 else f"{said[:100]}..."
        raise UserError(where, f"cannot be read ({reason})", "Correct the path") from None
    return place


def default_roots() -> DataRoots:
    """Returns the roots that TRILEMMA_DATA (default ./data) and TRILEMMA_CACHE (default ~/.cache/trilemma) name.

    TRILEMMA_OFFLINE set to anything but "" or "0" forbids downloads.

    Raises:
        UserError: If the cache cannot be a path, or one begins with the home of a user whom this machine does not know.
    """
    return DataRoots(
        data=_expanded(os.environ.get("TRILEMMA_DATA") or "data"),
        cache=possible(_expanded(os.environ.get("TRILEMMA_CACHE") or "~/.cache/trilemma"), "TRILEMMA_CACHE"),
        offline=os.environ.get("TRILEMMA_OFFLINE", "") not in ("", "0"),
    )


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(path, "begins with a home folder that cannot be found", "Write the whole path") from error

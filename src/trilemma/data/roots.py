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
        """Returns a study's path: as it is if absolute, below `data` otherwise.

        Raises:
            UserError: If it begins with the home of a user whom this machine does not know.
        """
        return self.data / _expanded(path)


def default_roots() -> DataRoots:
    """Returns the roots that TRILEMMA_DATA (default ./data) and TRILEMMA_CACHE (default ~/.cache/trilemma) name.

    TRILEMMA_OFFLINE set to anything but "" or "0" forbids downloads.

    Raises:
        UserError: If one begins with the home of a user whom this machine does not know.
    """
    return DataRoots(
        data=_expanded(os.environ.get("TRILEMMA_DATA") or "data"),
        cache=_expanded(os.environ.get("TRILEMMA_CACHE") or "~/.cache/trilemma"),
        offline=os.environ.get("TRILEMMA_OFFLINE", "") not in ("", "0"),
    )


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(path, "begins with a home folder that cannot be found", "Write the whole path") from error

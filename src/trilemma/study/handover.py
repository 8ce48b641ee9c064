"""The folder that leaves the store: what may be written where, and the sums by which it is checked."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from trilemma.atomic import atomic_folder
from trilemma.errors import UserError

MODEL, CARD, FACTS, SUMS = "model.onnx", "MODEL_CARD.md", "model_card.json", "SHA256SUMS"
#: The model again, for the way: unpacked by `zstd -d`.
SENT = "model.onnx.zst"

#: A card is some ten kilobytes; a file far beyond that is none.
_MOST_BYTES = 16 * 2**20


def refuse_occupied(folder: Path, key: str) -> Path:
    """Returns where an export of an artefact shall stand, its links followed.

    Args:
        folder: What the user named; it may be missing, empty, or hold an earlier export of the same artefact.
        key: The artefact's.

    Raises:
        UserError: If there is anything else.
    """
    place = folder.resolve()
    if not place.name or place == Path.cwd():
        raise UserError(str(folder), "is the folder that you are in, or the root", "Name a folder that can be replaced")
    if not place.exists():
        above = next(parent for parent in place.parents if parent.exists())
        if not above.is_dir():
            raise UserError(str(folder), f"cannot be made, for {above} is no folder", "Name another folder with --to")
        return place
    if not place.is_dir():
        raise UserError(str(folder), "is no folder", "Name a new folder with --to")
    found = {child.name for child in place.iterdir()}
    if found and not (found <= {MODEL, SENT, CARD, FACTS, SUMS} and _key_of(place / FACTS) == key):
        problem = "holds something else than an earlier export of this artefact"
        raise UserError(str(folder), problem, "Name a new or an empty folder with --to")
    return place


def hand_over(place: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files and their sums, all or nothing.

    Args:
        place: As `refuse_occupied` returned it.
        files: File name -> content.

    Raises:
        Failure: If they cannot be written; an earlier export stays.
    """
    sums = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    atomic_folder(place, {**files, SUMS: sums.encode()})


def _key_of(path: Path) -> str | None:
    """Returns the key that a card names, or None where it is no card."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        card = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return card.get("key") if isinstance(card, dict) else None

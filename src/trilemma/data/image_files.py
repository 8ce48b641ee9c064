"""From a list of image files to records: decoded once, in parallel, and cached."""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from trilemma.data.assemble import SPLITS
from trilemma.data.cache import cached_arrays, new_array
from trilemma.data.images import is_deep, read_image
from trilemma.data.records import Records
from trilemma.data.roots import DataRoots
from trilemma.errors import UserError
from trilemma.spec import content_key

_DECODER_VERSION = 1


@dataclass(frozen=True)
class ImageFile:
    """One record before its image is decoded.

    Attributes:
        path: The file.
        name: What to call it in a message.
        label: Class index.
        patient: Equal for records of one patient, in whatever split; "" if unknown.
        site: Index into the data set's sites.
    """

    path: Path
    name: str
    label: int
    patient: str = ""
    site: int = 0


def read_records(
    files: Mapping[str, Sequence[ImageFile]], size: int, mode: str, roots: DataRoots
) -> dict[str, Records]:
    """Returns the records of each split, their images decoded or from the cache.

    Args:
        files: "train", "val" and "test".
        size: Height and width in pixels.
        mode: "grey" or "rgb".
        roots: Where the cache is.

    Raises:
        UserError: A file is missing or unreadable.
        Failure: The cache cannot be written.
    """
    states = [[(str(file.path), *_state(file.path)) for file in files[split]] for split in SPLITS]
    key = content_key("images", _DECODER_VERSION, size, mode, states)
    images = cached_arrays(roots.cache, key, lambda folder: _decode(files, size, mode, folder))
    known = sorted({file.patient for split in SPLITS for file in files[split] if file.patient})
    codes = {patient: code for code, patient in enumerate(known)} | {"": -1}
    return {
        split: Records(
            images[split],
            np.array([file.label for file in files[split]], dtype=np.int64),
            np.array([codes[file.patient] for file in files[split]], dtype=np.int64),
            np.array([file.site for file in files[split]], dtype=np.int64),
            np.array([file.name for file in files[split]], dtype=np.str_),
        )
        for split in SPLITS
    }


def _state(path: Path) -> tuple[int, int]:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # bytes that are no text can be opened, but neither shown nor stored
        problem = f"is a path that is not {sys.getfilesystemencoding().upper()}"
        raise UserError(str(path), problem, "Rename the file or the folder") from None
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "Correct the path or its permissions"
        ) from None
    return state.st_size, state.st_mtime_ns


def _decode(files: Mapping[str, Sequence[ImageFile]], size: int, mode: str, folder: Path) -> None:
    """Writes one array (N, C, H, W) per split; float32 for all as soon as one file has more than 8 bits."""
    paths = [file.path for split in SPLITS for file in files[split]]
    deep = any(is_deep(path) for path in paths)
    channels = 1 if mode == "grey" else 3
    targets = [
        image
        for split in SPLITS
        for image in new_array(
            folder, split, (len(files[split]), channels, size, size), np.float32 if deep else np.uint8
        )
    ]
    console = Console(stderr=True)
    # Pillow lets go of the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        try:
            done = pool.map(lambda path: read_image(path, size, mode), paths)
            decoded = track(
                done, "decoding images", len(paths), console=console, transient=True, disable=not console.is_terminal
            )
            for target, image in zip(targets, decoded, strict=True):
                target[:] = image / np.float32(255.0) if deep and image.dtype == np.uint8 else image
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""Reading the members of an .npz one by one, trusting nothing that its headers say until it has been checked."""

import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from trilemma.errors import UserError

_CHUNK_BYTES = 1 << 24
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
)


class Member(NamedTuple):
    """What an array's header declares, and what the archive says of it."""

    shape: tuple[int, ...]
    dtype: np.dtype


def broken(path: Path, problem: str) -> UserError:
    """Returns the error for a file that is not what it should be."""
    return UserError(str(path), problem, "Delete the file and get it again")


def read_headers(path: Path) -> dict[str, Member]:
    """Returns name -> declared shape and type of every array, without reading any data.

    Raises:
        UserError: Not an .npz, or a member whose size is not what its header declares (a zip bomb lies there).
    """
    members = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as stream:
                    member, start = _header(stream)
                declared = start + int(np.prod(member.shape, dtype=object)) * member.dtype.itemsize
                if declared != info.file_size:
                    raise ValueError(f"member {info.filename} declares {declared} bytes and holds {info.file_size}")
                members[info.filename.removesuffix(".npy")] = member
    except _BROKEN as error:
        raise broken(path, f"is not a readable .npz archive ({error})") from None
    return members


def copy_member(path: Path, name: str, target: np.ndarray) -> None:
    """Copies array `name` into `target`, an array of the declared shape and type, a piece at a time.

    Raises:
        UserError: The archive is damaged.
    """
    flat = target.reshape(-1).view(np.uint8)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            _header(stream)
            position = 0
            while position < len(flat):
                piece = stream.read(min(_CHUNK_BYTES, len(flat) - position))
                if not piece:
                    raise EOFError(f"member {name} ends early")
                flat[position : position + len(piece)] = np.frombuffer(piece, np.uint8)
                position += len(piece)
            stream.read(1)  # the end of the stream, where its checksum is compared
    except _BROKEN as error:
        raise broken(path, f"is damaged ({error})") from None


def _header(stream: IO[bytes]) -> tuple[Member, int]:
    """Returns the header and where the data start."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    if fortran and len(shape) > 1:
        raise ValueError("its arrays are in column order")
    return Member(shape, dtype), stream.tell()

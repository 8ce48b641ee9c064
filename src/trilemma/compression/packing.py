"""What a sparse model is shipped as: its ONNX file, without loss, with no room taken by zeros.

A packed model is a header and zstandard frames. The header is `TRIP`, a version, the sizes of the ONNX file and of
the table, a checksum of the file and one of all that was packed. The frames are: a table of the tensors that were cut
out of the file; what is left of the file; the masks of the tensors, one bit for each number, most significant bit
first, 1 where any of its bits is; of the numbers that are not zero the most significant bytes; and their other bytes.
Bytes of one kind stand together, as an entropy coder makes most of them so: signs and exponents repeat, the ends of
mantissas do not.
"""

import hashlib
import math
import struct
from typing import NamedTuple

import numpy as np
import onnx
import zstandard
from onnx import TensorProto, helper

#: No ONNX file is larger: protocol buffers end at 2 GiB.
LARGEST_BYTES = 2**31 - 1

_MAGIC, _VERSION = b"TRIP", 1
_LEVEL = 19
_CHECKSUM_BYTES = 16
_HEADER = struct.Struct(f"<4sBIQ{_CHECKSUM_BYTES}s")  # magic, version, tensors, length, checksum of the ONNX file
_PIECE = struct.Struct("<QQQB")  # bytes of the rest before it, numbers, numbers that are not zero, bytes of a number
_FRAME = struct.Struct("<Q")  # length of the zstandard frame that follows
_NUM_FRAMES = 5
#: A row of the table, before coding, must not be longer than what it is about.
_SMALLEST_TENSOR_BYTES = 64


class _Piece(NamedTuple):
    """A tensor that was cut out of a file."""

    place: int
    numbers: int
    non_zero: int
    width: int


def pack(model_bytes: bytes) -> bytes:
    """Returns an ONNX file in a smaller form from which `unpack` makes exactly the same bytes.

    A tensor is cut out and stored as a mask and its non-zero numbers where that is shorter before any coding: from a
    share of zeros of 1/32 in float32 and of 1/8 in int8, and 64 bytes on. -0.0 is not zero here.

    Args:
        model_bytes: The ONNX file; the same bytes and the same zstandard give the same packed bytes.

    Raises:
        ValueError: If it is no ONNX file, or none that comes back as it is.
    """
    if len(model_bytes) > LARGEST_BYTES:
        raise ValueError(f"The model has {len(model_bytes)} bytes, and an ONNX file at most {LARGEST_BYTES}.")
    pieces, rest, masks, tops, lows = _cut(model_bytes)
    table = b"".join(_PIECE.pack(*piece) for piece in pieces)
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    frames = [compressor.compress(part) for part in (table, rest, masks, tops, lows)]
    header = _HEADER.pack(_MAGIC, _VERSION, len(pieces), len(model_bytes), _checksum(model_bytes))
    body = b"".join(_FRAME.pack(len(frame)) + frame for frame in frames)
    packed = header + _checksum(header + body) + body
    if unpack(packed) != model_bytes:
        raise ValueError("The packed model does not give the ONNX file back.")
    return packed


def zstandard_file(model_bytes: bytes) -> bytes:
    """Returns an ONNX file as one zstandard file, which any `zstd -d` unpacks; of a sparse one `pack` makes less."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(model_bytes)


def is_packed(found: bytes) -> bool:
    """Returns whether a file says of itself that `pack` made it; an ONNX file never begins so."""
    return found.startswith(_MAGIC)


def unpack(packed: bytes, at_most: int = LARGEST_BYTES) -> bytes:
    """Returns the ONNX file that was packed.

    Args:
        packed: What `pack` returned, or anything else.
        at_most: Bytes that the ONNX file may have: no more are ever unpacked.

    Raises:
        ValueError: If it is cut off, changed, no packed model of this version, or too long; the text says which.
    """
    start = _HEADER.size + _CHECKSUM_BYTES
    if len(packed) < start:
        raise ValueError(f"The packed model is cut off: {len(packed)} bytes are less than a header.")
    magic, version, num_pieces, length, checksum = _HEADER.unpack_from(packed)
    if magic != _MAGIC or version != _VERSION:
        raise ValueError("This is no packed model of this version.")
    body = packed[start:]
    if _checksum(packed[: _HEADER.size] + body) != packed[_HEADER.size : start]:
        raise ValueError("The packed model was changed or cut off: its checksum does not fit.")
    if length > at_most:
        raise ValueError(f"The packed model would unpack to {length} bytes, and at most {at_most} are allowed.")
    if num_pieces * _SMALLEST_TENSOR_BYTES > length:
        raise ValueError("The packed model says that more was cut out of its ONNX file than there is room for.")
    frames = _split(body)
    pieces = _pieces(_unpacked(frames[0], num_pieces * _PIECE.size), length)
    masks_bytes = sum(-(-piece.numbers // 8) for piece in pieces)
    tops_bytes = sum(piece.non_zero for piece in pieces)
    lows_bytes = sum(piece.non_zero * (piece.width - 1) for piece in pieces)
    rest_bytes = length - sum(piece.numbers * piece.width for piece in pieces)
    sizes = (rest_bytes, masks_bytes, tops_bytes, lows_bytes)
    model_bytes = _joined(pieces, *(_unpacked(frame, size) for frame, size in zip(frames[1:], sizes, strict=True)))
    if _checksum(model_bytes) != checksum:
        raise ValueError("The packed model does not hold the ONNX file that it was made of.")
    return model_bytes


def _cut(model_bytes: bytes) -> tuple[list[_Piece], bytes, bytes, bytes, bytes]:
    """Returns the tensors that are cut out, what is left of the file, masks, most significant and other bytes."""
    pieces, kept, masks, tops, lows = [], [], [], [], []
    end = kept_bytes = 0
    for tensor in _tensors(model_bytes):
        start = model_bytes.find(tensor.raw_data, end)
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        numbers = math.prod(tensor.dims)
        if start < 0 or len(tensor.raw_data) != numbers * width or len(tensor.raw_data) < _SMALLEST_TENSOR_BYTES:
            continue
        values = np.frombuffer(tensor.raw_data, np.uint8).reshape(numbers, width)
        mask = values.any(1)
        mask_bytes = np.packbits(mask).tobytes()
        present = values[mask]
        if len(mask_bytes) + present.size >= values.size:
            continue
        kept.append(model_bytes[end:start])
        kept_bytes += start - end
        pieces.append(_Piece(kept_bytes, numbers, len(present), width))
        masks.append(mask_bytes)
        tops.append(present[:, -1].tobytes())  # raw data is little-endian
        lows.append(present[:, :-1].tobytes())
        end = start + len(tensor.raw_data)
    kept.append(model_bytes[end:])
    return pieces, b"".join(kept), b"".join(masks), b"".join(tops), b"".join(lows)


def _tensors(model_bytes: bytes) -> list[TensorProto]:
    """Returns the constants that are stored as raw bytes, in the order of the file."""
    try:
        model = onnx.load_from_string(model_bytes)
    except Exception as error:  # the parser's exception has no base class but this one
        raise ValueError("This is no ONNX file.") from error
    return [tensor for tensor in model.graph.initializer if tensor.raw_data]


def _split(body: bytes) -> list[bytes]:
    frames, place = [], 0
    for _ in range(_NUM_FRAMES):
        if len(body) < place + _FRAME.size:
            raise ValueError("The packed model is cut off: it has too few parts.")
        (length,) = _FRAME.unpack_from(body, place)
        place += _FRAME.size
        frames.append(body[place : place + length])
        place += length
    if place != len(body):
        raise ValueError(f"The packed model's parts have {place} bytes, and it has {len(body)}.")
    return frames


def _unpacked(frame: bytes, length: int) -> bytes:
    """Returns what zstandard made smaller; it would make room for as much as the frame says, so that is asked first."""
    try:
        size = zstandard.frame_content_size(frame)
        if size != length:
            raise ValueError(f"A part of the packed model would unpack to {size} bytes and must have {length}.")
        part = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"A part of the packed model cannot be unpacked ({error}).") from None
    if len(part) != length:
        raise ValueError(f"A part of the packed model has {len(part)} bytes and says {length}.")
    return part


def _pieces(table: bytes, length: int) -> list[_Piece]:
    """Returns the table's rows, each of which lies within a file of `length` bytes."""
    pieces = [_Piece(*row) for row in _PIECE.iter_unpack(table)]
    room = length - sum(piece.numbers * piece.width for piece in pieces)
    places = [0, *(piece.place for piece in pieces), room]
    sound = all(
        1 <= piece.width <= 16
        and piece.non_zero <= piece.numbers
        and piece.numbers * piece.width >= _SMALLEST_TENSOR_BYTES
        for piece in pieces
    )
    if not sound or places != sorted(places):
        raise ValueError("The packed model's table of tensors does not fit its ONNX file.")
    return pieces


def _joined(pieces: list[_Piece], rest: bytes, masks: bytes, tops: bytes, lows: bytes) -> bytes:
    parts, start, mask_start, top_start, low_start = [], 0, 0, 0, 0
    for place, numbers, non_zero, width in pieces:
        bits = np.frombuffer(masks, np.uint8, -(-numbers // 8), mask_start)
        mask = np.unpackbits(bits, count=numbers).astype(bool)
        if int(mask.sum()) != non_zero:
            raise ValueError("The packed model's masks do not fit its table of tensors.")
        present = np.empty((non_zero, width), np.uint8)
        present[:, -1] = np.frombuffer(tops, np.uint8, non_zero, top_start)
        present[:, :-1] = np.frombuffer(lows, np.uint8, non_zero * (width - 1), low_start).reshape(non_zero, width - 1)
        values = np.zeros((numbers, width), np.uint8)
        values[mask] = present
        parts += [rest[start:place], values.tobytes()]
        start, mask_start = place, mask_start + len(bits)
        top_start, low_start = top_start + non_zero, low_start + non_zero * (width - 1)
    return b"".join([*parts, rest[start:]])


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()

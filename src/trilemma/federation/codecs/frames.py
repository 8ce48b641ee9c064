"""What crosses the network: a payload behind a header that tells whether it is whole.

A frame is `TRIU`, a version, the codec's number, the payload's length, a checksum of all that and of the body, and the
body, which zstandard makes smaller where it can. What was damaged or cut off on the way is found out; who sent it
the server knows from the connection. A checksum keeps nobody out who means harm: what a frame holds is examined too.
"""

import struct
import zlib

import zstandard

_MAGIC, _VERSION = b"TRIU", 1
_HEADER = struct.Struct("<4sBBBQI")  # magic, version, codec, whether the body is compressed, payload length, checksum
HEADER_BYTES = _HEADER.size
#: More makes a frame of an update hardly smaller, and much slower.
_LEVEL = 3


def seal(payload: bytes, codec: int) -> bytes:
    """Returns a payload as a frame.

    Args:
        payload: What a codec wrote.
        codec: The codec's number, from 0 to 255.
    """
    smaller = zstandard.ZstdCompressor(level=_LEVEL).compress(payload)
    compressed = len(smaller) < len(payload)
    body = smaller if compressed else payload
    header = (_MAGIC, _VERSION, codec, int(compressed), len(payload))
    return _HEADER.pack(*header, _checksum(header, body)) + body


def unseal(frame: bytes, codec: int, at_most: int) -> bytes:
    """Returns the payload of a frame.

    Args:
        frame: What arrived.
        codec: The number of the codec that the study agreed on.
        at_most: Bytes that its payload may have: no more are ever unpacked.

    Raises:
        ValueError: If it is cut off, changed, of another codec, or too long; the text says which.
    """
    if len(frame) < HEADER_BYTES:
        raise ValueError(f"is cut off: {len(frame)} bytes are less than a header")
    *header, checksum = _HEADER.unpack_from(frame)
    magic, version, number, compressed, length = header
    if magic != _MAGIC or version != _VERSION:
        raise ValueError("is no frame of this version")
    body = frame[HEADER_BYTES:]
    if _checksum(tuple(header), body) != checksum:
        raise ValueError("was changed or cut off on its way: its checksum does not fit")
    if number != codec:
        raise ValueError("is of another codec than the study's")
    if length > at_most:
        raise ValueError(f"would unpack to {length} bytes, and at most {at_most} are an update")
    payload = _unpacked(body, length) if compressed else body
    if len(payload) != length:
        raise ValueError(f"holds {len(payload)} bytes and says {length}")
    return payload


def _unpacked(body: bytes, length: int) -> bytes:
    """Returns what zstandard made smaller; it would make room for as much as the body says, so that is asked first."""
    try:
        size = zstandard.frame_content_size(body)
        if size != length:
            raise ValueError(f"would unpack to {size} bytes and says {length}")
        return zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"cannot be unpacked ({error})") from None


def _checksum(header: tuple, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(repr(header).encode()))

"""Frames: whole ones come back, and of all others the receiver learns that they are not."""

import struct
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trilemma.federation.codecs.frames import HEADER_BYTES, seal, unseal


@given(st.binary(max_size=400), st.integers(0, 255))
def test_a_whole_frame_comes_back(payload, codec):
    assert unseal(seal(payload, codec), codec, len(payload)) == payload


def test_what_can_be_made_smaller_is_and_the_rest_stays_as_it_is():
    assert len(seal(bytes(10_000), 1)) < HEADER_BYTES + 40
    assert len(seal(b"\x93", 1)) == HEADER_BYTES + 1


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=60), st.data())
def test_any_change_of_any_bit_and_any_cut_is_noticed(payload, data):
    frame = seal(payload * 3, 7)
    place = data.draw(st.integers(0, len(frame) - 1))
    changed = bytearray(frame)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match="frame|cut off|changed"):
        unseal(bytes(changed), 7, 1000)
    with pytest.raises(ValueError, match="cut off"):
        unseal(frame[:place], 7, 1000)
    with pytest.raises(ValueError, match="cut off"):
        unseal(frame + b"\0", 7, 1000)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_anything_else_is_refused_and_nothing_breaks(junk):
    with pytest.raises(ValueError, match="frame|cut off"):
        unseal(junk, 1, 1000)


def test_another_codec_and_what_would_unpack_to_too_much_are_refused():
    with pytest.raises(ValueError, match="another codec"):
        unseal(seal(b"abc", 2), 3, 10)
    with pytest.raises(ValueError, match="would unpack to 1000000 bytes, and at most 1000"):
        unseal(seal(bytes(1_000_000), 2), 2, 1000)


def lying(body: bytes, length: int) -> bytes:
    """A frame with a good checksum over a body that is not what the header says."""
    header = (b"TRIU", 1, 2, 1, length)
    return struct.pack("<4sBBBQI", *header, zlib.crc32(body, zlib.crc32(repr(header).encode()))) + body


def test_a_frame_that_lies_about_its_length_is_refused_before_anything_is_unpacked(monkeypatch):
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("was unpacked"))
    with pytest.raises(ValueError, match="would unpack to 1000000 bytes and says 500"):
        unseal(lying(seal(bytes(1_000_000), 2)[HEADER_BYTES:], 500), 2, 1000)
    without_size = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(500))
    with pytest.raises(ValueError, match="would unpack to -1 bytes"):
        unseal(lying(without_size, 500), 2, 1000)


@settings(max_examples=200)
@given(st.binary(max_size=80), st.integers(0, 1000))
def test_a_body_that_zstandard_did_not_write_is_refused(body, length):
    with pytest.raises(ValueError, match="unpack|holds"):
        unseal(lying(body, length), 2, 1000)

"""Packed models: the same bytes come back, and of all others the reader learns that they are not."""

import hashlib
import struct

import numpy as np
import onnx
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from trilemma.compression.export import export_onnx
from trilemma.compression.fake_quantisation import quantise
from trilemma.compression.packing import LARGEST_BYTES, pack, unpack
from trilemma.compression.pruning import prune, prune_n_of_m
from trilemma.models.specs import Resnet9

HEADER, SEAL = struct.Struct("<4sBIQ16s"), 16
START = HEADER.size + SEAL


@pytest.fixture(scope="module")
def sparse():
    return export_onnx(prune(Resnet9(width=4).make(1, 16, 2, 0).eval(), 0.9), 1, 16)


@pytest.fixture(scope="module")
def packed(sparse):
    return pack(sparse)


def model_of(*arrays):
    tensors = [numpy_helper.from_array(array, str(place)) for place, array in enumerate(arrays)]
    graph = helper.make_graph([], "g", [], [], tensors)
    return helper.make_model(graph).SerializeToString(deterministic=True)


@settings(deadline=None, max_examples=12)
@given(
    fraction=st.floats(0, 1), seed=st.integers(0, 99), integers=st.booleans(), norm=st.sampled_from(["group", "batch"])
)
def test_exported_models_come_back(fraction, seed, integers, norm):
    classifier = prune(Resnet9(width=4, norm=norm).make(1, 8, 2, seed).eval(), fraction)
    if integers:
        classifier = quantise(classifier, torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))
    model_bytes = export_onnx(classifier, 1, 8, {"said": "δ"})
    assert unpack(pack(model_bytes)) == model_bytes
    assert pack(model_bytes) == pack(model_bytes)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([np.float32, np.int8, np.uint8, np.int32, np.int64, np.float16, np.float64, np.bool_]),
            st.integers(0, 300),
            st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]),
        ),
        max_size=6,
    ),
    st.integers(0, 99),
)
def test_any_tensors_come_back(tensors, seed):
    draws = np.random.default_rng(seed)
    arrays = []
    for kind, size, zeros in tensors:
        values = draws.integers(0, 256, size * np.dtype(kind).itemsize).astype(np.uint8)
        values = (values & 1 if kind is np.bool_ else values).view(kind)
        arrays.append(np.where(draws.random(size) < zeros, np.zeros(1, kind), values))
    model_bytes = model_of(*arrays)
    assert unpack(pack(model_bytes)) == model_bytes


def test_numbers_that_look_like_others_come_back():
    odd = np.array([0.0, -0.0, np.nan, np.inf, 1e-45] * 20, np.float32)
    odd[::3] = 0
    model_bytes = model_of(odd, odd, np.zeros(500, np.int8), odd[::-1].copy())
    restored = onnx.load_from_string(unpack(pack(model_bytes)))
    assert numpy_helper.to_array(restored.graph.initializer[0]).tobytes() == odd.tobytes()
    typed = onnx.load_from_string(model_bytes)
    typed.graph.initializer.append(helper.make_tensor("typed", TensorProto.FLOAT, [100], [0.0] * 100))  # not raw
    assert unpack(pack(typed.SerializeToString())) == typed.SerializeToString()


def test_room_is_taken_by_what_is_not_zero():
    classifier = Resnet9(width=8).make(1, 16, 2, 0).eval()
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    dense = export_onnx(classifier, 1, 16)
    plain = zstandard.ZstdCompressor(level=19)
    for pruned, least in ((prune(classifier, 0.9), 9), (prune_n_of_m(classifier, 2, 4), 2.1)):
        single, integer = export_onnx(pruned, 1, 16), export_onnx(quantise(pruned, x), 1, 16)
        assert len(dense) / len(pack(single)) > least
        assert len(dense) / len(pack(integer)) > 2 * least
        assert len(pack(single)) < 0.9 * len(plain.compress(single))
        assert len(pack(integer)) < 0.95 * len(plain.compress(integer))
    assert len(pack(dense)) < len(plain.compress(dense)) + 250


def test_random_masks_take_little_more_than_their_entropy():
    draws = np.random.default_rng(0)
    values = np.where(draws.random(80_000) < 0.9, 0, draws.integers(1, 128, 80_000)).astype(np.int8)
    bits = -(0.9 * np.log2(0.9) + 0.1 * np.log2(0.1)) + 0.1 * 7
    assert len(pack(model_of(values))) < 1.12 * 80_000 * bits / 8


def test_every_changed_byte_is_refused(packed):
    draws = np.random.default_rng(0)
    changes = [(place, 1 << int(draws.integers(8))) for place in range(len(packed))]
    changes += [(place, 1 << bit) for place in range(START + 60) for bit in range(8)]
    for place, change in changes:
        changed = bytearray(packed)
        changed[place] ^= change
        with pytest.raises(ValueError, match="packed model.*\\.$"):
            unpack(bytes(changed))


def test_every_cut_and_every_longer_one_is_refused(packed):
    for length in [*range(200), *range(200, len(packed), 37), len(packed) - 1]:
        with pytest.raises(ValueError, match="cut off"):
            unpack(packed[:length])
    with pytest.raises(ValueError, match="changed or cut off"):
        unpack(packed + b"\0")


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_anything_else_is_refused_and_nothing_breaks(junk):
    for start in (b"", b"TRIP\1"):
        with pytest.raises(ValueError, match="packed model"):
            unpack(start + junk)


def test_what_is_no_onnx_file_is_not_packed():
    for junk in (b"\xff" * 50, b"not a model"):
        with pytest.raises(ValueError, match="no ONNX file"):
            pack(junk)


def checksum(data):
    return hashlib.blake2b(data, digest_size=16).digest()


def forged(parts, length, num_pieces, digest=bytes(16), sizes=None):
    """A packed model with a good seal over what its writer claims."""
    compressor = zstandard.ZstdCompressor()
    frames = [compressor.compress(part) for part in parts]
    body = b"".join(struct.pack("<Q", len(frame) if sizes is None else sizes) + frame for frame in frames)
    header = HEADER.pack(b"TRIP", 1, num_pieces, length, digest)
    return header + checksum(header + body) + body


def row(place, numbers, non_zero, width):
    return struct.pack("<QQQB", place, numbers, non_zero, width)


WHOLE = bytes(range(40)) + bytes([0, 0, 1, 2] * 16)
GOOD = [row(40, 32, 16, 2), WHOLE[:40], bytes([0b01010101] * 4), bytes([2] * 16), bytes([1] * 16)]


def test_a_forged_model_opens_when_all_of_it_is_true():
    assert unpack(forged(GOOD, 104, 1, checksum(WHOLE))) == WHOLE
    with pytest.raises(ValueError, match="does not hold the ONNX file"):
        unpack(forged(GOOD, 104, 1))


@pytest.mark.parametrize(
    ("changes", "length", "num_pieces", "match"),
    [
        ({0: row(41, 32, 16, 2)}, 104, 1, "table of tensors does not fit"),  # after the end of the rest
        ({0: row(40, 2**60, 16, 2)}, 104, 1, "table of tensors does not fit"),
        ({0: row(40, 32, 33, 2)}, 104, 1, "table of tensors does not fit"),
        ({0: row(40, 32, 16, 0)}, 104, 1, "table of tensors does not fit"),
        ({0: row(0, 1, 1, 200)}, 300, 1, "table of tensors does not fit"),
        ({0: row(40, 32, 16, 2) + row(39, 32, 16, 2)}, 168, 2, "table of tensors does not fit"),
        ({0: row(40, 32, 15, 2), 3: bytes(15), 4: bytes(15)}, 104, 1, "masks do not fit"),
        ({1: bytes(41)}, 104, 1, "would unpack to 41 bytes and must have 40"),
        ({2: bytes(5)}, 104, 1, "would unpack to 5 bytes and must have 4"),
        ({3: bytes(17)}, 104, 1, "would unpack to 17 bytes and must have 16"),
        ({4: bytes(15)}, 104, 1, "would unpack to 15 bytes and must have 16"),
        ({}, 150, 2, "would unpack to 25 bytes and must have 50"),
        ({0: row(40, 0, 0, 2)}, 104, 1, "table of tensors does not fit"),  # as many as would fill any memory
        ({0: row(40, 31, 16, 2)}, 104, 1, "table of tensors does not fit"),  # shorter than any that is cut out
        ({}, 104, 5, "more was cut out"),
        ({}, LARGEST_BYTES, 2**32 - 1, "more was cut out"),
        ({}, LARGEST_BYTES, 1, f"would unpack to 40 bytes and must have {LARGEST_BYTES - 64}"),
        ({}, LARGEST_BYTES + 1, 1, "at most 2147483647 are allowed"),
        ({}, 2**64 - 1, 1, "at most 2147483647 are allowed"),
    ],
)
def test_lies_under_a_good_seal_are_refused(changes, length, num_pieces, match):
    parts = [changes.get(place, part) for place, part in enumerate(GOOD)]
    with pytest.raises(ValueError, match=match):
        unpack(forged(parts, length, num_pieces, checksum(WHOLE)))


@pytest.mark.parametrize(
    ("parts", "sizes"), [(GOOD[:4], None), ([*GOOD, b""], None), (GOOD, 5), (GOOD, 2**63), ([], None)]
)
def test_parts_that_do_not_fit_are_refused(parts, sizes):
    with pytest.raises(ValueError, match="packed model"):
        unpack(forged(parts, 104, 1, checksum(WHOLE), sizes))


def test_nothing_is_unpacked_that_would_be_too_long(packed, sparse, monkeypatch):
    assert unpack(packed, len(sparse)) == sparse
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("was unpacked"))
    with pytest.raises(ValueError, match=f"at most {len(sparse) - 1} are allowed"):
        unpack(packed, len(sparse) - 1)
    bomb = forged([bytes(10_000_000), *GOOD[1:]], 104, 1)
    assert len(bomb) < 2000
    with pytest.raises(ValueError, match="would unpack to 10000000 bytes and must have 25"):
        unpack(bomb)


def test_a_frame_without_its_size_or_with_other_bytes_is_refused():
    header = HEADER.pack(b"TRIP", 1, 1, 104, bytes(16))
    for frame in (zstandard.ZstdCompressor(write_content_size=False).compress(GOOD[0]), b"no frame at all", b""):
        body = (struct.pack("<Q", len(frame)) + frame) * 5
        with pytest.raises(ValueError, match="part of the packed model"):
            unpack(header + checksum(header + body) + body)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_frames_that_zstandard_did_not_write_are_refused(data):
    frames = [zstandard.ZstdCompressor().compress(part) for part in GOOD]
    which = data.draw(st.integers(0, 4))
    changed = bytearray(frames[which])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    frames[which] = bytes(changed)
    body = b"".join(struct.pack("<Q", len(frame)) + frame for frame in frames)
    header = HEADER.pack(b"TRIP", 1, 1, 104, checksum(WHOLE))
    try:
        assert unpack(header + checksum(header + body) + body) == WHOLE  # some bits of a frame say nothing
    except ValueError as error:
        assert "packed model" in str(error)

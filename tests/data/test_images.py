"""Image files: what each format yields, and what hostile ones end in."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trilemma.data.images import is_deep, png_bytes, read_image
from trilemma.errors import UserError


def ramp(height=40, width=30) -> np.ndarray:
    return np.add.outer(np.arange(height) * 4, np.arange(width) * 2).astype(np.uint8)


def saved(tmp_path, array, name, **options):
    path = tmp_path / name
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpeg"])
def test_eight_bit_files_stay_eight_bit(tmp_path, name):
    path = saved(tmp_path, ramp(32, 32), name)
    image = read_image(path, 32, "grey")
    assert image.dtype == np.uint8 and image.shape == (1, 32, 32)
    assert not is_deep(path)
    assert np.abs(image[0].astype(int) - ramp(32, 32)).max() <= (3 if name.endswith("jpeg") else 0)


def test_rgb_of_grey_is_three_equal_channels_and_grey_of_rgb_is_luma(tmp_path):
    path = saved(tmp_path, ramp(), "a.png")
    image = read_image(path, 16, "rgb")
    assert image.shape == (3, 16, 16) and (image == image[0]).all()
    red = saved(tmp_path, np.full((8, 8, 3), (255, 0, 0), np.uint8), "red.png")
    assert (read_image(red, 8, "grey") == 76).all()  # ITU-R 601: 0.299 * 255
    assert read_image(red, 8, "rgb")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_become_float_by_their_range(tmp_path, name):
    values = np.array([[0, 65535], [32768, 257]], np.uint16)
    path = saved(tmp_path, values, name)
    assert is_deep(path)
    image = read_image(path, 2, "grey")
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[0], values / 65535.0, atol=1e-6)
    assert read_image(path, 2, "rgb").shape == (3, 2, 2)


def png_of_sixteen_bits(path, pixels, colour_type):
    """A PNG that Pillow cannot write: 16 bits in each of several channels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(("channels", "colour_type"), [(3, 2), (2, 4), (4, 6)])
def test_sixteen_bits_in_several_channels_are_refused_and_not_cut_to_eight(tmp_path, channels, colour_type):
    pixels = np.arange(8 * 8 * channels).reshape(8, 8, channels) % 4096
    path = png_of_sixteen_bits(tmp_path / "colour.png", pixels, colour_type)
    assert np.asarray(Image.open(path)).max() < 256, "what Pillow makes of it"
    for read in (is_deep, lambda path: read_image(path, 8, "grey")):
        with pytest.raises(UserError, match=r"colour.png: has 16 bits in each of several channels"):
            read(path)
    grey = png_of_sixteen_bits(tmp_path / "grey.png", pixels[..., 0], 0)
    assert is_deep(grey) and read_image(grey, 8, "grey").max() == pytest.approx(pixels[..., 0].max() / 65535)


def test_float_tiffs_are_taken_in_the_unit_range_only(tmp_path):
    good = saved(tmp_path, np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), "good.tif")
    np.testing.assert_allclose(read_image(good, 4, "grey")[0].ravel(), np.linspace(0, 1, 16), atol=1e-6)
    for name, value in (("big.tif", 7.0), ("nan.tif", np.nan)):
        path = saved(tmp_path, np.full((4, 4), value, np.float32), name)
        with pytest.raises(UserError, match=f"{name}: has pixel values outside 0..1"):
            read_image(path, 4, "grey")


def test_palettes_and_transparency_are_resolved_onto_black(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert read_image(saved(tmp_path, palette, "p.png"), 4, "rgb")[:, 0, 0].tolist() == [10, 200, 30]
    clear = np.full((4, 4, 4), (255, 255, 255, 0), np.uint8)
    assert read_image(saved(tmp_path, clear, "clear.png"), 4, "grey").max() == 0
    half = np.full((4, 4, 2), (200, 255), np.uint8)
    assert (read_image(saved(tmp_path, Image.fromarray(half, "LA"), "la.png"), 4, "grey") == 200).all()
    bilevel = Image.fromarray(np.eye(4) > 0)
    assert set(read_image(saved(tmp_path, bilevel, "one.png"), 4, "grey").ravel().tolist()) == {0, 255}


def test_exif_orientation_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    array = np.zeros((16, 16), np.uint8)
    array[:8, :8] = 255
    image = read_image(saved(tmp_path, array, "turned.png", exif=exif), 16, "grey")[0]
    assert image[:8, 8:].min() == 255 and image[:8, :8].max() == 0


def test_large_jpegs_decode_close_to_the_exact_way(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (20, 20)).astype(np.uint8)).resize((800, 600)))
    path = saved(tmp_path, smooth, "large.jpg", quality=95)
    exact = np.asarray(Image.fromarray(smooth).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(read_image(path, 64, "grey")[0] - exact).mean() < 2.0


def test_resizing_is_antialiased(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = read_image(saved(tmp_path, board.astype(np.uint8), "board.png"), 8, "grey")
    assert image.min() >= 120 and image.max() <= 135


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("kept", [0, 10, 300, 900])
def test_truncated_files_name_themselves(tmp_path, name, kept):
    rng = np.random.default_rng(0)
    path = saved(tmp_path, rng.integers(0, 256, (64, 64)).astype(np.uint8), name)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=name):
        read_image(path, 16, "grey")


def test_other_files_are_refused(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(UserError, match="not a PNG, JPEG, TIFF or DICOM image"):
        read_image(text, 8, "grey")
    gif = saved(tmp_path, ramp(), "a.gif").rename(tmp_path / "gif.png")
    with pytest.raises(UserError, match="not a PNG"):
        read_image(gif, 8, "grey")
    with pytest.raises(UserError, match="absent.png: cannot be read \\(No such file"):
        read_image(tmp_path / "absent.png", 8, "grey")
    several = saved(
        tmp_path, Image.fromarray(ramp()), "two.tif", save_all=True, append_images=[Image.fromarray(ramp())]
    )
    with pytest.raises(UserError, match="several pictures"):
        read_image(several, 8, "grey")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [9_200, 12_000, 60_000])
def test_decompression_bombs_are_refused_from_their_header(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body)
    with pytest.raises(UserError, match="pixels"):
        read_image(path, 8, "grey")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_files_end_in_one_error_or_an_image(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "TIFF"]))
    buffer = io.BytesIO()
    Image.fromarray(ramp(16, 16)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / f"damaged.{kind.lower()}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the decoders' own remarks about damage
        try:
            image = read_image(path, 8, "grey")
        except UserError as error:
            assert path.name in str(error)
        else:
            assert image.shape == (1, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_bytes_round_trip(channels):
    image = np.random.default_rng(0).integers(0, 256, (channels, 9, 7))
    png = png_bytes(image / 255.0)
    assert png.startswith(b"\x89PNG")
    again = np.asarray(Image.open(io.BytesIO(png)))
    np.testing.assert_array_equal(again, image[0] if channels == 1 else image.transpose(1, 2, 0))
    assert np.asarray(Image.open(io.BytesIO(png_bytes(np.full((1, 2, 2), 3.0))))).max() == 255

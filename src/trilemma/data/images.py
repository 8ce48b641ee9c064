"""Image files in and out: the only module that knows Pillow.

Files come from anywhere, so a reader here admits four formats, limits the number of pixels before it decodes, and
turns whatever a decoder raises into one message that names the file.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from trilemma.errors import UserError
from trilemma.monai_bridge import read_dicom

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
MAX_PIXELS = 80_000_000
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_REMEDY = "Replace the file, or leave it out"


def is_dicom(path: Path) -> bool:
    """Returns whether a file is DICOM by its name."""
    return path.suffix.lower() in (".dcm", ".dicom")


def is_deep(path: Path) -> bool:
    """Returns whether a file has more than 8 bits per channel, from its header.

    Raises:
        UserError: Not a readable image.
    """
    if is_dicom(path):
        return True
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return False
    with _opened(path) as image:
        return image.mode in _SIXTEEN_BIT or image.mode == "F"


def read_image(path: Path, size: int, mode: str) -> np.ndarray:
    """Reads one image as a square.

    The image is turned as its EXIF says, put on black where it is transparent, and resized to `size` x `size` with
    antialiasing, whatever its proportions were (no cropping, no padding).

    Args:
        path: PNG, JPEG, TIFF or DICOM.
        size: Height and width in pixels.
        mode: "grey" (ITU-R 601 luma of a colour image) or "rgb" (a grey image three times).

    Returns:
        (1 or 3, size, size): uint8 for 8-bit files; float32 in [0, 1], scaled by their range, for 16-bit files and
        DICOM.

    Raises:
        UserError: The file is missing, damaged, not one of the formats, too large, or holds several pictures.
    """
    if is_dicom(path):
        return _finish_deep(read_dicom(path, MAX_PIXELS), size, mode)
    with _opened(path) as image:
        try:
            if image.format == "JPEG":
                # Large JPEGs decode at a reduced scale, still twice the wanted size, before they are antialiased.
                image.draft("L" if mode == "grey" else "RGB", (2 * size, 2 * size))
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode in _SIXTEEN_BIT or upright.mode == "F":
                return _finish_deep(_unit_range(path, upright), size, mode)
            flat = _without_alpha(upright).convert("L" if mode == "grey" else "RGB")
            return _square(flat, size)
        except UserError:
            raise
        except Exception as error:  # a decoder may raise anything when its input is hostile
            raise UserError(str(path), f"cannot be decoded ({error})", _REMEDY) from None


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Returns decoded pixels resized as `read_image` resizes an 8-bit file: what a shipped model must do itself.

    Args:
        pixels: uint8, (H, W) of a grey image or (H, W, 3).
        size: Height and width in pixels.

    Returns:
        (1 or 3, size, size): uint8.
    """
    return _square(Image.fromarray(pixels), size)


def _square(image: Image.Image, size: int) -> np.ndarray:
    array = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def png_bytes(image_CHW: np.ndarray) -> bytes:
    """Returns an image as a PNG file.

    Args:
        image_CHW: float in [0, 1] (values outside are clipped), 1 or 3 channels.
    """
    array = np.rint(np.clip(np.asarray(image_CHW, dtype=np.float64), 0.0, 1.0) * 255.0).astype(np.uint8)
    image = Image.fromarray(array[0]) if array.shape[0] == 1 else Image.fromarray(array.transpose(1, 2, 0).copy())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image after checking its header; the file is closed here, as Pillow forgets some damaged ones."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "Correct the path or its permissions"
        ) from None
    with stream:
        image = _checked(path, stream)
        with image:
            yield image


def _checked(path: Path, stream: IO[bytes]) -> Image.Image:
    try:
        image = Image.open(stream, formats=("PNG", "JPEG", "TIFF"))
        several = image.format == "TIFF" and getattr(image, "n_frames", 1) > 1
        cut = image.mode not in _SIXTEEN_BIT and any(";16" in str(tile[3]) for tile in image.tile)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(str(path), f"has more than {MAX_PIXELS} pixels", "Scale it down first") from None
    except Exception as error:  # see read_image
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "not a PNG, JPEG, TIFF or DICOM image" if unknown else str(error)
        raise UserError(str(path), f"cannot be read ({reason})", _REMEDY) from None
    if image.size[0] * image.size[1] > MAX_PIXELS:
        size = f"{image.size[0]} x {image.size[1]}"
        raise UserError(str(path), f"has {size} pixels, more than {MAX_PIXELS}", "Scale it down first")
    if cut:  # Pillow would keep the upper half of every number without a word
        raise UserError(
            str(path), "has 16 bits in each of several channels", "Save it with 8 bits, or as grey with 16 and no alpha"
        )
    if several:
        raise UserError(str(path), "holds several pictures; images here are 2-D", "Save one picture per file")
    return image


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, (0, 0, 0, 255)), coloured).convert("RGB")
    return image.convert("RGB") if image.mode == "P" else image


def _unit_range(path: Path, image: Image.Image) -> np.ndarray:
    """Returns a 16-bit or float image as float32 in [0, 1], shape (H, W)."""
    array = np.asarray(image)
    values = array.astype(np.float32)
    if image.mode != "F":
        values = values / np.float32(65535.0)
    if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > 1.0:
        allowed = "0..1" if image.mode == "F" else "0..65535"
        raise UserError(
            str(path), f"has pixel values outside {allowed} ({array.min()} to {array.max()})", "Save it as 16-bit PNG"
        )
    return values


def _finish_deep(image_HW: np.ndarray, size: int, mode: str) -> np.ndarray:
    resized = Image.fromarray(image_HW).resize((size, size), Image.Resampling.BILINEAR)
    grey = np.clip(np.asarray(resized, dtype=np.float32), 0.0, 1.0)[None]
    return grey if mode == "grey" else np.repeat(grey, 3, axis=0)

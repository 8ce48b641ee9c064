"""DICOM files through MONAI's reader: rescale, windows, look-up tables, inversion."""

import importlib.util
import warnings
from functools import partial

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from helpers.pictures import roots_of
from trilemma.data.images import MAX_PIXELS, read_image
from trilemma.data.specs import Folder
from trilemma.errors import UserError
from trilemma.monai_bridge import read_dicom

read = partial(read_dicom, max_pixels=MAX_PIXELS)

PIXELS = np.arange(48, dtype=np.uint16).reshape(6, 8) * 80  # 0..3760, taller than it is stored wide


def write(path, pixels=PIXELS, **fields):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["fixed"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = pixels.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)
    return path


def test_without_a_window_the_stored_bits_are_the_range(tmp_path):
    image = read(write(tmp_path / "a.dcm"))
    assert image.dtype == np.float32 and image.shape == (6, 8)
    np.testing.assert_allclose(image, PIXELS / 4095.0, atol=1e-6)


def test_signed_values_and_rescale(tmp_path):
    signed = (PIXELS.astype(np.int16) - 2048).astype(np.int16)
    path = write(tmp_path / "a.dcm", signed, PixelRepresentation=1, RescaleSlope="2", RescaleIntercept="-5")
    np.testing.assert_allclose(read(path), PIXELS / 4095.0, atol=1e-6)


def test_monochrome1_is_inverted(tmp_path):
    path = write(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(read(path), 1.0 - PIXELS / 4095.0, atol=1e-6)


def test_the_first_window_is_applied_as_the_standard_says(tmp_path):
    path = write(tmp_path / "a.dcm", WindowCenter=["2000", "1"], WindowWidth=["1001", "2"], RescaleSlope="1",
                 RescaleIntercept="100")  # fmt: skip
    expected = np.clip((PIXELS + 100 - 1999.5) / 1000 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    np.testing.assert_allclose(read(path), expected, atol=1e-6)
    path = write(tmp_path / "b.dcm", WindowCenter="2000", WindowWidth="800", VOILUTFunction="SIGMOID")
    np.testing.assert_allclose(read(path), 1 / (1 + np.exp(-4 * (PIXELS - 2000.0) / 800)), atol=1e-5)
    path = write(tmp_path / "c.dcm", WindowCenter="2000", WindowWidth="800", VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_allclose(read(path), np.clip((PIXELS - 2000.0) / 800 + 0.5, 0, 1), atol=1e-6)


def test_windows_agree_with_pydicom(tmp_path):
    from pydicom.pixels.processing import apply_windowing

    path = write(tmp_path / "a.dcm", WindowCenter="1500", WindowWidth="1200")
    theirs = apply_windowing(PIXELS.astype(float), pydicom.dcmread(path)) / 4095.0
    np.testing.assert_allclose(read(path), theirs, atol=1e-6)


def test_a_look_up_table_is_applied(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.LUTData = (np.sqrt(np.arange(4096) / 4095.0) * 65535).astype(np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    path = write(tmp_path / "a.dcm", VOILUTSequence=[table])
    np.testing.assert_allclose(read(path), np.sqrt(PIXELS / 4095.0), atol=1e-4)


def test_a_dicom_file_is_an_image_like_any_other(tmp_path):
    path = write(tmp_path / "a.dcm")
    image = read_image(path, 4, "rgb")
    assert image.dtype == np.float32 and image.shape == (3, 4, 4)
    roots = roots_of(tmp_path)
    for split, number in (("train", 4), ("test", 1)):
        for label, scale in (("low", 40), ("high", 80)):
            folder = roots.data / "mine" / split / label
            folder.mkdir(parents=True)
            for i in range(number):
                write(folder / f"{i}.dcm", (np.arange(48).reshape(6, 8) * scale + i).astype(np.uint16))
            Image.fromarray(np.full((6, 8), 255, np.uint8)).save(folder / "white.png")
    data = Folder(path="mine", size=8).load(roots)
    assert data.train.images_NCHW.dtype == np.float32 and float(data.train.x().max()) <= 1.0


@pytest.mark.parametrize("content", [b"", b"no dicom", b"\0" * 128 + b"DICM" + b"\x02\x00\x10\x00UI\xff\xff"])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "bad.dcm"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.dcm"):
        read_image(path, 8, "grey")


def test_truncated_several_and_coloured_are_refused(tmp_path):
    path = write(tmp_path / "short.dcm")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="short.dcm"):
        read(path)
    path = write(tmp_path / "many.dcm", np.stack([PIXELS, PIXELS]), NumberOfFrames=2)
    with pytest.raises(UserError, match="several frames"):
        read(path)
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "absent.dcm")


def test_a_damaged_file_is_told_of_once(tmp_path):
    path = write(tmp_path / "bad.dcm")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.1000x.1.2.1\0"))  # transfer syntax
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match="bad.dcm"):
            read(path)
    assert [str(warning.message) for warning in said] == []


def test_a_picture_too_large_is_refused_by_its_header(tmp_path):
    path = write(tmp_path / "a.dcm")
    assert read(path, max_pixels=48).shape == (6, 8)
    with pytest.raises(UserError, match="a.dcm: has 8 x 6 pixels, more than 47"):
        read(path, max_pixels=47)
    path = write(tmp_path / "b.dcm", Rows=10_000, Columns=9_000)  # more than the file holds
    with pytest.raises(UserError, match=f"b.dcm: has 9000 x 10000 pixels, more than {MAX_PIXELS}"):
        read_image(path, 8, "grey")


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.dcm")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pydicom" else find(name, *rest)
    )
    with pytest.raises(UserError, match=r'pip install "trilemma\[dicom\]"'):
        read(path)

"""PatchCamelyon (Veeling et al. 2018): the only module that knows HDF5."""

from pathlib import Path

import h5py
import numpy as np

from trilemma.data.assemble import SPLITS, assemble, plain_records
from trilemma.data.cache import cached_arrays, new_array
from trilemma.data.records import Dataset
from trilemma.data.roots import DataRoots
from trilemma.errors import UserError
from trilemma.spec import content_key

_LAYOUT_VERSION = 1
_SIZE = 96
_BLOCK = 1024
_SOURCE = "PatchCamelyon (Veeling et al. 2018, doi 10.5281/zenodo.2546921), CC0"
_FETCH = "Get it from https://zenodo.org/records/2546921 and unpack it with gunzip"
_PUBLISHED = {"train": "train", "val": "valid", "test": "test"}


def load_pcam(path: str, max_records: int | None, roots: DataRoots) -> Dataset:
    """Returns the patches, 96 x 96 in colour: 'normal' or 'tumour' in their centre.

    Raises:
        UserError: A file is missing, damaged or not of the published form.
    """
    folder = roots.locate(path)
    files = {(split, part): _file(folder, split, part) for split in SPLITS for part in "xy"}
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files.values()]
    key = content_key("pcam", _LAYOUT_VERSION, max_records, states)
    arrays = cached_arrays(roots.cache, key, lambda target: _copy(files, max_records, target))
    splits = {split: plain_records(arrays[split], arrays[f"{split}_labels"]) for split in SPLITS}
    return assemble("PatchCamelyon", ("normal", "tumour"), ("all",), splits, _SOURCE)


def _file(folder: Path, split: str, part: str) -> Path:
    file = folder / f"camelyonpatch_level_2_split_{_PUBLISHED[split]}_{part}.h5"
    if not file.is_file():
        raise UserError(str(file), "does not exist", _FETCH)
    return file


def _copy(files: dict[tuple[str, str], Path], max_records: int | None, target: Path) -> None:
    for split in SPLITS:
        x_file, y_file = files[split, "x"], files[split, "y"]
        try:
            with h5py.File(x_file, "r") as x_source, h5py.File(y_file, "r") as y_source:
                x, y = _array(x_source, "x", x_file), _array(y_source, "y", y_file)
                if x.dtype != np.uint8 or x.shape[1:] != (_SIZE, _SIZE, 3):
                    raise UserError(str(x_file), f"'x' is {x.dtype} {x.shape}, expected uint8 (N, 96, 96, 3)", _FETCH)
                if y.dtype.kind not in "iu" or y.shape[0] != x.shape[0] or y.size != y.shape[0]:
                    raise UserError(
                        str(y_file), f"'y' is {y.dtype} {y.shape}, expected ({x.shape[0]}, 1, 1, 1)", _FETCH
                    )
                number = x.shape[0] if max_records is None else min(max_records, x.shape[0])
                images = new_array(target, split, (number, 3, _SIZE, _SIZE), np.uint8)
                for start in range(0, number, _BLOCK):
                    stop = min(start + _BLOCK, number)
                    images[start:stop] = x[start:stop].transpose(0, 3, 1, 2)
                labels = y[:number].reshape(-1).astype(np.int64)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                raise  # the disk of the cache, not the file
            raise UserError(f"{x_file}, {y_file.name}", f"cannot be read as HDF5 ({error})", _FETCH) from None
        np.save(target / f"{split}_labels.npy", labels, allow_pickle=False)


def _array(source: h5py.File, name: str, file: Path) -> h5py.Dataset:
    found = source.get(name)
    if not isinstance(found, h5py.Dataset):
        raise UserError(str(file), f"has no array '{name}'", _FETCH)
    return found

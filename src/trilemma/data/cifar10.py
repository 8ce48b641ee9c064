"""CIFAR-10 (Krizhevsky 2009) from its published python or binary batches; no pickle is ever executed."""

from pathlib import Path

import numpy as np

from trilemma.data.assemble import assemble, plain_records
from trilemma.data.inert_pickle import read_inert
from trilemma.data.records import Dataset
from trilemma.data.roots import DataRoots
from trilemma.data.split import hold_out
from trilemma.errors import UserError
from trilemma.randomness import numpy_generator

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SOURCE = "CIFAR-10 (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html"
_FETCH = "Get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there"
_PIXELS = 3 * 32 * 32
_MAX_BYTES = 100_000_000
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))


def load_cifar10(path: str, val_fraction: float, roots: DataRoots) -> Dataset:
    """Returns the images, 32 x 32 in colour; validation is made from train.

    Raises:
        UserError: A batch is missing, damaged, or holds anything but data.
    """
    folder = roots.locate(path)
    batches = [_read_batch(folder, name) for name in _TRAIN]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    held = hold_out(np.arange(len(labels)), labels, val_fraction, numpy_generator(0, "validation"))
    splits = {
        "train": plain_records(images[~held], labels[~held]),
        "val": plain_records(images[held], labels[held]),
        "test": plain_records(*_read_batch(folder, "test_batch")),
    }
    return assemble("CIFAR-10", CLASSES, ("all",), splits, _SOURCE)


def _read_batch(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (N, 3, 32, 32) uint8 and labels (N,) int64 of one batch."""
    plain, binary = folder / name, folder / f"{name}.bin"
    path = plain if plain.is_file() or not binary.is_file() else binary
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"has more than {_MAX_BYTES} bytes")
        data = path.read_bytes()
        images, labels = _from_binary(data) if path.suffix == ".bin" else _from_python(data)
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", _FETCH) from None
    except ValueError as error:
        raise UserError(str(path), f"is not a CIFAR-10 batch ({error})", f"Delete it. {_FETCH}") from None
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
    if len(wrong):
        raise UserError(
            str(path), f"record {wrong[0]} has label {labels[wrong[0]]}, outside 0..9", f"Delete it. {_FETCH}"
        )
    return images.copy(), labels  # its own memory, not a view of the bytes that were read


def _from_python(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = read_inert(data)
    if not isinstance(batch, dict):
        raise ValueError("it holds no dict")
    named = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    images, labels = named.get("data"), named.get("labels")
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != _PIXELS:
        raise ValueError("'data' is not a uint8 array (N, 3072)")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(type(label) is int for label in labels):
        raise ValueError("'labels' is not a list of one whole number per image")
    return images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _from_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not data or len(data) % (_PIXELS + 1):
        raise ValueError(f"its length is no multiple of {_PIXELS + 1} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, _PIXELS + 1)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)

"""MedMNIST v2 (Yang et al. 2023): twelve 2-D sets at four sizes, read from their .npz files."""

import hashlib
from pathlib import Path

import numpy as np

from trilemma.data.assemble import SPLITS, assemble, plain_records
from trilemma.data.cache import cached_arrays, new_array
from trilemma.data.download import download
from trilemma.data.medmnist_facts import PUBLISHED, RECORD_URL, Published
from trilemma.data.npz import broken, copy_member, read_headers
from trilemma.data.records import Dataset
from trilemma.data.roots import DataRoots
from trilemma.errors import UserError
from trilemma.spec import content_key

_LAYOUT_VERSION = 1


def file_name(name: str, size: int) -> str:
    """Returns the published name of a set's file."""
    return f"{name}.npz" if size == 28 else f"{name}_{size}.npz"


def load_medmnist(name: str, size: int, roots: DataRoots) -> Dataset:
    """Returns a MedMNIST set, downloaded if it is neither among the user's images nor in the cache.

    The multi-label `chestmnist` is read as two classes, 'no finding' and 'any finding', and says so.

    Raises:
        UserError: The file is missing and cannot be downloaded, or is not what it should be.
        Failure: The disk is full.
    """
    published = PUBLISHED[name]
    path = _find(name, size, roots)
    state = path.stat()
    key = content_key("medmnist", _LAYOUT_VERSION, str(path.resolve()), size, state.st_size, state.st_mtime_ns)
    arrays = cached_arrays(roots.cache, key, lambda folder: _decode(path, published, size, folder))
    warnings = ["MedMNIST does not name its patients: images of one patient may lie in several splits and clients."]
    if arrays["md5"].tobytes().hex() != published.md5[size]:
        warnings.append(
            f"{path.name} is not the published file (its MD5 checksum differs): results may not compare with others'."
        )
    classes, labels = published.classes, {split: arrays[f"{split}_labels"] for split in SPLITS}
    if name == "chestmnist":
        classes, labels = ("no finding", "any finding"), {s: y.max(1, keepdims=True) for s, y in labels.items()}
        warnings.append("ChestMNIST's 14 labels, of which several may hold, are read as one: any finding or none.")
    splits = {split: plain_records(arrays[split], labels[split][:, 0]) for split in SPLITS}
    source = (
        f"MedMNIST v2 {name}, {size} pixels (Yang et al. 2023, doi 10.1038/s41597-022-01721-8), {published.licence}"
    )
    return assemble(f"{name} {size}", classes, ("all",), splits, source, warnings=warnings)


def _find(name: str, size: int, roots: DataRoots) -> Path:
    file = file_name(name, size)
    places = [roots.data / "medmnist" / file, roots.cache / "medmnist" / file]
    for place in places:
        if place.is_file():
            return place
    url = f"{RECORD_URL}/files/{file}?download=1"
    looked = " and ".join(str(place) for place in places)
    if roots.offline:
        raise UserError(
            file,
            f"is neither at {looked}, and downloads are switched off",
            f"Get it from {url} and put it at {places[0]}",
        )
    download(
        url,
        places[1],
        PUBLISHED[name].md5[size],
        f"It was looked for at {looked}; get it from {url} by other "
        f"means and put it at {places[0]}, or go online and run the same command again",
    )
    return places[1]


def _decode(path: Path, published: Published, size: int, folder: Path) -> None:
    """Copies images (N, C, H, W), labels (N, 1 or findings) and the file's MD5 into a cache folder."""
    headers = read_headers(path)
    findings = len(published.classes) if published.channels == 1 and len(published.classes) == 14 else 1
    for split, limit in zip(SPLITS, published.num_records, strict=True):
        _check(path, headers, split, (limit, published.channels, size, findings))
    for split in SPLITS:
        stored = headers[f"{split}_images"].shape
        images = new_array(folder, split, (stored[0], published.channels, size, size), np.uint8)
        if published.channels == 1:
            copy_member(path, f"{split}_images", images.reshape(stored))
        else:
            as_stored = np.empty(stored, np.uint8)
            copy_member(path, f"{split}_images", as_stored)
            images[:] = as_stored.transpose(0, 3, 1, 2)
        member = headers[f"{split}_labels"]
        labels = np.empty(member.shape, member.dtype)
        copy_member(path, f"{split}_labels", labels)
        _check_labels(path, split, labels, 2 if findings > 1 else len(published.classes))
        np.save(folder / f"{split}_labels.npy", labels.astype(np.int64), allow_pickle=False)
    np.save(folder / "md5.npy", np.frombuffer(_md5(path), np.uint8), allow_pickle=False)


def _check(path: Path, headers: dict, split: str, expected: tuple[int, int, int, int]) -> None:
    limit, channels, size, findings = expected
    for name in (f"{split}_images", f"{split}_labels"):
        if name not in headers:
            raise broken(path, f"has no array '{name}' (it has {', '.join(sorted(headers)) or 'none'})")
    images, labels = headers[f"{split}_images"], headers[f"{split}_labels"]
    shape = (size, size) if channels == 1 else (size, size, channels)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise broken(path, f"'{split}_images' is {images.dtype} {images.shape}, expected uint8 {('N', *shape)}")
    if labels.dtype.kind not in "iu" or labels.shape != (images.shape[0], findings):
        raise broken(path, f"'{split}_labels' is {labels.dtype} {labels.shape}, expected {(images.shape[0], findings)}")
    if not 1 <= images.shape[0] <= limit:
        raise broken(path, f"'{split}_images' has {images.shape[0]} records, the published set has {limit}")


def _check_labels(path: Path, split: str, labels: np.ndarray, num_classes: int) -> None:
    wrong = np.argwhere((labels < 0) | (labels >= num_classes))
    if len(wrong):
        record = int(wrong[0, 0])
        raise broken(
            path, f"'{split}_labels' has {labels[tuple(wrong[0])]} at record {record}, outside 0..{num_classes - 1}"
        )


def _md5(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()

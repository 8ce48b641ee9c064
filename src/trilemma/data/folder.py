"""The user's own images, one folder per class."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trilemma.data.assemble import assemble
from trilemma.data.image_files import ImageFile, read_records
from trilemma.data.images import SUFFIXES
from trilemma.data.records import Dataset
from trilemma.data.roots import DataRoots
from trilemma.data.split import hold_out
from trilemma.errors import UserError
from trilemma.randomness import numpy_generator

_SPELLINGS = {
    "train": ("train", "Train", "training", "Training"),
    "val": ("val", "Val", "valid", "validation", "Validation"),
    "test": ("test", "Test", "testing", "Testing"),
}


def load_folder(path: str, size: int, mode: str, val_fraction: float, patient: str, roots: DataRoots) -> Dataset:
    """Returns the images below `path`: `train|test/CLASS/*`, with `val` or with validation made from train.

    Patient ids are compared between train and val; those of test are taken to be numbered anew, as in many published
    sets, and ids that occur in both are reported.

    Args:
        path: The folder.
        size: Height and width in pixels.
        mode: "grey" or "rgb".
        val_fraction: Share of train's patients for validation where there is no `val` folder.
        patient: Regular expression whose one group is the patient in a file's stem, or "".
        roots: Data and cache folders.

    Raises:
        UserError: A folder is missing, a class empty or unknown, an image unreadable.
    """
    root = roots.locate(path)
    if not root.is_dir():
        raise UserError(str(root), "is not a folder", "Correct the path; relative ones start at TRILEMMA_DATA")
    places = {split: _place(root, split) for split in _SPELLINGS}
    train, test, val = places["train"], places["test"], places["val"]
    if train is None or test is None:
        missing = "train" if train is None else "test"
        raise UserError(str(root), f"has no folder '{missing}'", "Lay it out as train/CLASS/* and test/CLASS/*")
    classes = _classes(train)
    files = {"train": _list(train, classes, root, patient), "test": _list(test, classes, root, patient)}
    if val is not None:
        files["val"] = _list(val, classes, root, patient)
    else:
        files["train"], files["val"] = hold_out_files(files["train"], val_fraction, "validation")
    shared = {f.patient for f in files["test"] if f.patient} & {f.patient for s in ("train", "val") for f in files[s]}
    warnings = []
    if not patient:
        warnings.append(
            "Patients are not known (no `patient` pattern): every image counts as a patient of its own, so that one "
            "person may be on both sides of a split, and intervals may be too narrow."
        )
    if shared:
        warnings.append(
            f"{len(shared)} patient ids of test also occur in train or val ({min(shared)} is one): "
            "if they mean the same people, the test results are too good."
        )
    files["test"] = [
        ImageFile(f.path, f.name, f.label, f.patient and f"{f.patient} of test", f.site) for f in files["test"]
    ]
    splits = read_records(files, size, mode, roots)
    return assemble(f"{root.name} {size}", classes, ("all",), splits, f"Images in {root.name}", warnings=warnings)


def hold_out_files(files: Sequence[ImageFile], fraction: float, role: str) -> tuple[list[ImageFile], list[ImageFile]]:
    """Returns the files that stay and those of a random `fraction` of the patients of each class.

    The draw depends on nothing but the list, so that every study sees the same splits.
    """
    patients = [file.patient or f"\x00{index}" for index, file in enumerate(files)]
    units_N = np.unique(patients, return_inverse=True)[1] if files else np.empty(0, dtype=np.int64)
    labels_N = np.array([file.label for file in files], dtype=np.int64)
    held_N = hold_out(units_N, labels_N, fraction, numpy_generator(0, role))
    stay = [file for file, held in zip(files, held_N, strict=True) if not held]
    return stay, [file for file, held in zip(files, held_N, strict=True) if held]


def _place(root: Path, split: str) -> Path | None:
    found = [child for child in sorted(root.iterdir()) if child.is_dir() and child.name in _SPELLINGS[split]]
    if len(found) > 1:
        names = " and ".join(place.name for place in found)
        raise UserError(str(root), f"has several folders for {split}: {names}", "Keep one of them")
    return found[0] if found else None


def _classes(train: Path) -> list[str]:
    classes = sorted(child.name for child in train.iterdir() if child.is_dir() and not child.name.startswith("."))
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise UserError(str(train), f"has fewer than two class folders ({found})", "Make one folder per class")
    return classes


def _list(place: Path, classes: Sequence[str], root: Path, patient: str) -> list[ImageFile]:
    files = []
    for folder in sorted(child for child in place.iterdir() if child.is_dir() and not child.name.startswith(".")):
        if folder.name not in classes:
            raise UserError(
                str(folder), f"is no class of train ({', '.join(classes)})", "Rename it, or add the class to train"
            )
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise UserError(str(folder), f"holds no images ({', '.join(SUFFIXES)})", "Add some, or remove the folder")
        label = classes.index(folder.name)
        files += [ImageFile(path, str(path.relative_to(root)), label, _patient(path, patient)) for path in found]
    if not files:
        raise UserError(str(place), "has no class folders", "Make one folder per class")
    return files


def _patient(path: Path, pattern: str) -> str:
    if not pattern:
        return ""
    match = re.search(pattern, path.stem)
    if match is None or not match[1]:
        raise UserError(
            str(path),
            f"the pattern '{pattern}' finds no patient in the file's name",
            "Correct `patient`, or leave it out",
        )
    return match[1]

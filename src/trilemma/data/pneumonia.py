"""The paediatric chest X-ray set of Kermany et al. (2018) in its published folder layout.

Diagnosis and patient are in the file names: `person1301_virus_2241.jpeg` is patient 1301 with viral pneumonia;
`IM-0115-0001.jpeg` and `NORMAL2-IM-1427-0001.jpeg` are studies 0115 and 1427 of healthy children. Number
ranges start again in `test`, so an id means something only together with its split.
"""

import re
from pathlib import Path

import numpy as np

from trilemma.data.assemble import assemble
from trilemma.data.image_files import ImageFile, read_records
from trilemma.data.records import Dataset
from trilemma.data.roots import DataRoots
from trilemma.data.split import hold_out
from trilemma.errors import UserError
from trilemma.randomness import numpy_generator

_SICK = re.compile(r"(person\d+)_(bacteria|virus)_\d+")
_HEALTHY = re.compile(r"(?:NORMAL\d*-)?(IM-\d+)-\d+")
_SOURCE = "Paediatric chest X-rays (Kermany et al. 2018, doi 10.17632/rscbjbr9sj.2), CC BY 4.0"
_CLASSES = {2: ("normal", "pneumonia"), 3: ("normal", "bacterial", "viral")}


def parse_name(path: Path) -> tuple[str, int]:
    """Returns the patient and the diagnosis that a file name tells: 0 normal, 1 bacterial, 2 viral.

    Raises:
        UserError: The name is not of the published form, or contradicts its folder.
    """
    sick, healthy = _SICK.match(path.stem), _HEALTHY.match(path.stem)
    if sick and path.parent.name == "PNEUMONIA":
        return sick[1], 1 if sick[2] == "bacteria" else 2
    if healthy and path.parent.name == "NORMAL":
        return healthy[1], 0
    raise UserError(
        str(path),
        "the name does not tell patient and diagnosis as the published files do",
        'Keep the published names (PNEUMONIA/person1_virus_6.jpeg, NORMAL/IM-0115-0001.jpeg), or use kind = "folder"',
    )


def load_pneumonia(folder: str, classes: int, size: int, mode: str, val_fraction: float, roots: DataRoots) -> Dataset:
    """Returns the set; validation is made from train, a patient at a time.

    The 16 images of the `val` folder of some copies were taken from train by whoever made it; they join train.

    Raises:
        UserError: The folder or an image is missing, unreadable or not named as published.
    """
    root = roots.locate(folder)
    pool = _list(root, "train", required=True) + _list(root, "val", required=False)
    units_N = np.unique([file.patient for file in pool], return_inverse=True)[1]
    labels_N = np.array([file.label for file in pool])
    held_N = hold_out(units_N, labels_N, val_fraction, numpy_generator(0, "validation"))
    files = {
        "train": [file for file, held in zip(pool, held_N, strict=True) if not held],
        "val": [file for file, held in zip(pool, held_N, strict=True) if held],
        "test": _list(root, "test", required=True),
    }
    splits = read_records(files, size, mode, roots)
    if classes == 2:
        for records in splits.values():
            np.minimum(records.labels_N, 1, out=records.labels_N)
    return assemble(f"chest X-rays {size}", _CLASSES[classes], ("all",), splits, _SOURCE)


def _list(root: Path, split: str, required: bool) -> list[ImageFile]:
    files = []
    for folder in ("NORMAL", "PNEUMONIA"):
        found = sorted(path for path in (root / split / folder).glob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
        if required and not found:
            raise UserError(
                str(root / split / folder),
                "holds no JPEG images",
                "Set TRILEMMA_DATA to the folder that has chest_xray, which is published at "
                "https://data.mendeley.com/datasets/rscbjbr9sj/2",
            )
        origin = "test" if split == "test" else "train"
        for path in found:
            patient, diagnosis = parse_name(path)
            files.append(ImageFile(path, str(path.relative_to(root)), diagnosis, f"{origin}/{patient}"))
    return files

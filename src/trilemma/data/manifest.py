"""The user's own images, listed in a CSV file."""

import csv
from pathlib import Path, PurePosixPath, PureWindowsPath

from trilemma.data.assemble import SPLITS, assemble
from trilemma.data.folder import hold_out_files
from trilemma.data.image_files import ImageFile, read_records
from trilemma.data.images import SUFFIXES
from trilemma.data.records import Dataset
from trilemma.data.roots import DataRoots
from trilemma.errors import UserError

_COLUMNS = ("path", "label", "patient", "site", "split")


def load_manifest(path: str, size: int, mode: str, fractions: tuple[float, float], roots: DataRoots) -> Dataset:
    """Returns the images that a CSV file lists.

    The first line names the columns: `path` and `label`, and if known `patient`, `site` and `split` (train, val,
    test); others are ignored. An image path is relative to the CSV file's folder and must stay below it. Patients
    mean the same person in every split. Classes are sorted by name, by number if all are whole numbers.

    Args:
        path: The CSV file.
        size: Height and width in pixels.
        mode: "grey" or "rgb".
        fractions: Shares of the patients for val and test where no row is marked so.
        roots: Data and cache folders.

    Raises:
        UserError: Names the line of the CSV file, or the image.
    """
    file = roots.locate(path)
    rows = _read(file)
    classes = _in_order({row["label"] for _, row in rows})
    sites = _in_order({row["site"] for _, row in rows})
    if len(sites) > 1 and "" in sites:
        line = next(line for line, row in rows if not row["site"])
        raise UserError(f"{file}: line {line}", "has no site while others have one", "Fill in the column")
    splits = _splits(file, rows, classes, sites)
    for split, fraction in (("test", fractions[1]), ("val", fractions[0])):
        if not splits[split]:
            splits["train"], splits[split] = hold_out_files(splits["train"], fraction, split)
    records = read_records(splits, size, mode, roots)
    names = tuple(site or "all" for site in sites)
    return assemble(f"{file.stem} {size}", classes, names, records, f"Images listed in {file.name}")


def _read(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Returns line number and cells of each row; absent columns are ""."""
    rows = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            _check_header(file, reader.fieldnames)
            for row in reader:
                where = f"{file}: line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(where, "has another number of cells than the first line", "Correct the line")
                cells = {column: (row.get(column) or "").strip() for column in _COLUMNS}
                for column in ("path", "label"):
                    if not cells[column]:
                        raise UserError(where, f"has no {column}", "Fill it in, or delete the line")
                rows.append((reader.line_num, cells))
    except OSError as error:
        raise UserError(
            str(file), f"cannot be read ({error.strerror})", "Correct the path; relative ones start at TRILEMMA_DATA"
        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            str(file), f"is not a CSV file in UTF-8 ({error})", "Save it as comma-separated UTF-8"
        ) from None
    if not rows:
        raise UserError(str(file), "lists no images", "Add one line per image")
    return rows


def _check_header(file: Path, names: object) -> None:
    found = [str(name) for name in names] if isinstance(names, (list, tuple)) else []
    for column in ("path", "label"):
        if column not in found:
            raise UserError(
                f"{file}: line 1",
                f"has no column '{column}' (it has {', '.join(found) or 'none'})",
                "Name the columns in the first line: path,label,patient,site,split",
            )
    twice = next((name for name in found if name in _COLUMNS and found.count(name) > 1), None)
    if twice:
        raise UserError(f"{file}: line 1", f"has the column '{twice}' twice", "Keep one of them")


def _splits(
    file: Path, rows: list[tuple[int, dict[str, str]]], classes: list[str], sites: list[str]
) -> dict[str, list[ImageFile]]:
    """Returns the rows by split; a row without one is for training."""
    splits: dict[str, list[ImageFile]] = {split: [] for split in SPLITS}
    paths: dict[Path, int] = {}
    patients: dict[str, tuple[str, int]] = {}
    for line, row in rows:
        where = f"{file}: line {line}"
        split = row["split"] or "train"
        if split not in SPLITS:
            raise UserError(where, f"has the split '{split}'", "Write train, val or test")
        path = _below(file.parent, row["path"], where)
        if (first := paths.setdefault(path, line)) != line:
            raise UserError(where, f"lists the image of line {first} again", "Delete one of the lines")
        if row["patient"]:
            other, first = patients.setdefault(row["patient"], (split, line))
            if other != split:
                raise UserError(
                    where,
                    f"patient {row['patient']} is in {split} here and in {other} in line {first}",
                    "Put all records of a patient into one split",
                )
        label, site = classes.index(row["label"]), sites.index(row["site"])
        splits[split].append(ImageFile(path, row["path"], label, row["patient"], site))
    return splits


def _below(folder: Path, text: str, where: str) -> Path:
    """Returns the image's real path if it lies below `folder`."""
    posix, windows = PurePosixPath(text), PureWindowsPath(text)
    if "\x00" in text or posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts:
        raise UserError(where, f"the path '{text}' leaves the manifest's folder", "Use paths below that folder")
    path = folder / posix
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(where, f"'{text}' is not a known kind of image", f"Use one of {', '.join(SUFFIXES)}")
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise UserError(where, f"the image '{text}' does not exist", "Correct the path, or delete the line") from None
    if not real.is_relative_to(folder.resolve()):
        raise UserError(where, f"the link '{text}' leaves the manifest's folder", "Put the image itself there")
    if not real.is_file():
        raise UserError(where, f"'{text}' is not a file", "Correct the path, or delete the line")
    return real


def _in_order(names: set[str]) -> list[str]:
    # The name too, since "1" and "01" are two names of one number, and a set has no order of its own. Python reads no
    # number of more than 4300 digits.
    whole = all(name.isdecimal() and len(name) <= 4300 for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if whole else sorted(names)

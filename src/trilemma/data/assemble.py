"""The last step of every source: check what was read and put it together as a Dataset."""

import hashlib
from collections.abc import Sequence

import numpy as np

from trilemma.data.duplicates import digests, duplicate_warnings
from trilemma.data.records import Dataset, Records
from trilemma.errors import UserError

SPLITS = ("train", "val", "test")


def assemble(
    name: str,
    classes: Sequence[str],
    sites: Sequence[str],
    splits: dict[str, Records],
    source: str,
    synthetic: bool = False,
    warnings: Sequence[str] = (),
) -> Dataset:
    """Returns the data set after checking it; duplicates and thin classes become warnings.

    Args:
        name: Short name for titles and error messages.
        classes: Class names in label order, at least two.
        sites: Site names in code order, at least one.
        splits: "train", "val" and "test".
        source: Where the images come from and their licence.
        synthetic: True for generated images.
        warnings: What the source itself has to say.

    Raises:
        UserError: No records in a split, a label outside the classes, a class without training records, images of
            unlike shapes, a patient in two splits.
    """
    if len(classes) < 2:
        raise UserError(name, f"only one class was found ({', '.join(classes)})", "Classification needs at least two")
    for split in SPLITS:
        _check_records(f"{name}: {split}", splits[split], classes, sites)
    _check_classes(name, splits["train"], classes)
    _check_patients(name, splits)
    hashes = {split: digests(splits[split]) for split in SPLITS}
    thin = [
        f"Class '{label}' has no record in {split}: nothing can be measured for it there."
        for split in ("val", "test")
        for index, label in enumerate(classes)
        if index not in splits[split].labels_N
    ]
    return Dataset(
        name=name,
        classes=tuple(classes),
        sites=tuple(sites),
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        synthetic=synthetic,
        source=source,
        fingerprint=_fingerprint(splits, hashes, classes),
        warnings=(*warnings, *thin, *duplicate_warnings(splits, hashes)),
    )


def _check_records(where: str, records: Records, classes: Sequence[str], sites: Sequence[str]) -> None:
    if not len(records):
        raise UserError(where, "holds no records", "Give at least one image per class")
    shape = records.images_NCHW.shape
    if len(shape) != 4 or shape[0] != len(records) or shape[1] not in (1, 3) or shape[2] != shape[3]:
        raise UserError(where, f"images of shape {shape} are not (N, 1 or 3, size, size)", "Check how they were saved")
    for what, codes_N, limit in (("label", records.labels_N, len(classes)), ("site", records.sites_N, len(sites))):
        wrong = np.flatnonzero((codes_N < 0) | (codes_N >= limit))
        if len(wrong):
            record, code = records.names_N[wrong[0]], codes_N[wrong[0]]
            raise UserError(
                where,
                f"record {record} has {what} {code}, outside 0..{limit - 1}",
                "Correct it or leave the record out",
            )


def _check_classes(name: str, train: Records, classes: Sequence[str]) -> None:
    counts = np.bincount(train.labels_N, minlength=len(classes))
    empty = [label for label, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"{name}: train", f"class '{empty[0]}' has no record", "Add images of it, or leave the class out everywhere"
        )


def _check_patients(name: str, splits: dict[str, Records]) -> None:
    seen: dict[int, str] = {}
    for split in SPLITS:
        records = splits[split]
        for code in np.unique(records.patients_N[records.patients_N >= 0]):
            other = seen.setdefault(int(code), split)
            if other != split:
                record = records.names_N[records.patients_N == code][0]
                raise UserError(
                    f"{name}: {split}",
                    f"the patient of record {record} also has records in {other}",
                    "Put all records of a patient into one split",
                )


def _fingerprint(splits: dict[str, Records], hashes: dict[str, list[bytes]], classes: Sequence[str]) -> str:
    state = hashlib.blake2b("\x1f".join(classes).encode(), digest_size=16)
    for split in SPLITS:
        state.update(b"".join(hashes[split]))
        for codes_N in (splits[split].labels_N, splits[split].patients_N, splits[split].sites_N):
            state.update(np.asarray(codes_N, dtype="<i8").tobytes())
    return state.hexdigest()


def plain_records(images_NCHW: np.ndarray, labels_N: np.ndarray) -> Records:
    """Returns records of which neither patient nor site is known, named by their index."""
    number = len(labels_N)
    return Records(
        images_NCHW,
        np.array(labels_N, dtype=np.int64),
        np.full(number, -1, dtype=np.int64),
        np.zeros(number, dtype=np.int64),
        np.arange(number).astype(str),
    )

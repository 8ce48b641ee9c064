"""Holding records out of a split, a patient at a time and each class in proportion."""

import numpy as np


def unit_classes(units_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the units with their sizes and their classes.

    A unit is what may not be divided: a patient, or one record whose patient is unknown.

    Args:
        units_N: One code per record, as from `Records.units()`.
        labels_N: Class indices.

    Returns:
        Distinct units (U,) ascending, number of records of each (U,), its most frequent class (U,), the lower on a tie.
    """
    units_U, inverse_N, sizes_U = np.unique(units_N, return_inverse=True, return_counts=True)
    counts_UC = np.zeros((len(units_U), int(labels_N.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(counts_UC, (inverse_N, labels_N), 1)
    return units_U, sizes_U, counts_UC.argmax(1)


def hold_out(units_N: np.ndarray, labels_N: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Returns a boolean mask (N,) of about `fraction` of the units of each class, whole units only.

    Of every class with at least two units, at least one is held out and at least one stays.
    """
    units_U, _, classes_U = unit_classes(units_N, labels_N)
    held = []
    for label in np.unique(classes_U):
        members = rng.permutation(units_U[classes_U == label])
        if len(members) > 1:
            held.append(members[: min(max(round(fraction * len(members)), 1), len(members) - 1)])
    return np.isin(units_N, np.concatenate(held)) if held else np.zeros(len(units_N), dtype=bool)

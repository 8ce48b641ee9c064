"""What each client holds, as rows for a table."""

from typing import Any

import numpy as np

from trilemma.data.records import Dataset, Partition


def client_rows(dataset: Dataset, partition: Partition) -> list[dict[str, Any]]:
    """Returns one row per client of its training records.

    Returns:
        Dicts with "client" (name), "records" (number), "patients" (number, None where any is unknown) and "classes"
        (class name -> number of records).
    """
    rows = []
    for client, positions in zip(partition.clients, partition.train, strict=True):
        patients = dataset.train.patients_N[positions]
        counts = np.bincount(dataset.train.labels_N[positions], minlength=len(dataset.classes))
        rows.append(
            {
                "client": client,
                "records": len(positions),
                "patients": None if (patients < 0).any() else len(np.unique(patients)),
                "classes": {name: int(count) for name, count in zip(dataset.classes, counts, strict=True)},
            }
        )
    return rows

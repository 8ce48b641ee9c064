"""Loads a folder of images and divides it over hospitals, a patient at a time."""

import tempfile
from pathlib import Path

import numpy as np

from trilemma.data.images import png_bytes
from trilemma.data.partition import iid
from trilemma.data.roots import DataRoots
from trilemma.data.specs import Folder
from trilemma.data.summary import client_rows
from trilemma.randomness import numpy_generator


def write_images(root: Path) -> None:
    """Writes two images of each of six patients per class and split: healthy0_0.png, healthy0_1.png ..."""
    draws = numpy_generator(0, "example")
    for split in ("train", "test"):
        for label, shade in (("healthy", 0.3), ("sick", 0.6)):
            for patient in range(6):
                for view in range(2):
                    path = root / split / label / f"{label}{patient}_{view}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(png_bytes(shade + draws.normal(0, 0.1, (1, 40, 40)).astype(np.float32)))


with tempfile.TemporaryDirectory() as name:
    write_images(Path(name) / "radiographs")
    spec = Folder(path="radiographs", size=32, patient=r"^(\w+)_\d+$")
    dataset = spec.load(DataRoots(data=Path(name), cache=Path(name) / "cache"))
    print(f"{dataset.name}: {len(dataset.train)} train, {len(dataset.val)} val, {len(dataset.test)} test")
    for row in client_rows(dataset, iid(dataset, num_clients=2, seed=0)):
        print(f"{row['client']}: {row['records']} records of {row['patients']} patients, {row['classes']}")

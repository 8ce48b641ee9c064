"""Small image files for the tests of sources that read files."""

from pathlib import Path

import numpy as np
from PIL import Image

from trilemma.data.roots import DataRoots


def write_image(path: Path, seed: int = 0, size: int = 20) -> Path:
    """Writes a random grey image of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size)).astype(np.uint8)).save(path)
    return path


def write_images(root: Path, names: list[str]) -> None:
    """Writes one distinct image per relative path."""
    for seed, name in enumerate(names):
        write_image(root / name, seed)


def roots_of(tmp_path: Path) -> DataRoots:
    """Returns roots below a test's own folder."""
    return DataRoots(tmp_path / "data", tmp_path / "cache", offline=True)

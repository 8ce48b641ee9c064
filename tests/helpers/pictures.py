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


def write_stripes(root: Path, num_train: int, num_test: int, size: int = 16) -> Path:
    """Writes a folder of noisy images without and with stripes, which a small network learns in a few steps."""
    draws = np.random.default_rng(0)
    wave = 24 * np.sin(np.arange(size) * np.pi / 2 + 0.5)
    for split, number in (("train", num_train), ("test", num_test)):
        for index in range(number):
            image = 128 + 20 * draws.normal(size=(size, size)) + (index % 2) * wave
            path = root / split / ("flat", "striped")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).round().astype(np.uint8)).save(path)
    return root


def roots_of(tmp_path: Path) -> DataRoots:
    """Returns roots below a test's own folder."""
    return DataRoots(tmp_path / "data", tmp_path / "cache", offline=True)

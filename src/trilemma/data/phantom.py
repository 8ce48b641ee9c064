"""Chest-radiograph phantoms: drawn from formulas, synthetic, and said to be so.

Each image is drawn from generators of its own (its patient's anatomy, its findings, its scanner), so that image i is
the same however many are made.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trilemma.data.assemble import SPLITS, assemble
from trilemma.data.cache import cached_arrays, new_array
from trilemma.data.phantom_render import RENDERER_VERSION, Canvas, Case, draw_case, draw_scanner, make_canvas, render
from trilemma.data.records import Dataset, Records
from trilemma.data.roots import DataRoots
from trilemma.randomness import numpy_generator
from trilemma.spec import content_key

_BATCH = 32
_SOURCE = "Synthetic chest-radiograph phantoms drawn by Trilemma; no patient was ever imaged"
CLASSES = {2: ("normal", "pneumonia"), 3: ("normal", "bacterial", "viral")}


@dataclass(frozen=True)
class PhantomPlan:
    """Which phantoms to draw.

    Attributes:
        size: Height and width in pixels, at least 16.
        num_images: Of train, val and test.
        num_sites: Hospitals, each with its scanner.
        num_classes: 2 or 3.
        shift: How far the scanners differ; 0 for one scanner.
        images_per_patient: Images of equal anatomy and diagnosis.
        seed: Of everything.
    """

    size: int
    num_images: tuple[int, int, int]
    num_sites: int
    num_classes: int
    shift: float
    images_per_patient: int
    seed: int


def load_phantom(plan: PhantomPlan, roots: DataRoots) -> Dataset:
    """Returns the phantoms, drawn or from the cache.

    Raises:
        Failure: The cache cannot be written.
    """
    drawn = (plan.size, plan.num_images, plan.num_sites, plan.num_classes, plan.shift, plan.images_per_patient)
    key = content_key("phantom", RENDERER_VERSION, *drawn, plan.seed)
    arrays = cached_arrays(roots.cache, key, lambda folder: _draw_all(plan, folder))
    splits, first_patient = {}, 0
    for split, number in zip(SPLITS, plan.num_images, strict=True):
        patients = np.arange(number, dtype=np.int64) // plan.images_per_patient
        splits[split] = Records(
            arrays[split],
            np.array([label_of(plan, int(patient)) for patient in patients], dtype=np.int64),
            patients + first_patient,
            patients % plan.num_sites,
            np.arange(number).astype(str),
        )
        first_patient += int(patients[-1]) + 1
    sites = [f"hospital {number}" for number in range(1, plan.num_sites + 1)]
    return assemble(f"phantom {plan.size}", CLASSES[plan.num_classes], sites, splits, _SOURCE, synthetic=True)


def label_of(plan: PhantomPlan, patient: int) -> int:
    """Returns a patient's class: the classes take turns within each site."""
    return patient // plan.num_sites % plan.num_classes


def draw(plan: PhantomPlan, split: str, indices: range) -> np.ndarray:
    """Returns images of a split by their indices, uint8, shape (N, 1, size, size)."""
    canvas = make_canvas(plan.size)
    batches = [
        _draw_batch(plan, canvas, split, range(start, min(start + _BATCH, indices.stop)))
        for start in range(indices.start, indices.stop, _BATCH)
    ]
    return np.concatenate(batches)


def _draw_all(plan: PhantomPlan, folder: Path) -> None:
    canvas = make_canvas(plan.size)
    for split, number in zip(SPLITS, plan.num_images, strict=True):
        images = new_array(folder, split, (number, 1, plan.size, plan.size), np.uint8)
        for start in range(0, number, _BATCH):
            stop = min(start + _BATCH, number)
            images[start:stop] = _draw_batch(plan, canvas, split, range(start, stop))


def _draw_batch(plan: PhantomPlan, canvas: Canvas, split: str, indices: range) -> np.ndarray:
    return render([_case(plan, split, index) for index in indices], canvas)


def _case(plan: PhantomPlan, split: str, index: int) -> Case:
    patient = index // plan.images_per_patient
    site, label = patient % plan.num_sites, label_of(plan, patient)
    anatomy = numpy_generator(plan.seed, "phantom", "anatomy", split, patient)
    picture = numpy_generator(plan.seed, "phantom", "picture", split, index)
    scanner = draw_scanner(numpy_generator(plan.seed, "phantom", "scanner", site), plan.shift)
    if plan.num_classes == 2 and label == 1:
        label += int(anatomy.integers(2))
    return draw_case(anatomy, picture, label, scanner)

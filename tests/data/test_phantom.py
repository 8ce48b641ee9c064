"""Phantoms: seeded per image, whatever the number; learnable findings; scanners that differ by `shift`."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from trilemma.data.phantom import PhantomPlan, draw, label_of
from trilemma.data.roots import DataRoots
from trilemma.data.specs import Phantom

PLAN = PhantomPlan(32, (60, 30, 30), 3, 3, 1.0, 1, 0)


@pytest.mark.parametrize("size", [16, 17, 32, 64])
def test_images_have_their_size_and_use_their_range(size):
    images = draw(replace(PLAN, size=size), "train", range(6))
    assert images.shape == (6, 1, size, size) and images.dtype == np.uint8
    assert (images.reshape(6, -1).std(1) > 20).all()


def test_an_image_does_not_depend_on_the_others():
    images = draw(PLAN, "train", range(50))
    np.testing.assert_array_equal(draw(PLAN, "train", range(37, 41)), images[37:41])
    np.testing.assert_array_equal(draw(replace(PLAN, num_images=(500, 30, 30)), "train", range(3)), images[:3])


def test_seed_split_and_index_change_the_image():
    images = [
        draw(PLAN, "train", range(1)),
        draw(PLAN, "test", range(1)),
        draw(PLAN, "train", range(9, 10)),
        draw(replace(PLAN, seed=1), "train", range(1)),
    ]
    assert len({image.tobytes() for image in images}) == 4


def lung_brightness(images: np.ndarray) -> np.ndarray:
    """Returns mean brightness of the right and the left lung field, shape (N, 2)."""
    size = images.shape[-1]
    rows = slice(int(0.25 * size), int(0.65 * size))
    right, left = slice(int(0.18 * size), int(0.40 * size)), slice(int(0.60 * size), int(0.82 * size))
    return np.stack([images[:, 0, rows, side].mean((1, 2)) for side in (right, left)], 1)


def test_findings_are_where_they_belong():
    plan = replace(PLAN, shift=0.0, num_sites=1, num_images=(600, 3, 3))
    images = draw(plan, "train", range(600)) / 255.0
    labels = np.array([label_of(plan, index) for index in range(600)])
    brightness = lung_brightness(images)
    clear, lobar, diffuse = (brightness[labels == label] for label in range(3))
    assert lobar.mean() > clear.mean() + 0.02 and diffuse.mean() > clear.mean() + 0.02
    sides = [np.abs(group[:, 0] - group[:, 1]).mean() for group in (clear, lobar, diffuse)]
    assert sides[1] > 1.5 * sides[0] and sides[1] > 1.5 * sides[2]  # one lobe against both lungs


def test_scanners_differ_by_shift():
    def spread(shift: float) -> float:
        plan = replace(PLAN, shift=shift)
        images = draw(plan, "train", range(60))
        return float(np.std([images[site::3].mean() for site in range(3)]))

    assert spread(1.0) > 3.0 * spread(0.0)


def test_patients_share_anatomy_and_diagnosis_but_not_pixels():
    plan = replace(PLAN, images_per_patient=2, shift=0.0)
    images = draw(plan, "train", range(40)).astype(float).reshape(40, -1)
    same = np.mean([np.abs(images[i] - images[i + 1]).mean() for i in range(0, 40, 2)])
    other = np.mean([np.abs(images[i] - images[(i + 18) % 40]).mean() for i in range(0, 40, 2)])
    assert 0 < same < 0.9 * other


def test_the_data_set_is_synthetic_complete_and_cached(tmp_path):
    spec = Phantom(size=16, train=36, val=18, test=18, images_per_patient=2)
    roots = DataRoots(Path("nowhere"), tmp_path)
    data, again = spec.load(roots), spec.load(roots)
    assert data.synthetic and "ynthetic" in data.source
    assert data.classes == ("normal", "bacterial", "viral") and data.sites == ("hospital 1", "hospital 2", "hospital 3")
    assert [len(r) for r in (data.train, data.val, data.test)] == [36, 18, 18]
    assert again.fingerprint == data.fingerprint and data.warnings == ()
    assert np.bincount(data.train.labels_N).tolist() == [12, 12, 12]
    crossed = {(int(site), int(label)) for site, label in zip(data.train.sites_N, data.train.labels_N, strict=True)}
    assert len(crossed) == 9
    x = data.train.x()
    assert x.shape == (36, 1, 16, 16) and float(x.min()) >= 0.0 and float(x.max()) <= 1.0
    other = Phantom(size=16, train=36, val=12, test=18, seed=1).load(roots)
    assert other.fingerprint != data.fingerprint


def test_two_classes_mix_both_pneumonias(tmp_path):
    data = Phantom(size=16, train=40, val=10, test=10, classes=2, sites=1).load(DataRoots(Path("x"), tmp_path))
    assert data.classes == ("normal", "pneumonia") and np.bincount(data.train.labels_N).tolist() == [20, 20]


def test_too_few_images_for_the_sites_are_refused():
    with pytest.raises(ValidationError, match="leave a site without some class"):
        Phantom(train=8)


def test_drawing_is_fast_enough():
    draw(replace(PLAN, size=64), "train", range(32))
    start = time.perf_counter()
    draw(replace(PLAN, size=64), "train", range(96))
    assert time.perf_counter() - start < 2.0  # 0.15 s on an idle core


def test_a_linear_reader_beats_chance_but_is_not_perfect():
    """The findings can be learned, and their mean brightness alone does not give them away."""
    from sklearn.metrics import roc_auc_score

    plan = replace(PLAN, num_images=(600, 3, 3))
    labels = np.array([label_of(plan, index) > 0 for index in range(600)])
    score = lung_brightness(draw(plan, "train", range(600)) / 255.0)
    auroc = roc_auc_score(labels, score.mean(1))
    assert 0.52 < auroc < 0.85

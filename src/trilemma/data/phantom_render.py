"""Draws chest-radiograph phantoms: anatomy, findings and scanner as sums of smooth shapes.

Coordinates are x and y in [-1, 1], y downwards; the picture is seen from the front, so the heart points to the right.
Brightness stands for what an X-ray beam meets on its way: bone and heart bright, air dark. Arrays are (B, S, S): a
batch of pictures of S x S pixels; a value per picture is (B, 1, 1).
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

#: Part of the cache key: raise it whenever a pixel changes.
RENDERER_VERSION = 1

_COARSE, _FINE = 9, 42


@dataclass(frozen=True)
class Canvas:
    """What depends on the size alone.

    Attributes:
        x_11S: Pixel centres from left to right.
        y_1S1: Pixel centres from top to bottom.
        coarse: (S, 9) basis that turns 9 x 9 normal numbers into a smooth random field of variance 1.
        fine: (S, 42) basis of a finer field.
    """

    x_11S: np.ndarray
    y_1S1: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray


@dataclass(frozen=True)
class Case:
    """One picture to be drawn.

    Attributes:
        label: 0 normal, 1 bacterial, 2 viral.
        values: Named numbers of anatomy, findings, exposure and scanner.
        coarse: (2, 9, 9) normal numbers.
        fine: (2, 42, 42) normal numbers.
        rng: Generator that the scanner's noise is drawn from.
    """

    label: int
    values: dict[str, float]
    coarse: np.ndarray
    fine: np.ndarray
    rng: np.random.Generator


def make_canvas(size: int) -> Canvas:
    """Returns the canvas of pictures of `size` x `size` pixels."""
    centres = ((np.arange(size) + 0.5) / size * 2.0 - 1.0).astype(np.float32)
    return Canvas(centres[None, None, :], centres[None, :, None], _basis(centres, _COARSE), _basis(centres, _FINE))


def _basis(centres_S: np.ndarray, number: int) -> np.ndarray:
    knots = np.linspace(-1.1, 1.1, number)
    width = 0.8 * (knots[1] - knots[0])
    basis = np.exp(-0.5 * ((centres_S[:, None] - knots) / width) ** 2)
    return (basis / np.sqrt((basis**2).sum(1, keepdims=True))).astype(np.float32)


def draw_scanner(rng: np.random.Generator, shift: float) -> dict[str, float]:
    """Returns a scanner's properties, `shift` times as far from the common one as drawn."""
    far = rng.uniform(-1.0, 1.0, size=6) * shift
    return {
        "gamma": float(np.exp(0.28 * far[0])),
        "contrast": float(np.clip(1.0 + 0.22 * far[1], 0.4, 1.6)),
        "offset": float(0.06 * far[2]),
        "noise": float(0.02 * np.exp(0.6 * far[3])),
        "blur": float(0.011 * np.exp(0.6 * far[4])),
        "vignette": float(max(0.0, 0.12 + 0.12 * far[5])),
    }


def draw_case(
    anatomy: np.random.Generator, picture: np.random.Generator, label: int, scanner: dict[str, float]
) -> Case:
    """Returns a case: `anatomy` decides what belongs to the patient, `picture` what belongs to the single picture."""
    values = scanner | _draw_anatomy(anatomy) | _draw_findings(anatomy, label) | _draw_posture(picture)
    coarse, fine = (anatomy.standard_normal((2, number, number), dtype=np.float32) for number in (_COARSE, _FINE))
    return Case(label, values, coarse, fine, picture)


def _draw_anatomy(rng: np.random.Generator) -> dict[str, float]:
    a = rng.uniform
    return {
        "width": a(0.90, 1.08),
        "height": a(0.90, 1.08),
        "heart_x": a(0.06, 0.15),
        "heart_width": a(0.27, 0.37),
        "heart_height": a(0.24, 0.30),
        "dome": a(0.10, 0.20),
        "ribs": a(0.145, 0.175),
        "rib_phase": a(0.0, 1.0),
        "rib_contrast": a(0.05, 0.12),
        "bronchi": a(0.5, 1.5),
        "fat": a(0.0, 0.07),
        "body": a(0.86, 0.97),
    }


def _draw_findings(rng: np.random.Generator, label: int) -> dict[str, float]:
    """Returns side, lobe and strength of the finding; faint ones cannot be told from a clear lung."""
    a = rng.uniform
    return {
        "side": -1.0 if rng.random() < 0.55 else 1.0,
        "lobe_x": a(0.30, 0.52),
        "lobe_y": float(rng.choice([-0.40, -0.02, 0.30])) + a(-0.06, 0.06),
        "lobe_width": a(0.16, 0.28),
        "lobe_height": a(0.13, 0.24),
        "opacity": a(0.18, 0.46) if label == 1 else 0.0,
        "reticular": a(0.15, 0.34) if label == 2 else 0.0,
    }


def _draw_posture(rng: np.random.Generator) -> dict[str, float]:
    """Returns how the patient stood and breathed, the exposure, and one harmless shadow."""
    p = rng.uniform
    return {
        "dx": p(-0.06, 0.06),
        "dy": p(-0.05, 0.05),
        "tilt": p(-0.07, 0.07),
        "breath": p(-0.05, 0.07),
        "exposure": p(-0.05, 0.05),
        "blob_x": p(-0.7, 0.7),
        "blob_y": p(-0.5, 0.6),
        "blob_size": p(0.12, 0.3),
        "blob": p(0.0, 0.07),
        "collimator": p(0.0, 0.05),
    }


@dataclass(frozen=True)
class _Chest:
    """A batch of chests on their canvas.

    Attributes:
        v: Name -> value per picture, (B, 1, 1).
        x: Distance from the midline in the chest's own frame, (B, S, S), negative on the patient's right.
        y: Height in the chest's own frame, downwards.
        coarse: (B, 2, S, S) smooth random fields.
        fine: (B, 2, S, S) finer random fields.
    """

    v: dict[str, np.ndarray]
    x: np.ndarray
    y: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray


def render(cases: list[Case], canvas: Canvas) -> np.ndarray:
    """Returns the pictures, uint8, shape (B, 1, S, S)."""
    chest = _place(cases, canvas)
    v, x, y = chest.v, chest.x, chest.y
    right, left = _lung(chest, -1.0), _lung(chest, 1.0)
    heart = _heart(chest)
    lungs = (right + left) * (1.0 - 0.85 * heart)
    hilum = np.exp(-(((np.abs(x) - 0.2) / 0.16) ** 2) - ((y + 0.02) / 0.2) ** 2)
    density = _body(chest) * (0.60 + v["fat"]) - lungs * (0.43 - v["fat"] - 0.6 * v["breath"])
    density += _bones(chest) + 0.07 * heart + _middle(chest)
    density += _vessels(chest, lungs, hilum) + _findings(chest, np.where(v["side"] < 0, right, left), lungs, hilum)
    density += 0.012 * chest.fine[:, 0] * lungs + 0.02 * chest.coarse[:, 1]
    density += v["blob"] * np.exp(-((x - v["blob_x"]) ** 2 + (y - v["blob_y"]) ** 2) / v["blob_size"] ** 2)
    return _scan(density, canvas, v, cases)


def _place(cases: list[Case], canvas: Canvas) -> _Chest:
    v = {name: np.array([case.values[name] for case in cases], np.float32)[:, None, None] for name in cases[0].values}
    x, y = canvas.x_11S - v["dx"], canvas.y_1S1 - v["dy"]
    return _Chest(
        v,
        (x + v["tilt"] * y) / v["width"],
        (y - v["tilt"] * x) / v["height"],
        _fields(np.stack([case.coarse for case in cases]), canvas.coarse),
        _fields(np.stack([case.fine for case in cases]), canvas.fine),
    )


def _edge(distance: np.ndarray, width: float) -> np.ndarray:
    """Returns 1 well inside (positive distance), 0 well outside, soft over `width`."""
    return expit(distance * (1.0 / width))


def _fields(numbers: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return np.matmul(np.matmul(basis, numbers), basis.T)


def _lung(chest: _Chest, side: float) -> np.ndarray:
    """Returns one lung field: a rounded apex, a lateral wall, a domed diaphragm with its deep outer angle."""
    v, y, out = chest.v, chest.y, side * chest.x
    down = np.clip((y + 0.80) / 1.35, 1e-4, 1.0)
    root = np.sqrt(down)
    medial = 0.30 - 0.19 * np.minimum(2.0 * root, 1.0)
    lateral = 0.30 + 0.50 * root - 0.07 * down**3
    dome = v["dome"] * np.clip(1.0 - ((out - 0.38) / 0.36) ** 2, -1.5, 1.0)
    base = 0.62 - v["breath"] - dome - (0.05 if side < 0 else 0.0)
    inside = np.minimum(np.minimum(out - medial, lateral - out), np.minimum((y + 0.80) * 0.6, base - y))
    return _edge(inside, 0.018)


def _heart(chest: _Chest) -> np.ndarray:
    """Returns the heart, an ellipse that leans to the patient's left."""
    v, x, y = chest.v, chest.x - chest.v["heart_x"], chest.y - 0.27
    along, across = 0.80 * x + 0.60 * y, 0.80 * y - 0.60 * x
    return _edge(1.0 - np.sqrt((along / v["heart_width"]) ** 2 + (across / v["heart_height"]) ** 2), 0.05)


def _body(chest: _Chest) -> np.ndarray:
    """Returns trunk and neck against the empty background."""
    y, across = chest.y, np.abs(chest.x)
    shoulders = y + 1.02 - 0.45 * np.maximum(across - 0.30, 0.0) - 0.5 * np.maximum(across - 0.75, 0.0)
    neck = _edge(0.30 - across, 0.03)
    flank = _edge(chest.v["body"] + 0.05 * np.abs(y) - across, 0.015)
    belly = 0.10 * _edge(y - 0.55, 0.08)
    return flank * np.maximum(_edge(shoulders, 0.02), 0.75 * neck) * (0.93 + belly - 0.18 * across**2)


def _bones(chest: _Chest) -> np.ndarray:
    """Returns ribs (seen from the back and, fainter, from the front), clavicles and spine."""
    v, y, across = chest.v, chest.y, np.abs(chest.x)
    wall = 0.34 + 0.50 * np.sqrt(np.clip((y + 0.84) / 1.35, 0.0, 1.0))
    cage = _edge(wall - across, 0.02) * _edge(0.80 - y, 0.1) * _edge(y + 0.82, 0.04)
    back = np.cos(2.0 * np.pi * ((y - 0.34 * across**2 - 0.05 * across) / v["ribs"] + v["rib_phase"]))
    front = np.cos(2.0 * np.pi * ((y + 0.50 * across**1.5) / (1.1 * v["ribs"]) + v["rib_phase"] + 0.35))
    ribs = _edge(back - 0.35, 0.12) * (0.55 + 0.45 * _edge(0.85 - back, 0.1))
    ribs = ribs * _edge(across - 0.10, 0.03) + 0.45 * _edge(front - 0.45, 0.15) * _edge(across - 0.36, 0.06)
    away = y + 0.67 + 0.16 * (across - 0.1) - 0.05 * np.sin(7.0 * across)
    clavicle = _edge(0.028 - np.abs(away), 0.008) * _edge(across - 0.07, 0.02) * _edge(0.66 - across, 0.03)
    disc = 0.6 + 0.4 * np.cos(2.0 * np.pi * (y / 0.135 + v["rib_phase"]))
    return v["rib_contrast"] * (ribs * cage + 1.5 * clavicle) + 0.07 * _edge(0.085 - across, 0.02) * disc


def _middle(chest: _Chest) -> np.ndarray:
    """Returns mediastinum and aortic arch, less the air in windpipe and stomach."""
    x, y = chest.x, chest.y
    band = 0.09 * _edge(0.13 + 0.05 * np.clip(y, -1.0, 1.0) - np.abs(x - 0.01), 0.03) * _edge(0.72 - y, 0.1)
    arch = 0.12 * _edge(0.085 - np.sqrt((x - 0.11) ** 2 + (y + 0.30) ** 2), 0.02)
    windpipe = 0.10 * _edge(0.038 - np.abs(x + 0.01), 0.012) * _edge(-0.22 - y, 0.04)
    stomach = 0.12 * np.exp(-(((x - 0.36) / 0.14) ** 2) - ((y - 0.72 + chest.v["breath"]) / 0.07) ** 2)
    return np.maximum(band, arch) - windpipe - stomach


def _vessels(chest: _Chest, lungs: np.ndarray, hilum: np.ndarray) -> np.ndarray:
    """Returns bright strands that leave both hila and fade outwards."""
    out, down = np.abs(chest.x) - 0.10, chest.y + 0.02
    distance = np.sqrt(out**2 + down**2)
    angle = np.arctan2(down, out) * 9.0 + 1.6 * chest.coarse[:, 0] + 0.7 * chest.fine[:, 0] * distance
    strands = _edge(np.cos(angle + 6.0 * distance) - 0.70, 0.14) * np.exp(-distance / 0.28)
    return chest.v["bronchi"] * (0.17 * strands + 0.09 * hilum) * lungs


def _findings(chest: _Chest, lung: np.ndarray, lungs: np.ndarray, hilum: np.ndarray) -> np.ndarray:
    """Returns one lobe's consolidation (bacterial) and a net through both lungs (viral)."""
    v, coarse, fine = chest.v, chest.coarse, chest.fine
    across, down = (v["side"] * chest.x - v["lobe_x"]) / v["lobe_width"], (chest.y - v["lobe_y"]) / v["lobe_height"]
    lobe = _edge(1.0 - across**2 - down**2 + 0.5 * coarse[:, 1], 0.35) * lung * (1.0 + 0.12 * fine[:, 0])
    net = np.exp(-((fine[:, 1] / 0.5) ** 2)) * (0.5 + 0.5 * hilum + 0.6 * expit(2.0 * coarse[:, 0])) + 0.2 * hilum
    return v["opacity"] * lobe + v["reticular"] * lungs * (net - 0.15)


def _scan(density: np.ndarray, canvas: Canvas, v: dict[str, np.ndarray], cases: list[Case]) -> np.ndarray:
    """Returns what the scanner makes of the densities."""
    size = density.shape[-1]
    noise = np.stack([case.rng.standard_normal((size, size), dtype=np.float32) for case in cases])
    blurs = np.stack([_blur(canvas.y_1S1[0, :, 0], case.values["blur"]) for case in cases])
    sharp = np.clip(density + 0.03, 0.0, 1.3)
    soft = np.matmul(np.matmul(blurs, sharp), blurs.transpose(0, 2, 1))
    light = np.clip(0.5 + v["contrast"] * (soft + v["exposure"] - 0.5) + v["offset"], 0.0, 1.0) ** v["gamma"]
    light *= 1.0 - v["vignette"] * (canvas.x_11S**2 + canvas.y_1S1**2) / 2.0
    light += v["noise"] * noise * (0.5 + 0.8 * light)
    frame = 1.0 - v["collimator"]
    inside = _edge(frame - np.abs(canvas.x_11S), 0.006) * _edge(frame - np.abs(canvas.y_1S1), 0.006)
    return np.rint(np.clip(light * inside, 0.0, 1.0) * 255.0).astype(np.uint8)[:, None]


def _blur(centres_S: np.ndarray, sigma: float) -> np.ndarray:
    """Returns the (S, S) matrix of a Gaussian blur; its standard deviation is `sigma` of the picture's width."""
    weights = np.exp(-0.5 * ((centres_S[:, None] - centres_S) / (2.0 * sigma)) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

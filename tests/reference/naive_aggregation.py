"""Rules of aggregation, one row and one coordinate at a time, as their papers say it; in plain double precision."""

import itertools

import numpy as np


def median(rows):
    return np.median(rows, axis=0)


def trimmed_mean(rows, f):
    return np.array([np.sort(column)[f : len(rows) - f].mean() for column in rows.T])


def scores(rows, f):
    found = []
    for i, row in enumerate(rows):
        others = sorted(float(((row - other) ** 2).sum()) for j, other in enumerate(rows) if j != i)
        found.append(sum(others[: max(1, len(rows) - f - 2)]))
    return found


def best(rows, found):
    """Of equal scores the row that is nearest to all others."""
    totals = [sum(((row - other) ** 2).sum() for other in rows) for row in rows]
    equal = [i for i in range(len(rows)) if found[i] <= min(found) * (1 + 1e-5)]
    return min(equal, key=lambda i: totals[i])


def krum(rows, f):
    return rows[best(rows, scores(rows, f))]


def multi_krum(rows, f):
    return rows[np.argsort(scores(rows, f), kind="stable")[: len(rows) - f]].mean(0)


def bulyan(rows, f):
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        chosen.append(left.pop(best(rows[left], scores(rows[left], f))))
    picked = rows[sorted(chosen)]
    around = []
    for column in picked.T:
        order = np.argsort(np.abs(column - np.median(column)), kind="stable")
        around.append(column[order[: len(rows) - 4 * f]].mean())
    return np.array(around)


def divide_and_conquer(rows, f, draws_of_coordinates):
    """Algorithm 2 of the paper: of each draw the f rows that lie farthest along the first right singular vector go."""
    good = set(range(len(rows)))
    for chosen in draws_of_coordinates:
        centred = rows[:, chosen] - rows[:, chosen].mean(0)
        direction = np.linalg.svd(centred)[2][0]
        outlying = (centred @ direction) ** 2
        good -= set(np.argsort(-outlying, kind="stable")[:f].tolist())
    return rows[sorted(good)].mean(0)


def geometric_median(rows, weights, steps=20000):
    """By subgradient-free Weiszfeld in the rows' own space."""
    point = weights @ rows
    for _ in range(steps):
        pulls = weights / np.maximum(np.linalg.norm(rows - point, axis=1), 1e-12)
        point = pulls @ rows / pulls.sum()
    return point


def norm_clipping(rows, weights, bound):
    return sum(w * row * min(1.0, bound / np.linalg.norm(row)) for w, row in zip(weights, rows, strict=True))


def centred_clipping(rows, weights, start, radius, steps):
    point = start
    for _ in range(steps):
        moves = [(row - point) * min(1.0, radius / np.linalg.norm(row - point)) for row in rows]
        point = point + sum(w * move for w, move in zip(weights, moves, strict=True))
    return point


def fltrust(rows, root):
    length = np.linalg.norm(root)
    trust = [max(0.0, float(row @ root) / (np.linalg.norm(row) * length)) for row in rows]
    scaled = [row * length / np.linalg.norm(row) for row in rows]
    return sum(t * row for t, row in zip(trust, scaled, strict=True)) / sum(trust)


def robust_learning_rate(rows, weights, threshold):
    agreed = np.abs(np.sign(rows).sum(0)) >= threshold
    return np.where(agreed, 1, -1) * (weights @ rows)


def nearest_neighbour_mixing(rows, f):
    mixed = []
    for row in rows:
        order = np.argsort([((row - other) ** 2).sum() for other in rows], kind="stable")
        mixed.append(rows[order[: len(rows) - f]].mean(0))
    return np.array(mixed)


def foolsgold_weights(histories):
    """Algorithm 1 of the paper, as its authors' code has it."""
    n = len(histories)
    unit = histories / np.linalg.norm(histories, axis=1, keepdims=True)
    cosine = unit @ unit.T - np.eye(n)
    most = np.array([max(cosine[i][j] for j in range(n) if j != i) for i in range(n)])
    for i, j in itertools.product(range(n), range(n)):
        if i != j and most[i] < most[j] and most[j] > 0:
            cosine[i][j] *= most[i] / most[j]
    weights = 1 - np.array([max(cosine[i][j] for j in range(n) if j != i) for i in range(n)])
    weights = np.clip(weights, 0, 1)
    weights = np.minimum(weights / weights.max(), 0.99)
    with np.errstate(divide="ignore"):
        weights = np.log(weights / (1 - weights)) + 0.5
    return np.clip(weights, 0, 1)

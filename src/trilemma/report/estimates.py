"""From the measurements of several seeds to one number with its interval, and from two numbers to their difference.

Seeds of one configuration share a test set, so their spread alone understates what another test set would do:
the interval of an estimate is the wider of Student's t over seeds and the mean of the single intervals. A
difference is paired by seed, for both sides saw the same images in the same order.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from trilemma.evaluation.measurement import Measurement

#: The smallest and largest possible value of a unit.
_RANGES = {"fraction": (0.0, 1.0), "coefficient": (-1.0, 1.0)}


@dataclass(frozen=True)
class Estimate:
    """One quantity of one configuration.

    Attributes:
        value: Mean over seeds, or None where no seed has a value.
        low: Lower end of the 95 % interval (a quartile for a latency), or None where there is none.
        high: Upper end.
        sd: Standard deviation over seeds, or None for fewer than two.
        n: Records behind one seed's number, the smallest over seeds; 0 where it is not a rate.
        by_seed: (seed, value) of every seed that has one.
        reason: Why there is no value, or why some trainings are not in it; "" where nothing is amiss.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    n: int = 0
    by_seed: tuple[tuple[int, float], ...] = ()
    reason: str = "not measured"


@dataclass(frozen=True)
class Difference:
    """How far one estimate lies above another.

    Attributes:
        value: First minus second.
        low: Lower end of its 95 % interval, or None where there is none.
        high: Upper end.
        num_pairs: Seeds that were paired; 0 where the interval comes from the two single intervals.
    """

    value: float
    low: float | None
    high: float | None
    num_pairs: int

    @property
    def shown(self) -> bool:
        """Returns whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(samples: Iterable[tuple[int, Measurement]]) -> Estimate:
    """Returns the mean over seeds of one metric with its interval.

    Several trainings of one seed (each hospital on its own) are averaged first; the mean of their intervals is
    then conservative, for a mean varies no more than its parts do on average.

    Args:
        samples: (seed, measurement) of every training, all of one metric and unit.
    """
    samples = list(samples)
    usable = [(seed, m) for seed, m in samples if m.value is not None and math.isfinite(m.value)]
    if not usable:
        return Estimate(reason=_reasons(m for _, m in samples) or "not measured")
    by_seed = tuple((seed, _mean(_values(usable, seed))) for seed in sorted({seed for seed, _ in usable}))
    means = [value for _, value in by_seed]
    bounds = [(m.low, m.high) for _, m in usable if m.low is not None and m.high is not None]
    unit = usable[0][1].unit
    low = high = None
    if len(bounds) == len(usable):
        low, high = _mean([b[0] for b in bounds]), _mean([b[1] for b in bounds])
    if len(means) > 1 and unit in _RANGES:
        half, (smallest, largest) = _t_half_width(means), _RANGES[unit]
        low = max(smallest, min(_mean(means) - half, math.inf if low is None else low))
        high = min(largest, max(_mean(means) + half, -math.inf if high is None else high))
    absent = len(samples) - len(usable)
    why = _reasons(m for _, m in samples if m.value is None)
    return Estimate(
        value=_mean(means),
        low=low,
        high=high,
        sd=_sd(means) if len(means) > 1 else None,
        n=min(m.n for _, m in usable),
        by_seed=by_seed,
        reason=f"{absent} of {len(samples)} trainings have no value: {why or 'no reason given'}" if absent else "",
    )


def exact(by_seed: Iterable[tuple[int, float]], reason: str = "not recorded") -> Estimate:
    """Returns the mean of numbers that carry no interval, such as bytes and seconds of a training."""
    pairs = tuple(by_seed)
    if not pairs:
        return Estimate(reason=reason)
    values = [value for _, value in pairs]
    return Estimate(_mean(values), sd=_sd(values) if len(values) > 1 else None, by_seed=pairs, reason="")


def difference(first: Estimate, second: Estimate) -> Difference | None:
    """Returns first minus second with a 95 % interval, or None where either has no value.

    With two or more seeds in common: Student's t of the differences by seed, never narrower than the test images
    allow, for seeds that agree say nothing about other images. Otherwise the two intervals are combined by squaring
    and adding (Newcombe 1998, method 10), which is conservative for two models on the same images.

    Args:
        first: A share or a coefficient in [0, 1].
        second: The same metric on the same test images.
    """
    if first.value is None or second.value is None:
        return None
    ours, theirs = dict(first.by_seed), dict(second.by_seed)
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(pairs) > 1:
        middle = _mean(pairs)
        half = max(_t_half_width(pairs), _sampling_half_width(middle, min(first.n, second.n)))
        return Difference(middle, max(-1.0, middle - half), min(1.0, middle + half), len(pairs))
    gap = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Difference(gap, None, None, 0)
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return Difference(gap, gap - down, gap + up, 0)


def _values(samples: Sequence[tuple[int, Measurement]], seed: int) -> list[float]:
    return [m.value for its_seed, m in samples if its_seed == seed and m.value is not None]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _sd(values: Sequence[float]) -> float:
    middle = _mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def _t_half_width(values: Sequence[float]) -> float:
    return float(stdtrit(len(values) - 1, 0.975)) * _sd(values) / math.sqrt(len(values))


def _sampling_half_width(gap: float, n: int) -> float:
    """Returns the least half width that n paired images allow: every image that changed changed the same way.

    At least |gap| n images changed, so the variance of the gap is at least |gap| (1 - |gap|) / n (McNemar's test in
    its best case); and no gap is known better than to one image.
    """
    size, n = min(1.0, abs(gap)), max(1, n)
    return max(1 / n, 1.96 * math.sqrt(size * (1 - size) / n))


def _reasons(measurements: Iterable[Measurement]) -> str:
    return "; ".join(dict.fromkeys(m.reason or m.status for m in measurements))

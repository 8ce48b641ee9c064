"""From the measurements of several seeds to one number with its interval, and from two numbers to their difference.

Seeds of one configuration share a test set, so their spread alone understates what another test set would do:
the interval of an estimate is the wider of Student's t over seeds and the mean of the single intervals. A
difference varies with the trainings and with the test patients, so its interval holds both: the spread of the
differences by seed, and the two single intervals.
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
        single: The mean interval of the single models, which speaks of other test patients only; None without one.
        reason: Why there is no value, or why some trainings are not in it; "" where nothing is amiss.
        withheld: Whether there are values that may not be shown.
        bound: Whether some value is known to be too high.
        least: Where that is so and how much is left is known: the mean over seeds of the least.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    n: int = 0
    by_seed: tuple[tuple[int, float], ...] = ()
    single: tuple[float, float] | None = None
    reason: str = "not measured"
    withheld: bool = False
    bound: bool = False
    least: float | None = None

    @property
    def judged(self) -> float | None:
        """Returns the value by which a row is judged: the least that is known."""
        return self.value if self.least is None else self.least


@dataclass(frozen=True)
class Difference:
    """How far one estimate lies above another.

    Attributes:
        value: First minus second.
        low: Lower end of its 95 % interval, or None where there is none.
        high: Upper end.
        num_pairs: Seeds that were paired; 0 where fewer than two are common, so that the interval comes from the two
            intervals alone.
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

    Where the number of any training is withheld there is no mean either: that of the others would be a selection.

    Args:
        samples: (seed, measurement) of every training, all of one metric and unit.
    """
    samples = list(samples)
    withheld = [m for _, m in samples if m.status == "withheld"]
    if withheld:
        some = f"{len(withheld)} of {len(samples)} trainings: " if len(withheld) < len(samples) else ""
        return Estimate(reason=some + _reasons(withheld), withheld=True)
    usable = [(seed, m) for seed, m in samples if m.value is not None and math.isfinite(m.value)]
    if not usable:
        return Estimate(reason=_reasons(m for _, m in samples) or "not measured")
    by_seed = tuple((seed, _mean(_values(usable, seed))) for seed in sorted({seed for seed, _ in usable}))
    means = [value for _, value in by_seed]
    bounds = [None if m.low is None or m.high is None else (m.low, m.high) for _, m in usable]
    unit = usable[0][1].unit
    single = _mean_interval(bounds)
    low, high = single or (None, None)
    if len(means) > 1 and unit in _RANGES:
        half, (smallest, largest) = _t_half_width(means), _RANGES[unit]
        low = max(smallest, min(_mean(means) - half, math.inf if low is None else low))
        high = min(largest, max(_mean(means) + half, -math.inf if high is None else high))
    absent = len(samples) - len(usable)
    why = _reasons(m for _, m in samples if m.value is None)
    said = [f"{absent} of {len(samples)} trainings have no value: {why or 'no reason given'}"] if absent else []
    bounds_only = [m for _, m in usable if m.status == "bound"]
    said += [_reasons(bounds_only)] if bounds_only else []
    return Estimate(
        value=_mean(means),
        low=low,
        high=high,
        sd=_sd(means) if len(means) > 1 else None,
        n=min(m.n for _, m in usable),
        by_seed=by_seed,
        single=single,
        reason="; ".join(said),
        bound=bool(bounds_only),
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

    With two or more seeds in common the value is the mean difference by seed, and three half widths are squared and
    added: Student's t of the differences by seed, for other trainings, and on each side the mean interval of the
    single models, for other test patients. Seeds share their test patients, so more seeds narrow the first alone.
    Otherwise the two intervals are squared and added (Newcombe 1998, method 10). Both treat the two models' errors
    as independent although they saw the same patients, and so err on the side of showing nothing, unless what one
    model finds easy the other finds hard.

    Args:
        first: A share or a coefficient in [0, 1].
        second: The same metric on the same test images.
    """
    if first.value is None or second.value is None:
        return None
    ours, theirs = dict(first.by_seed), dict(second.by_seed)
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(pairs) > 1:
        gap, spread = _mean(pairs), _t_half_width(pairs)
        ours_alone, theirs_alone = first.single, second.single
    else:
        gap, spread = first.value - second.value, 0.0
        ours_alone, theirs_alone = _interval(first), _interval(second)
    num_pairs = len(pairs) if len(pairs) > 1 else 0
    if ours_alone is None or theirs_alone is None:
        return Difference(gap, None, None, num_pairs)
    first_down, first_up = _reach(first.value, ours_alone)
    second_down, second_up = _reach(second.value, theirs_alone)
    low = gap - math.hypot(spread, first_down, second_up)
    high = gap + math.hypot(spread, first_up, second_down)
    return Difference(gap, max(-1.0, low), min(1.0, high), num_pairs)


def averaged(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the mean of one metric over groups of records (hospitals), each group counting the same.

    Its intervals are the means of theirs, which is conservative: a mean varies no more than its parts do on average.
    Only seeds that every group has are in it.

    Args:
        estimates: One per group. Where one has no value, neither has the mean.
    """
    by_group = [dict(each.by_seed) for each in estimates]
    seeds = sorted(set.intersection(*(set(group) for group in by_group))) if by_group else []
    if not seeds:
        return Estimate()
    by_seed = tuple((seed, _mean([group[seed] for group in by_group])) for seed in seeds)
    whole, single = _mean_interval([_interval(e) for e in estimates]), _mean_interval([e.single for e in estimates])
    low, high = whole or (None, None)
    values = [value for _, value in by_seed]
    sd = _sd(values) if len(values) > 1 else None
    n = min(each.n for each in estimates)
    return Estimate(_mean(values), low, high, sd=sd, n=n, by_seed=by_seed, single=single, reason="")


def _interval(found: Estimate) -> tuple[float, float] | None:
    return None if found.low is None or found.high is None else (found.low, found.high)


def _reach(value: float, interval: tuple[float, float]) -> tuple[float, float]:
    """Returns how far an interval reaches below and above the value, never a negative distance."""
    return max(0.0, value - interval[0]), max(0.0, interval[1] - value)


def _mean_interval(intervals: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return None
    return _mean([low for low, _ in known]), _mean([high for _, high in known])


def _values(samples: Sequence[tuple[int, Measurement]], seed: int) -> list[float]:
    return [m.value for its_seed, m in samples if its_seed == seed and m.value is not None]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _sd(values: Sequence[float]) -> float:
    middle = _mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def _t_half_width(values: Sequence[float]) -> float:
    return float(stdtrit(len(values) - 1, 0.975)) * _sd(values) / math.sqrt(len(values))


def _reasons(measurements: Iterable[Measurement]) -> str:
    return "; ".join(dict.fromkeys(m.reason or m.status for m in measurements))

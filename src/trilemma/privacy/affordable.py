"""What still fits into a privacy budget: the most steps at a noise, the least noise for so many steps."""

import math
from collections.abc import Iterable, Sequence

from trilemma.privacy.accounting import MAX_NOISE, epsilon
from trilemma.privacy.guarantee import DpEvent


def merged(events: Iterable[DpEvent]) -> tuple[DpEvent, ...]:
    """Returns events of equal noise and rate as one with the sum of their steps, in a fixed order.

    Composition does not depend on the order, and the accountant's time grows with the number of different events.
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        mechanism = (event.noise_multiplier, event.sampling_rate)
        steps[mechanism] = steps.get(mechanism, 0) + event.steps
    return tuple(
        DpEvent(noise_multiplier=noise, sampling_rate=rate, steps=number)
        for (noise, rate), number in sorted(steps.items())
        if number
    )


def total(*parts: Iterable[DpEvent], delta: float) -> float:
    """Returns the epsilon of all events of all parts composed, at `delta`."""
    return epsilon(merged(event for part in parts for event in part), delta)


def most_steps(booked: Sequence[DpEvent], asked: Sequence[DpEvent], delta: float, budget: float) -> tuple[DpEvent, ...]:
    """Returns the longest beginning of `asked` that fits after `booked`, its events in unchanged proportion.

    Args:
        booked: What is spent already.
        asked: What is wanted; with one event any number of its steps is tried, with several only whole multiples of
            the smallest numbers of steps in the same proportion.
        delta: Of the budget.
        budget: The largest epsilon allowed.

    Returns:
        Events with fewer steps; none where not even the first steps fit.
    """
    parts = math.gcd(*(event.steps for event in asked))
    low, high = 0, parts + 1  # `low` fits or is nothing, `high` is more than was asked for
    while high - low > 1:
        middle = (low + high) // 2
        if total(booked, _share(asked, middle, parts), delta=delta) <= budget:
            low = middle
        else:
            high = middle
    return _share(asked, low, parts) if low else ()


def least_noise(
    booked: Sequence[DpEvent], asked: Sequence[DpEvent], delta: float, budget: float
) -> tuple[DpEvent, ...]:
    """Returns `asked` with all noise multipliers enlarged by the smallest common factor with which it fits.

    Args:
        booked: What is spent already.
        asked: What is wanted and does not fit.
        delta: Of the budget.
        budget: The largest epsilon allowed.

    Returns:
        Events whose multipliers are rounded up to three decimals; none where no multiplier up to `MAX_NOISE` fits.
    """
    most = max(event.noise_multiplier for event in asked)
    low, high = 1.0, MAX_NOISE / most if most else 1.0  # `low` does not fit, `high` does
    if high <= low or not total(booked, _noisier(asked, high), delta=delta) <= budget:
        return ()
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        if total(booked, _noisier(asked, middle), delta=delta) <= budget:
            high = middle
        else:
            low = middle
    return _noisier(asked, high)


def _share(events: Sequence[DpEvent], part: int, parts: int) -> tuple[DpEvent, ...]:
    return tuple(event.model_copy(update={"steps": event.steps // parts * part}) for event in events)


def _noisier(events: Sequence[DpEvent], factor: float) -> tuple[DpEvent, ...]:
    return tuple(
        event.model_copy(update={"noise_multiplier": math.ceil(event.noise_multiplier * factor * 1000) / 1000})
        for event in events
    )

"""The one door to the accountant: from the steps that ran to an epsilon that may be claimed, and back.

Claims use Opacus's PRV accountant (Gopi, Lee, Wutschitz 2021), an upper bound that includes its own numerical error.
Its time and memory grow with epsilon until it returns infinity, so beyond `PRV_LIMIT` the looser RDP accountant stands
in for it, also an upper bound, and the guarantee says so. PRV adds up probabilities in floating-point numbers, whose
errors outweigh a very small delta: below `MIN_DELTA` it can underestimate, so no study and no new budget book may ask
for less, and what an old one holds is bounded by RDP, whose formula has no such limit. The GDP accountant can
underestimate too and is not used.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version

import numpy as np

from trilemma.privacy.guarantee import DpEvent

#: The smallest and largest noise multipliers that a calibration may return.
MIN_NOISE, MAX_NOISE = 0.2, 1000.0

#: The smallest delta for which PRV is asked: at 1e-13 it was seen 0.04 to 1.1 below dp-accounting's PLD accountant.
MIN_DELTA = 1e-10

#: What is wrong with less, as the end of a sentence.
TOO_SMALL = "where the accountant's rounding errors outweigh it, so that epsilon could be larger than the one claimed"

#: Above this epsilon by RDP, that epsilon is claimed: PRV would take gigabytes to say that nothing is protected.
PRV_LIMIT = 100.0

#: (noise multiplier, sampling rate, steps) of each mechanism that ran.
History = tuple[tuple[float, float, int], ...]

_WHOLE_ORDERS = (2, 3, 4, 6, 8, 12, 16, 32, 64)


def accountant_name(largest_epsilon: float) -> str:
    """Returns the accountant behind epsilons up to `largest_epsilon`, as a guarantee cites it."""
    name = f"PRV accountant of Opacus {version('opacus')}"
    return name if largest_epsilon <= PRV_LIMIT else f"{name}, RDP where epsilon exceeds {PRV_LIMIT:g}"


def epsilon(events: Sequence[DpEvent], delta: float) -> float:
    """Returns the epsilon of all events composed, at `delta`.

    Args:
        events: Poisson-sampled Gaussian steps that ran on one client's records; none cost nothing.
        delta: In (0, 1).
    """
    history = tuple((event.noise_multiplier, event.sampling_rate, event.steps) for event in events if event.steps)
    return _epsilon(history, delta) if history else 0.0


def noise_multiplier(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Returns the smallest noise multiplier (to 0.1 %) whose `steps` cost at most `target_epsilon` at `delta`.

    Raises:
        ValueError: If no multiplier between `MIN_NOISE` and `MAX_NOISE` gives the target.
    """
    high = MIN_NOISE
    while _epsilon(((high, sampling_rate, steps),), delta) > target_epsilon:
        high *= 2
        if high > MAX_NOISE:
            raise ValueError(
                f"epsilon {target_epsilon:g} at delta {delta:g} is out of reach in {steps} steps "
                f"at sampling rate {sampling_rate:g}"
            )
    low = max(MIN_NOISE, high / 2)
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        if _epsilon(((middle, sampling_rate, steps),), delta) <= target_epsilon:
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float) -> float:
    from opacus.accountants import RDPAccountant  # takes a second, which most commands need not wait

    # A few whole orders take no time and nearly always show that PRV is affordable.
    for orders in (_WHOLE_ORDERS, RDPAccountant.DEFAULT_ALPHAS):
        by_rdp = _rdp_epsilon(history, delta, orders)
        if by_rdp <= PRV_LIMIT and delta >= MIN_DELTA:
            return _prv_epsilon(history, delta)
    return by_rdp


def _prv_epsilon(history: History, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with _without_warnings():
        return float(accountant.get_epsilon(delta=delta))


def _rdp_epsilon(history: History, delta: float, orders: Sequence[float]) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    with _without_warnings():
        return float(accountant.get_epsilon(delta=delta, alphas=list(orders)))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences RDP's advice on its range of orders, and logarithms of zero, which PRV meets at sampling rate 1."""
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order")
        yield

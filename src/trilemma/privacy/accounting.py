"""The one door to the accountant: from the steps that ran to an epsilon that may be claimed, and back.

Claims use Opacus's PRV accountant (Gopi, Lee, Wutschitz 2021), an upper bound that includes its own numerical error.
Its RDP accountant only narrows the search for a noise multiplier; the GDP accountant can underestimate and is not used.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version

from opacus.accountants import PRVAccountant, RDPAccountant

from trilemma.privacy.guarantee import DpEvent

#: The smallest and largest noise multipliers that a calibration may return.
MIN_NOISE, MAX_NOISE = 0.2, 1000.0


def accountant_name() -> str:
    """Returns the accountant as a guarantee cites it."""
    return f"PRV accountant of Opacus {version('opacus')}"


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
    low, high = MIN_NOISE, MIN_NOISE
    if _epsilon(((low, sampling_rate, steps),), delta) <= target_epsilon:
        return low
    while _rdp_epsilon(high, sampling_rate, steps, delta) > target_epsilon:
        low, high = high, 2 * high
        if high > MAX_NOISE:
            raise ValueError(
                f"epsilon {target_epsilon:g} at delta {delta:g} is out of reach in {steps} steps "
                f"at sampling rate {sampling_rate:g}"
            )
    # RDP is looser than PRV, so `high` suffices and the answer may lie a little below `low`.
    low *= 0.5
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        if _epsilon(((middle, sampling_rate, steps),), delta) <= target_epsilon:
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = list(history)
    with _without_order_warning():
        return float(accountant.get_epsilon(delta=delta))


def _rdp_epsilon(noise: float, sampling_rate: float, steps: int, delta: float) -> float:
    accountant = RDPAccountant()
    accountant.history = [(noise, sampling_rate, steps)]
    with _without_order_warning():
        return float(accountant.get_epsilon(delta=delta))


@contextmanager
def _without_order_warning() -> Iterator[None]:
    """Silences the RDP accountant's advice on its range of orders: it only brackets a search or a grid here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order")
        yield

"""How numbers are written: the same value reads the same in every table, figure and sentence."""

import math

from trilemma.report.estimates import Estimate

#: Written where there is no value; why is said beside it.
NO_VALUE = "–"
MINUS = "−"

#: Written where there is a value that may not be shown.
WITHHELD = "withheld"

#: Metric -> what a reader calls it.
METRIC_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "mcc": "MCC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "expected_calibration_error": "calibration error",
    "majority_accuracy": "majority class",
    "robust_accuracy": "robust accuracy",
    "robust_auroc": "robust AUROC",
}

#: Metrics that are read as a number and not as a share of the images.
_COEFFICIENTS = {"auroc", "robust_auroc", "mcc", "expected_calibration_error"}


def percent(value: float, digits: int = 1) -> str:
    """Returns 0.862 as "86.2 %"."""
    return f"{_signed(100 * value, digits)}\u00a0%"


def decimal(value: float, digits: int = 3) -> str:
    """Returns 0.9618 as "0.962"."""
    return _signed(value, digits)


def byte_size(value: float) -> str:
    """Returns 1234567 as "1.23 MB": powers of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            return f"{value:.3g}\u00a0{unit}" if abs(value) < 999.5 else f"{value:.0f}\u00a0{unit}"
        value /= 1000
    raise AssertionError("unreachable: the loop ends at GB")


def count(value: float) -> str:
    """Returns 1234567 as "1.23 million": three digits of what cannot be read off otherwise."""
    for power, word in ((1e9, "\u00a0billion"), (1e6, "\u00a0million"), (1e3, "\u00a0thousand")):
        if value >= 0.9995 * power:
            return f"{value / power:.3g}{word}" if value < 999.5 * power else f"{value / power:.0f}{word}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Returns 0.0012 as "1.2 ms", 34.2 as "34.2 s" and 750 as "12.5 min"."""
    if seconds < 1:
        return f"{1000 * seconds:.3g}\u00a0ms"
    if seconds < 100:
        return f"{seconds:.3g}\u00a0s"
    return f"{seconds / 60:.3g}\u00a0min" if seconds < 6000 else f"{seconds / 3600:.3g}\u00a0h"


def radius(value: float) -> str:
    """Returns 4/255 as "4/255" and 0.5 as "0.5": pixel units, images in [0, 1]."""
    steps = value * 255
    if 0.5 <= steps <= 64 and math.isclose(steps, round(steps), abs_tol=1e-6):
        return f"{round(steps)}/255"
    return f"{value:.4g}"


def epsilon(value: float) -> str:
    """Returns a privacy budget with two decimals, rounded up: a promise is never written smaller than it is."""
    return f"{math.ceil(round(value * 100, 6)) / 100:.2f}"


def metric_title(metric: str) -> str:
    """Returns what a reader calls a metric."""
    return METRIC_TITLES.get(metric, metric.replace("_", " "))


def metric_value(metric: str, value: float) -> str:
    """Returns a value the way its metric is read: a share in percent, a coefficient with three decimals."""
    return decimal(value) if metric in _COEFFICIENTS else percent(value)


def metric_difference(metric: str, value: float) -> str:
    """Returns the size of a difference without its sign: "3.1 points", or "0.012" for a coefficient."""
    return decimal(abs(value)) if metric in _COEFFICIENTS else f"{abs(100 * value):.1f}\u00a0points"


def metric_bounds(metric: str, low: float, high: float) -> str:
    """Returns an interval of a metric or of a difference: "84.1 to 88.0"."""
    if metric in _COEFFICIENTS:
        return f"{decimal(low)} to {decimal(high)}"
    return f"{_signed(100 * low, 1)} to {_signed(100 * high, 1)}"


def metric_estimate(metric: str, estimate: Estimate) -> str:
    """Returns "86.2 % (84.1 to 88.0)", "≤ 86.2 % ..." where that is too high, "withheld", or the sign for no value."""
    if estimate.value is None:
        return WITHHELD if estimate.withheld else NO_VALUE
    text = at_most(metric_value(metric, estimate.value), estimate)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({metric_bounds(metric, estimate.low, estimate.high)})"


def at_most(text: str, estimate: Estimate) -> str:
    """Returns a written value, after "≤ " where it is known to be too high."""
    return f"≤\u00a0{text}" if estimate.bound else text


def _signed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)

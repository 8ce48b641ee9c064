import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilemma.report import numbers
from trilemma.report.estimates import Estimate


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (numbers.percent, 0.8625, "86.2\u00a0%"),
        (numbers.percent, -0.0001, "0.0\u00a0%"),
        (numbers.decimal, -0.25, "−0.250"),
        (numbers.byte_size, 999, "999\u00a0B"),
        (numbers.byte_size, 1_683_302, "1.68\u00a0MB"),
        (numbers.byte_size, 999_999, "1\u00a0MB"),
        (numbers.byte_size, 5e12, "5000\u00a0GB"),
        (numbers.duration, 0.0021, "2.1\u00a0ms"),
        (numbers.duration, 34.25, "34.2\u00a0s"),
        (numbers.duration, 750, "12.5\u00a0min"),
        (numbers.duration, 7200, "2\u00a0h"),
        (numbers.radius, 4 / 255, "4/255"),
        (numbers.radius, 0.5, "0.5"),
        (numbers.epsilon, 7.961, "7.97"),
        (numbers.epsilon, 8.0, "8.00"),
    ],
)
def test_numbers_are_written_plainly(write, value, text):
    assert write(value) == text


@settings(deadline=None)
@given(st.floats(1e-3, 1e3))
def test_a_privacy_promise_is_never_written_smaller_than_it_is(value):
    assert float(numbers.epsilon(value)) >= value - 1e-8
    assert float(numbers.epsilon(value)) <= value + 0.0101


def test_an_estimate_without_a_value_is_a_dash():
    assert numbers.metric_estimate("accuracy", Estimate()) == "–"
    assert numbers.metric_estimate("accuracy", Estimate(0.5)) == "50.0\u00a0%"
    assert numbers.metric_estimate("auroc", Estimate(0.5, 0.4, 0.6)) == "0.500 (0.400 to 0.600)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (999, "999"), (1000, "1 thousand"), (999_499, "999 thousand"), (999_600, "1 million"),
     (4_321_000, "4.32 million"), (555_000_000, "555 million"), (1.8e9, "1.8 billion"), (1.234e12, "1234 billion")],
)  # fmt: skip
def test_counts_are_read_at_a_glance(value, text):
    assert numbers.count(value).replace("\u00a0", " ") == text

"""How a radius grows: what a schedule says, between its points too."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilemma.robustness.schedule import growth_label, radius_share

share = st.floats(0, 1)
points = st.lists(st.tuples(st.integers(0, 100), share), min_size=1, max_size=6, unique_by=lambda point: point[0]).map(
    lambda points: tuple(sorted((moment / 100, share) for moment, share in points))
)


@settings(deadline=None, max_examples=100)
@given(points, share)
def test_a_schedule_is_piecewise_linear_and_level_outside(points, progress):
    moments, shares = zip(*points, strict=True)
    assert radius_share(0.0, points, progress) == pytest.approx(np.interp(progress, moments, shares), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 1), share)
def test_a_warm_up_is_the_schedule_of_two_points(warmup, progress):
    assert radius_share(warmup, None, progress) == pytest.approx(radius_share(0, ((0, 0), (warmup, 1)), progress))


def test_without_either_the_radius_is_whole_from_the_start():
    assert [radius_share(0.0, None, progress) for progress in (0.0, 0.5, 1.0)] == [1, 1, 1]
    assert growth_label(0.0, None) == ""
    assert growth_label(0.25, None) == ", warm-up 25 %"
    assert growth_label(0.0, ((0, 0), (0.5, 1))) == ", radius schedule 0:0 0.5:1"

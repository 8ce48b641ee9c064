"""What the user sees before there is anything to count."""

import io
import time

import pytest
from rich.console import Console

from trilemma.study import progress
from trilemma.study.progress import Progress


@pytest.mark.parametrize(
    ("patience", "quiet", "seen"), [(0.0, False, "preparing [the] images\n"), (60.0, False, ""), (0.0, True, "")]
)
def test_only_what_takes_longer_than_a_moment_is_told(monkeypatch, patience, quiet, seen):
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", patience)
    shown = io.StringIO()
    with Progress(Console(file=shown), quiet).waiting("preparing [the] images"):
        # A busy machine may start the timer late; where nothing should come, a while without anything has to do.
        give_up = time.monotonic() + (30 if seen else 0.2)
        while not shown.getvalue() and time.monotonic() < give_up:
            time.sleep(0.002)
    assert shown.getvalue() == seen

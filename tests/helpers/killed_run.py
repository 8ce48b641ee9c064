"""Runs of a private study that are killed at random moments, for tests of the budget books."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from trilemma.cli import main
from trilemma.study import train_job

#: Longer than any run here takes on a busy machine.
PATIENCE_SECONDS = 240


@dataclass(frozen=True)
class Ending:
    """What a run has come to.

    Attributes:
        killed: Whether it was killed before its end.
        code: Its exit code; minus the signal's number where it was killed.
        seconds: How long it lived.
    """

    killed: bool
    code: int
    seconds: float


class Forks:
    """Starts command lines in processes of their own, without importing everything anew for each."""

    def __init__(self) -> None:
        self.context = get_context("forkserver")
        own = ["trilemma.cli", "trilemma.study.engine", "trilemma.report.html"]
        self.context.set_forkserver_preload([*own, "opacus.accountants", "onnxruntime"])

    def run(self, arguments: Sequence[object], releases: Path, delay: float) -> Ending:
        """Runs a command line and kills it after `delay` seconds.

        Args:
            arguments: What follows `trilemma`.
            releases: A file that gets a line, the round, before anything of a round is computed from the images.
            delay: Seconds from its start; infinite for a run to its end.
        """
        process = self.context.Process(target=_run, args=(list(map(str, arguments)), str(releases)))
        begun = time.monotonic()
        process.start()
        process.join(min(delay, PATIENCE_SECONDS))
        if process.is_alive():
            process.kill()
            process.join()
            assert delay < PATIENCE_SECONDS, "it does not end"
        assert process.exitcode is not None
        # It may have come to its end just before the signal reached it.
        return Ending(process.exitcode == -signal.SIGKILL, process.exitcode, time.monotonic() - begun)


def _run(arguments: list[str], releases: str) -> None:
    real, lines = train_job.run_round, os.open(releases, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def watched(federation, state):
        os.write(lines, f"{state.round}\n".encode())
        return real(federation, state)

    train_job.run_round = watched
    sys.argv = ["trilemma", *arguments]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        main()


def released_rounds(releases: Path) -> list[int]:
    """Returns the rounds that were begun, one for each time."""
    return [int(line) for line in releases.read_text().split()] if releases.exists() else []

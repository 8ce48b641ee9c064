"""What the user sees while a study runs: stages, rounds, time left; plain lines where there is no terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread, Timer

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from trilemma.errors import TrilemmaError
from trilemma.federation.teaching import total_rounds
from trilemma.study.files import StoreFiles
from trilemma.study.plan import Training
from trilemma.study.work import Job

#: Seconds between two looks at how far the trainings are.
LOOK_SECONDS = 0.5

#: Seconds that something may take before the user is told of it.
PATIENCE_SECONDS = 2.0

#: What is waited for before the first training.
READING = "preparing the images"
REHEARSING = "trying every compression on an untrained network"


class Progress:
    """Shows one stage after another.

    Args:
        console: Where to.
        quiet: Show nothing but failures.
    """

    def __init__(self, console: Console, quiet: bool = False):
        self._console = console
        self._quiet = quiet
        self._started = time.monotonic()
        self._ended = 0
        self._total = 0
        self._finished_rounds = 0

    @contextmanager
    def stage(self, name: str, jobs: list[Job], files: StoreFiles) -> Iterator[None]:
        """Shows a stage while its jobs run; a training counts by its rounds, everything else as one."""
        self._ended, self._total, self._finished_rounds = 0, len(jobs), 0
        if not jobs or self._quiet:
            yield
            return
        if not self._console.is_terminal:
            self._console.print(f"{name}: {_count(len(jobs))} to do")
            yield
            return
        columns = [
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
        ]
        with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console) as bars:
            task = bars.add_task(name, total=sum(map(_size, jobs)), unit="rounds" if _rounds(jobs[0]) else "jobs")
            stop = Event()
            watcher = Thread(target=self._watch, args=(bars, task, jobs, files, stop), daemon=True)
            watcher.start()
            try:
                yield
            finally:
                stop.set()
                watcher.join()
                bars.update(task, completed=self._done(jobs, files))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Says what is being done, where that takes longer than a moment."""
        timer = Timer(PATIENCE_SECONDS, self.note, (what,))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def note(self, text: str) -> None:
        """Tells what the user should know."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def ended(self, job: Job) -> None:
        """Counts a job as ended."""
        self._ended += 1
        self._finished_rounds += _size(job)
        if not self._console.is_terminal and not self._quiet:
            minutes = (time.monotonic() - self._started) / 60
            line = f"  {self._ended}/{self._total} {job.title} ({minutes:.1f} min)"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def failed(self, error: TrilemmaError) -> None:
        """Tells of a job that ended badly; the others go on."""
        self._console.print(Text.assemble(("failed", "red"), f" {error}"), soft_wrap=True)

    def _watch(self, bars: Bars, task: "object", jobs: list[Job], files: StoreFiles, stop: Event) -> None:
        while not stop.wait(LOOK_SECONDS):
            bars.update(task, completed=self._done(jobs, files))  # pyright: ignore[reportArgumentType]

    def _done(self, jobs: list[Job], files: StoreFiles) -> int:
        running = 0
        for job in jobs:
            if _rounds(job):
                path = files.progress(job.key)
                try:
                    running += int(path.read_text())
                except (OSError, ValueError):
                    continue  # not begun, or ended meanwhile
        return self._finished_rounds + running


def _rounds(job: Job) -> int:
    first = job.arguments[0]
    return total_rounds(first.spec) if isinstance(first, Training) else 0


def _size(job: Job) -> int:
    return _rounds(job) or 1


def _count(number: int) -> str:
    return "1 job" if number == 1 else f"{number} jobs"

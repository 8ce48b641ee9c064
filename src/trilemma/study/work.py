"""Runs jobs, in this process or in several, and hands each result over as it comes."""

import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Thread
from typing import Any

from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from trilemma.atomic import atomic_write
from trilemma.errors import Failure, TrilemmaError
from trilemma.study.workplace import Workplace

#: Seconds between two looks at whether the study's process is still there.
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        title: For the user: "train DP epsilon 8, seed 0".
        key: Names its log.
        function: A module-level function (it travels to another process) of the workplace and `arguments`.
        arguments: Picklable.
    """

    title: str
    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Failed:
    """How a job ended badly.

    Attributes:
        error: The message for the user.
    """

    error: TrilemmaError


def run_jobs(jobs: list[Job], place: Workplace, num_processes: int) -> Iterator[tuple[Job, Any]]:
    """Yields every job with its result or `Failed`, in the order in which they end.

    Raises:
        Failure: If a worker process was killed; what came before has been yielded.
    """
    if num_processes == 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, _attempt(job, place)
        return
    parallel = Parallel(n_jobs=min(num_processes, len(jobs)), return_as="generator_unordered")
    try:
        with warnings.catch_warnings():
            # A worker that has come to hold much memory is replaced between two jobs, which is as it should be.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
            tasks = (delayed(_numbered)(number, job, place) for number, job in enumerate(jobs))
            results: Iterator[tuple[int, Any]] = parallel(tasks)  # pyright: ignore[reportAssignmentType] - a generator
            for number, result in results:
                yield jobs[number], result
    except TerminatedWorkerError as error:
        raise Failure(
            "a worker process", "was killed, most likely for want of memory", "Run again with --jobs 1; it resumes"
        ) from error


def _numbered(number: int, job: Job, place: Workplace) -> tuple[int, Any]:
    _end_with_owner(place)
    return number, _attempt(job, place)


@lru_cache(maxsize=1)
def _end_with_owner(place: Workplace) -> None:
    """Lets this worker process end soon after the study's: nobody would take its results, and it holds memory."""
    Thread(target=_wait_for_end, args=(place,), daemon=True).start()


def _wait_for_end(place: Workplace) -> None:
    while not place.abandoned():
        time.sleep(LOOK_SECONDS)
    os._exit(1)  # files are written whole or not at all, so any moment will do


def _attempt(job: Job, place: Workplace) -> Any:
    try:
        return job.function(place, *job.arguments)
    except TrilemmaError as error:
        return Failed(type(error)(f"{job.title}: {error.where}", error.problem, error.remedy))
    except MemoryError:
        return Failed(
            Failure(job.title, "there is not enough memory", "Run again with --jobs 1 or a smaller batch_size")
        )
    except Exception as error:  # the one place that turns a defect into a message: the other jobs go on
        log = place.files.log(job.key)
        atomic_write(log, traceback.format_exc().encode())
        return Failed(Failure(job.title, f"failed ({type(error).__name__}: {error})", f"The details are in {log}"))

"""A study may be killed at any moment: run again, it ends with the rows of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.tiny_study import SMALLEST, plan_of, rows_of, run_plan, write_study
from trilemma.study.files import StoreFiles
from trilemma.study.store import Store

#: Longer than any run here takes on a busy machine.
PATIENCE_SECONDS = 240


def start(study: Path, store: Path, roots, jobs: int) -> subprocess.Popen:
    """Starts `trilemma run` in a process group of its own, as a shell does."""
    command = [sys.executable, "-m", "trilemma", "run", str(study), "--store", str(store), "--jobs", str(jobs)]
    environment = {**os.environ, "TRILEMMA_CACHE": str(roots.cache), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    """Returns what a run that must succeed has printed."""
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    return output


def kill_group(process: subprocess.Popen) -> None:
    """Kills the run and its workers, as a power cut or `kill -9 -PGID` would."""
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_SECONDS)
    psutil.wait_procs(workers, timeout=30)


def kill_after(process: subprocess.Popen, delay: float, report: Path) -> str:
    """Kills a run some time after it has said that there is work.

    Returns:
        "killed"; "ended" if the report was written before; "idle" if there was nothing to do but that.
    """
    assert process.stdout is not None
    if not any(" to do" in line for line in process.stdout):
        process.communicate()
        return "idle"
    time.sleep(delay)
    ended = report.exists()
    if process.poll() is None:
        kill_group(process)
    else:
        process.communicate()
    return "ended" if ended else "killed"


def kill_at_round(process: subprocess.Popen, progress: Path, round_number: int) -> None:
    """Kills a run as soon as a training has ended a round."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        if progress.exists() and int(progress.read_text() or 0) >= round_number:
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    kill_group(process)


#: Processes of each run; two of them start so slowly that more would only be killed in that.
JOBS = (2, 1, 1, 1, 1)


def stored_seconds(folder: Path) -> float:
    """Returns how much work a store holds, in the seconds that it took."""
    with Store(folder, write=True) as store:  # a reader may not undo what a killed writer left half done
        runs, artefacts, evaluations = (
            [get(key) for key in store.keys(table)]
            for table, get in (("runs", store.run), ("artefacts", store.artefact), ("evaluations", store.evaluation))
        )
    return sum(row.seconds for row in (*runs, *artefacts, *evaluations) if row is not None)


def kill_within(study: Path, store: Path, roots, jobs: int, delay: float, spare: Path) -> bool:
    """Goes on with a run and kills it after `delay`, or earlier if it ends before; False if nothing was left to do."""
    if store.exists():
        shutil.copytree(store, spare)
    for _ in range(10):
        outcome = kill_after(start(study, store, roots, jobs), delay, store / "reports" / "tiny.html")
        if outcome != "ended":
            return outcome == "killed"
        shutil.rmtree(store)
        if spare.exists():
            shutil.copytree(spare, store)
        delay *= 0.7
    raise AssertionError(f"it ends before it can be killed, even {delay} seconds after its start")


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_rows_of_an_undisturbed_run(finished, roots, tmp_path):
    """At five moments of the work, from the first training to the report; each run goes on where the last one died."""
    study, store = write_study(tmp_path), tmp_path / "store"
    seed = random.randrange(2**32)
    print(f"moments of seed {seed}")  # shown if it fails
    moments, undisturbed = random.Random(seed), rows_of(finished)
    # Beyond what the jobs took lie combining, the report and what comes between.
    whole = 1.2 * stored_seconds(shutil.copytree(finished, tmp_path / "measured"))
    for number, jobs in enumerate(JOBS):
        fraction = moments.uniform(number, number + 1) / len(JOBS)
        delay = max(0.0, fraction * whole - (stored_seconds(store) if store.exists() else 0.0))
        if not kill_within(study, store, roots, jobs, delay, tmp_path / f"spare {number}"):
            assert number >= 2, "it was done before it was killed often enough"
            break
        if (store / "store.db").exists() and (store / "store.db").stat().st_size:
            cut = rows_of(shutil.copytree(store, tmp_path / f"cut {number}"), recover=True)
            print(f"killed after {fraction:.0%}:", {table: len(rows) for table, rows in cut.items()})
            assert all(row in undisturbed[t] for t in cut if t != "studies" for row in cut[t])  # whole rows only
    finish(start(study, store, roots, 1))
    after = rows_of(store)
    for table in set(after) - {"studies"}:  # a study's text is its file's
        assert after[table] == undisturbed[table], table
    assert (store / "reports" / "tiny.html").is_file()


LONG = SMALLEST.replace("base.rounds = 1", "base.rounds = 16")


def test_it_resumes_at_the_last_finished_round(roots, tmp_path):
    """Killed in the midst of a training, and at once again: no round is trained twice."""
    study, store, undisturbed = write_study(tmp_path, LONG), tmp_path / "store", tmp_path / "undisturbed"
    run_plan(plan_of(study), undisturbed, roots)
    key = rows_of(undisturbed)["runs"][0]["key"]
    files = StoreFiles(store)
    kill_at_round(start(study, store, roots, 1), files.progress(key), 3)
    reached = int(files.progress(key).read_text())
    assert 3 <= reached < 16
    early = files.checkpoint(key).read_bytes()
    kill_at_round(start(study, store, roots, 1), files.progress(key), reached + 1)
    # Had the second run begun anew, it would have gone through a smaller number of rounds first.
    assert int(files.progress(key).read_text()) > reached
    assert files.checkpoint(key).read_bytes() != early
    finish(start(study, store, roots, 1))
    assert rows_of(store)["runs"] == rows_of(undisturbed)["runs"]
    assert rows_of(store)["measurements"] == rows_of(undisturbed)["measurements"]
    with Store(store) as opened:
        run = opened.run(key)
    # Rounds that were trained before the kills bring their seconds along: they are in the sum, though nobody waited.
    assert run.seconds >= sum(row["seconds"] for row in run.history)
    assert not files.progress(key).exists() and not files.checkpoint(key).exists()


def test_killed_without_its_workers_it_can_be_run_again_at_once(roots, tmp_path):
    """Only the parent dies (for want of memory, say): its workers follow, and disturb nothing until they do."""
    longer = "seeds = [0, 1]" + LONG.replace("rounds = 16", "rounds = 24")
    study, store = write_study(tmp_path, longer), tmp_path / "store"
    run_plan(plan_of(study), tmp_path / "undisturbed", roots)
    process = start(study, store, roots, 2)
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up and not list((store / "checkpoints").glob("*.rounds")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    finish(start(study, store, roots, 1))
    after, undisturbed = rows_of(store), rows_of(tmp_path / "undisturbed")
    assert all(after[table] == undisturbed[table] for table in set(after) - {"studies"})
    assert not (store / "logs").exists()  # a worker that gives up is no failure
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "a worker outlives its study"
    process.communicate()


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_traceback(roots, tmp_path):
    """As a terminal does it: the signal goes to the run and its workers alike."""
    study, store = write_study(tmp_path, "seeds = [0, 1]" + LONG), tmp_path / "store"
    # Where a script started the tests in the background, SIGINT is ignored, and the run would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(study, store, roots, 2)
    signal.signal(signal.SIGINT, before)
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up and not list((store / "checkpoints").glob("*.rounds")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, output
    assert "run the same command again" in output and "Traceback" not in output, output

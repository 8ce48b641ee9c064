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


def kill_after(process: subprocess.Popen, wanted: str, delay: float) -> bool:
    """Kills a run some time after it has printed `wanted`; returns whether it was still running."""
    assert process.stdout is not None
    for line in process.stdout:
        if wanted in line:
            break
    time.sleep(delay)
    running = process.poll() is None
    if running:
        kill_group(process)
    else:
        process.communicate()
    return running


def kill_at_round(process: subprocess.Popen, progress: Path, round_number: int) -> None:
    """Kills a run as soon as a training has ended a round."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        if progress.exists() and int(progress.read_text() or 0) >= round_number:
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    kill_group(process)


#: The stage in which each kill falls, and the number of processes; each run goes on from where the last one was killed.
MOMENTS = (("training:", 2), ("compressing:", 1), ("clean metrics:", 1), ("attacking:", 2), ("attacking:", 1))


def test_killed_five_times_it_ends_with_the_rows_of_an_undisturbed_run(finished, roots, tmp_path):
    study, store = write_study(tmp_path), tmp_path / "store"
    moments = random.Random(5)
    for number, (stage, jobs) in enumerate(MOMENTS):
        assert kill_after(start(study, store, roots, jobs), stage, moments.uniform(0, 0.25))
        if (store / "store.db").exists() and (store / "store.db").stat().st_size:
            undisturbed = rows_of(finished)
            cut = rows_of(shutil.copytree(store, tmp_path / f"cut {number}"), recover=True)
            assert all(row in undisturbed[t] for t in cut if t != "studies" for row in cut[t])  # whole rows only
    finish(start(study, store, roots, 1))
    after, undisturbed = rows_of(store), rows_of(finished)
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
    longer = "seeds = [0, 1]" + LONG.replace("rounds = 16", "rounds = 40")
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
    process = start(study, store, roots, 2)
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up and not list((store / "checkpoints").glob("*.rounds")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, output
    assert "run the same command again" in output and "Traceback" not in output, output

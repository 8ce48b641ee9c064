"""The store keeps whole rows only, whatever happens to the disk, the file or the process."""

import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny_study import rows_of
from trilemma.errors import Failure, UserError
from trilemma.evaluation.measurement import Measurement, Outcome
from trilemma.privacy.guarantee import NO_PRIVACY
from trilemma.results import DataFacts, Example
from trilemma.study.lineage import Lineage
from trilemma.study.migrations import MIGRATIONS
from trilemma.study.rows import ArtefactRow, EvaluationRow, RunRow
from trilemma.study.store import Refused, Store

GOLDEN = Path(__file__).parents[1] / "golden" / "store_schema.sql"
RUN = RunRow("s1:run", {"seed": 0}, [{"round": 1}], NO_PRIVACY, {"device": "cpu"}, "print", 1.5, 10, 20)
ARTEFACT = ArtefactRow("s1:art", "s1:run", {"kind": "none", "label": "fp32"}, 100, 0.25, NO_PRIVACY, 0.5)


def evaluation(key="s1:eval", measurements=(), outcomes=(), examples=()):
    return EvaluationRow(
        key, "s1:art", {"kind": "clean"}, {}, 0.1, tuple(measurements), tuple(outcomes), tuple(examples)
    )


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", write=True) as opened:
        opened.add_run(RUN)
        opened.add_artefact(ARTEFACT)
        yield opened


def schema_of(path: Path) -> str:
    db = sqlite3.connect(path)
    statements = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL ORDER BY name")]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    db.close()
    return "\n\n".join([*statements, f"-- version {version}"]) + "\n"


def test_the_schema_is_what_it_was(tmp_path):
    """A new schema needs a migration of its own; to renew the file, delete it and run this test."""
    Store(tmp_path, write=True).__exit__()
    if not GOLDEN.exists():
        GOLDEN.write_text(schema_of(tmp_path / "store.db"))
        pytest.fail(f"{GOLDEN} was written anew; look at it and commit it")
    assert schema_of(tmp_path / "store.db") == GOLDEN.read_text()


def test_an_empty_file_is_brought_up_to_date(tmp_path):
    """What a process leaves that was killed between opening the file and its first step."""
    (tmp_path / "store.db").touch()
    with pytest.raises(UserError, match="older version"):
        Store(tmp_path)
    with Store(tmp_path, write=True) as opened:
        assert opened.keys("runs") == set()
    with Store(tmp_path) as opened:
        assert opened.studies() == []


def test_trainings_of_the_first_version_are_kept_and_name_no_booking(tmp_path):
    db = sqlite3.connect(tmp_path / "store.db")
    db.executescript(MIGRATIONS[0] + "PRAGMA user_version = 1")
    claimed = NO_PRIVACY.model_dump_json()
    db.execute("INSERT INTO runs VALUES ('s1:run', '{}', '[]', ?, '{}', 'print', 1.5, 10, 20)", (claimed,))
    db.commit()
    db.close()
    with Store(tmp_path, write=True) as opened:
        row = opened.run("s1:run")
        assert row == RunRow("s1:run", {}, [], NO_PRIVACY, {}, "print", 1.5, 10, 20, Lineage())
        paid = Lineage("r", {"north": {"x": 3}})
        opened.note_lineage("s1:run", paid)
        assert opened.runs(["s1:run", "s1:other"]) == {"s1:run": replace(row, lineage=paid)}


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    Store(tmp_path, write=True).__exit__()
    before = (tmp_path / "store.db").read_bytes()
    monkeypatch.setattr("trilemma.study.store.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE x (a); CREATE TABLE runs (a)"))
    with pytest.raises(Failure, match="already exists"):
        Store(tmp_path, write=True)
    assert schema_of(tmp_path / "store.db") == GOLDEN.read_text()
    assert len(before) == (tmp_path / "store.db").stat().st_size


@pytest.mark.parametrize("write", [True, False])
def test_a_newer_version_is_refused_and_left_alone(tmp_path, write):
    Store(tmp_path, write=True).__exit__()
    db = sqlite3.connect(tmp_path / "store.db")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    before = (tmp_path / "store.db").read_bytes()
    with pytest.raises(Failure, match="newer version") as caught:
        Store(tmp_path, write=write)
    assert "Update trilemma" in caught.value.remedy
    assert (tmp_path / "store.db").read_bytes() == before


def test_a_refused_opening_leaves_no_lock(tmp_path):
    (tmp_path / "store.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(Failure, match="not a database"):
        Store(tmp_path, write=True)
    (tmp_path / "store.db").unlink()
    Store(tmp_path, write=True).__exit__()


HOLD = """
import sys
from pathlib import Path
from trilemma.study.store import Store
with Store(Path(sys.argv[1]), write=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_a_reader_is_not(store, tmp_path):
    store.__exit__()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "store")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process") as caught:
            Store(tmp_path / "store", write=True)
        assert "--store" in caught.value.remedy
        with Store(tmp_path / "store") as reader:
            assert reader.keys("runs") == {"s1:run"}
        holder.kill()  # the lock dies with its holder
        holder.wait()
        Store(tmp_path / "store", write=True).__exit__()


def test_no_store_to_read(tmp_path):
    with pytest.raises(UserError, match="no store here"):
        Store(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_store_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="cannot be written"):
        Store(tmp_path / "file", write=True)


def test_a_full_disk_keeps_what_was_stored(store, tmp_path):
    store.add_evaluations([evaluation()])
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    large = Outcome(np.zeros((5000, 2), np.float32))
    with pytest.raises(Failure, match="full") as caught:
        store.add_evaluations([evaluation("s1:small"), evaluation("s1:large", outcomes=[large])])
    assert "Free some space" in caught.value.remedy and caught.value.exit_code == 1
    assert not isinstance(caught.value, Refused)  # no other row would fare better
    assert store.keys("evaluations") == {"s1:eval"}  # all or none
    store._db.execute("PRAGMA max_page_count = 100000")
    store.add_evaluations([evaluation("s1:large", outcomes=[large])])
    assert store.keys("evaluations") == {"s1:eval", "s1:large"}


def test_a_damaged_file_is_a_failure(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "store")
    content = bytearray((folder / "store.db").read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    (folder / "store.db").write_bytes(content)
    with pytest.raises(Failure, match="cannot be used"), Store(folder) as opened:
        for key in opened.keys("runs"):  # noqa: SIM118
            opened.run(key)


def test_a_reader_of_a_store_that_was_killed_while_writing_says_what_to_do(store, tmp_path):
    """A rollback journal that no writer has put right: SQLite lets a reader do nothing."""
    store._db.execute("PRAGMA cache_size = 1")
    store._db.execute("BEGIN IMMEDIATE")
    for number in range(200):
        store._db.execute("INSERT INTO studies VALUES (?, ?, ?, ?)", (str(number), "q" * 1000, "", ""))
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("store.db", "store.db-journal"):
        shutil.copy(tmp_path / "store" / name, killed / name)
    store._db.execute("ROLLBACK")
    with pytest.raises(Failure, match="Run the study again"), Store(killed) as reader:
        reader.studies()
    with Store(killed, write=True) as opened:
        assert opened.studies() == [] and opened.keys("runs") == {"s1:run"}


def test_missing_is_not_zero(store):
    undefined = Measurement("auroc", None, n=3, status="undefined", reason="one class only", client="worst")
    zero = Measurement("accuracy", 0.0, 0.0, 0.5, 3, radius=0.1, source="s1:other")
    store.add_evaluations([evaluation(measurements=[undefined, zero])])
    row = store.evaluation("s1:eval")
    assert row.measurements == (undefined, zero)
    assert row.measurements[0].value is None and row.measurements[1].value == 0.0


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_logits_come_back_as_they_were(store, dtype):
    logits = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    logits[0] = [np.inf, -0.0, np.float32(1e-40)]
    fortran = np.asfortranarray(logits.astype(dtype))
    store.add_evaluations([evaluation(outcomes=[Outcome(fortran, 0.1, "s1:other"), Outcome(fortran)])])
    first, second = store.outcomes("s1:eval")
    assert first.logits_NK.dtype == np.dtype("<f4") and np.array_equal(first.logits_NK, logits)
    assert (first.radius, first.source, second.radius, second.source) == (0.1, "s1:other", None, None)
    first.logits_NK[0, 0] = 1  # torch warns of arrays that cannot be written


def test_examples_and_facts_come_back_as_they_were(store):
    example = Example("s1:art", "PGD", b"a", b"b", b"c", 2.0, "sick", ("well", 0.5), ("sick", 1.0))
    store.add_evaluations([evaluation(examples=[example])])
    assert store.evaluation("s1:eval").examples == (example,)
    facts = DataFacts("name", "source", True, ("a", "b"), "b", {"train": 1}, 0.5, [{"client": "x"}], ("a warning",))
    store.add_facts("s1:facts", facts, "print")
    assert store.facts("s1:facts") == (facts, "print")
    assert store.facts("s1:none") is None


def test_rows_come_back_as_they_were(store):
    assert store.run("s1:run") == RUN and store.artefact("s1:art") == ARTEFACT
    assert store.artefacts_of("s1:run") == [ARTEFACT]
    assert store.run("none") is store.artefact("none") is store.evaluation("none") is None
    store.open_study("a", "first?", "1")
    store.open_study("a", "second?", "2")
    assert [row[:2] for row in store.studies()] == [("a", "second?")] and store.study_toml("a") == "2"


def test_nothing_is_stored_of_what_is_not_there(store, tmp_path):
    with pytest.raises(Refused, match="FOREIGN KEY"):
        store.add_artefact(ArtefactRow("s1:b", "s1:none", {}, 1, 0.0, NO_PRIVACY, 0.1))
    with pytest.raises(Refused, match="UNIQUE"):
        store.add_run(RUN)
    with pytest.raises(Refused, match="JSON"):  # NaN in a history is a defect, and not stored
        store.add_run(RunRow("s1:x", {}, [{"loss": float("nan")}], NO_PRIVACY, {}, "", 0.0, 0, 0))
    assert len(rows_of(tmp_path / "store")["artefacts"]) == 1 and store.keys("runs") == {"s1:run"}


def test_a_reader_cannot_write(store, tmp_path):
    with Store(tmp_path / "store") as reader, pytest.raises(Failure, match="readonly"):
        reader.open_study("a", "b", "c")


def test_a_writer_removes_the_checkpoint_of_a_stored_training(store, tmp_path):
    """A process may be killed between storing a training and removing its checkpoint."""
    store.__exit__()
    for key in (RUN.key, "s1:unfinished"):
        for path in (store.files.checkpoint(key), store.files.progress(key)):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    with Store(tmp_path / "store", write=True):
        pass
    left = {store.files.checkpoint("s1:unfinished"), store.files.progress("s1:unfinished")}
    assert set((tmp_path / "store" / "checkpoints").iterdir()) == left

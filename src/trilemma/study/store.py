"""The store: every number of every study, in one SQLite file with the models beside it; the one door to SQLite.

One process writes at a time (a lock says so to the second), each finished piece of work in one transaction: whatever
is killed when, the store holds whole rows only, and what it holds need not be done again.
"""

import fcntl
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from trilemma.errors import Failure, UserError
from trilemma.evaluation.measurement import Measurement, Outcome
from trilemma.privacy.guarantee import Guarantee
from trilemma.results import DataFacts, Example
from trilemma.study.files import StoreFiles
from trilemma.study.lineage import Lineage
from trilemma.study.migrations import MIGRATIONS
from trilemma.study.rows import ArtefactRow, EvaluationRow, RunRow


class Refused(Failure):
    """The store is sound, but a piece of work holds what it cannot take: that one is lost and no other."""


class Store:
    """An open store; use it as a context manager.

    Args:
        folder: Where `store.db` and the models are.
        write: Take the writer's lock and bring the schema up to date, creating the store if need be.

    Raises:
        UserError: If there is no store to read, or another process writes to it.
        Failure: If it comes from a newer version, is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, write: bool = False):
        self.files = StoreFiles(folder)
        self._path = folder / "store.db"
        self._lock = _take_lock(folder) if write else None
        if not write and not self._path.is_file():
            raise UserError(str(folder), "there is no store here", "Run a study first, or name its folder with --store")
        if write:
            self.files.remove_partial()
        try:
            self._db = self._open(write)
            if write:
                self._remove_stale_checkpoints()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._release()

    def _release(self) -> None:
        if self._lock:
            self._lock.close()

    def _open(self, write: bool) -> sqlite3.Connection:
        address = self._path.resolve().as_uri() + ("" if write else "?mode=ro")
        try:
            self._db = sqlite3.connect(address, uri=True, isolation_level=None, timeout=30)
        except sqlite3.Error as error:
            raise self._failure(error) from error
        try:
            self._migrate(write)
        except BaseException:
            self._db.close()
            raise
        return self._db

    def _migrate(self, write: bool) -> None:
        try:
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise self._failure(error) from error
        if version > len(MIGRATIONS):
            raise Failure(
                str(self._path),
                f"was written by a newer version (schema {version}; this one knows {len(MIGRATIONS)})",
                "Update trilemma, or name another folder with --store; nothing was changed",
            )
        if not write and version < len(MIGRATIONS):
            raise UserError(
                str(self._path), "was written by an older version", "Run a study on it once to bring it up to date"
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            with self._transaction():
                for statement in script.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {number}")

    def _remove_stale_checkpoints(self) -> None:
        """Removes what is left where a process was killed between storing a training and discarding its checkpoint."""
        for key in self.keys("runs"):
            self.files.discard_checkpoint(key)

    def _failure(self, error: sqlite3.Error) -> Failure:
        text = str(error)
        if "full" in text:
            remedy = "Free some space and run the same command again; what was stored stays"
        elif "readonly" in text:
            remedy = "Run the study again: it was killed while writing, and a writer puts that right"
        elif "locked" in text:
            remedy = "Wait for the other process to end and run the same command again"
        else:
            remedy = "Check that the disk can be written and the file is a store, or name another folder with --store"
        return Failure(str(self._path), f"the store cannot be used ({text})", remedy)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, (sqlite3.IntegrityError, ValueError)):
                problem = f"a number or text that was found cannot be stored ({error})"
                raise Refused(str(self._path), problem, "Please report this; everything else is stored") from error
            if isinstance(error, sqlite3.Error):
                raise self._failure(error) from error
            raise

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    # What there is.

    def studies(self) -> list[tuple[str, str, str]]:
        """Returns (name, question, when it was last run) of every study."""
        return self._rows("SELECT name, question, opened_at FROM studies ORDER BY name")

    def study_toml(self, name: str) -> str | None:
        """Returns the text of a study as it was last run."""
        rows = self._rows("SELECT toml FROM studies WHERE name = ?", name)
        return rows[0][0] if rows else None

    def keys(self, table: str) -> set[str]:
        """Returns the keys of `runs`, `artefacts`, `evaluations` or `facts`."""
        assert table in ("runs", "artefacts", "evaluations", "facts")
        return {key for (key,) in self._rows(f"SELECT key FROM {table}")}

    def run(self, key: str) -> RunRow | None:
        """Returns a training."""
        rows = self._rows(
            "SELECT key, spec, history, guarantee, provenance, fingerprint, seconds, peak_memory_bytes, "
            "num_parameters, lineage FROM runs WHERE key = ?",
            key,
        )
        if not rows:
            return None
        key, spec, history, guarantee, provenance, fingerprint, seconds, peak, num_parameters, lineage = rows[0]
        claimed = Guarantee.model_validate_json(guarantee)
        texts = json.loads(spec), json.loads(history), claimed, json.loads(provenance)
        return RunRow(key, *texts, fingerprint, seconds, peak, num_parameters, Lineage.parse(lineage))

    def runs(self, keys: Iterable[str]) -> dict[str, RunRow]:
        """Returns the trainings of these keys that it holds."""
        return {key: row for key in keys if (row := self.run(key))}

    def artefact(self, key: str) -> ArtefactRow | None:
        """Returns an artefact."""
        rows = self._rows(
            "SELECT key, run_key, compression, file_bytes, sparsity, guarantee, seconds FROM artefacts WHERE key = ?",
            key,
        )
        if not rows:
            return None
        key, run_key, compression, file_bytes, sparsity, guarantee, seconds = rows[0]
        claimed = Guarantee.model_validate_json(guarantee)
        return ArtefactRow(key, run_key, json.loads(compression), file_bytes, sparsity, claimed, seconds)

    def artefacts_of(self, run_key: str) -> list[ArtefactRow]:
        """Returns what a training's model was turned into."""
        keys = self._rows("SELECT key FROM artefacts WHERE run_key = ? ORDER BY key", run_key)
        return [row for (key,) in keys if (row := self.artefact(key))]

    def evaluation(self, key: str) -> EvaluationRow | None:
        """Returns an evaluation with its measurements and examples, without its outcomes."""
        rows = self._rows("SELECT key, artefact_key, spec, provenance, seconds FROM evaluations WHERE key = ?", key)
        if not rows:
            return None
        key, artefact_key, spec, provenance, seconds = rows[0]
        columns = ", ".join(Measurement._fields)
        measured = self._rows(f"SELECT {columns} FROM measurements WHERE evaluation_key = ? ORDER BY position", key)
        examples = self._rows(
            "SELECT title, clean_png, perturbation_png, adversarial_png, scale, truth, clean_class, clean_confidence, "
            "adversarial_class, adversarial_confidence FROM examples WHERE evaluation_key = ? ORDER BY position",
            key,
        )
        return EvaluationRow(
            key,
            artefact_key,
            json.loads(spec),
            json.loads(provenance),
            seconds,
            tuple(Measurement(*row) for row in measured),
            examples=tuple(_example(artefact_key, values) for values in examples),
        )

    def evaluations_of(self, artefact_key: str) -> list[EvaluationRow]:
        """Returns every evaluation of an artefact, in the order in which they were stored."""
        keys = self._rows("SELECT key FROM evaluations WHERE artefact_key = ? ORDER BY rowid", artefact_key)
        return [row for (key,) in keys if (row := self.evaluation(key))]

    def outcomes(self, evaluation_key: str) -> tuple[Outcome, ...]:
        """Returns the logits that an evaluation kept."""
        rows = self._rows(
            "SELECT logits, num_classes, radius, source FROM outcomes WHERE evaluation_key = ? ORDER BY position",
            evaluation_key,
        )
        return tuple(
            Outcome(np.frombuffer(bytearray(logits), dtype="<f4").reshape(-1, classes), radius, source)
            for logits, classes, radius, source in rows
        )

    def facts(self, key: str) -> tuple[DataFacts, str] | None:
        """Returns what is known of a data set and its partition, and the data's fingerprint."""
        rows = self._rows("SELECT facts, fingerprint FROM facts WHERE key = ?", key)
        if not rows:
            return None
        fields = json.loads(rows[0][0])
        fields |= {name: tuple(fields[name]) for name in ("classes", "warnings")}
        return DataFacts(**fields), rows[0][1]

    def data_fingerprint(self, data: dict[str, Any]) -> str | None:
        """Returns the fingerprint of the images that the stored trainings on a data spec have seen."""
        rows = self._rows("SELECT fingerprint FROM runs WHERE json_extract(spec, '$.data') = json(?)", _json(data))
        return rows[0][0] if rows else None

    # What is added.

    def open_study(self, name: str, question: str, toml: str) -> None:
        """Notes that a study is being run."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO studies VALUES (?, ?, ?, ?)", (name, question, toml, now))

    def add_facts(self, key: str, facts: DataFacts, fingerprint: str) -> None:
        """Stores what is known of a data set and its partition."""
        with self._transaction():
            text = json.dumps(facts.__dict__, allow_nan=False)
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (key, text, fingerprint))

    def add_run(self, row: RunRow) -> None:
        """Stores a training."""
        with self._transaction():
            values = (
                row.key,
                _json(row.spec),
                _json(row.history),
                row.guarantee.model_dump_json(),
                _json(row.provenance),
                row.fingerprint,
                row.seconds,
                row.peak_memory_bytes,
                row.num_parameters,
                row.lineage.text(),
            )
            self._insert("runs", values)

    def note_lineage(self, key: str, lineage: Lineage) -> None:
        """Stores what has paid for a training by now."""
        with self._transaction():
            self._db.execute("UPDATE runs SET lineage = ? WHERE key = ?", (lineage.text(), key))

    def add_artefact(self, row: ArtefactRow) -> None:
        """Stores an artefact."""
        claimed = row.guarantee.model_dump_json()
        with self._transaction():
            values = (row.key, row.run_key, _json(row.compression), row.file_bytes, row.sparsity, claimed, row.seconds)
            self._insert("artefacts", values)

    def add_evaluations(self, rows: list[EvaluationRow]) -> None:
        """Stores evaluations, all or none."""
        with self._transaction():
            for row in rows:
                self._insert(
                    "evaluations", (row.key, row.artefact_key, _json(row.spec), _json(row.provenance), row.seconds)
                )
                for position, measurement in enumerate(row.measurements):
                    self._insert("measurements", (row.key, position, *measurement))
                for position, outcome in enumerate(row.outcomes):
                    logits = np.ascontiguousarray(outcome.logits_NK, dtype="<f4")
                    blob = (row.key, position, outcome.radius, outcome.source, logits.shape[1], logits.tobytes())
                    self._insert("outcomes", blob)
                for position, example in enumerate(row.examples):
                    self._insert("examples", (row.key, position, *_example_values(example)))

    def _insert(self, table: str, values: tuple[Any, ...]) -> None:
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT INTO {table} VALUES ({marks})", values)


def _example(artefact_key: str, values: tuple[Any, ...]) -> Example:
    title, clean, perturbation, adversarial, scale, truth, *predictions = values
    before, after = (predictions[0], predictions[1]), (predictions[2], predictions[3])
    return Example(artefact_key, title, clean, perturbation, adversarial, scale, truth, before, after)


def _example_values(example: Example) -> tuple[Any, ...]:
    images = (example.clean_png, example.perturbation_png, example.adversarial_png)
    predictions = (*example.clean_prediction, *example.adversarial_prediction)
    return (example.title, *images, example.scale, example.truth, *predictions)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _take_lock(folder: Path) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "store.lock").open("w")
    except OSError as error:
        raise Failure(
            str(folder), f"the store cannot be written ({error.strerror})", "Name another folder with --store"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            str(folder), "another process is writing to this store", "Wait for it to end, or name another with --store"
        ) from None
    return lock

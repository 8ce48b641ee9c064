"""The file of a budget book: sealed lines, a lock, and appending so that a kill at any moment does no harm.

Each line is a JSON object whose `seal` is a hash of the rest of it and of the seal before: a line that was changed,
moved, taken out or put in breaks the chain there. The seals are no signatures: who may write the file can write
another one. They find damage, careless edits and bad copies.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trilemma.atomic import cannot_write, flush_folder
from trilemma.errors import Failure, UserError
from trilemma.privacy.guarantee import DpEvent, Trust, Unit
from trilemma.privacy.noise import NoiseKind

#: Version of the format; a book of a newer one is refused. Until 1.0 lines may get fields that older builds refuse.
VERSION = 1

Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]

FROM_A_COPY = "Put the file back from a copy; a new one in its place would forget what was spent"


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Terms(_Line):
    """The first line: whose book it is and how much may be spent.

    Attributes:
        version: Of the format.
        owner: The hospital.
        unit: What its budget protects: one image, one patient, or the hospital as a whole.
        relation: Neighbouring relation of the data sets.
        epsilon: The budget.
        delta: At which it holds; below 1 / `num_units`, and since it is checked at least `accounting.MIN_DELTA`.
        fingerprint: Of the hospital's images and labels, for unit "patient" also of which are one patient's.
        num_units: How many units they are.
        created: When, in UTC.
    """

    kind: Literal["terms"] = "terms"
    version: int = VERSION
    owner: str
    unit: Unit
    relation: Literal["add_or_remove_one"] = "add_or_remove_one"
    epsilon: Positive
    delta: float = Field(gt=0, lt=1)
    fingerprint: str
    num_units: int = Field(ge=1)
    created: str


class Admission(_Line):
    """A line that admits another state of the hospital's images: new patients, another resolution.

    Attributes:
        time: When, in UTC.
        fingerprint: As in `Terms`, of the images as they are now.
        num_units: How many units they are.
    """

    kind: Literal["data"] = "data"
    time: str
    fingerprint: str
    num_units: int = Field(ge=1)


class Booking(_Line):
    """A line that books a training.

    Attributes:
        time: When, in UTC.
        training: The training's key.
        study: The study's name.
        events: (noise multiplier, sampling rate, steps) of all that it will run.
        release: Identifies the released numbers; None where each run draws new noise.
        trust: Who adds the noise; with the next two the conditions on which the events cost what the book says. None
            in lines from before they were noted.
        num_colluding: How many hospitals may side with the server or withhold their noise.
        noise: "seeded", from which nobody is protected who knows the seed, or "system".
        epsilon_after: What was spent with this line, as the accountant of that day had it; for the reader only.
        id: Drawn for this booking and written down with whatever it paid for, so that nothing else is taken for that;
            empty in lines from before there were any.
    """

    kind: Literal["book"] = "book"
    time: str
    training: str
    study: str
    events: tuple[tuple[Positive, Probability, Annotated[int, Field(ge=0)]], ...]
    release: str | None
    trust: Trust | None = None
    num_colluding: Annotated[int, Field(ge=0)] = 0
    noise: NoiseKind | None = None
    epsilon_after: float
    id: str = ""

    @property
    def conditions(self) -> str:
        """Returns on what its epsilon rests, in a few words; "" where it was not noted."""
        if self.trust is None:
            return ""
        colluding = f", {self.num_colluding} may collude" if self.num_colluding else ""
        return f"{self.trust}{colluding}, {self.noise} noise"

    @property
    def dp_events(self) -> tuple[DpEvent, ...]:
        """Returns the events for the accountant."""
        return tuple(DpEvent(noise_multiplier=z, sampling_rate=q, steps=n) for z, q, n in self.events)


_LINE: TypeAdapter[Terms | Admission | Booking] = TypeAdapter(
    Annotated[Terms | Admission | Booking, Field(discriminator="kind")]
)


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        terms: The first line.
        lines: The others.
        seals: Of each line, the first one's included. The last one, noted elsewhere, shows later whether lines were
            cut off: through the chain it seals them all.
        size: Bytes of the whole lines.
        torn: Bytes after them, which a killed writer left.
    """

    terms: Terms
    lines: tuple[Admission | Booking, ...]
    seals: tuple[str, ...]
    size: int
    torn: int

    @property
    def head(self) -> str:
        """Returns the last line's seal."""
        return self.seals[-1]


def create_file(path: Path, terms: Terms) -> None:
    """Writes a file with its first line; a file that is there already stays as it is.

    Raises:
        UserError: If there is one.
        Failure: If it cannot be written; then there is none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise UserError(
            str(path),
            "is there already, and what it says is spent stays spent",
            "Go on with it, or name another folder for other patients' images",
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        append(file, path, None, terms)
        flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # nothing can have been booked in it
            path.unlink()
        raise
    finally:
        os.close(file)


@contextmanager
def locked(path: Path, write: bool = True) -> Iterator[int]:
    """Holds a file's lock, waiting for it: alone to write, or together with other readers.

    Raises:
        UserError: If there is no file.
        Failure: If it cannot be opened or locked, or was replaced while this waited.
    """
    try:
        file = os.open(path, (os.O_RDWR | os.O_APPEND if write else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(
            str(path),
            "there is no ledger here",
            "Create the books of a study's hospitals with: trilemma ledger create FOLDER --study STUDY.toml "
            "--epsilon E --delta D",
        ) from None
    except OSError as error:
        raise (cannot_write(path, error) if write else _cannot_read(path, error)) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
            replaced = not os.path.samestat(os.fstat(file), path.stat())
        except OSError as error:
            raise Failure(
                str(path),
                f"could not be locked ({error.strerror}), so two runs could spend the same budget",
                "Keep ledgers on a disk of this machine",
            ) from error
        if replaced:
            raise Failure(str(path), "was replaced by another file meanwhile", "Run the same command again")
        yield file
    finally:
        os.close(file)


def read(path: Path) -> Content:
    """Returns what a file holds; hold its lock.

    Only a last line whose object does not end is taken for what a killed writer left, on which nothing was released.
    One that ends, with its end of line lost to an editor or a bad copy, counts, or is refused if it is damaged.

    Raises:
        UserError: If it comes from a newer version.
        Failure: If it cannot be read, or a line is not what was written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _cannot_read(path, error) from error
    *raw, tail = content.split(b"\n")
    seals, lines = [""], []
    for number, text in enumerate(raw, 1):
        line, seal = _opened(text, seals[-1], path, number)
        lines.append(line)
        seals.append(seal)
    size = len(content) - len(tail)
    if _ends(tail):
        line, seal = _opened(tail, seals[-1], path, len(raw) + 1)
        lines.append(line)
        seals.append(seal)
        size, tail = len(content) + 1, b""  # the end of line belongs to it, and the next writer adds it
    if not lines:
        raise Failure(
            str(path),
            "holds no whole first line",
            "If it was just being created, nothing can have been booked: delete it and create it anew. If it is older, "
            "put it back from a copy",
        )
    return Content(lines[0], tuple(lines[1:]), tuple(seals[1:]), size, len(tail))


def append(file: int, path: Path, content: Content | None, line: Terms | Admission | Booking) -> None:
    """Adds a line and returns when it is on the disk.

    Args:
        file: Descriptor of the file, open for appending, its lock held.
        path: For messages.
        content: What it holds, as just read, or None for a new file; what a killed writer left at its end is cut off.
        line: What to add.

    Raises:
        Failure: If that fails; the line is not there, or, where not even that could be undone, counts.
    """
    size, head = (content.size, content.head) if content else (0, "")
    before = os.fstat(file).st_size
    try:
        if before > size:
            os.ftruncate(file, size)
        rest = b"\n" * max(0, size - before) + sealed(line.model_dump(mode="json"), head)[0] + b"\n"
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(file, min(before, size))
            os.fsync(file)
        raise cannot_write(path, error) from error


def sealed(fields: dict[str, Any], head: str) -> tuple[bytes, str]:
    """Returns a line without its end, and its seal.

    Args:
        fields: What it says.
        head: Seal of the line before; empty for the first one.
    """
    text = json.dumps(fields, sort_keys=True, allow_nan=False)
    seal = hashlib.blake2b(f"{head}\n{text}".encode(), digest_size=16).hexdigest()
    return f'{text[:-1]}, "seal": "{seal}"}}'.encode(), seal


def _ends(text: bytes) -> bool:
    """Returns whether a text begins with a whole JSON object, whatever comes after."""
    try:
        json.JSONDecoder().raw_decode(text.decode(errors="replace"))
    except ValueError:
        return False
    return True


def _opened(text: bytes, head: str, path: Path, number: int) -> tuple[Any, str]:
    where = f"{path}: line {number}"
    try:
        fields = json.loads(text)
        seal = fields.pop("seal", None) if isinstance(fields, dict) else None
    except ValueError:
        raise Failure(where, "is no line of a ledger", FROM_A_COPY) from None
    if number == 1 and isinstance(fields, dict):
        _refuse_newer(fields.get("version"), path)
    if seal is None or not _is_sealed(text, fields, head, seal):
        raise Failure(where, "was changed, or lines before it were changed, moved or lost", FROM_A_COPY)
    try:
        line = _LINE.validate_json(json.dumps(fields))
    except ValidationError as error:
        raise Failure(where, f"cannot be understood ({error.errors()[0]['msg']})", FROM_A_COPY) from None
    if isinstance(line, Terms) != (number == 1):
        raise Failure(where, "is out of place", FROM_A_COPY)
    return line, seal


def _is_sealed(text: bytes, fields: dict[str, Any], head: str, seal: Any) -> bool:
    try:
        return sealed(fields, head) == (text, seal)
    except ValueError:  # a number that none of the written ones is, such as 1e405
        return False


def _refuse_newer(version: Any, path: Path) -> None:
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            str(path), f"is a ledger of version {version}; this Trilemma reads {VERSION}", "Update Trilemma to use it"
        )


def _cannot_read(path: Path, error: OSError) -> Failure:
    return Failure(str(path), f"could not be read ({error.strerror})", "Check that it is a file and may be read")

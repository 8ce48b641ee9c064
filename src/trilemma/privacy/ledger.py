"""A hospital's own budget book: what its images were used for, and how much of its budget is left.

A training is booked, whole, before anything computed from the images leaves the hospital. From reading the book to
the line being on the disk its lock is held. Whatever is killed when, and however many run at once, the book may show
more than was released and never less.
"""

import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Self

from trilemma.errors import UserError
from trilemma.privacy.accounting import MIN_DELTA, TOO_SMALL
from trilemma.privacy.affordable import least_noise, merged, most_steps, total
from trilemma.privacy.guarantee import DpEvent, Trust
from trilemma.privacy.ledger_file import Admission, Booking, Content, Terms, append, create_file, locked, read
from trilemma.privacy.noise import NoiseKind


@dataclass(frozen=True)
class Request:
    """What a training asks of a book.

    Attributes:
        training: Its key.
        study: The study's name.
        events: All that it will run.
        release: Equal for two runs that release the very same numbers, so that the second one costs nothing: the same
            noise from a seed, and the same code, machine and settings. None where every run draws noise of its own:
            each is a new release, and is booked anew.
        trust: Who adds the noise.
        num_colluding: How many hospitals the claim allows to side with the server or to withhold their noise.
        noise: Where it comes from.
    """

    training: str
    study: str
    events: tuple[DpEvent, ...]
    release: str | None
    trust: Trust
    num_colluding: int
    noise: NoiseKind


@dataclass(frozen=True)
class Ledger:
    """A book as it was when it was read.

    Attributes:
        path: Its file.
        content: What it holds.
    """

    path: Path
    content: Content

    @classmethod
    def create(cls, path: Path, terms: Terms) -> Self:
        """Writes a new book.

        Raises:
            UserError: If there is a file of that name, or delta would allow publishing a unit or is too small.
            Failure: If it cannot be written.
        """
        refuse_delta(path, terms.delta, terms.num_units)
        create_file(path, terms)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads a book.

        Raises:
            UserError: If there is none, or it comes from a newer version.
            Failure: If it cannot be read, or a line was changed, moved, lost or damaged.
        """
        with locked(path, write=False):
            return cls(path, read(path))

    @property
    def terms(self) -> Terms:
        """Returns whose book it is and how much may be spent."""
        return self.content.terms

    @property
    def entries(self) -> tuple[Booking, ...]:
        """Returns the bookings, oldest first."""
        return tuple(line for line in self.content.lines if isinstance(line, Booking))

    @property
    def fingerprints(self) -> frozenset[str]:
        """Returns the states of the hospital's images that this book counts for."""
        admitted = (line.fingerprint for line in self.content.lines if isinstance(line, Admission))
        return frozenset((self.terms.fingerprint, *admitted))

    @property
    def events(self) -> tuple[DpEvent, ...]:
        """Returns all that is booked, events of one noise and rate as one."""
        return merged(event for entry in self.entries for event in entry.dp_events)

    def spent(self, *more: DpEvent) -> float:
        """Returns the epsilon of all bookings composed, and of further events if given, at the book's delta."""
        return total(self.events, more, delta=self.terms.delta)

    @property
    def left(self) -> float:
        """Returns budget minus spent; what fits follows from composition, which mostly grants more than addition."""
        return max(0.0, self.terms.epsilon - self.spent())

    def holds(self, booking: str) -> bool:
        """Returns whether a booking of this id is in the book."""
        return bool(booking) and any(entry.id == booking for entry in self.entries)

    def repeated(self, request: Request) -> str:
        """Returns the id of a booking that paid for the very release that is asked for, or "" if there is none."""
        if request.release is None:
            return ""
        wanted = (request.release, request.training, _numbers(request.events))
        same = (entry.id for entry in self.entries if (entry.release, entry.training, entry.events) == wanted)
        return next((booking for booking in same if booking), "")

    def charges(self, request: Request) -> bool:
        """Returns whether a request has to be booked; otherwise it repeats a release that was."""
        return not self.repeated(request)

    def refuse_overdraw(self, request: Request) -> None:
        """Refuses what exceeds the budget.

        Raises:
            UserError: With what is spent, what is left, what was asked for and what would fit.
        """
        after = self.spent(*request.events)
        if after <= self.terms.epsilon:  # and not "if it is larger, refuse": what is no number must not pass
            return
        raise UserError(
            str(self.path),
            f"the budget of '{self.terms.owner}' would be overdrawn: {self.in_words()}, "
            f"and {described(request.events)} would make it {up(after)}",
            self.what_fits(request.events),
        )

    def in_words(self) -> str:
        """Returns the balance as part of a sentence."""
        budget = f"of epsilon {self.terms.epsilon:g} at delta {self.terms.delta:g}"
        return f"{budget}, {up(self.spent())} is spent and {down(self.left)} left"

    def what_fits(self, asked: tuple[DpEvent, ...], before: tuple[DpEvent, ...] = ()) -> str:
        """Returns in words what could be booked instead of `asked`, after what is booked and `before`."""
        booked, delta, budget = (*self.events, *before), self.terms.delta, self.terms.epsilon
        steps, offers = sum(event.steps for event in asked), []
        shorter = most_steps(booked, asked, delta, budget)
        if shorter:
            offers.append(f"{sum(event.steps for event in shorter)} of the {steps} steps with this noise")
        noisier = least_noise(booked, asked, delta, budget)
        if noisier:
            multipliers = " and ".join(f"{event.noise_multiplier:g}" for event in noisier)
            offers.append(f"all {steps} steps with noise multiplier {multipliers}")
        return f"What would fit: {', or '.join(offers)}" if offers else "Nothing of it would fit, however noisy"

    def book(self, request: Request) -> "Ledger":
        """Books a request and returns the book after it; see `book_all`."""
        book_all({self.path: request})
        return Ledger.open(self.path)

    def admit(self, fingerprint: str, num_units: int) -> "Ledger":
        """Lets the book count for another state of the same hospital's images, and returns the book after it.

        Raises:
            UserError: If delta would allow publishing one of so many units.
            Failure: If the book is damaged or cannot be written.
        """
        with locked(self.path) as file:
            book = Ledger(self.path, read(self.path))
            if fingerprint in book.fingerprints:
                return book
            refuse_delta(self.path, book.terms.delta, num_units)
            append(file, self.path, book.content, Admission(time=now(), fingerprint=fingerprint, num_units=num_units))
            return Ledger(self.path, read(self.path))


def book_all(requests: Mapping[Path, Request]) -> dict[Path, str]:
    """Books one training in the books of all its hospitals, or in none.

    All books are locked, in the order of their paths, then all are checked, then all are written. What a book has
    already is not booked again. Where writing fails half way (a full disk, a kill), some books show a training that
    did not run: nothing was released. With seeded noise, running it again costs them nothing more.

    Returns:
        Book -> id of the booking that pays for its request: a new one, or that of the release which it repeats.

    Raises:
        UserError: If a book is missing or would be overdrawn; no book has changed.
        Failure: If a book is damaged or cannot be written; the training must not run.
    """
    with ExitStack() as locks:
        order = sorted(requests, key=os.path.realpath)
        _refuse_same_file(order)
        files = {path: locks.enter_context(locked(path)) for path in order}
        books = {path: Ledger(path, read(path)) for path in order}
        paid = {path: books[path].repeated(requests[path]) for path in order}
        charged = [path for path in order if not paid[path]]
        booking = secrets.token_hex(16)  # not from the line: two books may have a beginning in common
        for path in charged:
            books[path].refuse_overdraw(requests[path])
        for path in charged:
            append(files[path], path, books[path].content, _booking(books[path], requests[path], booking))
        return {path: paid[path] or booking for path in order}


def refuse_delta(path: Path, delta: float, num_units: int) -> None:
    """Refuses a delta that allows publishing a unit, or that is too small to be accounted for.

    Raises:
        UserError: Naming the largest sensible delta, or the smallest.
    """
    if delta < MIN_DELTA:
        raise UserError(
            str(path), f"delta {delta:g} is below {MIN_DELTA:g}, {TOO_SMALL}", f"Give {MIN_DELTA:g} or more"
        )
    if not delta * num_units < 1:
        raise UserError(
            str(path),
            f"delta {delta:g} is not below 1 / {num_units}, so it would allow publishing one of so many",
            f"Give a delta well below {1 / num_units:.1g}",
        )


def described(events: tuple[DpEvent, ...]) -> str:
    """Returns events as part of a sentence."""
    return " and ".join(
        f"{event.steps} steps with noise multiplier {event.noise_multiplier:g} at sampling rate {event.sampling_rate:g}"
        for event in events
    )


def now() -> str:
    """Returns the time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def up(epsilon: float) -> str:
    """Returns an epsilon with two decimals, none of which says less."""
    return _two_decimals(epsilon, ROUND_CEILING)


def down(epsilon: float) -> str:
    """Returns an epsilon with two decimals, none of which says more."""
    return _two_decimals(epsilon, ROUND_FLOOR)


def _two_decimals(epsilon: float, rounding: str) -> str:
    exact = Decimal(str(epsilon))
    return str(exact.quantize(Decimal("0.01"), rounding)) if exact.is_finite() else str(epsilon)


def _numbers(events: tuple[DpEvent, ...]) -> tuple[tuple[float, float, int], ...]:
    return tuple((event.noise_multiplier, event.sampling_rate, event.steps) for event in events)


def _booking(book: Ledger, request: Request, booking: str) -> Booking:
    return Booking(
        time=now(),
        training=request.training,
        study=request.study,
        events=_numbers(request.events),
        release=request.release,
        trust=request.trust,
        num_colluding=request.num_colluding,
        noise=request.noise,
        epsilon_after=book.spent(*request.events),
        id=booking,
    )


def _refuse_same_file(paths: list[Path]) -> None:
    """Refuses two names of one file: its lock would wait for itself, and one hospital's budget pay for two."""
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        if path.exists():
            status = path.stat()
            first = seen.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                raise UserError(str(path), f"is the same file as {first}", "Give every hospital a book of its own")

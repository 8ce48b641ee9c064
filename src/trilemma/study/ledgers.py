"""The hospitals' budget books and a study: whose images a training uses, what it costs each book, and whether it fits.

Books are kept by name of the hospital, in one folder. A pooled training is booked in the books of all whose images were
pooled, for each of their images was sampled and noised as the pool was.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from trilemma.errors import Failure, UserError
from trilemma.federation.server import Federation
from trilemma.federation.training import planned_events, prepare
from trilemma.privacy.guarantee import DpEvent, Unit
from trilemma.privacy.ledger import Ledger, Request, book_all, now, refuse_delta, up
from trilemma.privacy.ledger_file import Terms
from trilemma.privacy.specs import DpSgd
from trilemma.study.files import load_texts
from trilemma.study.holdings import Holding, release_of, study_holdings, training_holdings
from trilemma.study.plan import Plan, Training, without_guarantee
from trilemma.study.workplace import Books, Workplace


@dataclass(frozen=True)
class Claim:
    """What a training asks of one book, and for whose images.

    Attributes:
        holding: The hospital's.
        unit: What the training protects.
        request: For its book.
    """

    holding: Holding
    unit: Unit
    request: Request


def book_path(folder: Path, owner: str) -> Path:
    """Returns the file of a hospital's book: its name, with hyphens for what file names should not hold."""
    return folder / f"{re.sub(r'[^0-9A-Za-z_.À-ɏ]+', '-', owner).strip('-.') or 'hospital'}.jsonl"


def create_books(plan: Plan, place: Workplace, folder: Path, epsilon: float, delta: float) -> list[Ledger]:
    """Creates a book for every hospital of a study, or none.

    Raises:
        UserError: If a book is there already, hospitals hold other images from one training to the next, or epsilon
            and delta cannot be.
        Failure: If a book cannot be written.
    """
    unit, holdings = study_holdings(plan, place)
    if not (0 < epsilon < float("inf") and 0 < delta < 1):
        problem = f"epsilon {epsilon:g} and delta {delta:g} are no budget"
        raise UserError("--epsilon, --delta", problem, "Give an epsilon above 0 and a delta between 0 and 1")
    paths = _paths(folder, holdings)
    for path, holding in paths.items():
        refuse_delta(path, delta, holding.num_units)
        if path.exists():
            raise UserError(
                str(path),
                "is there already, and what it says is spent stays spent",
                "Go on with it, or name another folder for other patients' images",
            )
    books = []
    for path, holding in paths.items():
        terms = Terms(unit=unit, epsilon=epsilon, delta=delta, created=now(), **vars(holding))
        books.append(Ledger.create(path, terms))
    return books


def admit_data(plan: Plan, place: Workplace, folder: Path) -> list[Ledger]:
    """Lets the books of a study's hospitals count for the images that these hold now.

    Raises:
        UserError: If a book is missing or another hospital's, or hospitals hold other images from one training to the
            next.
        Failure: If a book is damaged or cannot be written.
    """
    unit, holdings = study_holdings(plan, place)
    books = []
    for path, holding in _paths(folder, holdings).items():
        book = Ledger.open(path)
        _refuse_stranger(book, holding, unit)
        books.append(book.admit(holding.fingerprint, holding.num_units))
    return books


def read_books(where: Path) -> list[Ledger]:
    """Returns the book in a file, or all in a folder, by name.

    Raises:
        UserError: If there is none.
        Failure: If one is damaged.
    """
    paths = sorted(where.glob("*.jsonl")) if where.is_dir() else [where]
    if not paths:
        raise UserError(str(where), "holds no ledger (*.jsonl)", "Create some with: trilemma ledger create")
    return [Ledger.open(path) for path in paths]


def check_books(plan: Plan, stored: set[str], place: Workplace) -> list[dict[Path, Claim]]:
    """Refuses a study, before any of it runs, that the books do not allow; returns what has yet to be booked.

    Args:
        plan: The study's cells.
        stored: Keys of the trainings in the store. They cost nothing if they were booked, on whatever machine; one
            that never was (it ran without books) is booked like one that will run.
        place: With its books.

    Returns:
        For each training that costs anything, in the order of the plan: book -> claim.

    Raises:
        UserError: If something in the study carries no guarantee, a book is missing, is another hospital's or another
            unit's, counts for other images, or would be overdrawn.
        Failure: If a book is damaged.
    """
    books = _books(place)
    reasons = dict.fromkeys(without_guarantee(plan))
    if reasons:
        raise UserError(
            "--ledgers",
            f"no budget can pay for what has no guarantee: {'; '.join(reasons)}",
            "Take these out of the study, or run it without --ledgers",
        )
    opened: dict[Path, Ledger] = {}
    costly: list[tuple[Training, dict[Path, Claim]]] = []
    for training in plan.trainings:
        new = {}
        for path, claim in _claims(place, training).items():
            if path not in opened:
                opened[path] = Ledger.open(path)
            _refuse_stranger(opened[path], claim.holding, claim.unit)
            _refuse_other_images(opened[path], claim.holding, books)
            known = opened[path].knows(training.key) if training.key in stored else False
            if not known and opened[path].charges(claim.request):
                new[path] = claim
        if new:
            costly.append((training, new))
    _refuse_overdraw(opened, costly)
    return [new for _, new in costly]


def book_stored(claims: list[dict[Path, Claim]], stored: set[str]) -> None:
    """Books the trainings that ran without books.

    Raises:
        UserError: If a book would be overdrawn.
        Failure: If a book is damaged or cannot be written.
    """
    for new in claims:
        requests = {path: claim.request for path, claim in new.items() if claim.request.training in stored}
        if requests:
            book_all(requests)


def book_training(place: Workplace, training: Training, federation: Federation, steps_done: dict[str, int]) -> None:
    """Books a training in the books of all its hospitals; it may run once this has returned.

    Args:
        place: With its books.
        training: What is about to run.
        federation: The training, prepared.
        steps_done: Client name -> DP steps of the checkpoint from which it goes on.

    Raises:
        UserError: If a book would be overdrawn; none has changed.
        Failure: If a book is damaged or cannot be written.
    """
    claims = _claims_of(place, training, federation, steps_done)
    for path, claim in claims.items():
        book = Ledger.open(path)
        _refuse_stranger(book, claim.holding, claim.unit)
        _refuse_other_images(book, claim.holding, _books(place))
    book_all({path: claim.request for path, claim in claims.items()})


def _books(place: Workplace) -> Books:
    assert place.books is not None  # whoever keeps none does not ask
    return place.books


def _claims(place: Workplace, training: Training) -> dict[Path, Claim]:
    """Returns what a training that is not running asks of each book, going on from its checkpoint if it has one."""
    federation = prepare(training.spec, place.dataset(training.spec.data), place.torch_device)
    return _claims_of(place, training, federation, _steps_done(place.files.checkpoint(training.key)))


def _steps_done(checkpoint: Path) -> dict[str, int]:
    """Returns client name -> DP steps of a checkpoint; one that cannot be used is as good as none."""
    try:
        return json.loads(load_texts(checkpoint)["private_steps"])
    except (Failure, KeyError, ValueError):
        return {}


def _claims_of(
    place: Workplace, training: Training, federation: Federation, steps_done: dict[str, int]
) -> dict[Path, Claim]:
    """Returns what a training asks of each book.

    Seeded noise repeats itself: the whole training is one release, however often it is killed and resumed. Fresh noise
    does not: a round that was under way when the process was killed may have left the hospital, and is done again with
    other noise. So each start books all that it will run, and what the one before did not run stays booked.
    """
    spec, dataset = training.spec, place.dataset(training.spec.data)
    assert isinstance(spec.privacy, DpSgd)  # others were refused
    release = release_of(place, training, dataset) if spec.privacy.noise == "seeded" else None
    holdings = training_holdings(training, dataset)
    claims: dict[Path, Claim] = {}
    for client in federation.clients:
        events = planned_events(federation).get(client.name, ())
        if release is None:
            events = _without(events, steps_done.get(client.name, 0))
        events = tuple(event for event in events if event.steps)
        for shard in client.shards if events else ():
            holding = holdings[shard.hospital]
            path = book_path(_books(place).folder, holding.owner)
            if path in claims:
                raise _same_file(path, claims[path].holding.owner, holding.owner)
            request = Request(training.key, _books(place).study, events, release)
            claims[path] = Claim(holding, spec.privacy.unit, request)
    return claims


def _without(events: tuple[DpEvent, ...], steps_done: int) -> tuple[DpEvent, ...]:
    """Returns events without the steps that a checkpoint holds; with several kinds of events all are kept."""
    if len(events) != 1:
        return events
    return (events[0].model_copy(update={"steps": max(0, events[0].steps - steps_done)}),)


def _paths(folder: Path, holdings: list[Holding]) -> dict[Path, Holding]:
    paths: dict[Path, Holding] = {}
    for holding in holdings:
        path = book_path(folder, holding.owner)
        if path in paths:
            raise _same_file(path, paths[path].owner, holding.owner)
        paths[path] = holding
    return paths


def _same_file(path: Path, first: str, second: str) -> UserError:
    return UserError(str(path), f"would be the book of both '{first}' and '{second}'", "Rename one of the two sites")


def _refuse_stranger(book: Ledger, holding: Holding, unit: Unit) -> None:
    terms = book.terms
    if terms.owner != holding.owner:
        raise UserError(
            str(book.path), f"is the book of '{terms.owner}' and not of '{holding.owner}'", "Name the right folder"
        )
    if terms.unit != unit:
        raise UserError(
            str(book.path),
            f"counts for the unit '{terms.unit}', and the training protects '{unit}'; neither follows from the other",
            f'Train with privacy.unit = "{terms.unit}", or keep books of the other unit in a folder of their own',
        )


def _refuse_other_images(book: Ledger, holding: Holding, books: Books) -> None:
    if holding.fingerprint not in book.fingerprints:
        raise UserError(
            str(book.path),
            f"counts for other images than '{holding.owner}' now holds",
            "If they are the same hospital's, more of them or at another resolution, let it count for these too: "
            f"trilemma ledger admit {books.folder} --study STUDY.toml",
        )


def _refuse_overdraw(opened: dict[Path, Ledger], costly: list[tuple[Training, dict[Path, Claim]]]) -> None:
    wanted = {path: [e for _, new in costly if path in new for e in new[path].request.events] for path in opened}
    over = [path for path, book in opened.items() if not book.spent(*wanted[path]) <= book.terms.epsilon]
    if not over:
        return
    if len(costly) == 1:
        opened[over[0]].refuse_overdraw(costly[0][1][over[0]].request)
    fitting, others, accepted = [], [], dict.fromkeys(opened, ())
    for training, new in costly:
        after = {path: (*accepted[path], *claim.request.events) for path, claim in new.items()}
        if all(opened[path].spent(*events) <= opened[path].terms.epsilon for path, events in after.items()):
            accepted |= after
            fitting.append(training.title)
        else:
            others.append(training.title)
    book = opened[over[0]]
    raise UserError(
        str(book.path),
        f"the budget of '{book.terms.owner}' would be overdrawn: {book.in_words()}, and the {len(costly)} trainings of "
        f"this study that are not booked would make it {up(book.spent(*wanted[over[0]]))}",
        f"{_list('What fits together', fitting)}. {_list('What does not fit after that', others)}",
    )


def _list(title: str, names: list[str]) -> str:
    return f"{title}: {'; '.join(names) or 'nothing'}"

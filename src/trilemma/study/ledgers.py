"""The hospitals' budget books and a study: whose images a training uses, what it costs each book, and whether it fits.

Books are kept by name of the hospital, in one folder. A pooled training is booked in the books of all whose images were
pooled, for each of their images was sampled and noised as the pool was.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trilemma.attacks.poisoning.specs import NoThreat
from trilemma.errors import Failure, UserError
from trilemma.federation.outside import malicious_outside
from trilemma.federation.server import Federation
from trilemma.federation.training import planned_events, prepare, trust_of
from trilemma.privacy.guarantee import DpEvent, Unit
from trilemma.privacy.ledger import Ledger, Request, book_all, now, refuse_delta, up
from trilemma.privacy.ledger_file import Terms
from trilemma.privacy.specs import DpSgd
from trilemma.study.files import load_texts
from trilemma.study.holdings import Holding, release_of, study_holdings, training_holdings
from trilemma.study.lineage import Lineage, Payment
from trilemma.study.plan import Plan, Training, without_guarantee
from trilemma.study.rows import RunRow
from trilemma.study.workplace import Books, Workplace


@dataclass(frozen=True)
class Claim:
    """What a training asks of one book, and for whose images.

    Attributes:
        holding: The hospital's.
        client: Whose steps of the training were made on them.
        request: For its book.
        paid: Id of a booking in that book -> steps behind the training's state that it paid for.
    """

    holding: Holding
    client: str
    request: Request
    paid: dict[str, int]


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


def unpromised_phrases(plan: Plan, place: Workplace) -> list[str]:
    """Returns whose images a study's guarantees leave out, though a book would be charged: malicious hospitals'."""
    phrases = []
    for training in plan.trainings:
        if not isinstance(training.spec.threat, NoThreat) and isinstance(training.spec.privacy, DpSgd):
            federation = prepare(training.spec, place.dataset(training.spec.data), place.torch_device)
            phrases += [f"{training.configuration}: {phrase}" for phrase in malicious_outside(federation)]
    return list(dict.fromkeys(phrases))


def check_books(plan: Plan, stored: Mapping[str, RunRow], place: Workplace) -> list[dict[Path, Claim]]:
    """Refuses a study, before any of it runs, that the books do not allow; returns what has yet to be booked.

    Malicious hospitals are charged like the others, though nothing is promised for their images: whoever says that the
    books allow a study says that too (`unpromised_phrases`).

    Args:
        plan: The study's cells.
        stored: Key -> training, of those in the store. They cost nothing if the books hold the bookings that they name,
            or the release; whatever ran without books is booked like what will run.
        place: With its books.

    Returns:
        For each training that costs anything, in the order of the plan: book -> claim.

    Raises:
        UserError: If something in the study carries no guarantee, a book is missing, is another hospital's or another
            unit's, counts for other images, or would be overdrawn.
        Failure: If a book is damaged.
    """
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
        federation = prepare(training.spec, place.dataset(training.spec.data), place.torch_device)
        row = stored.get(training.key)
        lineage = row.lineage if row else lineage_so_far(place, training)
        events = row.guarantee.events_by_client if row else planned_events(federation)
        claims = _claims(place, training, federation, lineage, events, opened)
        new = {path: claim for path, claim in claims.items() if opened[path].charges(claim.request)}
        if new:
            costly.append((training, new))
    _refuse_overdraw(opened, costly)
    return [new for _, new in costly]


def book_stored(claims: list[dict[Path, Claim]], stored: Mapping[str, RunRow]) -> Iterator[tuple[str, Lineage]]:
    """Books the stored trainings among `claims`, one by one.

    Yields:
        The key of each once it is booked, and its lineage, for the store to note.

    Raises:
        UserError: If a book would be overdrawn.
        Failure: If a book is damaged or cannot be written.
    """
    for new in claims:
        row = stored.get(next(iter(new.values())).request.training)
        if row is not None:
            ran = row.guarantee.events_by_client
            steps = {client: sum(event.steps for event in events) for client, events in ran.items()}
            yield row.key, row.lineage.after(_pay(new), steps)


def book_training(
    place: Workplace, training: Training, federation: Federation, lineage: Lineage
) -> tuple[Payment, ...]:
    """Books a training in the books of all its hospitals; it may run once this has returned.

    Args:
        place: With its books.
        training: What is about to run.
        federation: The training, prepared.
        lineage: Of the state from which it starts.

    Returns:
        What pays for it, for the lineage of the states to come.

    Raises:
        UserError: If a book would be overdrawn; none has changed.
        Failure: If a book is damaged or cannot be written.
    """
    return _pay(_claims(place, training, federation, lineage, planned_events(federation), {}))


def lineage_so_far(place: Workplace, training: Training) -> Lineage:
    """Returns the lineage of the state from which a training starts: that of its checkpoint, or of its teacher's.

    The release has a name only if all rounds run with the same code, on the same machine: so if that of the checkpoint
    is what it would be here.
    """
    privacy, release = training.spec.privacy, None
    if isinstance(privacy, DpSgd) and privacy.noise == "seeded":
        release = release_of(place, training, place.dataset(training.spec.data))
    kept = [place.files.checkpoint(training.key), place.files.teacher(training.key)]
    checkpoint = next((path for path in kept if path.exists()), None)
    if checkpoint is None:
        return Lineage(release)
    try:
        lineage = Lineage.parse(load_texts(checkpoint).get("lineage", "{}"))
    except (Failure, ValueError):
        return Lineage()  # whoever wants to go on from it is told
    return lineage if lineage.release == release else replace(lineage, release=None)


def _books(place: Workplace) -> Books:
    assert place.books is not None  # whoever keeps none does not ask
    return place.books


def _claims(
    place: Workplace,
    training: Training,
    federation: Federation,
    lineage: Lineage,
    events_by_client: Mapping[str, tuple[DpEvent, ...]],
    opened: dict[Path, Ledger],
) -> dict[Path, Claim]:
    """Returns what a training asks of each book, beyond what the bookings that its lineage names have paid for.

    A release with a name repeats itself: the whole training is one, however often it is killed and resumed. Without one
    it does not: a round that was under way when the process was killed may have left the hospital, and is done again
    with other noise. So each start books all that it will run, and what the one before did not run stays booked.

    Args:
        place: With its books.
        training: What runs or ran.
        federation: The training, prepared.
        lineage: Of its state.
        events_by_client: Client name -> all that it will have run in the end.
        opened: Books as they were read; others are read and added.

    Raises:
        UserError: If a book is missing, is another hospital's or another unit's, or counts for other images.
        Failure: If one is damaged.
    """
    spec, books = training.spec, _books(place)
    assert isinstance(spec.privacy, DpSgd)  # others were refused
    holdings = training_holdings(training, place.dataset(spec.data))
    events = {name: tuple(event for event in them if event.steps) for name, them in events_by_client.items()}
    active = [client for client in federation.clients if events.get(client.name)]
    pairs = [(client.name, holdings[shard.hospital]) for client in active for shard in client.shards]
    claims: dict[Path, Claim] = {}
    for path, (client, holding) in zip(_paths(books.folder, [holding for _, holding in pairs]), pairs, strict=True):
        book = opened[path] = opened.get(path) or Ledger.open(path)
        _refuse_stranger(book, holding, spec.privacy.unit)
        _refuse_other_images(book, holding, books)
        named = lineage.bookings.get(holding.owner, {})
        paid = {booking: steps for booking, steps in named.items() if book.holds(booking)}
        rest = _without(events[client], sum(paid.values()))
        if rest:
            asked = events[client] if lineage.release else rest
            request = _request(training, books.study, asked, lineage.release)
            claims[path] = Claim(holding, client, request, paid)
    return claims


def _request(training: Training, study: str, events: tuple[DpEvent, ...], release: str | None) -> Request:
    privacy = training.spec.privacy
    assert isinstance(privacy, DpSgd)  # others were refused
    trust = trust_of(training.spec, privacy)
    return Request(training.key, study, events, release, trust, privacy.num_colluding, privacy.noise)


def _pay(claims: Mapping[Path, Claim]) -> tuple[Payment, ...]:
    """Books one training's claims."""
    bookings = book_all({path: claim.request for path, claim in claims.items()})
    payments = []
    for path, claim in claims.items():
        before = sum(steps for booking, steps in claim.paid.items() if booking != bookings[path])
        payments.append(Payment(claim.holding.owner, claim.client, bookings[path], before))
    return tuple(payments)


def _without(events: tuple[DpEvent, ...], paid: int) -> tuple[DpEvent, ...]:
    """Returns events without the steps that are paid for; with several kinds of events all are kept, or none."""
    left = sum(event.steps for event in events) - paid
    if left <= 0:
        return ()
    return (events[0].model_copy(update={"steps": left}),) if len(events) == 1 else events


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

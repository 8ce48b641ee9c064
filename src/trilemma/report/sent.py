"""What a training sent, hospital by hospital and round by round, from its history."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trilemma.report.cells import Cell, by_seed
from trilemma.report.estimates import Estimate, exact

#: Why nothing is known of the traffic.
UNSENT = "no round recorded what it sent"
#: Why a sum is known and not its parts.
SUMS_ONLY = "trained by a version that recorded only the sum of all hospitals"

#: One round of a history.
_Round = dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """Bytes of one direction in the model's own rounds, a teacher's left out; all of them means over seeds.

    Attributes:
        mean: Of one hospital in one round.
        largest: Of any hospital in any round.
        slowest: Of the hospital that sent most in a round, in the mean over rounds: a round waits for it. Where only
            sums are known, hospitals count as equal.
    """

    mean: Estimate = Estimate(reason=UNSENT)
    largest: Estimate = Estimate(reason=UNSENT)
    slowest: Estimate = Estimate(reason=UNSENT)


@dataclass(frozen=True)
class Traffic:
    """What crosses the network in a training.

    Attributes:
        up: From the hospitals to the server.
        down: From the server to the hospitals.
        whole: Bytes of the model in float32, which is what a hospital receives first.
        total: Up and down, of all hospitals in all rounds, a teacher's included.
    """

    up: Sent = Sent()
    down: Sent = Sent()
    whole: Estimate = Estimate(reason=UNSENT)
    total: Estimate = Estimate(reason=UNSENT)


def traffic_of(cells: Iterable[Cell]) -> Traffic:
    """Returns what the trainings of one configuration sent; nothing where it is secret who took part."""
    rounds_by_seed = {
        seed: [r for cell in same for r in cell.run.history if r.get("bytes_up") is not None and r.get("clients")]
        for seed, same in by_seed(cells).items()
    }
    known = [(seed, rounds) for seed, rounds in rounds_by_seed.items() if rounds]
    return Traffic(
        up=_sent(known, "up"),
        down=_sent(known, "down"),
        whole=exact(((seed, max(_most(r, "down") for r in rounds)) for seed, rounds in known), UNSENT),
        total=exact(((seed, float(sum(_both(r) for r in rounds))) for seed, rounds in known), UNSENT),
    )


def _sent(known: Sequence[tuple[int, list[_Round]]], direction: str) -> Sent:
    mean, largest, slowest = [], [], []
    for seed, rounds in known:
        mean.append((seed, sum(_sum(r, direction) for r in rounds) / sum(len(r["clients"]) for r in rounds)))
        slowest.append((seed, sum(_most(r, direction) for r in rounds) / len(rounds)))
        largest.append((seed, max(_most(r, direction) for r in rounds)))
    if not all(f"bytes_{direction}_by_client" in r for _, rounds in known for r in rounds):
        largest = []
    return Sent(exact(mean, UNSENT), exact(largest, SUMS_ONLY if known else UNSENT), exact(slowest, UNSENT))


def _both(of_round: _Round) -> int:
    """Returns the bytes up and down of a round, the first one with those of the teacher that was trained before it."""
    teacher = of_round.get("teacher") or {}
    return sum(_sum(part, direction) for part in (of_round, teacher) for direction in ("up", "down"))


def _sum(of_round: _Round, direction: str) -> int:
    return of_round.get(f"bytes_{direction}") or 0


def _most(of_round: _Round, direction: str) -> float:
    """Returns the bytes of the hospital that sent or received most in a round; an equal share where only sums are."""
    by_client = of_round.get(f"bytes_{direction}_by_client")
    return float(max(by_client.values())) if by_client else _sum(of_round, direction) / len(of_round["clients"])

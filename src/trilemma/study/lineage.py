"""Which bookings paid for the steps behind a training's state; it goes wherever the state goes, so that it is known."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Payment:
    """A booking for what a training runs from now on, and for what it ran that no booking of the same book paid for.

    Attributes:
        hospital: Whose book holds it.
        client: Whose steps are counted.
        booking: Its id.
        before: Steps behind the state that other bookings in that book paid for.
    """

    hospital: str
    client: str
    booking: str
    before: int


@dataclass(frozen=True)
class Lineage:
    """How a training came to its state.

    Attributes:
        release: Names the numbers that were released, where running it again would release the very same ones; None
            where it would not, where its rounds ran under different conditions, or where that is not known.
        bookings: Hospital -> id of a booking -> steps behind the state that it paid for. Steps that ran without books
            are in none; a copy of an old book, or another one, may not hold it.
    """

    release: str | None = None
    bookings: dict[str, dict[str, int]] = field(default_factory=dict)

    def after(self, payments: Iterable[Payment], private_steps: Mapping[str, int]) -> "Lineage":
        """Returns the lineage of a later state.

        Args:
            payments: For what was run since.
            private_steps: Client name -> DP steps behind that state.
        """
        bookings = dict(self.bookings)
        for payment in payments:
            paid = private_steps.get(payment.client, 0) - payment.before
            bookings[payment.hospital] = {**bookings.get(payment.hospital, {}), payment.booking: paid}
        return replace(self, bookings=bookings)

    def text(self) -> str:
        """Returns it as JSON."""
        return json.dumps({"release": self.release, "bookings": self.bookings}, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> "Lineage":
        """Returns what `text` wrote; an empty object, from before there were lineages, names no booking.

        Raises:
            ValueError: If it is no JSON.
        """
        fields = json.loads(text)
        return cls(fields.get("release"), fields.get("bookings", {}))

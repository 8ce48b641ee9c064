"""What crosses the network: bytes of every hospital and round as they were sent, and how long lines take for them."""

from collections.abc import Sequence

from pydantic import TypeAdapter

from trilemma.federation.codecs.specs import CodecSpec
from trilemma.report import numbers
from trilemma.report.configurations import UNCOMPRESSED, Headline, Row
from trilemma.report.estimates import Estimate
from trilemma.report.markup import Html, tag
from trilemma.report.tables import Notes, amount_cell, header, rate_cell, table

#: Lines for which the time of a round is simulated, in bits per second.
LINES = {"10 Mbit/s": 10e6, "1 Gbit/s": 1e9}


def traffic_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns the federated trainings of a study, where one of them has a codec, before any compression."""
    federated = [row for row in rows if row.compression == UNCOMPRESSED and row.sent_down.value]
    return federated if any(row.spec.get("codec") for row in federated) else []


def seconds(row: Row, bits_per_second: float) -> float | None:
    """Returns how long a hospital's line takes for a round: down, then up, without the line's own delay."""
    if row.sent_up.value is None or row.sent_down.value is None:
        return None
    return 8 * (row.sent_up.value + row.sent_down.value) / bits_per_second


def fewer(row: Row) -> float | None:
    """Returns how many times more bytes the update would have in float32, as the model has on its way down."""
    if not row.sent_up.value or row.sent_down.value is None:
        return None
    return row.sent_down.value / row.sent_up.value


def traffic_table(rows: Sequence[Row], by: Headline) -> Html:
    """Returns bytes and seconds of every federated training beside what its model is worth."""
    notes, body = Notes("note-traffic"), []
    for row in traffic_rows(rows):
        ratio = fewer(row)
        body.append(
            tag(
                "tr",
                tag("th", row.configuration, scope="row"),
                tag("td", codec_label(row), class_="text"),
                amount_cell(row.sent_up, numbers.byte_size, notes),
                tag("td", numbers.NO_VALUE if ratio is None else f"{ratio:.3g}"),
                amount_cell(row.sent_down, numbers.byte_size, notes),
                *(amount_cell(_once(seconds(row, rate)), numbers.duration, notes) for rate in LINES.values()),
                rate_cell(by.utility, row.metric(by.utility), notes),
            )
        )
    titles = ["configuration", "codec", "up", "times fewer", "down", *LINES, numbers.metric_title(by.utility)]
    return table(traffic_caption(), [header(titles)], body, notes)


def traffic_caption() -> str:
    """Returns what the table of traffic shows."""
    return (
        "Bytes of one hospital in one round, up as they were framed and down in float32; how many times fewer than "
        "float32 go up; and how long a round takes on a line, down and then up, computed from the bytes alone."
    )


def codec_label(row: Row) -> str:
    """Returns what a training's updates were written with."""
    codec = row.spec.get("codec")
    return TypeAdapter(CodecSpec).validate_python(codec).label if codec else "float32"


def _once(value: float | None) -> Estimate:
    return Estimate(value, reason="" if value is not None else "no round recorded what it sent")

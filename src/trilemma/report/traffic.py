"""What crosses the network: bytes of every hospital and round as they were sent, and how long lines take for them."""

from collections.abc import Sequence

from pydantic import TypeAdapter

from trilemma.federation.codecs.specs import CodecSpec
from trilemma.report import numbers
from trilemma.report.configurations import UNCOMPRESSED, Headline, Row
from trilemma.report.estimates import Estimate
from trilemma.report.markup import Html, tag
from trilemma.report.sent import Sent
from trilemma.report.tables import Notes, amount_cell, header, rate_cell, table

#: Lines for which the time of a round is simulated, in bits per second.
LINES = {"10 Mbit/s": 10e6, "1 Gbit/s": 1e9}


def traffic_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns the federated trainings of a study, where one of them has a codec, before any compression."""
    federated = [row for row in rows if row.compression == UNCOMPRESSED and row.traffic.down.mean.value]
    coded = any(row.spec.get(field) for row in federated for field in ("codec", "downlink"))
    return federated if coded else []


def seconds(sent: Sent, bits_per_second: float) -> Estimate:
    """Returns how long a round takes one way: hospitals send at the same time, and the slowest is waited for.

    The line's own delay is left out, and so is that of a server whose line all of them share.
    """
    if sent.slowest.value is None:
        return sent.slowest
    return Estimate(8 * sent.slowest.value / bits_per_second, reason="")


def fewer(row: Row, sent: Sent) -> float | None:
    """Returns how many times more bytes one way would be in float32, in the mean over hospitals and rounds."""
    if not sent.mean.value or row.traffic.whole.value is None:
        return None
    return row.traffic.whole.value / sent.mean.value


def traffic_table(rows: Sequence[Row], by: Headline) -> Html:
    """Returns the bytes of every federated training beside what its model is worth."""
    notes, body = Notes("note-traffic"), []
    for row in traffic_rows(rows):
        cells = []
        for sent, field in ((row.traffic.up, "codec"), (row.traffic.down, "downlink")):
            ratio = fewer(row, sent)
            cells += [
                tag("td", codec_label(row, field), class_="text"),
                amount_cell(sent.mean, numbers.byte_size, notes),
                amount_cell(sent.largest, numbers.byte_size, notes),
                tag("td", numbers.NO_VALUE if ratio is None else f"{ratio:.3g}"),
            ]
        total = amount_cell(row.traffic.total, numbers.byte_size, notes)
        utility = rate_cell(by.utility, row.metric(by.utility), notes)
        body.append(tag("tr", tag("th", row.configuration, scope="row"), *cells, total, utility))
    one_way = ["mean", "largest", "times fewer"]
    titles = ["configuration", "up", *one_way, "down", *one_way, "in all", numbers.metric_title(by.utility)]
    return table(traffic_caption(), [header(titles)], body, notes)


def traffic_caption() -> str:
    """Returns what the table of bytes shows."""
    return (
        "Bytes of one hospital in one round, each way: how they are written, their mean over hospitals and rounds, the "
        "largest, and how many times fewer the mean is than the model in float32. In all: both ways, of all hospitals "
        "in all rounds. The first time a hospital takes part, the whole model comes down to it. A teacher's rounds, "
        "which come first and are of another network, count in that sum alone."
    )


def seconds_table(rows: Sequence[Row]) -> Html:
    """Returns how long lines take for a round of every federated training."""
    notes, body = Notes("note-seconds"), []
    for row in traffic_rows(rows):
        times = [seconds(sent, rate) for rate in LINES.values() for sent in (row.traffic.up, row.traffic.down)]
        cells = [amount_cell(time, numbers.duration, notes) for time in times]
        body.append(tag("tr", tag("th", row.configuration, scope="row"), *cells))
    titles = [f"{way}, {line}" for line in LINES for way in ("up", "down")]
    return table(seconds_caption(), [header(["configuration", *titles])], body, notes)


def seconds_caption() -> str:
    """Returns what the table of seconds shows."""
    return (
        "How long the hospitals of a round send or receive, each on a line of its own and all at the same time: the "
        "time of the slowest, in the mean over the model's own rounds, computed from its bytes alone. Where only the "
        "sum of a round was recorded, hospitals count as equal."
    )


def codec_label(row: Row, field: str = "codec") -> str:
    """Returns what a training's updates (`codec`) or its model's changes (`downlink`) were written with."""
    codec = row.spec.get(field)
    return TypeAdapter(CodecSpec).validate_python(codec).label if codec else "float32"

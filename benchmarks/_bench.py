"""What every benchmark shares: interleaved timing, and the table or the JSON at the end."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from trilemma.study.provenance import provenance


class Row(NamedTuple):
    """One figure of a benchmark: name, metric, value, unit; where it has them, ends of an interval or quartiles."""

    name: str
    metric: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None


def interleaved_seconds(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Returns the times of every case, run in turn after one warm-up each, so that drift of the machine meets all."""
    for case in cases.values():
        case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - started)
    return times


def ratio_rows(times: dict[str, list[float]], baseline: str, metric: str) -> list[Row]:
    """Returns, for every case, the median over turns of its time over the baseline's of the same turn."""
    rows = []
    for name, own in times.items():
        ratios = [mine / base for mine, base in zip(own, times[baseline], strict=True)]
        rows.append(Row(name, metric, statistics.median(ratios), "ratio"))
        rows.append(Row(name, "seconds", statistics.median(own), "seconds"))
    return rows


def main(benchmark: str, measure: Callable[[], list[Row]]) -> None:
    """Runs a benchmark on one thread and prints a table, or with --json one object."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    show(benchmark, measure(), arguments.json)


def show(benchmark: str, rows: list[Row], as_json: bool) -> None:
    """Prints rows as a table or as one JSON object."""
    if as_json:
        machine = provenance(torch.device("cpu"))
        print(json.dumps({"benchmark": benchmark, "machine": machine, "rows": [row._asdict() for row in rows]}))
        return
    table = Table(title=benchmark)
    for name in ("name", "metric", "value", "unit"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for row in rows:
        span = "" if row.low is None or row.high is None else f" ({row.low:.4g} to {row.high:.4g})"
        table.add_row(row.name, row.metric, f"{row.value:.4g}{span}", row.unit)
    print_wide(table)


def print_wide(table: Table) -> None:
    """Prints a table at its width, also where no terminal reads it."""
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)

"""The answer in a terminal: a table and a few sentences."""

from rich import box
from rich.table import Table
from rich.text import Text

from trilemma.report.answer import answer
from trilemma.report.markup import clean
from trilemma.report.summary import written_rows
from trilemma.results import Results


def answer_table(results: Results) -> Table:
    """Returns the table of configurations for rich; a study's names are shown as they are, never as markup."""
    (first, second, *others), rows = written_rows(results)
    table = Table(title=_text(results.name), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.caption = Text("★ Pareto-optimal   ↓ at or below the majority class   – not measured", style="dim")
    table.add_column(Text(f"{first}, {second}"), overflow="fold")
    for title in others:
        lines = clean(title).rstrip(")").replace(" (", "\n").replace(", ", "\n")
        # In a narrow terminal every column folds: one that may not would take the names' room.
        table.add_column(Text(lines), justify="right", overflow="fold")
    for configuration, compression, *cells in rows:
        name = _text(f"{configuration}, {compression}")
        table.add_row(name, *map(_two_lines, cells), style="bold" if cells[-1] else None)
    return table


def answer_text(results: Results) -> list[str]:
    """Returns the answer in words, one paragraph per finding: "Topic: sentences"."""
    return [clean(f"{finding.topic.rstrip('.')}: {finding.text}") for finding in answer(results)]


def _two_lines(cell: str) -> Text:
    """Returns a cell with its interval, if it has one, on a line of its own."""
    value, bracket, interval = cell.partition(" (")
    if " to " not in interval:
        return _text(cell)
    low_high, _, mark = clean(interval).replace(" to ", "–").partition(")")
    return Text.assemble(_text(value + mark), "\n", Text(low_high, style="not bold dim"))


def _text(text: str) -> Text:
    return Text(clean(text).replace("\n", " ").replace("\t", " "))

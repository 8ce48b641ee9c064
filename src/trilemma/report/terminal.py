"""The answer in a terminal: a table and a few sentences."""

from rich import box
from rich.table import Table
from rich.text import Text

from trilemma.report.answer import answer
from trilemma.report.markup import clean
from trilemma.report.summary import legend, written_rows
from trilemma.results import Results

#: A table with the names in its first column needs a terminal of so many columns; in a narrower one they fold badly.
WIDTH_FOR_NAMES = 100


def answer_table(results: Results, width: int) -> Table:
    """Returns the table of configurations for rich; a study's names are shown as they are, never as markup.

    Args:
        results: Of a study.
        width: Columns of the terminal. Below `WIDTH_FOR_NAMES` numbers stand for the names; see `answer_names`.
    """
    (first, second, *others), rows = written_rows(results)
    narrow = width < WIDTH_FOR_NAMES
    table = Table(title=_text(results.name), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = ((0, 1, 0, 0) if narrow else (0, 1)), not narrow
    table.caption = Text("\n".join(map(clean, legend(results))), style="dim")
    if narrow:
        table.add_column(Text("#"), justify="right")
    else:
        table.add_column(Text(f"{first}, {second}"), overflow="fold")
    for title in others:
        lines = clean(title).rstrip(")").replace(" (", "\n").replace(", ", "\n")
        # In a narrow terminal every column folds: one that may not would take the names' room.
        table.add_column(Text(lines), justify="right", overflow="fold")
    for number, (configuration, compression, *cells) in enumerate(rows, 1):
        name = str(number) if narrow else f"{configuration}, {compression}"
        table.add_row(_text(name), *map(_two_lines, cells), style="bold" if cells[-1] else None)
    return table


def answer_names(results: Results, width: int) -> list[str]:
    """Returns what the numbers of `answer_table` stand for, a line each; nothing where the table has the names."""
    if width >= WIDTH_FOR_NAMES:
        return []
    _, rows = written_rows(results)
    digits = len(str(len(rows)))
    return [clean(f"{number:>{digits}}  {row[0]}, {row[1]}") for number, row in enumerate(rows, 1)]


def answer_text(results: Results) -> list[str]:
    """Returns the answer in words, one paragraph per finding: "Topic: sentences", or "Question? Sentences"."""
    return [clean(f"{_opening(finding.topic)} {finding.text}") for finding in answer(results)]


def _opening(topic: str) -> str:
    return topic if topic.endswith("?") else f"{topic.rstrip('.')}:"


def _two_lines(cell: str) -> Text:
    """Returns a cell with what stands in its brackets, such as an interval, on lines of its own."""
    value, bracket, inner = cell.partition(" (")
    if not bracket:
        return _text(cell)
    small, _, mark = clean(inner).replace(" to ", "–").replace(", ", "\n").partition(")")
    return Text.assemble(_text(value + mark), "\n", Text(small, style="not bold dim"))


def _text(text: str) -> Text:
    return Text(clean(text).replace("\n", " ").replace("\t", " "))

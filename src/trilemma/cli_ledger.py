"""The commands of a hospital's budget book: `trilemma ledger`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilemma.cli_options import DataFolder, Overrides, console, data_roots, load_plan, possible_path
from trilemma.errors import Failure

if TYPE_CHECKING:
    from rich.table import Table

    from trilemma.privacy.ledger import Ledger
    from trilemma.study.workplace import Workplace

ledger_app = typer.Typer(name="ledger", help="Keep the hospitals' privacy budget books.", no_args_is_help=True)

Folder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="The folder of the books.", show_default=False, callback=possible_path),
]
Study = Annotated[Path, typer.Option("--study", metavar="STUDY.toml", help="The study file.", show_default=False)]


@ledger_app.command()
def create(
    folder: Folder,
    study_file: Study,
    epsilon: Annotated[float, typer.Option(help="The budget of each hospital, for ever.", show_default=False)],
    delta: Annotated[float, typer.Option(help="At which it holds; below 1 / images.", show_default=False)],
    data: DataFolder = None,
    overrides: Overrides = None,
) -> None:
    """Create a budget book for each hospital of a study, in the unit that the study protects."""
    from trilemma.study.ledgers import create_books

    books = create_books(load_plan(study_file, overrides), _place(data), folder, epsilon, delta)
    console().print(books_table(books))


@ledger_app.command()
def admit(folder: Folder, study_file: Study, data: DataFolder = None, overrides: Overrides = None) -> None:
    """Let the books count for the same hospitals' images as they are now: more of them, or at another resolution."""
    from trilemma.study.ledgers import admit_data

    books = admit_data(load_plan(study_file, overrides), _place(data), folder)
    console().print(books_table(books))


@ledger_app.command()
def show(
    where: Annotated[
        Path,
        typer.Argument(metavar="FOLDER_OR_FILE", help="The books.", show_default=False, callback=possible_path),
    ],
    entries: Annotated[bool, typer.Option("--entries", help="Show every booking.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    noted: Annotated[
        str | None,
        typer.Option(help="A seal noted earlier: fail unless a book still holds its line.", show_default=False),
    ] = None,
) -> None:
    """Show what is spent and left of each hospital's budget, and whether a book was cut or changed."""
    from trilemma.study.ledgers import read_books

    books = read_books(where)
    if noted is not None and not any(noted in book.content.seals for book in books):
        raise Failure(
            str(where), f"no line has the seal '{noted}' that was noted", "Put back the books from a copy that has it"
        )
    if as_json:
        typer.echo(json.dumps([_as_json(book) for book in books], indent=2))
        return
    console().print(books_table(books))
    for book in books:
        if entries and book.entries:
            console().print(_entries_table(book))
        if book.content.torn:
            console().print(
                f"note: {book.path} ends in {book.content.torn} bytes of a booking that a kill cut short; nothing was "
                "released on it, and the next booking removes it",
                highlight=False,
                markup=False,
            )


def books_table(books: "list[Ledger]") -> "Table":
    """Returns the balance of each book."""
    from rich.table import Table
    from rich.text import Text

    from trilemma.privacy.ledger import down, up

    table = Table(title="Privacy budgets")
    for name in ("hospital", "unit", "budget", "delta", "spent", "left", "entries", "seal"):
        table.add_column(name, justify="left" if name in ("hospital", "unit", "seal") else "right", overflow="fold")
    for book in books:
        terms = book.terms
        numbers = f"{terms.epsilon:g}", f"{terms.delta:g}", up(book.spent()), down(book.left), str(len(book.entries))
        table.add_row(Text(terms.owner), terms.unit, *numbers, book.content.head)
    return table


def _entries_table(book: "Ledger") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from trilemma.privacy.ledger import up

    table = Table(title=Text(f"Bookings of {book.terms.owner}"))
    for name in ("time (UTC)", "study", "training", "what", "how", "spent after"):
        table.add_column(name, justify="right" if name == "spent after" else "left", overflow="fold")
    for entry in book.entries:
        what = ", ".join(event.in_words() for event in entry.dp_events)
        table.add_row(entry.time, entry.study, entry.training, what, entry.conditions, up(entry.epsilon_after))
    return table


def _as_json(book: "Ledger") -> dict[str, Any]:
    return {
        "file": str(book.path),
        **book.terms.model_dump(mode="json"),
        "spent": book.spent(),
        "left": book.left,
        "seal": book.content.head,
        "torn_bytes": book.content.torn,
        "lines": [line.model_dump(mode="json") for line in book.content.lines],
    }


def _place(data: Path | None) -> "Workplace":
    import os

    from trilemma.study.workplace import Workplace

    return Workplace(Path(), data_roots(data), "cpu", 1, os.getpid())

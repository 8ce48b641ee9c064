"""What several commands take: their options, and what becomes of them. Nothing heavy is imported before it is used."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from trilemma.data.roots import DataRoots
    from trilemma.study.plan import Plan


def possible_path(path: Path | None) -> Path | None:
    """Returns a path that was given, or the message that it can be none."""
    from trilemma.data.roots import possible

    return None if path is None else possible(path, str(path))


StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.", show_default=False)]
StoreFolder = Annotated[
    Path, typer.Option("--store", help="Folder of the store.", envvar="TRILEMMA_STORE", callback=possible_path)
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of your images.", envvar="TRILEMMA_DATA", show_default="./data", callback=possible_path
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a field, as in --set base.rounds=2; may be repeated.")
]
LedgerFolder = Annotated[
    Path | None,
    typer.Option(
        "--ledgers",
        help="Folder of the hospitals' budget books: every training is booked there before it runs.",
        show_default="no books are kept",
        callback=possible_path,
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads of each process.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DEFAULT_STORE = Path("results")


def console() -> "Console":
    """Returns the terminal. It takes text as it is: brackets and colons in a path or a name stay what they are."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def load_plan(study_file: Path, overrides: list[str] | None) -> "Plan":
    """Returns what a study file asks for."""
    from trilemma.study.load import load_study
    from trilemma.study.plan import make_plan

    return make_plan(load_study(study_file, tuple(overrides or ())), str(study_file))


def data_roots(folder: Path | None) -> "DataRoots":
    """Returns where data are read and cached."""
    from dataclasses import replace

    from trilemma.data.roots import default_roots

    roots = default_roots()
    return replace(roots, data=folder) if folder else roots

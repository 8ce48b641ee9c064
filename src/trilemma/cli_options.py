"""What several commands take: their options, and what becomes of them. Nothing heavy is imported before it is used."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from trilemma.data.roots import DataRoots
    from trilemma.study.plan import Plan

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.", show_default=False)]
StoreFolder = Annotated[Path, typer.Option("--store", help="Folder of the store.", envvar="TRILEMMA_STORE")]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="Folder of your images.", envvar="TRILEMMA_DATA", show_default="./data")
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
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads of each process.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DEFAULT_STORE = Path("results")


def console() -> "Console":
    """Returns the terminal."""
    from rich.console import Console

    return Console()


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

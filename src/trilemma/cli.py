"""The command line. Everything heavy is imported by the command that needs it, so that `--help` answers at once."""

import io
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli_ledger import ledger_app
from trilemma.cli_options import (
    DEFAULT_STORE,
    DataFolder,
    Device,
    LedgerFolder,
    Overrides,
    StoreFolder,
    StudyFile,
    Threads,
    console,
    data_roots,
    load_plan,
    possible_path,
)
from trilemma.errors import TrilemmaError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from trilemma.results import Results
    from trilemma.study.plan import Plan

app = typer.Typer(
    name="trilemma",
    help="Can collaborative learning be private, robust and scalable? Measured on your own images and model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(ledger_app)


class _Stopped(Exception):
    """The user pressed Ctrl-C while a study ran; typer would end a KeyboardInterrupt without a word."""


@app.command()
def run(
    study_file: StudyFile,
    store: StoreFolder = DEFAULT_STORE,
    data: DataFolder = None,
    overrides: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes at once.", show_default="the number of cores")
    ] = None,
    threads: Threads = 1,
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    ledgers: LedgerFolder = None,
) -> None:
    """Train, compress, attack and report: whatever of the study is not in the store yet."""
    from trilemma.report.html import write_report
    from trilemma.study.engine import Engine
    from trilemma.study.progress import Progress
    from trilemma.study.store import Store
    from trilemma.study.workplace import Books, Workplace, choose_device

    plan = load_plan(study_file, overrides)
    terminal = console()
    books = Books(ledgers.resolve(), plan.study.name) if ledgers else None
    place = Workplace(store.resolve(), data_roots(data), choose_device(device), threads, os.getpid(), books)
    with Store(store, write=True) as opened:
        opened.open_study(plan.study.name, plan.study.question, study_file.read_text(encoding="utf-8"))
        try:
            Engine(plan, opened, place, jobs or os.cpu_count() or 1, Progress(terminal, quiet)).run()
        except KeyboardInterrupt as stop:
            raise _Stopped from stop
        finally:
            # Whatever went wrong, what is in the store is worth a report.
            results = _results(plan, opened, study_file, overrides)
            path = _report_path(results, opened.files.reports())
            if results.runs:
                write_report(results, path)
    _print_answer(terminal, results, path)


@app.command()
def check(
    study_file: StudyFile,
    store: StoreFolder = DEFAULT_STORE,
    data: DataFolder = None,
    overrides: Overrides = None,
    threads: Threads = 1,
    device: Device = "auto",
    ledgers: LedgerFolder = None,
) -> None:
    """Say what a study would do, what of it is in the store, and what can carry no guarantee, without running it."""
    from trilemma.study.check import check_study
    from trilemma.study.workplace import choose_device

    plan = load_plan(study_file, overrides)
    check_study(plan, store, data_roots(data), console(), ledgers, choose_device(device), threads)


@app.command()
def report(
    study_file: StudyFile,
    store: StoreFolder = DEFAULT_STORE,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The HTML file.", show_default="reports/NAME.html in the store")
    ] = None,
) -> None:
    """Write the report of what the store holds of a study."""
    from trilemma.report.html import write_report
    from trilemma.study.store import Store

    plan = load_plan(study_file, overrides)
    with Store(store) as opened:
        results = _results(plan, opened, study_file, overrides)
        path = out or _report_path(results, opened.files.reports())
    _refuse_empty(results, store)
    write_report(results, path)
    _print_answer(console(), results, path)


@app.command()
def export(
    study_file: StudyFile,
    out: Annotated[Path, typer.Argument(help="The file to write: .csv, .json, .tex or .md.", show_default=False)],
    store: StoreFolder = DEFAULT_STORE,
    overrides: Overrides = None,
) -> None:
    """Export a study's numbers: every measurement (CSV, JSON) or the table of configurations (LaTeX, Markdown)."""
    from trilemma.report.export import export_csv, export_json, export_latex, export_markdown
    from trilemma.study.store import Store

    writers = {".csv": export_csv, ".json": export_json, ".tex": export_latex, ".md": export_markdown}
    writer = writers.get(out.suffix.lower())
    if writer is None:
        raise UserError(str(out), "has no known ending", f"Use one of {', '.join(writers)}")
    plan = load_plan(study_file, overrides)
    with Store(store) as opened:
        results = _results(plan, opened, study_file, overrides)
    _refuse_empty(results, store)
    writer(results, out)
    console().print(f"wrote {out}", highlight=False, soft_wrap=True)


@app.command("export-model")
def export_model(
    key: Annotated[str, typer.Argument(help="The key of an artefact, or its beginning.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write.", show_default=False, callback=possible_path)],
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Export one model so that it stands alone: ONNX with its preprocessing inside, a model card, and checksums."""
    from trilemma.report.model_card import card_json, card_markdown
    from trilemma.study.handover import CARD, FACTS, MODEL, SENT, hand_over, refuse_occupied
    from trilemma.study.inspect import find_artefact
    from trilemma.study.shipment import shipment
    from trilemma.study.store import Store

    with Store(store) as opened:
        artefact = find_artefact(opened, key)
        place = refuse_occupied(to, artefact.key)
        about, model, sent = shipment(opened, artefact)
    cards = {CARD: card_markdown(about).encode(), FACTS: card_json(about).encode()}
    hand_over(place, {MODEL: model, SENT: sent, **cards})
    sizes = f"{MODEL} ({len(model)} bytes; {len(sent)} as {SENT})"
    console().print(f"wrote {to}: {sizes} of {artefact.key}", highlight=False, soft_wrap=True)


@app.command("list")
def list_studies(store: StoreFolder = DEFAULT_STORE) -> None:
    """List the studies and trainings in a store."""
    from trilemma.study.inspect import list_store
    from trilemma.study.store import Store

    with Store(store) as opened:
        list_store(opened, console())


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="The key of a training or an artefact, or its beginning.")],
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Show everything that is known of a training or an artefact."""
    from trilemma.study.inspect import show_key
    from trilemma.study.store import Store

    with Store(store) as opened:
        show_key(opened, key, console())


@app.command()
def data(study_file: StudyFile, data: DataFolder = None, overrides: Overrides = None) -> None:
    """Show what a study's source holds and how it is partitioned over the hospitals."""
    from trilemma.study.check import show_data

    show_data(load_plan(study_file, overrides), data_roots(data), console())


def version_callback(wanted: bool) -> None:
    """Prints the version and ends."""
    if wanted:
        from trilemma import __version__

        typer.echo(f"trilemma {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=version_callback, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line: 0 for success, 2 for the user's mistakes, 1 for failures, never a traceback."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no "★" shows "?", and nothing fails for it
            stream.reconfigure(errors=errors)
    try:
        app()
    except TrilemmaError as error:
        _end(str(error), error.exit_code)
    except (_Stopped, KeyboardInterrupt):
        _end("stopped. What has ended is stored; run the same command again to go on.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the output has gone
        sys.exit(1)
    except Exception as error:  # a defect of ours: keep its traceback for a report, and spare the user
        _end(f"internal error ({type(error).__name__}: {error}). Please report it with {_keep_traceback()}.", 1)


def _end(message: str, code: int) -> None:
    from rich.console import Console

    terminal = Console(stderr=True, soft_wrap=True, emoji=False)
    terminal.print(f"error: {message}", style="bold red", markup=False, highlight=False)
    sys.exit(code)


def _keep_traceback() -> str:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile(prefix="trilemma-error-", suffix=".txt", delete=False) as file:
        file.write(traceback.format_exc().encode(errors="backslashreplace"))
    return file.name


def _results(plan: "Plan", store, study_file: Path, overrides: list[str] | None) -> "Results":  # noqa: ANN001
    from trilemma.study.assemble import assemble

    changes = [part for override in overrides or () for part in ("--set", override)]
    command = shlex.join(["trilemma", "run", str(study_file), *changes])
    return assemble(plan, store, study_file.read_text(encoding="utf-8"), command)


def _report_path(results: "Results", folder: Path) -> Path:
    return folder / f"{results.name}.html"


def _refuse_empty(results: "Results", store: Path) -> None:
    if not results.runs:
        raise UserError(
            str(store), f"holds nothing of the study '{results.name}'", "Run it first: trilemma run STUDY.toml"
        )


def _print_answer(terminal: "Console", results: "Results", path: Path) -> None:
    from trilemma.report.terminal import answer_names, answer_table, answer_text

    terminal.print(answer_table(results, terminal.width))
    for name in answer_names(results, terminal.width):
        terminal.print(name, highlight=False, markup=False)
    terminal.print()
    for sentence in answer_text(results):
        terminal.print(sentence, highlight=False, markup=False)
    terminal.print(f"\nReport: {path}", highlight=False, soft_wrap=True)

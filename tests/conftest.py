"""Fixtures that every room's tests share."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from trilemma.cli import main


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The suite runs in parallel processes; more threads than cores only slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real images; without it the test skips and says what is missing."""
    folder = os.environ.get("TRILEMMA_DATA")
    if folder:
        needed = [Path(folder) / name for name in ("medmnist/pneumoniamnist.npz", "chest_xray/train")]
        missing = ", ".join(f"{path} is missing" for path in needed if not path.exists())
    else:
        missing = "TRILEMMA_DATA is not set"
    if missing and os.environ.get("TRILEMMA_REQUIRE_DATA"):
        pytest.fail(f"the real images are required here: {missing}")
    if missing:
        pytest.skip(f"the real images are not here: {missing} (see CONTRIBUTING.md)")
    return Path(str(folder))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Decoded images are cached in a folder of the test session, never in the user's."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("TRILEMMA_CACHE", str(base / "cache"))


@pytest.fixture
def trilemma(monkeypatch, capsys):
    """Runs the command line in this process; returns its exit code, stdout and stderr with spaces made single."""
    monkeypatch.setenv("COLUMNS", "300")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trilemma", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, re.sub(r"\s+", " ", captured.out), re.sub(r"\s+", " ", captured.err)

    return call

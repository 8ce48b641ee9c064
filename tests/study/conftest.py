"""The tiny study, run once for all tests of a process that read a finished store."""

from pathlib import Path

import pytest

from helpers.tiny_study import plan_of, roots_below, run_plan, write_study
from trilemma.data.roots import DataRoots
from trilemma.study.plan import Plan


@pytest.fixture(scope="session")
def roots(tmp_path_factory) -> DataRoots:
    return roots_below(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def tiny_plan(tmp_path_factory) -> Plan:
    return plan_of(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_plan, roots) -> Path:
    """The folder of a store that holds the whole tiny study; do not write to it."""
    folder = tmp_path_factory.mktemp("finished")
    run_plan(tiny_plan, folder, roots)
    return folder

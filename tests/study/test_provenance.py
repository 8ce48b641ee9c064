"""What is said of the process and of the source tree."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trilemma.study import provenance
from trilemma.study.provenance import peak_memory_bytes, reset_peak_memory

MEBIBYTE = 2**20


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux counts anew")
def test_a_second_job_does_not_inherit_the_peak_of_the_first():
    reset_peak_memory()
    before = peak_memory_bytes()
    large = bytearray(b"x") * (200 * MEBIBYTE)
    assert peak_memory_bytes() > before + 150 * MEBIBYTE
    del large
    assert peak_memory_bytes() > before + 150 * MEBIBYTE  # a peak is one although it has passed
    reset_peak_memory()
    assert peak_memory_bytes() < before + 100 * MEBIBYTE


ASK = "import runpy, sys; print(runpy.run_path(sys.argv[1])['_git_revision']())"


def test_a_revision_is_that_of_a_tree_that_tracks_the_package(tmp_path):
    """An environment inside somebody's repository is not of that repository."""
    file = Path(shutil.copy(provenance.__file__, tmp_path))

    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    def revision():
        done = subprocess.run([sys.executable, "-c", ASK, str(file)], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    assert revision() == ""
    git("add", file.name)
    git("commit", "-m", "ours")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert revision() == head
    file.write_text(file.read_text() + "\n# edited\n")
    assert revision() == head + "+changes"

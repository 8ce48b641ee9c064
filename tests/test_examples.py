"""Every example runs as it stands and says what it promises to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

#: What each prints, in part, as regular expressions.
SAID = {
    "attack_a_classifier.py": [r"clean: 0\.[6-9]", r"PGD-10 Linf 16/255: robust 0\.0"],
    "private_gradients.py": ["noise multiplier 0.8", r"epsilon (2\.9[7-9]|3\.00) at delta 0.001 for 5 steps"],
    "run_a_study.py": ["fp32: accuracy", "int8: robust_accuracy", "95 % interval"],
    "your_own_images.py": ["20 train, 4 val, 24 test", "client 2: 10 records of 5 patients"],
}


def test_every_example_is_tested():
    # The last one needs an exported model: tests/study/test_export_model.py runs it.
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAID.keys() | {"predict_without_torch.py"}


@pytest.mark.parametrize("name", sorted(SAID))
def test_an_example_runs(name, tmp_path):
    path = EXAMPLES / name
    assert len(path.read_text("utf-8").splitlines()) <= 40
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRILEMMA_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(re.search(said, done.stdout) for said in SAID[name]), done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"

"""What a job finds where it runs."""

import os
from pathlib import Path

import pytest
import torch

from trilemma.data.roots import DataRoots
from trilemma.study.workplace import Workplace


@pytest.mark.parametrize(
    ("device", "before", "after"), [("cuda", None, ":4096:8"), ("cuda", ":16:8", ":16:8"), ("cpu", None, None)]
)
def test_cublas_is_asked_for_the_same_sums_on_every_run(monkeypatch, device, before, after):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before or "")
    if before is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    roots = DataRoots(Path("data"), Path("cache"))
    try:
        Workplace(Path(), roots, device, 1, os.getpid()).enter()  # touches no GPU
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == after
    finally:
        Workplace(Path(), roots, "cpu", 1, os.getpid()).enter()


def test_float32_is_not_rounded_to_fewer_bits():
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    try:
        convolutions.allow_tf32 = products.allow_tf32 = True
        Workplace(Path(), DataRoots(Path("data"), Path("cache")), "cpu", 1, os.getpid()).enter()
        assert not convolutions.allow_tf32 and not products.allow_tf32
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before

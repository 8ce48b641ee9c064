"""Where a number came from: versions, revision, machine."""

import contextlib
import os
import platform
import resource
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

#: Instruction sets that change the results of quantised arithmetic from one CPU to another.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
PACKAGES = ("trilemma", "torch", "numpy", "scipy", "opacus", "onnx", "onnxruntime", "monai", "pydantic")


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _cpu_flags()],
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in PACKAGES},
        "git_revision": _git_revision(),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns what a reader needs to judge a number, or to get it again."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {**_machine(), "device": name, "threads": torch.get_num_threads()}


def reset_peak_memory() -> None:
    """Starts the count of `peak_memory_bytes` anew; a worker process does one job after another.

    Only Linux can (proc(5), clear_refs); elsewhere, and where the kernel forbids it, nothing happens.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Returns the largest resident set (main memory, not a GPU's) that this process has had.

    On Linux since `reset_peak_memory`; elsewhere since the process began, so that an earlier job may have set it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _cpu_info(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or "unknown"


def _cpu_flags() -> list[str]:
    return (_cpu_info("flags") or _cpu_info("Features")).split()


def _git_revision() -> str:
    """Returns the revision of the source tree that the package runs from, "+changes" if it was edited, or "".

    An installed package may lie below somebody else's repository, whose revision says nothing: only one that tracks
    this very file counts.
    """
    file = Path(__file__)
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        revision = _git(file.parent, "rev-parse", "HEAD")
        changed = _git(file.parent, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

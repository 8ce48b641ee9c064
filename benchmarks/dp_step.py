"""What privacy costs: one DP-SGD step (clipped gradient sum) over a plain gradient of the same batch.

Ours in float32 and in bfloat16, the three modes of Opacus and `torch.func`, interleaved. Memory is what a fresh process
needs for a step beyond what it held before.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleExpandedWeights, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from benchmarks._bench import Row, interleaved_seconds, main, ratio_rows
from trilemma.models.classifier import Classifier
from trilemma.models.specs import ModelSpec, Resnet9, Resnet18
from trilemma.privacy import bookkeeping, clipping
from trilemma.privacy.clipping_rules import Flat
from trilemma.robustness.objectives import mean_cross_entropy

BATCH, CLASSES, CLIP = 64, 2, 1.0

#: Name -> network, image size, and the turns of the interleaved run.
CASES: dict[str, tuple[ModelSpec, int, int]] = {
    "resnet9-w64-28": (Resnet9(width=64), 28, 7),
    "resnet9-w16-28": (Resnet9(width=16), 28, 15),
    "resnet9-w64-64": (Resnet9(width=64), 64, 3),
    "resnet9-w16-64": (Resnet9(width=16), 64, 7),
    "resnet18-w16-28": (Resnet18(width=16), 28, 15),
    "resnet18-w64-28": (Resnet18(width=64), 28, 5),
}


def network(case: str) -> tuple[Classifier, torch.Tensor, torch.Tensor]:
    """Returns a case's classifier, images and labels."""
    spec, size, _ = CASES[case]
    draws = torch.Generator().manual_seed(0)
    x_BCHW = torch.rand(BATCH, 1, size, size, generator=draws)
    return spec.make(1, size, CLASSES, seed=0), x_BCHW, torch.randint(CLASSES, (BATCH,), generator=draws)


def plain(case: str, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Returns a gradient of the mean loss."""
    classifier, x_BCHW, y_B = network(case)
    trainable = list(classifier.parameters())

    def step() -> None:
        with classifier.computing_in(dtype):
            loss = nn.functional.cross_entropy(classifier(x_BCHW), y_B)
        torch.autograd.grad(loss, trainable)

    return step


def ours(case: str, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Returns a step of the fast engine."""
    classifier, x_BCHW, y_B = network(case)

    def step() -> None:
        with classifier.computing_in(dtype):
            bookkeeping.clipped_gradient_sum(classifier, mean_cross_entropy, x_BCHW[:, None], y_B, Flat(CLIP))

    return step


def torch_func(case: str) -> Callable[[], object]:
    """Returns a step of the reference."""
    classifier, x_BCHW, y_B = network(case)
    return lambda: clipping.clipped_gradient_sum(classifier, mean_cross_entropy, x_BCHW[:, None], y_B, Flat(CLIP))


def opacus_per_sample(case: str, wrapper: type) -> Callable[[], object]:
    """Returns a step with per-sample gradients in memory: hooks or expanded weights."""
    classifier, x_BCHW, y_B = network(case)
    model = wrapper(classifier, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=BATCH
    )

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_BCHW), y_B).backward()
        optimizer.step()

    return step


def opacus_ghost(case: str) -> Callable[[], object]:
    """Returns a step of ghost clipping: a second backward pass, weighted."""
    classifier, x_BCHW, y_B = network(case)
    model = GradSampleModuleFastGradientClipping(
        classifier, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=0.0), noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=BATCH
    )
    loss = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss(reduction="mean"), "mean")

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x_BCHW), y_B).backward()
        optimizer.step()

    return step


ENGINES: dict[str, Callable[[str], Callable[[], object]]] = {
    "plain": plain,
    "plain-bfloat16": lambda case: plain(case, torch.bfloat16),
    "trilemma": ours,
    "trilemma-bfloat16": lambda case: ours(case, torch.bfloat16),
    "torch-func": torch_func,
    "opacus-hooks": lambda case: opacus_per_sample(case, GradSampleModule),
    "opacus-ew": lambda case: opacus_per_sample(case, GradSampleModuleExpandedWeights),
    "opacus-ghost": opacus_ghost,
}


def step_bytes(engine: str, case: str) -> int:
    """Returns the peak memory of two steps beyond what the process held before; for a fresh process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    step = ENGINES[engine](case)
    torch.rand(8, 1, 64, 64).square().sum()
    held = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    step()
    step()
    return _resident("VmHWM") - held


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def measure() -> list[Row]:
    """Returns step and memory ratios of every engine and network."""
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for case, (_, _, turns) in CASES.items():
        names = {engine: f"{engine}/{case}" for engine in ENGINES}
        steps = {names[engine]: make(case) for engine, make in ENGINES.items()}
        rows += ratio_rows(interleaved_seconds(steps, turns), names["plain"], "step_ratio")
        peaks = {}
        for engine in ENGINES:
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                peaks[engine] = fresh.submit(step_bytes, engine, case).result()
        rows += [Row(names[engine], "memory_ratio", peak / peaks["plain"], "ratio") for engine, peak in peaks.items()]
    return rows


if __name__ == "__main__":
    main("dp_step", measure)

"""What rules of aggregation cost: every rule over the mean, on 100 updates of 11 million parameters.

Rules that compare all pairs of updates are also set against one matrix product of that size, 100 x P by P x 100. Memory
is what a rule needs beside the updates, as a share of them: the largest resident set of a fresh process.
"""

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median

import psutil
import torch
from torch import Tensor

from benchmarks._bench import Row, main
from trilemma.federation.aggregation.rule import Received
from trilemma.federation.aggregation.rule_spec import NearestNeighbourMixing, Rule
from trilemma.federation.aggregation.specs import (
    Bulyan,
    CentredClipping,
    DivideAndConquer,
    FlTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NormClipping,
    RobustLearningRate,
    TrimmedMean,
)
from trilemma.federation.aggregation.updates import Updates

CLIENTS, PARAMETERS, TURNS = 100, 11_000_000, 3
RULES: dict[str, Rule] = {
    "median": Median(),
    "trimmed_mean": TrimmedMean(num_byzantine=20),
    "norm_clipping": NormClipping(bound=1.0),
    "centred_clipping": CentredClipping(radius=1.0),
    "robust_learning_rate": RobustLearningRate(threshold=30),
    "divide_and_conquer": DivideAndConquer(num_byzantine=20),
    "fltrust": FlTrust(),
    "foolsgold": FoolsGold(),
    "krum": Krum(num_byzantine=20),
    "multi_krum": MultiKrum(num_byzantine=20),
    "geometric_median": GeometricMedian(),
    "bulyan": Bulyan(num_byzantine=20),
    "median after nearest neighbours": Median(before=NearestNeighbourMixing(num_byzantine=20)),
}
#: Which compare all pairs.
PAIRWISE = ("foolsgold", "krum", "multi_krum", "geometric_median", "bulyan", "median after nearest neighbours")


def updates() -> Tensor:
    """Returns the updates."""
    draws = torch.Generator().manual_seed(0)
    matrix_NP = torch.empty(CLIENTS, PARAMETERS)
    for row_P in matrix_NP:
        row_P.normal_(generator=draws)
    return matrix_NP


def run(rule: Rule, matrix_NP: Tensor) -> Callable[[], object]:
    """Returns a call of a rule."""
    weights_N, root_P = torch.full((CLIENTS,), 1 / CLIENTS), matrix_NP[0] + matrix_NP[1]

    def call() -> object:
        draws = torch.Generator().manual_seed(0)
        return rule.make().apply(Received(Updates(matrix_NP), weights_N, tuple(range(CLIENTS)), draws, root_P), {})

    return call


def memory_share(name: str) -> float:
    """Returns what a rule needs beside the updates over what these take; for a process of its own."""
    torch.set_num_threads(1)
    matrix_NP = updates()
    before = psutil.Process(os.getpid()).memory_info().rss
    run(RULES[name], matrix_NP)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(0.0, peak - before) / (matrix_NP.numel() * matrix_NP.element_size())


def measure() -> list[Row]:
    """Returns every rule's time over the mean's and, where it compares pairs, over a product's; and its memory."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        shares = list(pool.map(memory_share, RULES))
    return [*timed(), *(Row(name, "memory", share, "share") for name, share in zip(RULES, shares, strict=True))]


def timed() -> list[Row]:
    """Returns every rule's time over the mean's and, where it compares pairs, over a product's."""
    matrix_NP = updates()
    mean, rows = run(Mean(), matrix_NP), []
    for name, rule in RULES.items():
        times: dict[str, list[float]] = {"rule": [], "mean": [], "product": []}
        cases: dict[str, Callable[[], object]] = {"rule": run(rule, matrix_NP), "mean": mean}
        if name in PAIRWISE:
            cases["product"] = partial(torch.matmul, matrix_NP, matrix_NP.T)
        for _ in range(TURNS):
            for case, call in cases.items():
                started = time.perf_counter()
                call()
                times[case].append(time.perf_counter() - started)
        rows.append(Row(name, "seconds", median(times["rule"]), "seconds"))
        for other in ("mean", "product"):
            if times[other]:
                ratios = [mine / theirs for mine, theirs in zip(times["rule"], times[other], strict=True)]
                rows.append(Row(name, f"over_{other}", median(ratios), "ratio"))
    return rows


if __name__ == "__main__":
    main("aggregation", measure)

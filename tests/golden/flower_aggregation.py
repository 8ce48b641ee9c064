"""Writes flower_aggregation.json: what Flower's own strategies make of some updates, for tests/contracts.

Flower 1.42 wants older releases of typer and rich than this project does, so it is asked in an environment of its own:

    python -m venv /tmp/flower && /tmp/flower/bin/pip install flwr==1.42.0
    /tmp/flower/bin/python tests/golden/flower_aggregation.py

Flower's Bulyan takes all of its first choice from one call of multi-Krum; the paper's Algorithm 1 applies Krum again
and again to what is left. Its `selection_rule` is set to that here, made of Flower's own Krum. Two rows that are each
other's nearest have one score where a score has one term, and the first of them is chosen: so Bulyan is asked a second
time with the rows in reverse order.
"""

import json
from pathlib import Path

import flwr
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.serverapp.strategy.multikrum import select_multikrum
from flwr.supercore.task_identity import TaskIdentity

N, F, P, CASES = 11, 2, 24, 6


def one_by_one(contents: list[RecordDict], num_malicious: int, num_chosen: int) -> list[RecordDict]:
    """Returns what Flower's Krum chooses again and again from those that are left."""
    left, chosen = list(contents), []
    while len(chosen) < num_chosen:
        (best,) = select_multikrum(left, num_malicious, 1)
        chosen.append(best)
        left = [content for content in left if content is not best]
    return chosen


STRATEGIES = {
    "mean": FedAvg(),
    "median": FedMedian(),
    "trimmed_mean": FedTrimmedAvg(beta=F / N),
    "krum": Krum(num_malicious_nodes=F),
    "multi_krum": MultiKrum(num_malicious_nodes=F, num_nodes_to_select=N - F),
    "bulyan": Bulyan(num_malicious_nodes=F, selection_rule=one_by_one),
}


def replies(matrix: np.ndarray, counts: list[int]) -> list[Message]:
    """Returns the rows as clients would send them."""
    asked = Message(RecordDict({}), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = "asked"
    return [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({"update": Array(row.copy())}),
                    "metrics": MetricRecord({"num-examples": count}),
                }
            ),
            reply_to=asked,
        )
        for row, count in zip(matrix, counts, strict=True)
    ]


def case(seed: int) -> dict:
    """Returns some updates and what each strategy makes of them; two rows of every second case are an attacker's."""
    draws = np.random.default_rng(seed)
    matrix = (draws.normal(size=P) + draws.normal(size=(N, P))).astype(np.float32)
    if seed % 2:
        matrix[-F:] += np.float32(20)
    counts = draws.integers(10, 100, N).tolist()
    found = {}
    for name, strategy in STRATEGIES.items():
        weights = counts if name == "mean" else [1] * N
        arrays, _ = strategy.aggregate_train(1, replies(matrix, weights))
        found[name] = arrays["update"].numpy().astype(float).tolist()
    arrays, _ = STRATEGIES["bulyan"].aggregate_train(1, replies(matrix[::-1], [1] * N))
    found["bulyan_reversed"] = arrays["update"].numpy().astype(float).tolist()
    return {"updates": matrix.astype(float).tolist(), "counts": counts, "aggregated": found}


if __name__ == "__main__":
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    written = {
        "source": f"flwr {flwr.__version__}, written by tests/golden/flower_aggregation.py",
        "num_byzantine": F,
        "cases": [case(seed) for seed in range(CASES)],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(written) + "\n")

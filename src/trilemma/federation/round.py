"""One federated round, on one screen: the order of the stages is code here and never configuration."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilemma.data.records import Records
from trilemma.federation.clients import Client, participants
from trilemma.federation.local_training import LocalResult, load_model, local_train
from trilemma.federation.optimizers import Optimizer
from trilemma.federation.specs import Centralised, FedAvg, LocalOnly, TrainSpec
from trilemma.federation.state import TrainingState
from trilemma.models.classifier import Classifier

#: Bytes of a float32 on the wire.
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Federation:
    """Everything that stays the same from round to round.

    Attributes:
        spec: The training.
        clients: Who trains.
        val: Records on which the server watches progress; they choose nothing.
        classifier: A workspace on the device; its weights are set before every use.
    """

    spec: TrainSpec
    clients: tuple[Client, ...]
    val: Records
    classifier: Classifier


def run_round(federation: Federation, state: TrainingState) -> TrainingState:
    """Returns the state after one more round."""
    started, spec = time.perf_counter(), federation.spec
    chosen = [federation.clients[position] for position in participants(spec, len(federation.clients), state.round)]
    results = {client.name: _train(federation, client, state) for client in chosen}
    sound = [client for client in chosen if is_sound(results[client.name], state)]
    params_P, buffers_Q, server = state.params_P, state.buffers_Q, state.server
    if sound:
        weights_N = torch.tensor([client.weight for client in sound], device=params_P.device)
        weights_N = weights_N / weights_N.sum()
        updates_NP = torch.stack([results[client.name].update_P for client in sound])
        update_P = spec.aggregation.make().apply(updates_NP, weights_N)
        params_P, server = server_step(spec, params_P, update_P, server)
        buffers_Q = weights_N @ torch.stack([results[client.name].buffers_Q for client in sound])
    load_model(federation.classifier, params_P, buffers_Q)
    row = {
        "round": state.round + 1,
        "clients": [client.name for client in chosen],
        "dropped": [client.name for client in chosen if client not in sound],
        "loss": mean_loss([result.loss for result in results.values()]),
        **watch(federation.classifier, federation.val),
        **_traffic(federation, chosen, state),
    }
    kept = dict(state.clients)
    if not isinstance(spec.algorithm, FedAvg):
        kept |= {client.name: results[client.name].optimizer_state for client in sound}
    steps = dict(state.private_steps)
    for client in chosen:
        if client.plan is not None:
            steps[client.name] = steps.get(client.name, 0) + client.steps
    row["seconds"] = time.perf_counter() - started
    return TrainingState(state.round + 1, params_P, buffers_Q, server, kept, steps, (*state.history, row))


def is_sound(result: LocalResult, state: TrainingState) -> bool:
    """Returns whether an update may enter the aggregation: the right shapes and finite numbers only."""
    shapes = result.update_P.shape == state.params_P.shape and result.buffers_Q.shape == state.buffers_Q.shape
    return bool(shapes and result.update_P.isfinite().all() and result.buffers_Q.isfinite().all())


def mean_loss(losses: list[float]) -> float | None:
    """Returns the mean of the clients' losses that are finite numbers, or None where none is."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else None


def server_optimizer(spec: TrainSpec) -> Optimizer | None:
    """Returns the server's optimizer; a baseline without a federation has no server."""
    return spec.server.make() if isinstance(spec.algorithm, FedAvg) else None


def server_step(
    spec: TrainSpec, params_P: Tensor, update_P: Tensor, server: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the server's parameters and state after an aggregated update."""
    optimizer = server_optimizer(spec)
    if optimizer is None:
        return params_P + update_P, server
    return optimizer.step(params_P, -update_P, server, spec.server.learning_rate)


@torch.no_grad()
def watch(classifier: Classifier, records: Records, batch_size: int = 256) -> dict[str, Any]:
    """Returns accuracy and loss on validation records, for the training curve."""
    if not len(records):
        return {"val_accuracy": None, "val_loss": None}
    classifier.eval()
    correct, loss = 0, 0.0
    for start in range(0, len(records), batch_size):
        chosen = slice(start, start + batch_size)
        y_B = records.y(chosen).to(classifier.device)
        logits_BK = classifier(records.x(chosen).to(classifier.device))
        correct += int((logits_BK.argmax(1) == y_B).sum())
        loss += float(torch.nn.functional.cross_entropy(logits_BK, y_B, reduction="sum"))
    return {"val_accuracy": correct / len(records), "val_loss": mean_loss([loss / len(records)])}


def _train(federation: Federation, client: Client, state: TrainingState) -> LocalResult:
    classifier, spec = federation.classifier, federation.spec
    load_model(classifier, state.params_P, state.buffers_Q)
    records = client.training_records(spec, classifier)
    return local_train(spec, client, classifier, records, state.round, state.clients.get(client.name))


def _traffic(federation: Federation, chosen: list[Client], state: TrainingState) -> dict[str, int]:
    """Counts what crosses the network: the model both ways, or in `centralised` training the images, once."""
    algorithm = federation.spec.algorithm
    if isinstance(algorithm, LocalOnly):
        return {"bytes_up": 0, "bytes_down": 0}
    if isinstance(algorithm, Centralised):
        images = sum(shard.records.images_NCHW.nbytes for client in chosen for shard in client.shards)
        return {"bytes_up": images if state.round == 0 else 0, "bytes_down": 0}
    model = FLOAT_BYTES * (state.params_P.numel() + state.buffers_Q.numel())
    return {"bytes_up": model * len(chosen), "bytes_down": model * len(chosen)}

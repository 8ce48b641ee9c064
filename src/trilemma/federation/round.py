"""One federated round, on one screen: the order of the stages is code here and never configuration."""

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trilemma.data.records import Records
from trilemma.federation.admission import digest
from trilemma.federation.clients import Client, participants
from trilemma.federation.downlink import bytes_down, come_down
from trilemma.federation.early_stopping import best_so_far, look
from trilemma.federation.gradual_pruning import kept, pruned
from trilemma.federation.local_training import LocalResult, drawn_records, load_model, local_train
from trilemma.federation.malice import forged
from trilemma.federation.quantised_training import Rounding, rounding_of
from trilemma.federation.root import root_update
from trilemma.federation.server import Aggregated, Federation, aggregate, sees_single_updates, server_step
from trilemma.federation.specs import Averaging, FedAvg
from trilemma.federation.state import EVERYBODY, TrainingState
from trilemma.federation.streams import private_generator
from trilemma.federation.wire import Arrived, sent
from trilemma.models.classifier import Classifier
from trilemma.privacy.specs import DpSgd


def run_round(federation: Federation, state: TrainingState) -> TrainingState:
    """Returns the state after one more round."""
    started, spec = time.perf_counter(), federation.spec
    chosen = who_takes_part(federation, state.round)
    load_model(federation.classifier, state.params_P, state.buffers_Q)
    rounding = rounding_of(spec, federation.classifier, federation.phantoms_NCHW, state.round)
    results = {client.name: _train(federation, client, state, rounding) for client in chosen}
    num_steps = max((client.steps for client in chosen), default=1)
    root_P = root_update(spec, federation.root, federation.classifier, state, num_steps, federation.trained_teacher)
    results, plot = forged(federation, chosen, results, state, root_P)
    arrived = sent(federation, chosen, results, state)
    results = arrived.results
    aggregated = aggregate(federation, chosen, results, state, root_P)
    params_P, server = state.params_P, state.server
    if aggregated.update_P is not None:
        params_P, server = server_step(spec, params_P, aggregated.update_P, server)
    down = come_down(federation, state, params_P, aggregated.buffers_Q)
    params_P, average_P, average_Q = _sparse(federation, state, down.params_P, aggregated.buffers_Q)
    following = TrainingState(
        state.round + 1,
        params_P,
        aggregated.buffers_Q,
        server,
        private_steps=_charged(federation, chosen, state),
        clips=aggregated.clips,
        memory=dict(aggregated.memory),
        plot=plot,
        seen=(*state.seen, *_digests(federation, results, aggregated)),
        unsaid=arrived.unsaid,
        unsaid_down=down.unsaid,
        average_P=average_P,
        average_Q=average_Q,
        pretraining_seconds=state.pretraining_seconds,
    )
    load_model(federation.classifier, following.latest_P, following.latest_Q)
    row = {"round": state.round + 1, **watch(federation.classifier, federation.val), "loss": None}
    row |= look(spec, federation.classifier, federation.looked_at, state.round + 1)
    best_P, best_Q = best_so_far(spec, state, row, following.latest_P, following.latest_Q)
    if federation.plan is None:  # where it must stay secret who took part, a row must not tell
        row |= _of_the_clients(federation, arrived, aggregated, state)
        row |= {"refused": aggregated.refused} if aggregated.refused else {}
        row |= {"change_bytes": down.change_bytes} if down.change_bytes is not None else {}
    kept = dict(state.clients)
    if not isinstance(spec.algorithm, FedAvg):
        kept |= {client.name: results[client.name].optimizer_state for client in aggregated.used}
    seconds = time.perf_counter() - started
    if federation.plan is None:
        row["seconds"] = seconds
    unlisted = state.unlisted_seconds + (seconds if federation.plan is not None else 0.0)
    following = replace(following, clients=kept, history=(*state.history, row), unlisted_seconds=unlisted)
    return replace(following, best_P=best_P, best_Q=best_Q)


def _sparse(
    federation: Federation, state: TrainingState, params_P: Tensor, buffers_Q: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the round's parameters and their moving average, where there is one, pruned; everybody can do that alike.

    The average remembers weights that have left since, so it is given the zeros of the parameters.
    """
    spec, classifier = federation.spec, federation.classifier
    params_P = pruned(spec, classifier, params_P, state.round + 1)
    average_P, average_Q = averaged(spec.averaging, state, params_P, buffers_Q)
    keep_P = kept(spec, classifier, params_P)
    if average_P is not None and keep_P is not None:
        average_P = average_P.masked_fill(~keep_P, 0.0)
    return params_P, average_P, average_Q


def _digests(federation: Federation, results: dict[str, LocalResult], aggregated: Aggregated) -> list[str]:
    """Returns by what this round's updates are known if they come again; none where they are nobody's to remember."""
    if not sees_single_updates(federation.spec):
        return []
    return [digest(results[client.name].update_P) for client in aggregated.used]


def _of_the_clients(
    federation: Federation, arrived: Arrived, aggregated: Aggregated, state: TrainingState
) -> dict[str, Any]:
    """Returns who took part in a round, what crossed the network, and the mean training loss where it may be kept."""
    privacy, results = federation.spec.privacy, arrived.results
    chosen = [client for client in federation.clients if client.name in results]
    no_noise_of_its_own = isinstance(privacy, DpSgd) and privacy.noise == "system"
    received = bytes_down(federation, chosen, state)
    return {
        "clients": [client.name for client in chosen],
        "dropped": [client.name for client in chosen if client not in aggregated.used],
        **({"left_out": dict(aggregated.left_out)} if aggregated.left_out else {}),
        "loss": None if no_noise_of_its_own else mean_loss([result.loss for result in results.values()]),
        "bytes_up": sum(arrived.bytes_up.values()),
        "bytes_down": sum(received.values()),
        "bytes_up_by_client": dict(arrived.bytes_up),
        "bytes_down_by_client": received,
    }


def averaged(
    averaging: Averaging | None, state: TrainingState, params_P: Tensor, buffers_Q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the moving average after a round that ended at (params_P, buffers_Q); it starts at the initial weights.

    Nothing but weights that are released enters it, so it costs no privacy.
    """
    if averaging is None:
        return None, None
    decay = averaging.decay_after(state.round)
    return decay * state.latest_P + (1 - decay) * params_P, decay * state.latest_Q + (1 - decay) * buffers_Q


def who_takes_part(federation: Federation, round_index: int) -> list[Client]:
    """Returns the clients of a round: drawn by the server's plan where it protects whole clients."""
    if federation.plan is None:
        positions = participants(federation.spec, len(federation.clients), round_index)
    else:
        draws = private_generator(federation.spec, federation.fingerprint, "poisson", round_index, "server")
        positions = federation.plan.sample(draws).tolist()
    return [federation.clients[position] for position in positions]


def mean_loss(losses: list[float]) -> float | None:
    """Returns the mean of the clients' losses that are finite numbers, or None where none is."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else None


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
        right_B = (logits_BK.argmax(1) == y_B) & logits_BK.isfinite().all(1)  # no number is no answer
        correct += int(right_B.sum())
        loss += float(torch.nn.functional.cross_entropy(logits_BK, y_B, reduction="sum"))
    return {"val_accuracy": correct / len(records), "val_loss": mean_loss([loss / len(records)])}


def _charged(federation: Federation, chosen: list[Client], state: TrainingState) -> dict[str, int]:
    """Returns the DP steps that ran, this round's included, also where its updates could not be used."""
    steps = dict(state.private_steps)
    # A server that draws clients in secret charges all of them; the draw is what makes its steps cheap.
    charged = [(client, 1) for client in federation.clients] if federation.plan else []
    charged += [(client, client.steps) for client in chosen if client.plan is not None]
    for client, num_steps in charged:
        steps[client.name] = steps.get(client.name, 0) + num_steps
    return steps


def _train(federation: Federation, client: Client, state: TrainingState, rounding: Rounding | None) -> LocalResult:
    classifier, spec = federation.classifier, federation.spec
    load_model(classifier, state.params_P, state.buffers_Q)
    records = client.training_records(spec, classifier, state.round, drawn_records(spec, client, state.round))
    clip = state.clips.get(EVERYBODY, state.clips.get(client.name)) if client.plan is not None else None
    kept, teacher = state.clients.get(client.name), federation.trained_teacher
    return local_train(spec, client, classifier, records, state.round, kept, clip, rounding, teacher)

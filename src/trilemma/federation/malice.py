"""The stage of a round at which malicious clients replace what they would have sent."""

from functools import partial

import torch
from torch import Tensor

from trilemma.attacks.poisoning.scene import Scene
from trilemma.federation.admission import is_too_long, why_malformed
from trilemma.federation.clients import Client
from trilemma.federation.local_training import LocalResult
from trilemma.federation.server import Federation, received_from, rule_of, sees_single_updates, why_too_few
from trilemma.federation.specs import ServerSgd, TrainSpec
from trilemma.federation.state import EVERYBODY, TrainingState
from trilemma.randomness import generator

#: Client name -> what it sends.
Results = dict[str, LocalResult]


def forged(
    federation: Federation,
    chosen: list[Client],
    results: Results,
    state: TrainingState,
    root_P: Tensor | None = None,
) -> tuple[Results, dict[str, Tensor]]:
    """Returns a round's results as they are sent, and what the malicious clients remember.

    Only updates of malicious clients change, and only in rounds in which they act.

    Args:
        federation: The training.
        chosen: Who takes part.
        results: Client name -> what its training made.
        state: Before the round.
        root_P: The server's own update, where its rule has one: who knows the rule is taken to know it.
    """
    threat = federation.spec.threat
    malicious = [client for client in chosen if client.malicious]
    if not threat.on_updates or not threat.acts(state.round) or not malicious:
        return results, state.plot
    sent, memory = threat.forge(_scene(federation, chosen, malicious, results, state, root_P))
    replaced = {
        client.name: results[client.name]._replace(update_P=update_P)
        for client, update_P in zip(malicious, sent, strict=True)
    }
    return results | replaced, dict(memory)


def _scene(
    federation: Federation,
    chosen: list[Client],
    malicious: list[Client],
    results: Results,
    state: TrainingState,
    root_P: Tensor | None,
) -> Scene:
    plan = federation.plan
    honest = [client for client in chosen if not client.malicious]
    if sees_single_updates(federation.spec):
        honest = [client for client in honest if _is_let_in(results[client.name], state)]
    own_MP = torch.stack([results[client.name].update_P for client in malicious])
    shown = [results[client.name].update_P for client in honest] if federation.spec.threat.sees_others else []
    positions = {client.name: position for position, client in enumerate(federation.clients)}
    if plan is None:
        num_honest = len(honest)
        weight = sum(client.weight for client in malicious) / sum(client.weight for client in [*honest, *malicious])
    else:  # who takes part is secret: what they send must not tell of it
        expected = plan.denominator / len(federation.clients)
        num_honest = round(expected * sum(not client.malicious for client in federation.clients))
        weight = len(malicious) / plan.denominator
    return Scene(
        own_MP,
        torch.stack(shown) if shown else own_MP[:0],
        num_honest,
        weight * _server_learning_rate(federation.spec),
        tuple(positions[client.name] for client in malicious),
        partial(_rehearsed, federation, [*honest, *malicious], state, root_P),
        generator(federation.spec.seed, "threat", "updates", state.round),
        state.plot,
    )


def _rehearsed(
    federation: Federation, senders: list[Client], state: TrainingState, root_P: Tensor | None, rows_KP: Tensor
) -> Tensor:
    """Returns what the server would make of one row of each sender, but for its noise; zero where it would refuse."""
    spec, nothing_P = federation.spec, torch.zeros_like(rows_KP[0])
    if federation.plan is not None:
        clip = state.clips.get(EVERYBODY)
        return federation.plan.update_sum(rows_KP, federation.classifier, clip)[0] / federation.plan.denominator
    # A row that is no number is left out too: a training of the attackers' own may have diverged.
    finite_K = rows_KP.isfinite().all(dim=1)
    let_in = [row for row in range(len(rows_KP)) if bool(finite_K[row]) and not is_too_long(rows_KP[row], state)]
    if not let_in or why_too_few(spec, len(let_in)):
        return nothing_P
    draws = generator(spec.seed, "threat", "rehearsal", state.round)
    received = received_from(federation, [senders[row] for row in let_in], rows_KP[let_in], draws, root_P)
    update_P = rule_of(spec).make().apply(received, state.memory)[0]
    return update_P if bool(update_P.isfinite().all()) else nothing_P


def _is_let_in(result: LocalResult, state: TrainingState) -> bool:
    return not why_malformed(result, state) and not is_too_long(result.update_P, state)


def _server_learning_rate(spec: TrainSpec) -> float:
    """Returns by what the server multiplies the mean; an adaptive one has no such number, and 1 stands for it."""
    return spec.server.learning_rate if isinstance(spec.server, ServerSgd) else 1.0

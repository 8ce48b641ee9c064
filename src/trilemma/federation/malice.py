"""The stage of a round at which malicious clients replace what they would have sent."""

import torch
from torch import Tensor

from trilemma.attacks.poisoning.scene import Scene
from trilemma.federation.aggregation.rule import Received
from trilemma.federation.aggregation.updates import Updates
from trilemma.federation.clients import Client
from trilemma.federation.local_training import LocalResult
from trilemma.federation.server import Federation, rule_of
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
    spec, honest = federation.spec, [client for client in chosen if not client.malicious]
    positions = {client.name: position for position, client in enumerate(federation.clients)}
    own_MP = torch.stack([results[client.name].update_P for client in malicious])
    honest_rows = [results[client.name].update_P for client in honest]
    ordered = honest + malicious
    weights_K = torch.tensor([client.weight for client in ordered], device=own_MP.device)

    def aggregate(rows_KP: Tensor) -> Tensor:
        """Returns what the server would make of rows; of other numbers than clients, with equal weights."""
        if federation.plan is not None:
            clip = state.clips.get(EVERYBODY)
            return federation.plan.update_sum(rows_KP, federation.classifier, clip)[0] / federation.plan.denominator
        known = len(rows_KP) == len(ordered)
        weights = weights_K if known else torch.ones(len(rows_KP), device=own_MP.device)
        senders = tuple(positions[client.name] for client in ordered) if known else tuple(range(len(rows_KP)))
        draws = generator(spec.seed, "threat", "rehearsal", state.round)
        received = Received(Updates(rows_KP), weights / weights.sum(), senders, draws, root_P)
        return rule_of(spec).make().apply(received, state.memory)[0]

    return Scene(
        own_MP,
        torch.stack(honest_rows) if honest_rows else own_MP[:0],
        float(sum(client.weight for client in malicious) / sum(client.weight for client in chosen)),
        tuple(positions[client.name] for client in malicious),
        aggregate,
        generator(spec.seed, "threat", "updates", state.round),
        state.plot,
    )

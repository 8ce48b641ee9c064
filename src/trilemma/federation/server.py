"""What the server does with a round's updates: from what the clients sent to the next model."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.data.records import Records
from trilemma.federation.admission import (
    is_too_long,
    why_implausible,
    why_malformed,
    why_no_count,
    why_no_sum_of_counts,
    why_old,
)
from trilemma.federation.aggregation.coordinates import coordinate_median
from trilemma.federation.aggregation.rule import Memory, Received
from trilemma.federation.aggregation.rule_spec import Rule
from trilemma.federation.aggregation.specs import Mean
from trilemma.federation.aggregation.updates import Updates
from trilemma.federation.clients import Client
from trilemma.federation.local_training import LocalResult
from trilemma.federation.optimizers import Optimizer
from trilemma.federation.specs import FedAvg, TrainSpec
from trilemma.federation.state import EVERYBODY, TrainingState
from trilemma.federation.streams import private_generator
from trilemma.federation.teaching import Lessons
from trilemma.models.classifier import Classifier
from trilemma.models.vector import variances
from trilemma.privacy.plan import PrivacyPlan
from trilemma.privacy.specs import DpSgd
from trilemma.randomness import generator


@dataclass(frozen=True)
class Federation:
    """Everything that stays the same from round to round.

    Attributes:
        spec: The training.
        clients: Who trains.
        val: Records on which the server watches progress; that chooses nothing.
        classifier: A workspace on the device; its weights are set before every use.
        plan: The server's, where it is trusted to protect whole clients; None otherwise.
        fingerprint: Of the data set; names the server's private streams together with the training.
        looked_at: Records that choose the round whose weights become the model, where early stopping does.
        root: The server's own records, where the rule of aggregation trusts them.
        phantoms_NCHW: What sets activation ranges, where the rounded network is trained.
        teacher: The federation that trains the teacher first, of the same clients; None where there is none.
        lessons: What that came to, once it is done.
    """

    spec: TrainSpec
    clients: tuple[Client, ...]
    val: Records
    classifier: Classifier
    plan: PrivacyPlan | None = None
    fingerprint: str = ""
    looked_at: Records | None = None
    root: Records | None = None
    phantoms_NCHW: Tensor | None = None
    teacher: "Federation | None" = None
    lessons: Lessons | None = None

    @property
    def trained_teacher(self) -> Classifier | None:
        """Returns the network whose answers the clients learn; None in a training without a teacher.

        Raises:
            ValueError: If the training has a teacher that was not trained yet.
        """
        if self.teacher is not None and self.lessons is None:
            raise ValueError("a training with a teacher trains that first: federation = taught(federation, its state)")
        return self.lessons.classifier if self.lessons is not None else None


class Aggregated(NamedTuple):
    """What a round's updates come to.

    Attributes:
        update_P: For the server's optimizer, or None where nothing may be used.
        buffers_Q: The next ones.
        clips: Client name -> the next clipping norm, where it adapts.
        used: The clients whose updates entered.
        memory: What the rule of aggregation remembers.
        refused: Why no rule was applied to the updates that came, or "".
        left_out: Client name -> why its update may not enter.
    """

    update_P: Tensor | None
    buffers_Q: Tensor
    clips: dict[str, float]
    used: list[Client]
    memory: Memory
    refused: str = ""
    left_out: Mapping[str, str] = MappingProxyType({})


def aggregate(
    federation: Federation,
    chosen: list[Client],
    results: dict[str, LocalResult],
    state: TrainingState,
    root_P: Tensor | None = None,
) -> Aggregated:
    """Returns what the chosen clients' results come to, by the study's kind of trust.

    Args:
        federation: The training.
        chosen: Who took part.
        results: Client name -> what it sent.
        state: Before the round.
        root_P: The server's own update, where the rule asks for one.
    """
    spec = federation.spec
    distributed, hidden = isinstance(spec.privacy, DpSgd) and spec.privacy.trust == "distributed", ""
    left_out = {c.name: why for c in chosen if (why := _why_left_out(federation, c, results[c.name], state))}
    sound = [client for client in chosen if client.name not in left_out]
    if federation.plan is not None:
        return _noised_by_server(federation, federation.plan, sound, results, state)
    if distributed and left_out:
        # Of a secure sum no part can be left out, the others' shares alone are too little noise, and whose it was stays
        # hidden.
        hidden = f"the secure sum {next(iter(left_out.values()))}; who sent that, it does not show"
        sound, left_out = [], {}
    elif distributed and (why := _why_no_counts(chosen, results)):
        hidden, sound = f"the secure sum {why}", []
    clips = _moved_together(chosen, results, state) if distributed and sound else dict(state.clips)
    clips |= {c.name: clip for c in chosen if not distributed and (clip := results[c.name].clip) is not None}
    nothing = Aggregated(None, state.buffers_Q, clips, [], state.memory, "", left_out)
    refused = why_too_few(spec, len(sound)) if sound else hidden
    if not sound or refused:
        return nothing._replace(refused=refused)
    rows_NP = torch.stack([results[client.name].update_P for client in sound])
    received = received_from(federation, sound, rows_NP, generator(spec.seed, "aggregation", state.round), root_P)
    update_P, memory = rule_of(spec).make().apply(received, state.memory)
    federated = isinstance(spec.algorithm, FedAvg)
    if not bool(update_P.isfinite().all()) or (federated and is_too_long(update_P, state)):
        refused = f"aggregation '{spec.aggregation.kind}' made of these updates one that is not finite, or too long"
        return nothing._replace(refused=refused)
    if not bool(update_P.any()) and bool(rows_NP.any()):
        return nothing._replace(refused=f"aggregation '{spec.aggregation.kind}' left none of these updates standing")
    buffers_Q = state.buffers_Q
    if not isinstance(spec.privacy, DpSgd):  # nothing that no noise was added to may come from a private client
        buffers_Q = _buffers(spec, received.weights_N, torch.stack([results[c.name].buffers_Q for c in sound]))
    return Aggregated(update_P, buffers_Q, clips, sound, memory, "", left_out)


def sees_single_updates(spec: TrainSpec) -> bool:
    """Returns whether the server may judge each update by what it holds, and remember it.

    Not in a secure sum, which shows nothing of its parts; not where it protects whole clients, for none may count for
    less because of what others sent, and each is clipped to a length, whatever it was; and not in a baseline, where
    nobody sends anything.
    """
    hidden = isinstance(spec.privacy, DpSgd) and (spec.privacy.trust == "distributed" or spec.privacy.unit == "client")
    return isinstance(spec.algorithm, FedAvg) and not hidden


def _why_left_out(federation: Federation, client: Client, result: LocalResult, state: TrainingState) -> str:
    """Returns why an update may not enter, or ""."""
    algorithm = federation.spec.algorithm
    counted = isinstance(algorithm, FedAvg) and algorithm.weights == "records"
    malformed = why_malformed(result, state) or (why_no_count(client.weight) if counted else "")
    if malformed or not sees_single_updates(federation.spec):
        return malformed
    variances_Q = variances(federation.classifier).to(result.update_P.device)
    return why_implausible(result, state, variances_Q) or why_old(result, state)


def received_from(
    federation: Federation, senders: list[Client], rows_NP: Tensor, draws: torch.Generator, root_P: Tensor | None
) -> Received:
    """Returns what a rule of aggregation is given.

    Args:
        federation: The training.
        senders: Whose updates are the rows.
        rows_NP: The updates.
        draws: For rules that draw.
        root_P: The server's own update, where the rule asks for one.
    """
    weights_N = torch.tensor([client.weight for client in senders], device=rows_NP.device)
    positions = {client.name: position for position, client in enumerate(federation.clients)}
    numbers = tuple(positions[client.name] for client in senders)
    return Received(Updates(rows_NP), weights_N / weights_N.sum(), numbers, draws, root_P)


def _buffers(spec: TrainSpec, weights_N: Tensor, buffers_NQ: Tensor) -> Tensor:
    """Returns batch norm's statistics: their mean beside the mean, and beside any other rule their medians.

    Rules are about directions and lengths of updates, which statistics do not have.
    """
    if isinstance(rule_of(spec), Mean) or not buffers_NQ.shape[1]:
        return weights_N @ buffers_NQ
    return coordinate_median(Updates(buffers_NQ))


def rule_of(spec: TrainSpec) -> Rule:
    """Returns the rule of aggregation; a baseline without a federation has one update, which is its mean."""
    return spec.aggregation if isinstance(spec.algorithm, FedAvg) else Mean()


def why_too_few(spec: TrainSpec, num_updates: int) -> str:
    """Returns why a rule cannot be applied to so many updates, or ""."""
    try:
        rule_of(spec).check(num_updates)
    except ValueError as error:
        return str(error)
    return ""


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


def _noised_by_server(
    federation: Federation,
    plan: PrivacyPlan,
    sound: list[Client],
    results: dict[str, LocalResult],
    state: TrainingState,
) -> Aggregated:
    """DP-FedAvg (McMahan et al. 2018, Algorithm 1): clipped, summed, noised, over the expected number of clients.

    An update that is malformed counts as zero. A round in which nobody was drawn is noise alone; a server that left
    it out would tell that nobody was drawn.
    """
    draws = private_generator(federation.spec, federation.fingerprint, "noise", state.round, "server")
    add_noise = plan.noise_source(draws)
    clip = state.clips.get(EVERYBODY)
    rows = [results[client.name].update_P for client in sound]
    updates_NP = torch.stack(rows) if rows else state.params_P.new_zeros(0, len(state.params_P))
    sum_P, norms_N = plan.update_sum(updates_NP, federation.classifier, clip)
    update_P = plan.noised_mean(sum_P, add_noise, clip)
    clips = dict(state.clips)
    if plan.adaptation is not None:
        count = plan.noised_count(norms_N, add_noise, clip)
        clips[EVERYBODY] = plan.adaptation.moved(clip or plan.adaptation.first_clip, count, plan.denominator)
    return Aggregated(update_P, state.buffers_Q, clips, sound, state.memory)


def _moved_together(chosen: list[Client], results: dict[str, LocalResult], state: TrainingState) -> dict[str, float]:
    """Returns the one clip of all clients after a round: the secure sum of their counts moves it."""
    plan = chosen[0].plan
    if plan is None or plan.adaptation is None:
        return dict(state.clips)
    clip = state.clips.get(EVERYBODY, plan.adaptation.first_clip)
    return {EVERYBODY: plan.adaptation.moved(clip, _sum_of_counts(results), plan.denominator * len(chosen))}


def _why_no_counts(chosen: list[Client], results: dict[str, LocalResult]) -> str:
    """Returns why the secure sum of the counts that move the common clip can be none, or ""."""
    plan = chosen[0].plan if chosen else None
    if plan is None or plan.adaptation is None:
        return ""
    deviation = plan.adaptation.count_noise * (len(chosen) / plan.num_honest) ** 0.5
    return why_no_sum_of_counts(_sum_of_counts(results), plan.denominator * len(chosen), deviation)


def _sum_of_counts(results: dict[str, LocalResult]) -> float:
    return sum(result.noised_count for result in results.values() if result.noised_count is not None)

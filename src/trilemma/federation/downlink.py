"""How the model comes down: a round's change as one frame for all, and what a client that missed some fetches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilemma.federation.clients import Client
from trilemma.federation.codecs.codec import num_values
from trilemma.federation.codecs.frames import seal
from trilemma.federation.server import Federation
from trilemma.federation.specs import FedAvg
from trilemma.federation.state import TrainingState
from trilemma.federation.wire import FLOAT_BYTES, floats, opened, whole_bytes
from trilemma.models.vector import shapes
from trilemma.randomness import generator


class CameDown(NamedTuple):
    """What everybody holds after a round, the server included.

    Attributes:
        params_P: The parameters that the next round starts at.
        unsaid: What the server remembers of what its codec could not say.
        change_bytes: Length of what takes a client from the round's model to the next one; None where the model comes
            down as it is, each time.
    """

    params_P: Tensor
    unsaid: dict[str, Tensor]
    change_bytes: int | None = None


def come_down(federation: Federation, state: TrainingState, params_P: Tensor, buffers_Q: Tensor) -> CameDown:
    """Returns what a server's step comes to once it has been written for the clients and read again.

    Everybody, the server included, goes on from the round's model and the change that was read, added once: all hold
    the same model bit for bit. With error feedback what the change left unsaid is added to the next one (Tang et al.
    2019, Algorithm 1). Nothing is sent of a round that changed nothing. The model itself is sent, in float32, where a
    change may be as long, or would not be finite.

    Args:
        federation: The training.
        state: Before the round.
        params_P: After the server's step.
        buffers_Q: The next ones; they travel in float32 in the same frame.
    """
    codec, unsaid = federation.spec.downlink, state.unsaid_down
    if codec is None:
        return CameDown(params_P, unsaid)
    if torch.equal(params_P, state.params_P) and torch.equal(buffers_Q, state.buffers_Q):
        return CameDown(params_P, unsaid, 0)
    whole, sizes = CameDown(params_P, {}, whole_bytes(state)), shapes(federation.classifier)
    if codec.largest(sizes) >= FLOAT_BYTES * num_values(sizes):
        return whole
    draws = generator(federation.spec.seed, "downlink", state.round)
    payload, kept = codec.encode(params_P - state.params_P, unsaid, draws, sizes)
    frame = seal(payload + floats(buffers_Q), codec.number)
    change_P, _ = opened(codec, frame, sizes, buffers_Q.numel())  # the buffers are as they were
    held_P = state.params_P + change_P.to(state.params_P)
    return CameDown(held_P, dict(kept), len(frame)) if bool(held_P.isfinite().all()) else whole


def bytes_down(federation: Federation, chosen: Sequence[Client], state: TrainingState) -> dict[str, int]:
    """Returns client name -> bytes that it receives at the start of a round, to hold the round's model.

    Without a codec for the way down that is the model in float32. With one it is the model for a client that never had
    one, and for others the frames that they have missed, or the model where that is less.

    Args:
        federation: The training, in which it is no secret who takes part.
        chosen: Who takes part.
        state: Before the round.
    """
    if not _has_server(federation):
        return {client.name: 0 for client in chosen}
    whole = whole_bytes(state)
    if federation.spec.downlink is None:
        return {client.name: whole for client in chosen}
    received = {}
    for client in chosen:
        held = _last_round(client, state)
        missed = [] if held is None else [row["change_bytes"] for row in state.history[held:]]
        received[client.name] = whole if held is None else min(whole, sum(missed))
    return received


def _last_round(client: Client, state: TrainingState) -> int | None:
    """Returns the last round that a client took part in, from 0, whose model it holds; None where there is none.

    It follows from the history, so that a resumed training counts the same bytes.
    """
    took_part = (index for index in reversed(range(state.round)) if client.name in state.history[index]["clients"])
    return next(took_part, None)


def about_teacher(federation: Federation, learnt: TrainingState, state: TrainingState) -> dict[str, Any]:
    """Returns what a history says of a teacher: its rounds and last validation accuracy, and the bytes that it cost.

    Bytes down hold the finished teacher in float32, once for each hospital that learns from it. Where it is secret who
    takes part there are no bytes.

    Args:
        federation: The student's.
        learnt: The teacher's last state.
        state: The student's last state.
    """
    told = {"rounds": learnt.round, "val_accuracy": learnt.history[-1]["val_accuracy"]}
    if federation.plan is not None:
        return told
    fetched = {name for row in state.history for name in row["clients"]} if _has_server(federation) else ()
    down = sum(row["bytes_down"] for row in learnt.history) + len(fetched) * whole_bytes(learnt)
    return {**told, "bytes_up": sum(row["bytes_up"] for row in learnt.history), "bytes_down": down}


def _has_server(federation: Federation) -> bool:
    return isinstance(federation.spec.algorithm, FedAvg)

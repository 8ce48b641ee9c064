"""What crosses the network in a round: each client's update as a frame, and what the server makes of it."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trilemma.federation.clients import Client
from trilemma.federation.codecs.codec import Codec, Shapes
from trilemma.federation.codecs.frames import seal, unseal
from trilemma.federation.local_training import LocalResult
from trilemma.federation.server import Federation
from trilemma.federation.specs import Centralised, FedAvg, LocalOnly
from trilemma.federation.state import TrainingState
from trilemma.models.vector import shapes
from trilemma.randomness import generator

#: Of a number in float32.
FLOAT_BYTES = 4


class Arrived(NamedTuple):
    """What the server has after the clients have sent.

    Attributes:
        results: Client name -> what arrived.
        bytes_up: Client name -> bytes that it sent.
        unsaid: Client name -> what it remembers of what it could not say, for all clients.
    """

    results: dict[str, LocalResult]
    bytes_up: dict[str, int]
    unsaid: dict[str, dict[str, Tensor]]


def sent(
    federation: Federation, chosen: list[Client], results: dict[str, LocalResult], state: TrainingState
) -> Arrived:
    """Returns a round's results as they arrive at the server.

    Args:
        federation: The training.
        chosen: Who took part.
        results: Client name -> what it would send.
        state: Before the round.
    """
    codec = federation.spec.codec
    if codec is None or not isinstance(federation.spec.algorithm, FedAvg):
        return Arrived(results, {client.name: _plain_bytes(federation, client, state) for client in chosen}, {})
    arrived, bytes_up, unsaid = dict(results), {}, dict(state.unsaid)
    sizes = shapes(federation.classifier)
    for client in chosen:
        result = results[client.name]
        frame, memory = _framed(federation, codec, client, result, state, sizes)
        if memory:
            unsaid[client.name] = memory
        bytes_up[client.name] = len(frame)
        arrived[client.name] = _opened(codec, frame, result, state, sizes)
    return Arrived(arrived, bytes_up, unsaid)


def opened(codec: Codec, frame: bytes, sizes: Shapes, num_buffers: int) -> tuple[Tensor, Tensor]:
    """Returns what was written in a frame: an update or a change, and the statistics, both float32 on a CPU.

    Raises:
        ValueError: If it is damaged; the text says how.
    """
    payload = unseal(frame, codec.number, codec.largest(sizes) + FLOAT_BYTES * num_buffers)
    end = len(payload) - FLOAT_BYTES * num_buffers
    if end < 0:
        raise ValueError(f"is {len(payload)} bytes long, and the statistics alone are {-end} more")
    buffers_Q = torch.from_numpy(np.frombuffer(payload, "<f4", offset=end).astype(np.float32))
    return codec.decode(payload[:end], sizes), buffers_Q


def floats(values: Tensor) -> bytes:
    """Returns numbers as they are, in float32."""
    return values.detach().cpu().numpy().astype("<f4").tobytes()


def whole_bytes(state: TrainingState) -> int:
    """Returns the bytes of a model, or of an update, in float32, its statistics included."""
    return FLOAT_BYTES * (state.params_P.numel() + state.buffers_Q.numel())


def _plain_bytes(federation: Federation, client: Client, state: TrainingState) -> int:
    """Returns what a client sends without a codec: the update in float32, or in `centralised` its images, once.

    Where there is a teacher, its training has already brought them.
    """
    algorithm = federation.spec.algorithm
    if isinstance(algorithm, LocalOnly):
        return 0
    if isinstance(algorithm, Centralised):
        images = sum(shard.records.images_NCHW.nbytes for shard in client.shards)
        return images if state.round == 0 and federation.spec.teacher is None else 0
    return whole_bytes(state)


def _framed(
    federation: Federation, codec: Codec, client: Client, result: LocalResult, state: TrainingState, sizes: Shapes
) -> tuple[bytes, dict[str, Tensor]]:
    """Returns what a client sends, and what it remembers."""
    spec, memory = federation.spec, state.unsaid.get(client.name, {})
    acts = client.malicious and spec.threat.acts(state.round)
    if result.update_P.shape == state.params_P.shape:
        again = acts and spec.threat.repeats
        draws = generator(spec.seed, "codec", -1 if again else state.round, client.number)
        payload, kept = codec.encode(result.update_P, {} if again else memory, draws, sizes)
        memory = memory if again else kept
    else:
        payload = floats(result.update_P)  # an attacker may send what no codec has written
    frame = seal(payload + floats(result.buffers_Q), codec.number)
    if acts:
        frame = spec.threat.garbled(frame)
    return frame, dict(memory)


def _opened(codec: Codec, frame: bytes, result: LocalResult, state: TrainingState, sizes: Shapes) -> LocalResult:
    """Returns what the server reads in a frame."""
    try:
        update_P, buffers_Q = opened(codec, frame, sizes, state.buffers_Q.numel())
    except ValueError as error:
        nothing_P = torch.zeros_like(state.params_P)
        return result._replace(update_P=nothing_P, buffers_Q=state.buffers_Q, damaged=f"came in a frame that {error}")
    return result._replace(update_P=update_P.to(state.params_P), buffers_Q=buffers_Q.to(state.buffers_Q))

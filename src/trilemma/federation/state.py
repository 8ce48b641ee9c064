"""What a training is between two rounds: everything that a killed process needs to go on as if nothing had been."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trilemma.federation.optimizers import State

#: Stands for the client's name where one clipping norm holds for all clients.
EVERYBODY = ""


@dataclass(frozen=True)
class TrainingState:
    """The state after `round` rounds. There is no generator in it: randomness derives from seed, role and round.

    Attributes:
        round: Rounds that ended.
        params_P: Trainable parameters of the server's model.
        buffers_Q: Its floating-point buffers (batch-norm statistics).
        server: State of the server's optimizer.
        clients: Client name -> state of its optimizer, where it outlives the round (the baselines).
        private_steps: Client name -> DP steps that ran: what the guarantee is computed from.
        history: One JSON-like dict per round.
        clips: Client name -> clipping norm, where it adapts; `EVERYBODY` where one holds for all clients.
    """

    round: int
    params_P: Tensor
    buffers_Q: Tensor
    server: State
    clients: dict[str, State] = field(default_factory=dict)
    private_steps: dict[str, int] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    clips: dict[str, float] = field(default_factory=dict)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the state as named tensors and a text for each other field, for a safetensors file."""
        tensors = {"params": self.params_P, "buffers": self.buffers_Q}
        tensors |= {f"server/{name}": value for name, value in self.server.items()}
        for client, state in self.clients.items():
            tensors |= {f"client/{client}/{name}": value for name, value in state.items()}
        texts = {
            "round": str(self.round),
            "private_steps": json.dumps(self.private_steps),
            "history": json.dumps(self.history),
            "clips": json.dumps(self.clips),
        }
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, texts

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], texts: dict[str, str], device: torch.device) -> "TrainingState":
        """Returns the state that `pack` described.

        Raises:
            KeyError: If something is missing.
            ValueError: If a text does not parse.
        """
        server: State = {}
        clients: dict[str, State] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            # A step count stays on the CPU, where it is read; all else goes where the model is.
            value = value.to(device) if value.ndim else value
            if kind == "server":
                server[rest] = value
            elif kind == "client":
                client, _, part = rest.rpartition("/")
                clients.setdefault(client, {})[part] = value
        return cls(
            round=int(texts["round"]),
            params_P=tensors["params"].to(device),
            buffers_Q=tensors["buffers"].to(device),
            server=server,
            clients=clients,
            private_steps=json.loads(texts["private_steps"]),
            history=tuple(json.loads(texts["history"])),
            clips=json.loads(texts.get("clips", "{}")),  # none adapted where a checkpoint does not have them
        )

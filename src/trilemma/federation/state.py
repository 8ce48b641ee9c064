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
        params_P: Trainable parameters of the model that everybody holds.
        buffers_Q: Its floating-point buffers (batch-norm statistics).
        server: State of the server's optimizer.
        clients: Client name -> state of its optimizer, where it outlives the round (the baselines).
        private_steps: Client name -> DP steps that ran: what the guarantee is computed from.
        history: One JSON-like dict per round, fit to be shown: under unit "client" nothing that tells who took part.
        clips: Client name -> clipping norm, where it adapts; `EVERYBODY` where one holds for all clients.
        memory: What the rule of aggregation remembers.
        plot: What the malicious clients remember.
        seen: Digests of the updates that were let in so far, by which a replayed one is known.
        unsaid: Client name -> what it remembers of what its codec could not say.
        unsaid_down: What the server remembers of what the codec for the way down could not say.
        average_P: Moving average of the parameters, where the training makes one and a round has ended.
        average_Q: The same of the buffers: batch norm's statistics must fit the parameters.
        best_P: Parameters of the best look so far, where looks choose the model (early stopping).
        best_Q: The buffers of that look.
        pretraining_seconds: Wall time before the first round, that of a teacher's training included.
        unlisted_seconds: Wall time of the rounds whose rows do not give it.
    """

    round: int
    params_P: Tensor
    buffers_Q: Tensor
    server: State
    clients: dict[str, State] = field(default_factory=dict)
    private_steps: dict[str, int] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    clips: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    plot: dict[str, Tensor] = field(default_factory=dict)
    seen: tuple[str, ...] = ()
    unsaid: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unsaid_down: dict[str, Tensor] = field(default_factory=dict)
    average_P: Tensor | None = None
    average_Q: Tensor | None = None
    best_P: Tensor | None = None
    best_Q: Tensor | None = None
    pretraining_seconds: float = 0.0
    unlisted_seconds: float = 0.0

    @property
    def latest_P(self) -> Tensor:
        """Returns the parameters after the last round, averaged where the training averages."""
        return self.params_P if self.average_P is None else self.average_P

    @property
    def latest_Q(self) -> Tensor:
        """Returns the buffers that go with them."""
        return self.buffers_Q if self.average_Q is None else self.average_Q

    @property
    def model_P(self) -> Tensor:
        """Returns the parameters of the model that this state stands for; the next round starts at `params_P`."""
        return self.latest_P if self.best_P is None else self.best_P

    @property
    def model_Q(self) -> Tensor:
        """Returns the buffers of that model."""
        return self.latest_Q if self.best_Q is None else self.best_Q

    @property
    def seconds(self) -> float:
        """Returns the wall time of all that led to this state."""
        listed = sum(row.get("seconds", 0.0) for row in self.history)
        return self.pretraining_seconds + self.unlisted_seconds + listed

    def pack(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the state as named tensors and a text for each other field, for a safetensors file."""
        tensors = {"params": self.params_P, "buffers": self.buffers_Q}
        if self.average_P is not None and self.average_Q is not None:
            tensors |= {"average": self.average_P, "average_buffers": self.average_Q}
        if self.best_P is not None and self.best_Q is not None:
            tensors |= {"best": self.best_P, "best_buffers": self.best_Q}
        tensors |= {f"server/{name}": value for name, value in self.server.items()}
        tensors |= {f"aggregation/{name}": value for name, value in self.memory.items()}
        tensors |= {f"threat/{name}": value for name, value in self.plot.items()}
        tensors |= {f"downlink/{name}": value for name, value in self.unsaid_down.items()}
        for client, memory in self.unsaid.items():
            tensors |= {f"codec/{client}/{name}": value for name, value in memory.items()}
        for client, state in self.clients.items():
            tensors |= {f"client/{client}/{name}": value for name, value in state.items()}
        texts = {
            "round": str(self.round),
            "private_steps": json.dumps(self.private_steps),
            "history": json.dumps(self.history),
            "clips": json.dumps(self.clips),
            "seen": json.dumps(self.seen),
            "pretraining_seconds": json.dumps(self.pretraining_seconds),
            "unlisted_seconds": json.dumps(self.unlisted_seconds),
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
        memory: dict[str, Tensor] = {}
        plot: dict[str, Tensor] = {}
        unsaid: dict[str, dict[str, Tensor]] = {}
        unsaid_down: dict[str, Tensor] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            # A step count stays on the CPU, where it is read; all else goes where the model is.
            value = value.to(device) if value.ndim else value
            if kind == "server":
                server[rest] = value
            elif kind == "aggregation":
                memory[rest] = value
            elif kind == "threat":
                plot[rest] = value
            elif kind == "downlink":
                unsaid_down[rest] = value
            elif kind == "codec":
                client, _, part = rest.rpartition("/")
                unsaid.setdefault(client, {})[part] = value
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
            memory=memory,
            plot=plot,
            unsaid=unsaid,
            unsaid_down=unsaid_down,
            seen=tuple(json.loads(texts.get("seen", "[]"))),
            clips=json.loads(texts.get("clips", "{}")),  # none adapted where a checkpoint does not have them
            average_P=tensors["average"].to(device) if "average" in tensors else None,
            average_Q=tensors["average_buffers"].to(device) if "average" in tensors else None,
            best_P=tensors["best"].to(device) if "best" in tensors else None,
            best_Q=tensors["best_buffers"].to(device) if "best" in tensors else None,
            pretraining_seconds=json.loads(texts.get("pretraining_seconds", "0.0")),
            unlisted_seconds=json.loads(texts.get("unlisted_seconds", "0.0")),
        )

"""Updates that are wrong rather than clever: what a server must notice and leave out."""

from typing import Literal

import torch
from torch import Tensor

from trilemma.attacks.poisoning.scene import Memory, Scene, Sent

Flaw = Literal["nan", "infinity", "shape", "huge", "replay", "frame"]

#: Length of a huge update; its numbers stay finite.
HUGE = 1e30


def malformed(scene: Scene, flaw: Flaw) -> tuple[Sent, Memory]:
    """Returns the malicious clients' updates with a flaw.

    A replay is what a client sent when it first acted, bit for bit; in that round it is its own update.
    """
    if flaw == "replay":
        firsts = {f"first {s}": own_P for s, own_P in zip(scene.senders, scene.own_MP, strict=True)}
        memory = {**firsts, **scene.memory}
        return tuple(memory[f"first {sender}"] for sender in scene.senders), memory
    if flaw == "frame":
        return tuple(scene.own_MP), scene.memory  # what is wrong is how it travels
    return tuple(_flawed(own_P, flaw, scene.draws) for own_P in scene.own_MP), scene.memory


def _flawed(own_P: Tensor, flaw: Flaw, draws: torch.Generator) -> Tensor:
    """Returns an update with a number that is none at a drawn place, of another length, or with a huge norm."""
    place = int(torch.randint(max(1, len(own_P)), (), generator=draws, device=draws.device))
    if flaw == "shape":
        return own_P[: len(own_P) - 1 - place]
    if flaw == "huge":
        return own_P * (HUGE / max(float(torch.linalg.vector_norm(own_P.double())), 1e-6))
    flawed_P = own_P.clone()
    flawed_P[place] = torch.nan if flaw == "nan" else torch.inf
    return flawed_P

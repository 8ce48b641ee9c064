"""The train-time threats on what a malicious client sends."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trilemma.attacks.poisoning.adaptive import adaptive
from trilemma.attacks.poisoning.malformed import Flaw, malformed
from trilemma.attacks.poisoning.scene import Memory, Scene, Sent
from trilemma.attacks.poisoning.threat import Threat
from trilemma.attacks.poisoning.updates import (
    Direction,
    alie,
    gaussian,
    inner_product,
    mimicked,
    min_max,
    min_sum,
    principal,
)

#: "honest": what the honest clients send in the same round; "own": what the malicious ones' own training made.
Knows = Literal["honest", "own"]


class SignFlip(Threat):
    """Each sends its update times a negative factor (Li et al. 2019).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        scale: The factor, without its sign.
    """

    kind: Literal["sign_flip"] = "sign_flip"
    scale: float = Field(default=4.0, gt=0)

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"sign flip {self.scale:g}x"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        return tuple(-self.scale * scene.own_MP), scene.memory


class Gaussian(Threat):
    """Each sends noise (Blanchard et al. 2017).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        scale: Length of the noise, in units of the update that it stands for.
    """

    kind: Literal["gaussian"] = "gaussian"
    scale: float = Field(default=10.0, gt=0)

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"Gaussian noise {self.scale:g}x"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        return tuple(gaussian(scene.own_MP, self.scale, scene.draws)), scene.memory


class Scaling(Threat):
    """Each sends its honest update times a factor, so that the model overshoots.

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        scale: The factor.
    """

    kind: Literal["scaling"] = "scaling"
    scale: float = Field(default=50.0, gt=0)

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"scaling {self.scale:g}x"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        return tuple(self.scale * scene.own_MP), scene.memory


class Alie(Threat):
    """All send the mean less z standard deviations: a little is enough (Baruch et al. 2019).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        knows: "honest": what the honest clients send in the same round. "own": only what their own training made.
        z: None: as far out as enough honest clients are; with few attackers that is not far.
    """

    kind: Literal["alie"] = "alie"
    knows: Knows = "honest"
    z: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_a_spread(self) -> "Alie":
        _refuse_lone(self, self.knows)
        return self

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"ALIE{'' if self.z is None else f' z {self.z:g}'}{_of_own(self.knows)}"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        num_malicious = len(scene.own_MP)
        num_clients = num_malicious + scene.num_honest
        return _all_send(alie(_known(scene, self.knows), num_clients, num_malicious, self.z), scene)


class InnerProduct(Threat):
    """All send the mean times a negative factor (inner-product manipulation, Xie et al. 2020).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        knows: "honest": what the honest clients send in the same round. "own": only what their own training made.
        scale: The factor, without its sign; above (n - f) / f it turns the mean of all round.
    """

    kind: Literal["inner_product"] = "inner_product"
    knows: Knows = "honest"
    scale: float = Field(default=8.0, gt=0)

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"inner product {self.scale:g}x{_of_own(self.knows)}"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        return _all_send(inner_product(_known(scene, self.knows), self.scale), scene)


class MinMax(Threat):
    """All send what is no farther from any honest update than those are (Shejwalkar and Houmansadr 2021).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        knows: "honest": what the honest clients send in the same round. "own": only what their own training made.
        direction: Along which it leaves the mean: against it at "unit" length, against its "sign", or along the
            standard deviations, "std".
        stretch: How many times as far from the honest updates as the paper lets it be; None: 1. Among few attackers the
            paper's own step hardly moves a mean, which needs no hiding from.
    """

    kind: Literal["min_max"] = "min_max"
    knows: Knows = "honest"
    direction: Direction = "unit"
    stretch: float | None = Field(default=None, gt=1)

    @model_validator(mode="after")
    def _has_a_spread(self) -> "MinMax":
        _refuse_lone(self, self.knows)
        return self

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"MinMax {self.direction}{_stretched(self.stretch)}{_of_own(self.knows)}"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        return _all_send(min_max(_known(scene, self.knows), self.direction, self.stretch or 1.0), scene)


class MinSum(Threat):
    """All send what is, in the sum of squares, no farther from the honest than those (Shejwalkar, Houmansadr 2021).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        knows: "honest": what the honest clients send in the same round. "own": only what their own training made.
        direction: Along which it leaves the mean: against it at "unit" length, against its "sign", or along the
            standard deviations, "std".
        stretch: How many times as far from the honest updates as the paper lets it be; None: 1. Among few attackers the
            paper's own step hardly moves a mean, which needs no hiding from.
    """

    kind: Literal["min_sum"] = "min_sum"
    knows: Knows = "honest"
    direction: Direction = "unit"
    stretch: float | None = Field(default=None, gt=1)

    @model_validator(mode="after")
    def _has_a_spread(self) -> "MinSum":
        _refuse_lone(self, self.knows)
        return self

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"MinSum {self.direction}{_stretched(self.stretch)}{_of_own(self.knows)}"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        return _all_send(min_sum(_known(scene, self.knows), self.direction, self.stretch or 1.0), scene)


class Mimic(Threat):
    """All send what one honest client sends, the one that differs most (Karimireddy et al. 2022).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        knows: "honest": what the honest clients send in the same round. "own": only what their own training made.
    """

    kind: Literal["mimic"] = "mimic"
    knows: Literal["honest"] = "honest"

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return "mimic"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        if not len(scene.honest_NP):
            return tuple(scene.own_MP), scene.memory
        before_P = scene.memory.get("principal")
        rounds = int(scene.memory.get("rounds", torch.tensor(0)))
        principal_P = principal(scene.honest_NP, before_P, rounds)
        memory = {"principal": principal_P, "rounds": torch.tensor(rounds + 1)}
        return _all_send(scene.honest_NP[mimicked(scene.honest_NP, principal_P)], scene)[0], memory


class Adaptive(Threat):
    """All send what does most harm to the server's own rule, which they ask (Fang et al. 2020).

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        knows: "honest": what the honest clients send in the same round. "own": only what their own training made.
    """

    kind: Literal["adaptive"] = "adaptive"
    knows: Knows = "honest"

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"adaptive{_of_own(self.knows)}"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        known_NP = _known(scene, self.knows)
        return _all_send(adaptive(known_NP, scene.aggregate, scene.num_honest, len(scene.own_MP)), scene)


class Malformed(Threat):
    """Each sends something that is no update: a server must notice, leave it out and say so.

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
        flaw: "nan" or "infinity" in one place, another "shape", a "huge" norm, a "replay" of its first update, or a
            "frame" that is cut off on its way.
    """

    kind: Literal["malformed"] = "malformed"
    flaw: Flaw = "nan"

    @property
    def name(self) -> str:
        """Returns the threat and its numbers."""
        return f"malformed ({self.flaw})"

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what they send, and what they remember."""
        return malformed(scene, self.flaw)

    def garbled(self, frame: bytes) -> bytes:
        """Returns half of a frame, where that is the flaw."""
        return frame[: len(frame) // 2] if self.flaw == "frame" else frame


def _refuse_lone(threat: Threat, knows: Knows) -> None:
    """Raises ValueError where a spread must be estimated from one update."""
    lone = threat.num_malicious == 1 or (threat.clients is not None and len(threat.clients) == 1)
    if knows == "own" and lone:
        raise ValueError("knows = 'own' needs two malicious clients: one update has no spread; use knows = 'honest'")


def _known(scene: Scene, knows: Knows) -> Tensor:
    """Returns the updates that a threat is made from; where no honest client takes part, the malicious ones' own."""
    return scene.honest_NP if knows == "honest" and len(scene.honest_NP) else scene.own_MP


def _all_send(sent_P: Tensor, scene: Scene) -> tuple[Sent, Memory]:
    return (sent_P,) * len(scene.own_MP), scene.memory


def _stretched(stretch: float | None) -> str:
    return "" if stretch is None else f" {stretch:g}x"


def _of_own(knows: Knows) -> str:
    return "" if knows == "honest" else ", of their own updates"

"""What every train-time threat is: who is malicious, in which rounds, what their records and their updates become."""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from trilemma.attacks.poisoning.scene import Memory, Scene, Sent
from trilemma.attacks.poisoning.selection import check_choice, choose_clients
from trilemma.data.records import Records
from trilemma.models.classifier import Classifier
from trilemma.spec import Spec

#: Factor of a malicious update; "replace": as large as makes the mean of all updates the malicious one.
Boost = float | Literal["replace"]


class Rounds(Spec):
    """In which rounds the malicious clients act; in the others they are honest.

    Attributes:
        first: Counted from 1.
        last: None: to the end.
        every: 1: in each of them; 3: in the first, the fourth, and so on.
    """

    first: int = Field(default=1, ge=1)
    last: int | None = Field(default=None, ge=1)
    every: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _some_round(self) -> "Rounds":
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last = {self.last} lies before first = {self.first}")
        return self

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        every = f"every {self.every} rounds " if self.every > 1 else ""
        return f"{every}from round {self.first}" + (f" to {self.last}" if self.last is not None else "")

    def has(self, round_index: int) -> bool:
        """Returns whether a round, counted from 0, is one of them."""
        since = round_index + 1 - self.first
        return since >= 0 and since % self.every == 0 and (self.last is None or round_index < self.last)


class Threat(Spec, ABC):
    """What the threats have in common.

    Attributes:
        num_malicious: That many clients, the last ones; give this or `clients`.
        clients: The malicious clients' indices, counted from 0.
        when: The rounds in which they act; None: all.
    """

    num_malicious: int | None = Field(default=None, ge=1)
    clients: tuple[int, ...] | None = None
    when: Rounds | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> "Threat":
        check_choice(self.num_malicious, self.clients)
        return self

    @property
    @abstractmethod
    def name(self) -> str:
        """Returns the threat and its numbers, without who and when."""

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"{self.name} by {self._who}" + (f" {self.when.label}" if self.when is not None else "")

    @property
    def on_updates(self) -> bool:
        """Returns whether malicious clients send something else than what their training made."""
        return getattr(self, "boost", None) is not None or type(self).forge is not Threat.forge

    @property
    def sees_others(self) -> bool:
        """Returns whether they know what the honest clients send in the same round."""
        return getattr(self, "knows", "own") == "honest"

    def malicious(self, num_clients: int) -> tuple[int, ...]:
        """Returns the malicious clients' indices, ascending.

        Raises:
            ValueError: If there are more of them than clients.
        """
        return choose_clients(self.num_malicious, self.clients, num_clients)

    def acts(self, round_index: int) -> bool:
        """Returns whether they act in a round, counted from 0."""
        return self.when is None or self.when.has(round_index)

    def check(self, num_classes: int, image_size: int) -> None:
        """Refuses classes that the data do not have, and triggers for which their images have no room.

        Raises:
            ValueError: Naming the class or the size.
        """
        for field in ("source", "target"):
            number = getattr(self, field, None)
            if number is not None and number >= num_classes:
                raise ValueError(f"{field} = {number} is no class: there are {num_classes}, numbered from 0")

    def may_change(self, labels_N: np.ndarray) -> np.ndarray:
        """Returns which of a malicious client's records it may change, were it to change any."""
        return np.full(len(labels_N), True)

    @property
    def repeats(self) -> bool:
        """Returns whether a malicious client sends the same again, bit for bit."""
        return getattr(self, "flaw", "") == "replay"

    def garbled(self, frame: bytes) -> bytes:
        """Returns what a malicious client sends in place of a frame, where a codec makes one."""
        return frame

    def claimed(self, num_records: int) -> int:
        """Returns how many records a malicious client says it has."""
        return num_records

    def poison(
        self,
        records: Records,
        classifier: Classifier,
        num_classes: int,
        generator: torch.Generator,
        drawn: np.ndarray | None = None,
        position: tuple[int, int] = (0, 1),
    ) -> Records:
        """Returns a malicious client's records as it trains on them in a round that starts from `classifier`.

        Args:
            records: What it holds.
            classifier: The round's global model.
            num_classes: At least 2.
            generator: The same stream in every round.
            drawn: Positions of the records that the round looks at, ascending: no others need to be what the threat
                makes of them. None: all.
            position: Which of the malicious clients it is, counted from 0, and how many there are.
        """
        return records

    def forge(self, scene: Scene) -> tuple[Sent, Memory]:
        """Returns what the malicious clients of a round send in place of their updates, and what they remember."""
        return boosted(scene, getattr(self, "boost", None)), scene.memory

    @property
    def _who(self) -> str:
        if self.clients is not None:
            return f"client{'s' if len(self.clients) > 1 else ''} {', '.join(map(str, self.clients))}"
        return f"{self.num_malicious} client{'s' if self.num_malicious != 1 else ''}"


def boosted(scene: Scene, boost: Boost | None) -> Sent:
    """Returns the malicious clients' own updates times a factor.

    With "replace" the mean of all updates becomes that of the malicious ones as soon as the honest ones are small, or
    cancel out: model replacement.

    References: Bagdasaryan et al. (2020), section 4.2.
    """
    factor = 1.0 if boost is None else 1 / scene.share if boost == "replace" else boost
    return tuple(factor * own_P for own_P in scene.own_MP)


def boost_label(boost: Boost | None) -> str:
    """Returns the factor as a part of a threat's name, with a space before it."""
    return "" if boost is None else ", model replacement" if boost == "replace" else f", boosted {boost:g}x"


def refuse_small_boost(boost: Boost | None) -> None:
    """Raises ValueError for a factor that is not positive."""
    if isinstance(boost, float) and boost <= 0:
        raise ValueError(f"boost = {boost:g} must be above 0")

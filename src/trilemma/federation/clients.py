"""The clients of one training: what each holds, how private it is, and whether it is malicious."""

from dataclasses import dataclass

import numpy as np

from trilemma.data.records import Dataset, Partition, Records, concatenate
from trilemma.errors import UserError
from trilemma.federation.specs import Centralised, FedAvg, LocalOnly, TrainSpec
from trilemma.models.classifier import Classifier
from trilemma.privacy.plan import PrivacyPlan
from trilemma.privacy.specs import DpSgd
from trilemma.randomness import generator, numpy_generator


@dataclass(frozen=True)
class Shard:
    """One hospital's records.

    Attributes:
        hospital: Its number in the partition.
        malicious: Whether the study's threat acts on it.
        records: Its training images, before any poisoning.
    """

    hospital: int
    malicious: bool
    records: Records


@dataclass(frozen=True)
class Client:
    """Who trains: a hospital, or in `centralised` training all of them in one place.

    Attributes:
        name: As shown to the user.
        number: Names its random streams.
        shards: One, or every hospital's.
        plan: Its privacy, or None.
        steps: Steps in each round.
        weight: Of its update, before normalising over the round's participants.
    """

    name: str
    number: int
    shards: tuple[Shard, ...]
    plan: PrivacyPlan | None
    steps: int
    weight: float

    @property
    def num_records(self) -> int:
        """Returns the number of its training images."""
        return sum(len(shard.records) for shard in self.shards)

    def training_records(self, spec: TrainSpec, classifier: Classifier) -> Records:
        """Returns what it trains on in a round: its records, poisoned where a shard is malicious.

        Args:
            spec: The training.
            classifier: The round's global model, which an attacker sees too.
        """
        parts = []
        for shard in self.shards:
            records = shard.records
            if shard.malicious:
                # The same stream every round: the same records are poisoned throughout.
                draws = generator(spec.seed, "threat", shard.hospital)
                records = spec.threat.poison(records, classifier, classifier.num_classes, draws)
            parts.append(records)
        return concatenate(parts)


def make_clients(spec: TrainSpec, dataset: Dataset, partition: Partition) -> tuple[Client, ...]:
    """Returns the clients of a training.

    Raises:
        UserError: If a client's privacy cannot be what the study asks for.
    """
    malicious = spec.threat.malicious(len(partition.clients))
    shards = [
        Shard(number, number in malicious, dataset.train.subset(index)) for number, index in enumerate(partition.train)
    ]
    if isinstance(spec.algorithm, Centralised):
        return (_make_client(spec, "all hospitals", 0, tuple(shards), 1.0),)
    if isinstance(spec.algorithm, LocalOnly):
        number = spec.algorithm.client or 0
        return (_make_client(spec, partition.clients[number], number, (shards[number],), 1.0),)
    return tuple(
        _make_client(
            spec, name, number, (shards[number],), _weight(spec.algorithm, number, len(shards[number].records))
        )
        for number, name in enumerate(partition.clients)
    )


def participants(spec: TrainSpec, num_clients: int, round_index: int) -> tuple[int, ...]:
    """Returns the positions of the clients that take part in a round, ascending; drawn by seed and round alone."""
    wanted = spec.algorithm.clients_per_round if isinstance(spec.algorithm, FedAvg) else None
    if wanted is None or wanted >= num_clients:
        return tuple(range(num_clients))
    drawn = numpy_generator(spec.seed, "participants", round_index).choice(num_clients, wanted, replace=False)
    return tuple(int(position) for position in np.sort(drawn))


def _weight(algorithm: FedAvg, number: int, num_records: int) -> float:
    if algorithm.weights == "records":
        return float(num_records)
    return 1.0 if algorithm.weights == "equal" else algorithm.weights[number]


def _make_client(spec: TrainSpec, name: str, number: int, shards: tuple[Shard, ...], weight: float) -> Client:
    num_records = sum(len(shard.records) for shard in shards)
    steps = spec.local.steps_per_round(num_records)
    plan = None
    if isinstance(spec.privacy, DpSgd):
        # The schedule of participants is fixed by the seed, so the number of its rounds is known beforehand.
        num_clients = spec.partition.num_clients if isinstance(spec.algorithm, FedAvg) else 1
        position = number if isinstance(spec.algorithm, FedAvg) else 0
        rounds = sum(position in participants(spec, num_clients, r) for r in range(spec.rounds))
        try:
            plan = spec.privacy.make(num_records, spec.local.batch_size, steps * rounds)
        except ValueError as error:
            raise UserError(
                f"client '{name}'", str(error), "Change local.batch_size or privacy, or the partition"
            ) from None
    return Client(name, number, shards, plan, steps, weight)

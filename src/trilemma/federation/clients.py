"""The clients of one training: what each holds, how private it is, and whether it is malicious."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from trilemma.data.records import Dataset, Partition, Records, concatenate
from trilemma.errors import UserError
from trilemma.federation.specs import Centralised, FedAvg, LocalOnly, TrainSpec
from trilemma.federation.teaching import phase_name, phases, total_rounds
from trilemma.federation.units import Units, patients
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
        units: The positions of each unit's records, where a unit may hold several; None where each record is one.
        fingerprint: Of the data set; names its private streams together with the training.
    """

    name: str
    number: int
    shards: tuple[Shard, ...]
    plan: PrivacyPlan | None
    steps: int
    weight: float
    units: Units | None = None
    fingerprint: str = ""

    @property
    def num_units(self) -> int:
        """Returns how many are sampled, clipped and protected on their own: its images, or its patients."""
        return self.num_records if self.units is None else len(self.units)

    @property
    def num_records(self) -> int:
        """Returns the number of its training images."""
        return sum(len(shard.records) for shard in self.shards)

    def records_of(self, units: list[int]) -> tuple[list[int], list[int]]:
        """Returns the positions of the units' records, unit by unit, and how many each unit has."""
        if self.units is None:
            return units, [1] * len(units)
        chosen = [self.units[unit].tolist() for unit in units]
        return [record for records in chosen for record in records], [len(records) for records in chosen]

    @property
    def malicious(self) -> bool:
        """Returns whether the study's threat acts on all that it holds, so that it may send what it likes."""
        return all(shard.malicious for shard in self.shards)

    def training_records(
        self, spec: TrainSpec, classifier: Classifier, round_index: int, drawn: np.ndarray | None = None
    ) -> Records:
        """Returns what it trains on in a round: its records, poisoned where a shard is malicious.

        Args:
            spec: The training.
            classifier: The round's global model, which an attacker sees too.
            round_index: From 0.
            drawn: Positions of the records that the round looks at: no others need to be poisoned. None: all.
        """
        parts, start = [], 0
        for shard in self.shards:
            inside = None if drawn is None else drawn[(drawn >= start) & (drawn < start + len(shard.records))] - start
            start += len(shard.records)
            records = shard.records
            if shard.malicious and spec.threat.acts(round_index):
                # The same stream every round: the same records are poisoned throughout.
                draws = generator(spec.seed, "threat", shard.hospital)
                everybody = spec.threat.malicious(spec.partition.num_clients)
                position = (everybody.index(shard.hospital), len(everybody))
                records = spec.threat.poison(records, classifier, classifier.num_classes, draws, inside, position)
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
    if isinstance(spec.privacy, DpSgd) and spec.privacy.unit == "patient":
        refuse_unknown_patients(dataset)
    if isinstance(spec.algorithm, Centralised):
        clients = [_make_client(spec, "all hospitals", 0, tuple(shards), 1.0)]
    elif isinstance(spec.algorithm, LocalOnly):
        number = spec.algorithm.client or 0
        clients = [_make_client(spec, partition.clients[number], number, (shards[number],), 1.0)]
    else:
        clients = [
            _make_client(spec, name, number, (shards[number],), _weight(spec, spec.algorithm, shards[number]))
            for number, name in enumerate(partition.clients)
        ]
    return _with_plans(spec, tuple(replace(client, fingerprint=dataset.fingerprint) for client in clients))


def refuse_unknown_patients(dataset: Dataset) -> None:
    """Refuses to protect patients where it is not known whose images are whose.

    Raises:
        UserError: Naming the data set.
    """
    unknown = int((dataset.train.patients_N < 0).sum())
    if unknown:
        raise UserError(
            "privacy.unit",
            f"'patient' needs to know whose images are whose, and {dataset.name} does not say so of {unknown} of its "
            f"{len(dataset.train)} training images",
            "Use data that name patients (a manifest's column 'patient', a folder's pattern `patient`), or set "
            "privacy.unit = 'example'",
        )


def participants(spec: TrainSpec, num_clients: int, round_index: int) -> tuple[int, ...]:
    """Returns the positions of the clients that take part in a round, ascending; drawn by seed and round alone.

    Where a trusted server protects whole clients its plan draws them instead (`round.who_takes_part`).
    """
    wanted = spec.algorithm.clients_per_round if isinstance(spec.algorithm, FedAvg) else None
    if wanted is None or wanted >= num_clients:
        return tuple(range(num_clients))
    draws = numpy_generator(spec.seed, "participants", *phase_name(spec), round_index)
    drawn = draws.choice(num_clients, wanted, replace=False)
    return tuple(int(position) for position in np.sort(drawn))


def planned_rounds(spec: TrainSpec, num_clients: int, position: int) -> int:
    """Returns in how many rounds a client takes part, a teacher's included.

    The seed fixes them, so they are known beforehand.
    """
    rounds = [(phase, index) for phase in phases(spec) for index in range(phase.rounds)]
    return sum(position in participants(phase, num_clients, index) for phase, index in rounds)


def server_plan(spec: TrainSpec, num_clients: int) -> PrivacyPlan | None:
    """Returns the plan of a trusted server that protects whole clients, or None where they are not the unit.

    Raises:
        UserError: If the number of clients is too small for what the study asks for.
    """
    if not isinstance(spec.privacy, DpSgd) or spec.privacy.unit != "client":
        return None
    assert isinstance(spec.algorithm, FedAvg)  # the spec refuses others
    wanted = spec.algorithm.clients_per_round or num_clients
    try:
        return spec.privacy.make_for_server(num_clients, wanted, total_rounds(spec))
    except ValueError as error:
        raise UserError("privacy", str(error), "Change privacy, rounds or the number of clients") from None


def _with_plans(spec: TrainSpec, clients: tuple[Client, ...]) -> tuple[Client, ...]:
    if not isinstance(spec.privacy, DpSgd) or spec.privacy.unit == "client":
        return clients
    privacy, batch_size = spec.privacy, spec.local.batch_size
    steps = [client.steps * planned_rounds(spec, len(clients), i) for i, client in enumerate(clients)]
    noise, num_honest, plans = None, 1, []
    if privacy.trust == "distributed":
        # All add shares of one noise, so it must do for the smallest client and the most steps.
        num_honest = len(participants(spec, len(clients), 0)) - privacy.num_colluding
        smallest = min(clients, key=lambda client: client.num_units)
        with _told_of(smallest):
            noise = privacy.calibrated(smallest.num_units, batch_size, max(steps))
    for client, num_steps in zip(clients, steps, strict=True):
        with _told_of(client):
            plans.append(privacy.make(client.num_units, batch_size, num_steps, noise, num_honest))
    return tuple(replace(client, plan=plan) for client, plan in zip(clients, plans, strict=True))


@contextmanager
def _told_of(client: Client) -> Iterator[None]:
    """Turns what is wrong with a client's privacy into a message that names the client."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"client '{client.name}'", str(error), "Change local.batch_size or privacy, or the partition"
        ) from None


def _weight(spec: TrainSpec, algorithm: FedAvg, shard: Shard) -> float:
    """Returns the weight of a hospital's updates; by records it rests on what the hospital says that it holds."""
    if algorithm.weights == "records":
        told = len(shard.records)
        return float(spec.threat.claimed(told) if shard.malicious else told)
    return 1.0 if algorithm.weights == "equal" else algorithm.weights[shard.hospital]


def _make_client(spec: TrainSpec, name: str, number: int, shards: tuple[Shard, ...], weight: float) -> Client:
    units = None
    if isinstance(spec.privacy, DpSgd) and spec.privacy.unit == "patient":
        units = patients(np.concatenate([shard.records.patients_N for shard in shards]))
    client = Client(name, number, shards, None, 0, weight, units)
    return replace(client, steps=spec.local.steps_per_round(client.num_units))

"""What a study may say about one training: its data, model, clients, server and their defences."""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from trilemma.attacks.poisoning.specs import NoThreat, ThreatSpec
from trilemma.data.specs import DataSpec, Iid, PartitionSpec, Phantom
from trilemma.federation.aggregation.specs import AggregationSpec, Mean
from trilemma.federation.codecs.specs import CodecSpec
from trilemma.federation.optimizers import Optimizer, adam, sgd
from trilemma.federation.refusals import (
    why_no_codec,
    why_no_downlink,
    why_no_looks,
    why_no_pruning,
    why_no_root,
    why_no_such_threat,
    why_no_teacher,
    why_unsound,
)
from trilemma.federation.smaller import GradualPruning, Int8Training, Teacher
from trilemma.models.specs import ModelSpec, Resnet9
from trilemma.privacy.specs import NoPrivacy, PrivacySpec
from trilemma.robustness.objective import Objective
from trilemma.robustness.objectives import adjusted
from trilemma.robustness.specs import DefenceSpec, EarlyStopping, NoDefence
from trilemma.spec import Spec


class Augmentation(Spec):
    """Random changes of training images, drawn anew for every record and step.

    Attributes:
        shift: Largest shift in pixels, in both directions; the border is repeated.
        flip: Mirror left and right with probability one half. It moves the heart to the other side.
        multiplicity: How often an image enters each step that it is drawn for, every copy changed in its own way (De
            et al. 2022). The mean of the copies' losses counts as the image's, so that privacy costs the same.
    """

    shift: int = Field(default=0, ge=0, le=64)
    flip: bool = False
    multiplicity: int = Field(default=1, ge=1, le=256)

    @model_validator(mode="after")
    def _copies_differ(self) -> "Augmentation":
        if self.multiplicity > 1 and not self.shift and not self.flip:
            raise ValueError(
                f"multiplicity {self.multiplicity} would compute on equal copies of each image, for nothing changes "
                "them; give a shift or flip, or leave multiplicity out"
            )
        return self


class Local(Spec):
    """How a client trains within a round.

    Attributes:
        optimizer: Starts afresh each round, except in `centralised` and `local_only` training.
        learning_rate: At the start; `schedule` lowers it.
        momentum: Of SGD.
        weight_decay: Added to the gradient (SGD) or decoupled (Adam).
        batch_size: Records per step; under DP the expected number of a Poisson-sampled batch, and of patients where
            these are the unit.
        epochs: Passes over the client's records (under DP with unit "patient": patients) per round. Or give `steps`.
        steps: Steps per round. Or give `epochs`.
        schedule: "cosine" falls to zero over all rounds.
        augmentation: Random changes of training images.
        precision: What the network computes in while it trains. "bfloat16" takes 50 to 60 % of the time of a wide
            network, and 75 to 85 % under DP, where the processor has instructions for it. It costs digits, not privacy:
            weights, per-record norms, sums and noise stay float32.
        class_shares: Public shares of the classes in the training images, in label order, that add up to 1: the model
            then answers as if all classes were equally frequent (logit adjustment, Menon et al. 2021). None: as
            frequent as they are. A guarantee says nothing of shares that were counted in private images.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=64, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    schedule: Literal["constant", "cosine"] = "constant"
    augmentation: Augmentation = Augmentation()
    precision: Literal["float32", "bfloat16"] = "float32"
    class_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = None

    @field_validator("class_shares")
    @classmethod
    def _add_up(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is not None and abs(sum(shares) - 1) > 0.02:  # three times .33 will do
            raise ValueError(f"class_shares must add up to 1, not {sum(shares):g}")
        return shares

    def adjusted(self, objective: Objective) -> Objective:
        """Returns the objective with its logits adjusted for `class_shares`, where these are given."""
        return objective if self.class_shares is None else adjusted(objective, self.class_shares)

    @model_validator(mode="after")
    def _one_length(self) -> "Local":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, and not both (neither means one epoch)")
        return self

    def make(self) -> Optimizer:
        """Returns the optimizer."""
        if self.optimizer == "adam":
            return adam(weight_decay=self.weight_decay)
        return sgd(self.momentum, self.weight_decay)

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of `precision`."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def steps_per_round(self, num_records: int) -> int:
        """Returns the steps of one round for a client with `num_records` records, or patients where these count."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 1) * -(-num_records // self.batch_size)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        copies = self.augmentation.multiplicity
        images = f"batch {self.batch_size}" + (f" x {copies}" if copies > 1 else "")
        precision = ", bfloat16" if self.precision == "bfloat16" else ""
        shares = ", balanced" if self.class_shares is not None else ""
        return f"{self.optimizer} {self.learning_rate:g}, {images}{precision}{shares}"


class Averaging(Spec):
    """The model is a moving average of the weights after each round; training goes on from the last ones.

    Attributes:
        decay: What the average keeps of itself in a round. Early on it is less, (1 + t) / (10 + t) after t rounds, so
            that the initial weights are soon forgotten.
    """

    decay: float = Field(ge=0, lt=1)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"averaged {self.decay:g}"

    def decay_after(self, rounds: int) -> float:
        """Returns the decay of the round that follows `rounds` rounds."""
        return min(self.decay, (1 + rounds) / (10 + rounds))


class Pretraining(Spec):
    """Training of the initial weights on images that are public, before the first round.

    They need the size and channels of the study's own images. With as many classes as these the last layer is kept, in
    the order of the classes; with another number it starts afresh.

    Attributes:
        data: Public or synthetic images; their training split is used.
        epochs: Passes over them.
        optimizer: Of this training only.
        learning_rate: Constant.
        momentum: Of SGD.
        batch_size: Images per step.
        augmentation: Random changes of the images.
        defence: Training objective; on public images an adversarial one costs no privacy. Its radius grows over this
            training alone.
    """

    data: DataSpec
    epochs: int = Field(default=5, ge=1)
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    batch_size: int = Field(default=64, ge=2)
    augmentation: Augmentation = Augmentation()
    defence: DefenceSpec = NoDefence()

    @field_validator("data")
    @classmethod
    def _not_measured_on(cls, data: DataSpec) -> DataSpec:
        if data.evaluate_on != "test":
            raise ValueError("evaluate_on says what a study measures on, and nothing is measured here; leave it out")
        return data

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        synthetic = " (synthetic)" if isinstance(self.data, Phantom) else ""
        defence = "" if isinstance(self.defence, NoDefence) else f" by {self.defence.label}"
        return f"pretrained on {self.data.label}{synthetic}{defence}"

    def make(self) -> Optimizer:
        """Returns the optimizer."""
        return adam() if self.optimizer == "adam" else sgd(self.momentum)


class FedAvg(Spec):
    """Federated averaging (McMahan et al. 2017, Algorithm 1).

    Attributes:
        weights: Of the clients' updates: "equal" (the default, with and without DP), "records" by their number of
            records (McMahan's choice), or public numbers from 1e-6 to 1e6, one for each client. Under DP: "equal" or
            public numbers.
        clients_per_round: How many take part in a round, drawn at random; all by default. Under DP with unit "client":
            how many are expected to, for each is drawn independently of the others.
    """

    kind: Literal["fedavg"] = "fedavg"
    weights: Literal["records", "equal"] | tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...] = "equal"
    clients_per_round: int | None = Field(default=None, ge=1)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "FedAvg"


class FedProx(FedAvg):
    """FedAvg whose clients are held near the round's model by (mu / 2) |w - w_round|^2 (Li et al. 2020, Algorithm 2).

    Attributes:
        mu: Strength of the hold.
    """

    kind: Literal["fedprox"] = "fedprox"  # pyright: ignore[reportIncompatibleVariableOverride]
    mu: float = Field(default=0.01, gt=0)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"FedProx mu {self.mu:g}"


class Centralised(Spec):
    """All records in one place: what the hospitals could reach if they pooled their images."""

    kind: Literal["centralised"] = "centralised"

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "centralised"


class LocalOnly(Spec):
    """Each hospital alone: what it reaches without collaborating.

    Attributes:
        client: Which hospital; a study that leaves it out trains each of them.
    """

    kind: Literal["local_only"] = "local_only"
    client: int | None = Field(default=None, ge=0)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "local only"


AlgorithmSpec = Annotated[FedAvg | FedProx | Centralised | LocalOnly, Field(discriminator="kind")]


class ServerSgd(Spec):
    """The server moves along the aggregated update.

    Attributes:
        learning_rate: 1 is plain averaging.
        momentum: Above 0 it is FedAvgM (Hsu et al. 2019).
    """

    kind: Literal["sgd"] = "sgd"
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return f"server momentum {self.momentum:g}" if self.momentum else "server average"

    def make(self) -> Optimizer:
        """Returns the server's optimizer, for the negative update as gradient."""
        return sgd(self.momentum)


class ServerAdam(Spec):
    """FedAdam (Reddi et al. 2021, Algorithm 2).

    Attributes:
        learning_rate: Of the server.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: Adaptivity; smaller adapts more.
    """

    kind: Literal["adam"] = "adam"
    learning_rate: float = Field(default=0.01, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)

    @property
    def label(self) -> str:
        """Returns the short text for tables."""
        return "server Adam"

    def make(self) -> Optimizer:
        """Returns the server's optimizer, for the negative update as gradient."""
        return adam(self.beta1, self.beta2, self.tau, debias=False)


ServerSpec = Annotated[ServerSgd | ServerAdam, Field(discriminator="kind")]


class TrainSpec(Spec):
    """One training, complete: equal specs give equal models.

    Attributes:
        data: Where the images come from.
        partition: Which hospital holds which.
        model: The network.
        pretraining: On public images, for better initial weights; None: random ones.
        algorithm: How the hospitals collaborate, or one of the baselines without collaboration.
        local: How a client trains.
        server: What the server does with the aggregated update.
        aggregation: How updates become one.
        averaging: Makes a moving average of the weights the model; None: the weights after the last round.
        defence: Training objective against inference-time attacks.
        early_stopping: Makes the round with the highest robust accuracy on other images the model; None: the last.
        privacy: Differential privacy.
        threat: What malicious clients do at training time.
        codec: How updates are written for the network; None: in float32.
        downlink: How the model's change in a round is written on its way down; everybody, the server included, goes on
            from what was written. None: the whole model comes down in every round, in float32.
        pruning: Makes the smallest weights zero while the model is trained; None: none.
        quantisation: Trains the model as int8 will compute it; None: in float.
        teacher: A larger network that is trained first, and that the model learns from; None: from the labels alone.
        rounds: Rounds of the federation; epochs of training pass by `local`.
        seed: Of everything random.
    """

    data: DataSpec = Phantom()
    partition: PartitionSpec = Iid(num_clients=3)
    model: ModelSpec = Resnet9(width=16)
    pretraining: Pretraining | None = None
    algorithm: AlgorithmSpec = FedAvg()
    local: Local = Local()
    server: ServerSpec = ServerSgd()
    aggregation: AggregationSpec = Mean()
    averaging: Averaging | None = None
    defence: DefenceSpec = NoDefence()
    early_stopping: EarlyStopping | None = None
    privacy: PrivacySpec = NoPrivacy()
    threat: ThreatSpec = NoThreat()
    codec: CodecSpec | None = None
    downlink: CodecSpec | None = None
    pruning: GradualPruning | None = None
    quantisation: Int8Training | None = None
    rounds: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)
    teacher: Teacher | None = None

    @model_validator(mode="after")
    def _clients_exist(self) -> "TrainSpec":
        num_clients = self.partition.num_clients
        self.threat.malicious(num_clients)  # raises with the field and the remedy
        if isinstance(self.algorithm, LocalOnly) and (self.algorithm.client or 0) >= num_clients:
            raise ValueError(
                f"algorithm.client {self.algorithm.client} is not one of the {num_clients} clients (0-based)"
            )
        if not isinstance(self.algorithm, FedAvg):
            return self
        per_round, weights = self.algorithm.clients_per_round, self.algorithm.weights
        if per_round is not None and per_round > num_clients:
            raise ValueError(
                f"algorithm.clients_per_round {per_round} exceeds the {num_clients} clients of the partition"
            )
        self.aggregation.check(per_round or num_clients)  # raises with both numbers
        if isinstance(weights, tuple) and len(weights) != num_clients:
            raise ValueError(
                f"algorithm.weights has {len(weights)} numbers for {num_clients} clients; give one for each"
            )
        return self

    @model_validator(mode="after")
    def _privacy_is_sound(self) -> "TrainSpec":
        reason = why_unsound(self) or why_no_looks(self) or why_no_root(self) or why_no_such_threat(self)
        reason = reason or why_no_codec(self) or why_no_downlink(self) or why_no_pruning(self)
        reason = reason or why_no_teacher(self)
        if reason:
            raise ValueError(reason)
        return self

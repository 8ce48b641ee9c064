"""What a guarantee does not cover, one phrase each, for a report and a data-protection officer."""

import math
from collections.abc import Mapping

import numpy as np

from trilemma.data.specs import Phantom
from trilemma.federation.server import Federation
from trilemma.federation.specs import Centralised, FedAvg
from trilemma.privacy.accounting import epsilon
from trilemma.privacy.guarantee import DpEvent, group_in_words
from trilemma.privacy.specs import DpSgd

_COUNTED = {
    "example": "the number of records of each hospital (published: it sets the sampling rate)",
    "patient": "the number of patients of each hospital (published: it sets the sampling rate)",
    "client": "the number of hospitals (published: it sets the sampling rate)",
}


def outside_phrases(
    federation: Federation,
    privacy: DpSgd,
    events: Mapping[str, tuple[DpEvent, ...]],
    promised: Mapping[str, float],
) -> tuple[str, ...]:
    """Returns everything that the guarantee of a training leaves open.

    Args:
        federation: The training.
        privacy: Its privacy.
        events: Those that ran, by client.
        promised: The epsilon that they come to, of each client to whom something is promised.
    """
    phrases = [
        *malicious_outside(federation),
        _COUNTED[privacy.unit],
        _curves(privacy),
        "what a report tells of the data: counts of classes and patients, test or validation images and accuracies",
        "other models trained on the same images: where several are released, their epsilons and deltas add up",
        "the choice of settings, if they were chosen by looking at private results",
        *patients_outside(federation, privacy, max(promised.values(), default=0.0)),
    ]
    pretraining = federation.spec.pretraining
    if pretraining is not None:
        synthetic = "synthetic " if isinstance(pretraining.data, Phantom) else ""
        phrases.append(
            f"the {synthetic}images of {pretraining.data.label}, on which the initial weights were trained: they are "
            "taken for public and not protected"
        )
    phrases += _of_choices(federation)
    if privacy.unit == "client":
        phrases.append(
            "which hospitals took part in which round: the server must keep it secret, and with it what tells of it, "
            "the traffic, memory and time of each round and in all; no report or export holds them, whoever runs the "
            "study can see them"
        )
    honest = {name: steps for name, steps in events.items() if name in promised}
    phrases += _of_noise(privacy) + _of_curious_hospitals(federation, privacy, honest)
    if isinstance(federation.spec.algorithm, FedAvg) and isinstance(federation.spec.algorithm.weights, tuple):
        phrases.append("the weights of the hospitals, which must not have been chosen by looking at private images")
    return tuple(phrases)


def _of_choices(federation: Federation) -> list[str]:
    """Returns what was chosen by something else than the private steps."""
    spec, phrases = federation.spec, []
    if spec.local.class_shares is not None:
        shares = ", ".join(f"{share:g}" for share in spec.local.class_shares)
        phrases.append(f"the class shares {shares}, which must be public and not counted in private images")
    if spec.early_stopping is not None:
        phrases.append("which round's model it is, chosen by images that are taken for public and not protected")
    return phrases


def _curves(privacy: DpSgd) -> str:
    if privacy.noise == "system" or privacy.unit == "client":
        return "the curves of validation, shown to whoever runs the study (those of training are not kept)"
    return "the curves of training and validation, shown to whoever runs the study"


def _of_noise(privacy: DpSgd) -> list[str]:
    """Returns what noise from the operating system leaves open."""
    if privacy.noise != "system":
        return []
    phrases = [
        "a round that was begun before the program was killed, and done again with other noise: it is counted once, "
        "because nothing of it had left the process"
    ]
    if privacy.trust == "distributed":
        phrases.append(
            "the rounding of each hospital's contribution to floating point; a secure sum of whole numbers has none"
        )
    return phrases


def _of_curious_hospitals(
    federation: Federation, privacy: DpSgd, events: Mapping[str, tuple[DpEvent, ...]]
) -> list[str]:
    """Returns what a hospital learns that knows its own share of the noise, where no share is there to spare."""
    plan = federation.clients[0].plan
    if privacy.trust != "distributed" or privacy.num_colluding or plan is None or plan.num_honest == 1:
        return []
    left = math.sqrt(1 - 1 / plan.num_honest)
    weaker = [
        [event.model_copy(update={"noise_multiplier": event.noise_multiplier * left}) for event in steps]
        for steps in events.values()
    ]
    largest = math.ceil(100 * max((epsilon(steps, privacy.delta) for steps in weaker), default=0.0)) / 100
    return [
        "a hospital that takes part: it can take its own share of the noise away, and against it "
        f"{plan.num_honest - 1} of {plan.num_honest} shares are left, {left:.3f} of the stated noise, so that epsilon "
        f"is at most {largest:.2f} (num_colluding = 1 or more covers any one such hospital)"
    ]


def unpromised(federation: Federation) -> frozenset[str]:
    """Returns the names of the clients to whose records nothing is promised: those that hold malicious shards only."""
    privacy = federation.spec.privacy
    if isinstance(privacy, DpSgd) and privacy.unit == "client":
        return frozenset()
    return frozenset(client.name for client in federation.clients if client.malicious)


def malicious_outside(federation: Federation) -> list[str]:
    """Returns for each hospital on which the study's threat acts that nothing is promised for its images.

    Which of its records are poisoned, and how, is drawn for all of them together (`choose_records`), so that one record
    less changes others too, and the guarantee would be one of the records as poisoned. The other hospitals keep theirs:
    what a threat makes depends on the models that were released and on the malicious hospital's own records. Under unit
    "client" a hospital goes with all that it holds, poisoned or not, so that its guarantee stands.
    """
    privacy, pooled = federation.spec.privacy, isinstance(federation.spec.algorithm, Centralised)
    if isinstance(privacy, DpSgd) and privacy.unit == "client":
        return []
    names = [
        f"hospital {shard.hospital + 1} of the pool" if pooled else client.name
        for client in federation.clients
        for shard in client.shards
        if shard.malicious
    ]
    return [f"{name} is malicious in this study: nothing is promised for its images" for name in names]


def patients_outside(federation: Federation, privacy: DpSgd, largest: float) -> list[str]:
    """Returns what a guarantee of at most epsilon `largest` leaves open for patients who have several images."""
    if privacy.unit == "client":
        return [
            "images of one patient, where the hospital's others stay: they count as 2 hospitals, one less and one "
            f"more; {_together('hospitals')}, so that for 2 {group_in_words(largest, privacy.delta, 2)}"
        ]
    if privacy.unit == "patient":
        if isinstance(federation.spec.algorithm, Centralised):
            return ["a patient who goes by two names in the data: the two count as two patients"]
        two = "a patient with images at two hospitals: the epsilons of both add up, and"
        if privacy.trust == "distributed":  # the noise of one sum protects both: a group of two, and no composition
            return [f"{two} for such a patient {group_in_words(largest, privacy.delta, 2)}"]
        return [f"{two} their deltas"]
    codes_N = np.concatenate([shard.records.patients_N for client in federation.clients for shard in client.shards])
    if (codes_N < 0).any():
        return [
            f"a patient with several images: {_together('images')}, so that for 2 "
            f"{group_in_words(largest, privacy.delta, 2)}; which belong together is not known"
        ]
    most = int(np.unique(codes_N, return_counts=True)[1].max(initial=0))
    if most <= 1:
        return []
    return [
        f"a patient with several images: {_together('images')}; here some patient has {most}, and for {most} "
        f"{group_in_words(largest, privacy.delta, most)}"
    ]


def _together(units: str) -> str:
    """Returns the theorem of group privacy in words."""
    return f"k {units} have k times this epsilon and k * e^((k - 1) * epsilon) times this delta"

"""What a guarantee does not cover, one phrase each, for a report and a data-protection officer."""

import math

import numpy as np

from trilemma.data.specs import Phantom
from trilemma.federation.server import Federation
from trilemma.federation.specs import Centralised, FedAvg
from trilemma.privacy.accounting import epsilon
from trilemma.privacy.guarantee import DpEvent
from trilemma.privacy.specs import DpSgd

_COUNTED = {
    "example": "the number of records of each hospital (published: it sets the sampling rate)",
    "patient": "the number of patients of each hospital (published: it sets the sampling rate)",
    "client": "the number of hospitals (published: it sets the sampling rate)",
}


def outside_phrases(federation: Federation, privacy: DpSgd, events: dict[str, tuple[DpEvent, ...]]) -> tuple[str, ...]:
    """Returns everything that the guarantee of a training leaves open; `events` are those that ran, by client."""
    phrases = [
        _COUNTED[privacy.unit],
        _curves(privacy),
        "what a report tells of the data: counts of classes and patients, test images and test accuracies",
        "other models trained on the same images: where several are released, their epsilons add up",
        "the choice of settings, if they were chosen by looking at private results",
        *patients_outside(federation),
    ]
    pretraining = federation.spec.pretraining
    if pretraining is not None:
        synthetic = "synthetic " if isinstance(pretraining.data, Phantom) else ""
        phrases.append(
            f"the {synthetic}images of {pretraining.data.label}, on which the initial weights were trained: they are "
            "taken for public and not protected"
        )
    if privacy.unit == "client":
        phrases.append(
            "which hospitals took part in which round: the server must keep it secret, and with it what tells of it, "
            "each round's traffic and time; no report or export holds them, whoever runs the study can see them"
        )
    phrases += _of_noise(privacy) + _of_curious_hospitals(federation, privacy, events)
    if isinstance(federation.spec.algorithm, FedAvg) and isinstance(federation.spec.algorithm.weights, tuple):
        phrases.append("the weights of the hospitals, which must not have been chosen by looking at private images")
    return tuple(phrases)


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


def _of_curious_hospitals(federation: Federation, privacy: DpSgd, events: dict[str, tuple[DpEvent, ...]]) -> list[str]:
    """Returns what a hospital learns that knows its own share of the noise, where no share is there to spare."""
    plan = federation.clients[0].plan
    if privacy.trust != "distributed" or privacy.num_colluding or plan is None or plan.num_honest == 1:
        return []
    left = math.sqrt(1 - 1 / plan.num_honest)
    weaker = [
        [event.model_copy(update={"noise_multiplier": event.noise_multiplier * left}) for event in steps]
        for steps in events.values()
    ]
    largest = math.ceil(100 * max(epsilon(steps, privacy.delta) for steps in weaker)) / 100
    return [
        "a hospital that takes part: it can take its own share of the noise away, and against it "
        f"{plan.num_honest - 1} of {plan.num_honest} shares are left, {left:.3f} of the stated noise, so that epsilon "
        f"is at most {largest:.2f} (num_colluding = 1 or more covers any one such hospital)"
    ]


def patients_outside(federation: Federation) -> list[str]:
    """Returns what the unit of a guarantee leaves open for patients who have several images."""
    privacy = federation.spec.privacy
    if not isinstance(privacy, DpSgd) or privacy.unit == "client":
        return ["a patient with images at several hospitals: k hospitals have k times this epsilon"]
    if privacy.unit == "patient":
        if isinstance(federation.spec.algorithm, Centralised):
            return ["a patient who goes by two names in the data: the two count as two patients"]
        return ["a patient with images at two hospitals: the epsilons of both add up"]
    codes = [shard.records.patients_N for client in federation.clients for shard in client.shards]
    if any((patients_N < 0).any() for patients_N in codes):
        return ["a patient with several images: k images have k times this epsilon; which belong together is not known"]
    most = max(int(np.unique(patients_N, return_counts=True)[1].max(initial=0)) for patients_N in codes)
    if most <= 1:
        return []
    return [f"a patient with several images: k images have k times this epsilon, and here some have up to {most}"]

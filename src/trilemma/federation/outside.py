"""What a guarantee does not cover, one phrase each, for a report and a data-protection officer."""

import numpy as np

from trilemma.federation.server import Federation
from trilemma.federation.specs import Centralised, FedAvg
from trilemma.privacy.specs import DpSgd

_COUNTED = {
    "example": "the number of records of each hospital (published: it sets the sampling rate)",
    "patient": "the number of patients of each hospital (published: it sets the sampling rate)",
    "client": "the number of hospitals (published: it sets the sampling rate)",
}


def outside_phrases(federation: Federation, privacy: DpSgd) -> tuple[str, ...]:
    """Returns everything that the guarantee of a training leaves open."""
    phrases = [
        _COUNTED[privacy.unit],
        "the curves of training and validation, shown to whoever runs the study",
        "what a report tells of the data: counts of classes and patients, test images and test accuracies",
        "other models trained on the same images: where several are released, their epsilons add up",
        "the choice of settings, if they were chosen by looking at private results",
        *patients_outside(federation),
    ]
    if privacy.unit == "client":
        phrases.append("which hospitals took part in which round: the server must keep it secret")
    if privacy.trust == "distributed" and privacy.noise == "system":
        phrases.append(
            "the rounding of each hospital's contribution to floating point; a secure sum of whole numbers has none"
        )
    if isinstance(federation.spec.algorithm, FedAvg) and isinstance(federation.spec.algorithm.weights, tuple):
        phrases.append("the weights of the hospitals, which must not have been chosen by looking at private images")
    return tuple(phrases)


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

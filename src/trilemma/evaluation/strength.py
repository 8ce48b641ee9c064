"""How strong an attack is: which one a study's models are judged by, and when there is none to judge them by."""

from trilemma.attacks.evasion.attack import Attack
from trilemma.attacks.evasion.specs import Apgd, AutoAttack, Fgsm
from trilemma.evaluation.specs import AllAtOnce, Transfer

TRANSFERRED, SINGLE_STEP, BLACK_BOX, GRADIENTS, SELF_TUNING, ENSEMBLE = range(6)

#: From here on attacks tune themselves or fail in different ways: without any of them a robust accuracy may be far too
#: high.
STRONG = SELF_TUNING

#: Steps with which an APGD has halved its own often enough to count as one that tunes itself.
ENOUGH_STEPS = 40


def strength(spec: Attack | Transfer | AllAtOnce) -> int:
    """Returns the strength of an evaluation that attacks; of two the higher one judges.

    Several attacks at once are as strong as the strongest of them, and one more where that follows gradients over many
    steps and another does without gradients: these fail in different ways.
    """
    if isinstance(spec, AllAtOnce):
        each = [strength(part) for part in spec.attacks]
        differ = max(each) >= GRADIENTS and not all(sees_gradients(part) for part in spec.attacks)
        return min(max(each) + differ, ENSEMBLE)
    if isinstance(spec, Transfer):
        return TRANSFERRED
    if isinstance(spec, AutoAttack):
        return ENSEMBLE if spec.effort == "full" else SELF_TUNING
    if isinstance(spec, Fgsm):
        return SINGLE_STEP
    if isinstance(spec, Apgd) and spec.steps >= ENOUGH_STEPS:
        return SELF_TUNING
    return GRADIENTS if spec.sees_gradients else BLACK_BOX


def sees_gradients(spec: Attack | Transfer | AllAtOnce) -> bool:
    """Returns whether an evaluation speaks of an attacker who knows the model: some of it follows its gradients."""
    if isinstance(spec, AllAtOnce):
        return any(sees_gradients(part) for part in spec.attacks)
    return isinstance(spec, Attack) and spec.sees_gradients

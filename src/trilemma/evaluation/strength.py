"""How strong an attack is: which one a study's models are judged by, and when there is none to judge them by."""

from trilemma.attacks.evasion.attack import Attack
from trilemma.attacks.evasion.specs import Apgd, AutoAttack, Fgsm, MiFgsm, Pgd
from trilemma.evaluation.specs import AllAtOnce, Transfer

TRANSFERRED, FEW_STEPS, BLACK_BOX, GRADIENTS, SELF_TUNING, ENSEMBLE = range(6)

#: From here on attacks tune themselves: without any of them a robust accuracy may be far too high.
STRONG = SELF_TUNING

#: Steps with which an attack that climbs at a radius is more than a hint, and with which an APGD has halved its own
#: often enough to count as one that tunes itself.
SOME_STEPS, ENOUGH_STEPS = 10, 40


def strength(spec: Attack | Transfer | AllAtOnce) -> int:
    """Returns the strength of an evaluation that attacks; of two the higher one judges.

    Several attacks at once are as strong as the strongest of them.
    """
    if isinstance(spec, AllAtOnce):
        return max(strength(part) for part in spec.attacks)
    if isinstance(spec, Transfer):
        return TRANSFERRED
    if isinstance(spec, AutoAttack):
        return ENSEMBLE if spec.effort == "full" else SELF_TUNING
    if isinstance(spec, Fgsm) or (isinstance(spec, Pgd | MiFgsm | Apgd) and spec.steps < SOME_STEPS):
        return FEW_STEPS
    if isinstance(spec, Apgd) and spec.steps >= ENOUGH_STEPS:
        return SELF_TUNING
    return GRADIENTS if spec.sees_gradients else BLACK_BOX

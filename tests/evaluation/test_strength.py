"""Which of two attacks judges."""

from typing import get_args

from trilemma.attacks.evasion.specs import (
    Apgd,
    AutoAttack,
    CarliniWagner,
    DeepFool,
    EvasionSpec,
    Fab,
    Fgsm,
    HopSkipJump,
    MiFgsm,
    Pgd,
    Square,
)
from trilemma.evaluation.specs import AllAtOnce, Transfer
from trilemma.evaluation.strength import STRONG, strength

R = (0.1,)
TRANSFER = Transfer(attack=Pgd(radii=R))
#: Weakest first; those of a line are equally strong.
ORDER = [
    [TRANSFER],
    [
        Fgsm(radii=R), Fgsm(radii=R, random_start=True), AllAtOnce(attacks=(Fgsm(radii=R), TRANSFER)),
        Pgd(radii=R, steps=1), MiFgsm(radii=R, steps=9), Apgd(radii=R, steps=1),
    ],
    [Square(radii=R), HopSkipJump(radii=R), AllAtOnce(attacks=(Square(radii=R), Fgsm(radii=R)))],
    [
        Pgd(radii=R), MiFgsm(radii=R), DeepFool(radii=R), CarliniWagner(radii=R), Fab(radii=R), Apgd(radii=R, steps=39),
        AllAtOnce(attacks=(Pgd(radii=R), Fab(radii=R))), AllAtOnce(attacks=(Pgd(radii=R), Square(radii=R))),
    ],
    [Apgd(radii=R), AutoAttack(radii=R, effort="quick"), AllAtOnce(attacks=(Apgd(radii=R), TRANSFER))],
    [AutoAttack(radii=R), AllAtOnce(attacks=(AutoAttack(radii=R), TRANSFER))],
]  # fmt: skip


def test_order():
    assert [{strength(spec) for spec in line} for line in ORDER] == [{i} for i in range(6)]
    assert [min(strength(spec) for spec in line) >= STRONG for line in ORDER] == [False] * 4 + [True] * 2


def test_every_attack_has_a_strength():
    told = {type(spec) for line in ORDER for spec in line}
    assert told == {*get_args(get_args(EvasionSpec)[0]), Transfer, AllAtOnce}

import pytest
from pydantic import TypeAdapter, ValidationError

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.specs import AutoAttack, Fgsm, MiFgsm, Pgd
from trilemma.evaluation.specs import (
    AllAtOnce,
    Clean,
    Cost,
    Diagnostics,
    EvaluationSpec,
    Transfer,
)

read = TypeAdapter(EvaluationSpec).validate_python
radii = ("1/255", "4/255")

MEMBERS = [
    Clean(),
    Fgsm(radii=radii),
    Pgd(norm="l2", radii=[0.5, 1], steps=10, restarts=2),
    Transfer(attack=MiFgsm(radii=radii)),
    AllAtOnce(attacks=[Fgsm(radii=radii), Pgd(radii=radii), Transfer(attack=Pgd(radii=radii))]),
    Cost(),
    AutoAttack(radii=radii),
    Diagnostics(radius="4/255"),
]


def test_every_member_survives_json():
    for spec in MEMBERS:
        again = read(spec.model_dump(mode="json"))
        assert again == spec and again.key == spec.key and type(again) is type(spec)


def test_labels_are_short_and_distinct():
    assert [spec.label for spec in MEMBERS] == [
        "clean",
        "FGSM Linf",
        "PGD-10x2 L2",
        "transfer MI-FGSM-10 Linf",
        "all at once Linf",
        "cost",
        "AutoAttack Linf",
        "diagnostics Linf 4/255",
    ]


def test_a_radius_is_a_fraction_or_a_number_alone_or_in_a_list():
    expected = Fgsm(radii=(4 / 255,))
    assert read({"kind": "fgsm", "radius": "4/255"}) == expected
    assert read({"kind": "fgsm", "radii": "4/255"}) == expected
    assert read({"kind": "fgsm", "radii": [4 / 255]}).key == expected.key
    assert expected.budgets == (Budget("linf", 4 / 255),)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "pgd"}, "radii"),
        ({"kind": "pgd", "radii": []}, "at least one radius"),
        ({"kind": "pgd", "radius": 0}, "must be positive"),
        ({"kind": "pgd", "radius": -1}, "greater than or equal to 0"),
        ({"kind": "pgd", "radius": "4/0"}, "neither a number nor a fraction"),
        ({"kind": "pgd", "radii": ["4/255", "4/255"]}, "ascend"),
        ({"kind": "pgd", "radii": ["8/255", "4/255"]}, "ascend"),
        ({"kind": "pgd", "radius": 4}, "at most 1"),
        ({"kind": "pgd", "radius": 0.1, "radii": [0.1]}, "not both"),
        ({"kind": "pgd", "radius": 0.1, "steps": 0}, "greater than or equal to 1"),
        ({"kind": "pgd", "radius": 0.1, "norm": "l1"}, "linf"),
        ({"kind": "pgd", "radius": 0.1, "epsilon": 0.1}, "Extra inputs"),
        ({"kind": "fgsm", "radius": 0.1, "steps": 3}, "Extra inputs"),
        ({"kind": "autoattak", "radius": 0.1}, "all_at_once"),
        ({"kind": "transfer"}, "a transfer needs radii"),
        ({"kind": "transfer", "radius": 0.1, "step": 3}, "unknown field step; valid are attack"),
        ({"kind": "transfer", "attack": {"kind": "square", "radius": 0.1}}, "'mifgsm'"),
        ({"kind": "carlini_wagner", "norm": "linf", "radius": 0.1}, "minimises the L2 length"),
        ({"kind": "apgd", "radius": 0.1, "num_targets": 1}, "aims at no class"),
        ({"kind": "diagnostics", "radius": 0}, "greater than 0"),
        ({"kind": "diagnostics", "radius": 4}, "beyond 1"),
        ({"kind": "cost", "repeats": 1}, "greater than or equal to 5"),
        ({"kind": "all_at_once", "attacks": [{"kind": "fgsm", "radius": 0.1}]}, "at least 2"),
        (
            {"kind": "all_at_once", "attacks": [{"kind": "fgsm", "radius": 0.1}, {"kind": "pgd", "radius": 0.2}]},
            "same norm and the same radii",
        ),
        (
            {"kind": "all_at_once", "attacks": [{"kind": "fgsm", "radius": 0.1}, {"kind": "fgsm", "radius": 0.1}]},
            "stands here twice",
        ),
    ],
)
def test_impossible_values_are_refused_with_a_sentence(wrong, message):
    with pytest.raises(ValidationError, match=message):
        read(wrong)


def test_an_l2_radius_may_be_large():
    assert Pgd(norm="l2", radii=(3.0,)).budgets == (Budget("l2", 3.0),)


def test_a_transfer_may_be_written_with_the_fields_of_pgd():
    read_flat = read({"kind": "transfer", "radii": radii, "steps": 7, "restarts": 2, "loss": "margin"})
    assert read_flat == Transfer(attack=Pgd(radii=radii, steps=7, restarts=2, loss="margin"))


def test_all_at_once_has_the_budgets_of_its_attacks():
    spec = MEMBERS[4]
    assert isinstance(spec, AllAtOnce)
    assert spec.budgets == spec.attacks[0].budgets and spec.norm == "linf" and spec.radii == (1 / 255, 4 / 255)

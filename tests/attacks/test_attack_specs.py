import pytest
from pydantic import TypeAdapter, ValidationError

from trilemma.attacks.poisoning.specs import AdversarialSamples, LabelFlip, NoThreat, ThreatSpec


def test_labels():
    assert NoThreat().label == "none"
    assert LabelFlip(num_malicious=1).label == "label flip 100 % by 1 client"
    assert LabelFlip(clients=(0, 2), mode="next", share=0.5).label == "label flip to next 50 % by clients 0, 2"
    samples = AdversarialSamples(num_malicious=2, radius="8/255")
    assert samples.label == "adversarial samples Linf 8/255 50 % by 2 clients"


@pytest.mark.parametrize(
    ("union", "fields", "message"),
    [
        (ThreatSpec, {"kind": "label_flip"}, "exactly one of num_malicious and clients"),
        (ThreatSpec, {"kind": "label_flip", "num_malicious": 1, "clients": [0]}, "exactly one"),
        (ThreatSpec, {"kind": "label_flip", "clients": []}, "one or more different indices"),
        (ThreatSpec, {"kind": "label_flip", "clients": [1, 1]}, "one or more different indices"),
        (ThreatSpec, {"kind": "label_flip", "clients": [-1]}, "one or more different indices"),
        (ThreatSpec, {"kind": "label_flip", "num_malicious": 0}, "greater than or equal to 1"),
        (ThreatSpec, {"kind": "label_flip", "num_malicious": 1, "share": 0}, "greater than 0"),
        (ThreatSpec, {"kind": "adversarial_samples", "num_malicious": 1, "radius": 8}, "beyond 1"),
        (ThreatSpec, {"kind": "adversarial_samples", "num_malicious": 1, "radius": "8/x"}, "neither a number nor"),
    ],
)
def test_impossible_values_are_refused(union, fields, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(union).validate_python(fields)


def test_a_radius_may_be_a_fraction_and_gives_the_same_key():
    read = TypeAdapter(ThreatSpec).validate_python(
        {"kind": "adversarial_samples", "num_malicious": 1, "radius": "8/255"}
    )
    assert read.key == AdversarialSamples(num_malicious=1).key


def test_who_is_malicious():
    assert NoThreat().malicious(3) == ()
    assert LabelFlip(num_malicious=2).malicious(5) == (3, 4)
    assert LabelFlip(num_malicious=3).malicious(3) == (0, 1, 2)
    assert AdversarialSamples(clients=(2, 0)).malicious(3) == (0, 2)
    with pytest.raises(ValueError, match="num_malicious = 4 is more than the 3 clients"):
        LabelFlip(num_malicious=4).malicious(3)
    with pytest.raises(ValueError, match="malicious client 3 does not exist"):
        AdversarialSamples(clients=(0, 3)).malicious(3)

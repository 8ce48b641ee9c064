"""What a study may say about its data."""

import pytest
from pydantic import TypeAdapter, ValidationError

from trilemma.data.specs import DataSpec, Folder, Manifest, Phantom

DATA = TypeAdapter(DataSpec)
ONE_OF_EACH = [
    {"kind": "phantom"},
    {"kind": "medmnist", "name": "bloodmnist"},
    {"kind": "pneumonia"},
    {"kind": "folder", "path": "mine"},
    {"kind": "manifest", "path": "lists/mine.csv"},
    {"kind": "cifar10"},
    {"kind": "pcam"},
]


@pytest.mark.parametrize("given", ONE_OF_EACH, ids=lambda given: given["kind"])
def test_every_kind_is_known_has_a_label_and_survives_json(given):
    spec = DATA.validate_python(given)
    assert spec.kind == given["kind"] and spec.label
    assert DATA.validate_json(spec.model_dump_json()) == spec
    assert spec.key.startswith("s2:")
    with pytest.raises(ValidationError):
        DATA.validate_python(given | {"sizes": 3})


def test_the_union_is_covered():
    assert {given["kind"] for given in ONE_OF_EACH} == set(DATA.json_schema()["discriminator"]["mapping"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "phantoms"},
        {"kind": "phantom", "size": 15},
        {"kind": "phantom", "classes": 4},
        {"kind": "phantom", "shift": -0.1},
        {"kind": "phantom", "test": 0},
        {"kind": "folder"},
        {"kind": "folder", "path": ""},
        {"kind": "folder", "path": "x", "val_fraction": 0.9},
        {"kind": "pcam", "max_records": 0},
        {},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        DATA.validate_python(wrong)


def test_keys_follow_every_field():
    assert Phantom().key == Phantom(size=64).key != Phantom(seed=1).key
    assert Folder(path="a").label == "a 64" and Manifest(path="b/c.csv", size=28).label == "c 28"

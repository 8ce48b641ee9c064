import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from trilemma.spec import Radius, Spec, content_key

radius = TypeAdapter(Radius)


class Example(Spec):
    count: int = 1
    size: float = 0.5


def test_a_golden_key():
    # BLAKE2b of '[{"a":1,"b":[0.5,"x",null,true]}]'. A change orphans every stored result: raise KEY_VERSION then.
    assert content_key({"a": 1, "b": [0.5, "x", None, True]}) == "s2:4444f8e73c28663c811a1ca4"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(-1e6, 1e6) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(value=st.dictionaries(st.text(max_size=3), json_values, max_size=4))
def test_the_order_of_fields_makes_no_difference(value):
    turned = dict(reversed(value.items()))
    assert content_key(value) == content_key(turned)
    assert content_key(value, 1) != content_key(value)


def test_what_makes_a_difference_and_what_does_not():
    assert content_key({"a": 1}) == content_key({"a": 1.0})
    assert content_key([0.0]) == content_key([-0.0]) == content_key((0,))
    keys = [content_key(v) for v in (1, 1.5, "1", True, None, [1], {"1": 1}, [[1]], "true")]
    assert len(set(keys)) == len(keys)
    assert content_key(1, 2) != content_key([1, 2])
    with pytest.raises(ValueError):
        content_key(math.nan)


def test_defaults_are_part_of_the_key():
    assert Example().key == Example(count=1, size=0.5).key
    assert Example().key == content_key({"count": 1, "size": 0.5})
    assert Example(size=2).key == Example(size=2.0).key != Example().key


def test_a_further_optional_field_leaves_the_keys_as_they_are():
    class Later(Example):
        limit: int | None = None
        inner: Example | None = None

    class Usually(Example):
        limit: int | None = 5

    assert Later().key == Example().key
    assert Later(inner=Later()).key == content_key({"count": 1, "size": 0.5, "inner": {"count": 1, "size": 0.5}})
    assert len({Later().key, Later(limit=1).key, Usually().key, Usually(limit=None).key}) == 4
    assert Later.model_validate(Later().model_dump(mode="json")) == Later()


@pytest.mark.parametrize("fields", [{"cuont": 1}, {"size": math.inf}, {"size": math.nan}, {"count": "x"}])
def test_specs_refuse_what_they_do_not_know(fields):
    with pytest.raises(ValidationError):
        Example(**fields)


class Switches(Spec):
    on: bool = False
    either: bool | int = 0
    sizes: tuple[float, ...] = ()
    radius: Radius = 0.0
    inner: Example = Example()
    free: dict[str, Any] = {}


@pytest.mark.parametrize(
    "fields",
    [
        {"sizes": [True]},
        {"sizes": (1.0, False)},
        {"radius": True},
        {"inner": {"count": True}},
        {"inner": {"size": False}},
    ],
)
def test_true_is_no_number(fields):
    with pytest.raises(ValidationError, match="takes neither true nor false"):
        Switches(**fields)


def test_true_stays_what_it_is_where_it_may_be():
    made = Switches(on=True, either=True, free={"use_bn": True, "layers": [False, 1]})
    assert made.on is True and made.either is True and made.free == {"use_bn": True, "layers": [False, 1]}
    assert Switches(inner=Example(count=2)).inner.count == 2


def test_specs_are_frozen():
    with pytest.raises(ValidationError):
        Example().count = 2


@pytest.mark.parametrize(
    ("said", "value"),
    [("4/255", 4 / 255), (" 8 / 255 ", 8 / 255), (0.1, 0.1), ("0.1", 0.1), ("1e-3", 1e-3), (0, 0.0), ("0", 0.0)],
)
def test_a_radius_may_be_a_fraction(said, value):
    assert radius.validate_python(said) == value


@pytest.mark.parametrize("said", ["four", "1/0", "", "4/", "/255", "1/2/3", -1, "-1/255", None, "1" + "0" * 400 + "/1"])
def test_what_is_no_radius_is_refused(said):
    with pytest.raises(ValidationError):
        radius.validate_python(said)


@pytest.mark.parametrize("said", ["nan", "inf", "1e400", "1e999999999"])
def test_a_radius_in_a_spec_is_finite(said):
    class Attack(Spec):
        radius: Radius

    with pytest.raises(ValidationError, match="finite"):
        Attack(radius=said)

"""Specs: frozen, self-validating descriptions of what to do, and the content keys that name them.

The discriminated union over `kind` is the registry: `{ kind = "krum" }` selects the class `Krum`. A key is a hash
of the resolved spec, defaults included, so equal requests have equal names whatever file they were written in.
"""

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

KEY_VERSION = "s2"


class Spec(BaseModel):
    """Base of everything that a study file may say."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """Refuses true and false where a number is meant; Python would take them for 1 and 0."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(name)
            if field and _has_bool(value) and not _mentions(field.annotation, bool):
                raise ValueError(f"{name} takes neither true nor false")
        return values

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out optional fields that are None, so that a spec can get another one and all keys stay."""
        fields = type(self).model_fields
        return {name: v for name, v in write(self).items() if v is not None or fields[name].default is not None}

    @property
    def key(self) -> str:
        """Returns the content key of this spec."""
        return content_key(self.model_dump(mode="json"))


def _mentions(annotation: Any, wanted: type) -> bool:
    return annotation in (wanted, Any) or any(_mentions(argument, wanted) for argument in get_args(annotation))


def _has_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_has_bool, value)))


def content_key(*parts: Any) -> str:
    """Returns the key of JSON-like parts: key order and 1 against 1.0 make no difference."""
    text = json.dumps([_canonical(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{KEY_VERSION}:{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _canonical(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _parse_fraction(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        text = value.replace(" ", "")
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"'{value}' is neither a number nor a fraction such as '4/255'") from None


#: A perturbation radius in pixel units (images lie in [0, 1]); a study may write it as a fraction, "4/255".
Radius = Annotated[float, BeforeValidator(_parse_fraction), Field(ge=0)]

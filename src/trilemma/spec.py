"""Specs: frozen, self-validating descriptions of what to do, and the content keys that name them.

The discriminated union over `kind` is the registry: `{ kind = "krum" }` selects the class `Krum`. A key is a hash
of the resolved spec, defaults included, so equal requests have equal names whatever file they were written in.
"""

import hashlib
import json
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

KEY_VERSION = "s1"


class Spec(BaseModel):
    """Base of everything that a study file may say."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @property
    def key(self) -> str:
        """Returns the content key of this spec."""
        return content_key(self.model_dump(mode="json"))


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

"""From a study file to a validated study: the one door to TOML, and the place where mistakes become messages."""

import difflib
import tomllib
from itertools import zip_longest
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trilemma.errors import UserError
from trilemma.study.specs import Study


def load_study(path: Path, overrides: tuple[str, ...] = ()) -> Study:
    """Reads a study file.

    Args:
        path: The TOML file.
        overrides: "field.field=value" each, the value as TOML (a bare word is a string).

    Raises:
        UserError: Naming the file, the field and what to do.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            str(path), "there is no such file", "Give the path of a study file, such as studies/quickstart.toml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"could not be read ({error})", "Give the path of a study file in UTF-8") from None
    return parse_study(text, str(path), overrides)


def parse_study(text: str, where: str, overrides: tuple[str, ...] = ()) -> Study:
    """Returns the study that a file's text describes.

    Args:
        text: TOML.
        where: What to call the file in a message.
        overrides: As of `load_study`.

    Raises:
        UserError: As of `load_study`.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(where, f"is not valid TOML: {error}", "Mend the line it names") from None
    except RecursionError:
        raise UserError(where, "nests tables or lists too deeply", "Write it flatter") from None
    for override in overrides:
        _apply(raw, override)
    return validate(Study, raw, where)


def validate(model: type[BaseModel], raw: dict[str, Any], where: str, prefix: str = "") -> Any:
    """Returns `model` made from `raw`, or raises the first mistake as a UserError."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = _most_telling(error.errors())
        place = ".".join([part for part in (prefix, _place(first, raw)) if part])
        problem, remedy = _explain(first, model, raw)
        raise UserError(f"{where}: {place}" if place else where, problem, remedy) from None


def _most_telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """Returns the first mistake; where a field is missing and its table has an unknown one, that: it is misspelt."""
    first = errors[0]
    unknown = (e for e in errors if e["type"] == "extra_forbidden" and e["loc"][:-1] == first["loc"][:-1])
    return next(unknown, first) if first["type"] == "missing" else first


def _apply(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in name.split(".")):
        raise UserError(
            f"--set {override}", "is not of the form field.field=value", "Write, for example, --set base.rounds=2"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = raw
    *parents, last = name.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(
                f"--set {override}", f"'{parent}' is no table", "Set a field of a table, such as base.rounds"
            )
    table[last] = value


def _walk(error: ErrorDetails, raw: Any) -> list[tuple[Any, Any]]:
    """Returns (name, value there) for each part of an error's place, without the tags of discriminated unions."""
    steps, value, beside = [], raw, False
    for part, inner in zip_longest(error["loc"], error["loc"][1:]):
        if isinstance(value, dict) and part not in value:
            tag = part == value.get("kind") or beside
            beside = not tag and isinstance(inner, str)  # a table whose fields stand beside the kind of the outer one
            if tag or beside:
                continue
        if isinstance(part, str) and not isinstance(value, dict):
            continue  # pydantic's name for a member of a union of simple types
        value = _at(value, part)
        steps.append((part, value))
    return steps


def _at(value: Any, part: Any) -> Any:
    """Returns what is at a key or position of a raw table or list, or None."""
    if isinstance(value, dict):
        return value.get(part)
    inside = isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value)
    return value[part] if inside else None


def _place(error: ErrorDetails, raw: Any) -> str:
    text = ""
    for part, _ in _walk(error, raw):
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _explain(error: ErrorDetails, model: type[BaseModel], raw: Any) -> tuple[str, str]:
    """Returns what is wrong and what to do about it."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        valid = valid_fields(model, [part for part, _ in _walk(error, raw)][:-1], raw)
        near = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        return "unknown field", f"{hint}Valid fields: {', '.join(valid)}" if valid else "Remove it"
    if kind == "missing":
        return "is required but missing", "Add it"
    if kind == "union_tag_not_found":
        return "says no kind", 'Add kind = "..." to the table'
    if kind == "union_tag_invalid":
        return f"kind '{context.get('tag')}' is unknown", f"Valid kinds: {context.get('expected_tags')}"
    if kind == "model_attributes_type":
        return f"must be a table, not {error['input']!r}", 'Write it as { kind = "..." } with its fields'
    if kind == "value_error":
        return str(context.get("error", error["msg"])).rstrip("."), "Change the study file"
    return f"{error['msg'].lower()}, not {error['input']!r}", "Change the value"


def valid_fields(model: type[BaseModel], place: list[Any], raw: Any) -> list[str]:
    """Returns the field names that are valid at a place in a raw study, or nothing where there is no table."""
    current: Any = model
    for part in place:
        raw = _at(raw, part)
        if isinstance(part, int):
            current = next((arg for arg in get_args(current) if arg is not Ellipsis), None)
        elif isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[part].annotation
        current = _member(current, raw)
        if current is None:
            return []
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _member(annotation: Any, raw: Any) -> Any:
    """Returns the member of a union that a raw table selects by its kind, or the annotation itself."""
    members = _models(annotation)
    if not members:
        return annotation
    kind = raw.get("kind") if isinstance(raw, dict) else None
    for member in members:
        if "kind" in member.model_fields and member.model_fields["kind"].default == kind:
            return member
    return members[0] if len(members) == 1 else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Returns the models of a union, also of one within another; nothing where it is no union of models."""
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _models(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) not in (Union, UnionType):
        return []
    return [model for member in get_args(annotation) for model in _models(member)]

"""Writes the pages that follow from the code: docs/cli.md and docs/study-file.md.

python docs/generate.py            # writes them
python docs/generate.py --check    # ends with 1 where one of them is not what the code says now
"""

import argparse
import inspect
import json
import re
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trilemma.cli import app
from trilemma.federation.specs import TrainSpec
from trilemma.spec import Radius, Spec
from trilemma.study.specs import Study

DOCS = Path(__file__).parent

#: Columns of the terminal in which the help is captured.
WIDTH = 100

NOTICE = "<!-- Written by docs/generate.py from the code; edit the code and run `make docs`. -->\n"

CLI_INTRO = """
# The command line

`trilemma COMMAND --help` prints what stands here. The study file is described in [study-file.md](study-file.md), the
store in [store.md](store.md).

Exit codes: 0 done; 1 something failed (a full disk, a broken store, a killed worker, a defect); 2 the request cannot be
(a mistake in the study file, the images or the options); 130 stopped with Ctrl-C. A failure is one message on the error
stream that names the file, field or record and what to do. What was stored before it stays.

Environment: `TRILEMMA_STORE` and `TRILEMMA_DATA` stand for `--store` and `--data`; `TRILEMMA_CACHE` is the folder of
downloads and decoded images (`~/.cache/trilemma`), which may be deleted at any time; `TRILEMMA_OFFLINE=1` forbids
downloads. `--set` changes a field of the file before it is read: the value is TOML, a bare word is a string, and
positions in lists cannot be addressed.
"""

STUDY_INTRO = """
# The study file

A study is one TOML file that asks one question. The smallest one that says something:

```toml study
name = "smallest"
question = "What does differential privacy cost on phantoms?"

[base]
rounds = 4
data = { kind = "phantom", size = 32, train = 300, val = 60, test = 90, classes = 2 }
partition = { kind = "iid", num_clients = 3 }
model = { kind = "resnet9", width = 8 }
local = { batch_size = 32 }

[grid]
privacy = [{ kind = "none" }, { kind = "dp_sgd", epsilon = 8.0, delta = 1e-3 }]
```

Rules that hold everywhere:

- A table with a `kind` is one of several; the kind decides which other fields it has. An unknown field or kind is an
  error that names the valid ones.
- A field without a default must be given. Left-out fields take the default given here, and the default is part of the
  key under which results are stored.
- Radii are in pixel units, images in [0, 1]; they may be written as fractions, `"4/255"`.
- TOML has no null: where a description says None, it means that the field is left out.

## How a study becomes trainings

`base` holds the fields of a training that all share. `grid` has axes; every combination of their values is one
configuration, trained once for each of `seeds`.

- An axis named like a field of a training lists values of that field. A value replaces the field **whole**: a grid
  value for `local` inherits nothing from `base.local`.
- Any other axis bundles fields: its values are tables with a `name` and the fields that they set. This is how to give
  DP-SGD another learning rate than plain training:

```toml study
name = "bundled"
question = "What does privacy cost when each side has its own learning rate?"

[base]
data = { kind = "phantom", size = 32, train = 600, val = 60, test = 90, classes = 2 }
partition = { kind = "iid", num_clients = 3 }
model = { kind = "resnet9", width = 8 }

[[grid.training]]
name = "plain"
local = { learning_rate = 0.05, momentum = 0.9, batch_size = 32 }

[[grid.training]]
name = "DP"
privacy = { kind = "dp_sgd", epsilon = 8.0, delta = 1e-3 }
local = { learning_rate = 0.5, momentum = 0.0, batch_size = 100 }

[[baselines]]
algorithm = { kind = "centralised" }
[[baselines]]
algorithm = { kind = "local_only" }
```

`baselines` are further configurations: each is `base` with the given fields replaced, and may have a `name`. With
`algorithm = { kind = "local_only" }` and no `client`, every hospital is trained alone; the report shows them as one
configuration. Equal trainings, wherever they come from, are trained once. Two different configurations of one name are
refused.

Every model is turned into each of `compressions`, and each result is measured by each of `evaluations`. Clean metrics
are always measured, because attacks are judged against them; a report shows them where `evaluations` lists `clean`.
"""


class Kind(NamedTuple):
    """One class that a table of the study file may be, and the value of its `kind`, if it has one."""

    spec: type[Spec]
    kind: str


def main() -> None:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description="Writes docs/cli.md and docs/study-file.md from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 where a page is stale")
    check = parser.parse_args().check
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            stale.append(str(path))
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"not what the code says now: {', '.join(stale)}. Run `make docs`.")


def pages() -> dict[str, str]:
    """Returns file name -> text of every generated page."""
    return {"cli.md": cli_page(), "study-file.md": study_page()}


def cli_page() -> str:
    """Returns the help of every command, as plain text of a fixed width."""
    group = typer.main.get_command(app)
    parts = [NOTICE, CLI_INTRO.strip(), _help(group, "trilemma")]
    parts += _commands(group, "trilemma", "##")
    return "\n\n".join(parts).replace(NOTICE + "\n", NOTICE) + "\n"


def _commands(group: Any, prefix: str, heading: str) -> list[str]:
    """Returns a section for each command of a group, and below it for each command of that."""
    parts = []
    for name, command in getattr(group, "commands", {}).items():
        parts += [f"{heading} {prefix} {name}", _help(command, f"{prefix} {name}")]
        parts += _commands(command, f"{prefix} {name}", f"{heading}#")
    return parts


def _help(command: Any, name: str) -> str:
    command.rich_markup_mode = None  # plain text instead of boxes
    context = command.context_class(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return "\n".join(["```text", *lines, "```"])


def study_page() -> str:
    """Returns every section of a study file and every kind with its fields."""
    parts = [STUDY_INTRO.strip(), "## The top of the file", _about(Study), _table(Study)]
    parts += ["## base: one training", _about(TrainSpec), _table(TrainSpec, skip=("seed",))]
    nested: dict[tuple[Kind, ...], str] = {}
    for name, field in TrainSpec.model_fields.items():
        parts += _section(f"base.{name}", field.annotation, nested)
    for name in ("compressions", "evaluations"):
        parts += _section(name, Study.model_fields[name].annotation, nested)
    return NOTICE + "\n".join(part if part.startswith("|") else f"{part}\n" for part in parts).rstrip() + "\n"


def _section(name: str, annotation: Any, nested: dict[tuple[Kind, ...], str]) -> list[str]:
    """Returns the parts of the page on a field whose value is a table, or nothing for other fields.

    Args:
        name: The field.
        annotation: What it may be.
        nested: Tables within tables -> the section that describes them; those of this one are added.
    """
    members = kinds(annotation)
    if not members:
        return []
    if (home := _home(members)) and home != name:  # two fields may be of the same kinds
        return [f"## {name}", f"What it may be stands under [{home}](#{home.replace('.', '')})."]
    parts = [f"## {name}"]
    for spec, kind in members:
        if kind:
            parts.append(f'### {name}: `kind = "{kind}"`')
        parts += [_about(spec), _table(spec)]
        for inner, field in spec.model_fields.items():
            tables = [table for table in kinds(field.annotation) if table not in members]
            home = _home(tables) or nested.get(tuple(tables), "")
            if home == name:
                parts.append(f"What `{inner}` may be stands above.")
                continue
            if home:
                parts.append(f"What `{inner}` may be stands under [{home}](#{home.replace('.', '')}).")
                continue
            nested |= {tuple(tables): name} if tables else {}
            for table in tables:  # tables within the table that have no section of their own
                heading = f"### {name}.{inner}" + (f': `kind = "{table.kind}"`' if table.kind else "")
                parts += [heading, _about(table.spec), _table(table.spec)]
    return parts


def _home(tables: list[Kind]) -> str:
    """Returns the section that describes all of some kinds, so that nothing stands twice; or "" where none does."""
    fields = {f"base.{name}": field for name, field in TrainSpec.model_fields.items()}
    fields |= {name: Study.model_fields[name] for name in ("compressions", "evaluations")}
    described = ((name, kinds(field.annotation)) for name, field in fields.items())
    return next((name for name, members in described if tables and all(t in members for t in tables)), "")


def kinds(annotation: Any) -> list[Kind]:
    """Returns the classes that a field's value may be, in their order; none for a field that is no table."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        field = annotation.model_fields.get("kind")
        return [Kind(annotation, str(field.default) if field else "")]
    return [kind for argument in get_args(annotation) for kind in kinds(argument)]


def _about(spec: type[Spec]) -> str:
    """Returns a class's description without its attributes."""
    text = inspect.cleandoc(spec.__doc__ or "")
    return text.partition("\nAttributes:\n")[0].strip()


def attribute_texts(spec: type[Spec]) -> dict[str, str]:
    """Returns field -> description from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(spec.__mro__):
        text = inspect.cleandoc(base.__doc__ or "") if issubclass(base, Spec) else ""
        for match in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", text.partition("Attributes:\n")[2], re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
    return found


def _table(spec: type[Spec], skip: tuple[str, ...] = ()) -> str:
    texts = attribute_texts(spec)
    lines = ["| field | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in spec.model_fields.items():
        if name in skip or name == "kind" or field.annotation in (None, type(None)):  # which it shares and may not have
            continue
        if name not in texts:
            sys.exit(f"{spec.__name__}.{name} has no line in the class's Attributes")
        cells = (f"`{name}`", value_text(field), default_text(field), texts[name])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "No further fields."


def value_text(field: FieldInfo) -> str:
    """Returns what a field's value may be."""
    return _value(field.annotation, list(field.metadata))


def _value(annotation: Any, metadata: list[Any]) -> str:
    if annotation is Radius or any(getattr(item, "func", None) is _radius_parser() for item in metadata):
        return "number or fraction ≥ 0"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        return _value(inner, [*metadata, *_constraints(more)])
    members = kinds(annotation)
    if members and origin not in (tuple, list):
        return "table" if not members[0].kind else "one of " + ", ".join(f"`{member.kind}`" for member in members)
    if origin in (tuple, list):
        return f"list of {_value(arguments[0], [])}{_bounds(metadata, 'entries')}"
    if origin is dict:
        return "table"
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        given = [_value(argument, metadata) for argument in arguments if argument is not type(None)]
        return " or ".join(given)
    names = {int: "integer", float: "number", str: "text", bool: "`true` or `false`"}
    return names.get(annotation, "any value") + _bounds(metadata, "characters")


def _constraints(metadata: list[Any]) -> list[Any]:
    """Returns constraints, also those that stand within a Field."""
    found = []
    for item in metadata:
        found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found


def _radius_parser() -> Any:
    return next(item.func for item in get_args(Radius) if hasattr(item, "func"))


def _bounds(metadata: list[Any], counted: str) -> str:
    signs = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}
    lengths = {"min_length": f"{counted}: at least {{}}", "max_length": f"{counted}: at most {{}}", "pattern": "`{}`"}
    said = []
    for item in metadata:
        for name, form in (signs | lengths).items():
            bound = getattr(item, name, None)
            if bound is not None:
                said.append(form.format(f"{bound:g}" if isinstance(bound, float) else bound))
    numbers = " and ".join(text for text in said if text[0] in "<>≥≤")
    others = [text for text in said if text[0] not in "<>≥≤"]
    return (f" {numbers}" if numbers else "") + (f" ({', '.join(others)})" if others else "")


def default_text(field: FieldInfo) -> str:
    """Returns a field's default, or that there is none."""
    if field.is_required():
        return "**required**"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if any(getattr(item, "func", None) is _radius_parser() for item in field.metadata):
        return f'`"{Fraction(value).limit_denominator(255)}"`' if value else "`0`"
    return _written(value)


def _written(value: Any) -> str:
    if value is None:
        return "left out"
    if isinstance(value, Spec):
        kind = getattr(value, "kind", None)
        return f'`{{ kind = "{kind}" }}`' if kind else "its defaults"
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Spec):
        return ", ".join(_written(item) for item in value)
    if isinstance(value, (dict, tuple, list)) and not value:
        return "empty"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    main()

"""`python -m gpt.cli.reference` prints docs/configuration.md: every option of the YAML files.

Everything in its tables is read from the options' definitions, so it is written once, there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic.fields import FieldInfo

from gpt.compare.grid import Grid
from gpt.config import Config, Section, spell
from gpt.config.bibliography import LINKS
from gpt.config.values import From, Only, Unit
from gpt.io.console import set_encoding
from gpt.scaling.ladder import Ladder

Mark = TypeVar("Mark", Unit, From, Only)

INTRODUCTION = """\
# Configuration

<!-- Written by `python -m gpt.cli.reference > docs/configuration.md`; do not edit. -->

A run is described by a YAML file of nested options. A file may build on another, which it names as
its `base`, and changes only what differs:

```yaml
# my-run.yaml
base: pre-norm                  # a shipped config; or a path, relative to this file
model:
  norm: {placement: post}
optimizer: {learning_rate: 3e-4}
```

Every option is also a flag, whose name is its dotted path: `model.norm.placement` is
`--model.norm.placement`, and `optimizer.learning_rate` is `--optimizer.learning-rate`. (`_` and `-`
are the same in flags.) Flags override the file, the file overrides its base, and the base overrides
the defaults:

```bash
steadygpt train my-run.yaml --training.steps 500 --no-model.bias --print-config
```

`--print-config` prints the result, every option included. The names of shipped configs are in
`steadygpt train --help`, those of grids in `steadygpt compare --help`, those of ladders in
`steadygpt scaling --help`; a file of that path has precedence over a name. Options that pick a
variant list their values below. An unknown option or value is an error that names the nearest valid
one. Where the type includes `null`, it unsets an option that the base sets.

There are three kinds of files: [configs](#configs) of runs, [grids](#grids) of comparisons, and
[ladders](#ladders) of scaling studies. Editors complete and check them with the JSON schemas
`configs/schema.json`, `configs/compare/schema.json` and `configs/scaling/schema.json`.
"""

PARTS: dict[str, tuple[type[Section], str]] = {
    "Configs": (Config, "The options of a run, in addition to `base`."),
    "Grids": (Grid, "The options of a comparison: which runs it makes, and what it asks."),
    "Ladders": (Ladder, "The options of a scaling study."),
}


def page() -> str:
    """The page, as Markdown."""
    parts = [INTRODUCTION]
    for title, (root, text) in PARTS.items():
        whole = root.model_json_schema()
        schemas = {**whole.get("$defs", {}), root.__name__: whole}
        parts += [f"\n## {title}\n\n{text}\n", *_tables(root, schemas, "", None)]
    return "".join(parts)


def _tables(
    section: type[Section], schemas: dict[str, Any], prefix: str, above: type[Section] | None
) -> Iterator[str]:
    """The table of a section, then those of the sections in it.

    Args:
        schemas: the JSON schema of every section, by the name of its class.
        prefix: dotted path of the section, with a dot at its end.
        above: the section that holds this one in a list or as an alternative to null; options that
            both have are inherited, and are not repeated.
    """
    rows, below = [], []
    for name, field in section.model_fields.items():
        inner = next(iter(_sections(field.annotation)), None)
        own = above is None or name not in above.model_fields
        if inner is not None and own:
            is_list = not isinstance(field.annotation, type) and "tuple" in str(field.annotation)
            below.append((inner, f"{prefix}{name}{'[]' if is_list else ''}.", field))
        if field.annotation is not inner and own:
            schema = schemas[section.__name__]["properties"][name]
            rows.append(_row(field, schema, f"{prefix}{name}"))
    if prefix:
        yield f"\n### {_code(prefix[:-1])}\n\n{_escape(_paragraph(section))}\n"
    if above is not None and set(section.model_fields) & set(above.model_fields):
        yield "\nThe options of a source, above, are options here too.\n"
    if rows:
        yield "\n| option | type | default | unit | meaning | source |\n|---|---|---|---|---|---|\n"
        yield "".join(rows)
    for inner, path, field in below:
        nested = field.annotation is inner
        yield from _tables(inner, schemas, path, None if nested else section)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections in a type, such as `Search` in `Search | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _row(field: FieldInfo, schema: dict[str, Any], path: str) -> str:
    unit = next((mark.name for mark in _marks(field, Unit)), "")
    sources = [name for mark in _marks(field, From) for name in mark.names]
    cells = [
        _code(path),
        _type(schema),
        "required" if field.is_required() else _default(field),
        unit,
        _meaning(field),
        ", ".join(f"[{name}]({LINKS[name]})" for name in sources),
    ]
    return f"| {' | '.join(cells)} |\n"


def _marks(field: FieldInfo, kind: type[Mark]) -> list[Mark]:
    """The marks of a kind on an option, or on the type of its value."""
    marks = (*field.metadata, *_inside(field.annotation))
    return [mark for mark in marks if isinstance(mark, kind)]


def _inside(annotation: Any) -> Iterator[Any]:
    """The marks in a type, such as those of `Steps` in `Steps | None`."""
    yield from getattr(annotation, "__metadata__", ())
    for argument in get_args(annotation):
        yield from _inside(argument)


def _type(schema: dict[str, Any]) -> str:
    """What a value may be, in words, from its JSON schema."""
    kinds = [_kind(branch) for branch in schema.get("anyOf", [schema])]
    return " or ".join(dict.fromkeys(kinds))


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(_code(value) for value in schema["enum"])
    if "const" in schema:
        return _code(schema["const"])
    if "$ref" in schema or schema.get("type") == "object":
        return "mapping"
    if "anyOf" in schema:
        return _type(schema)
    kind = schema.get("type", "value")
    if kind == "array":
        items = schema.get("items") or {}
        return f"list of {_plural(_kind(items))}" if items else "list"
    if kind in ("integer", "number") and "minimum" in schema:
        return f"{kind}, {_number(schema['minimum'])} to {_number(schema['maximum'])}"
    if kind == "string" and schema.get("format") == "path":
        return "path"
    return {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}.get(kind, kind)


def _plural(kind: str) -> str:
    """`integers, 1 to 9` of `integer, 1 to 9`; a list of choices unchanged."""
    return re.sub(r"^\w+", r"\g<0>s", kind)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}".replace("e+", "e")


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return _code(default if default and isinstance(default, str) else spell(default))


def _meaning(field: FieldInfo) -> str:
    text = _escape(" ".join(str(field.description).split()))
    for only in _marks(field, Only):
        other = _code(only.other)
        if not only.values:
            text += f" Read only if {other} is set."
        elif only.values == (None,):
            text += f" Read only without {other}."
        else:
            values = ", ".join(_code(value) for value in only.values if value)
            text += f" Read only if {other} is {values}."
    return text


def _paragraph(section: type[Section]) -> str:
    return " ".join(str(section.__doc__).partition("\n\n")[0].split())


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _escape(text: str) -> str:
    """Plain text, with Markdown's special characters escaped outside `code`."""
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [re.sub(r"([\\*_<>\[\]])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces).replace("|", "\\|")


if __name__ == "__main__":
    set_encoding()
    sys.stdout.write(page())

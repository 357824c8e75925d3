"""Command-line flags made from the schema of the config, so that every option is a flag.

tyro draws up the flags, groups their help and reads the command line; the values stay text, and
pydantic checks them together with the YAML's, so that all errors come at once and in one voice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import re
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, TypeVar, get_args

import tyro

from gpt.config import Section, option_paths
from gpt.errors import InputError, nearest

UNSET = "\x00unset"
Flags = TypeVar("Flags")


def parse(
    own: type[Flags], section: type[Section], prog: str, argv: list[str] | None
) -> tuple[Flags, dict[str, Any]]:
    """Read a command line. Answers `--help` by itself, with exit code 0.

    Args:
        own: a dataclass of the door's own arguments; its docstring is the help's first line.
        section: the options that are flags too, `--model.norm.placement` for nested ones.
        argv: the arguments; None takes those of the process.

    Returns:
        `own`, filled in, and the options of `section` that were given, nested and still text.

    Raises:
        InputError: a flag that does not exist or lacks its value, or a missing argument.
    """
    arguments = sys.argv[1:] if argv is None else argv
    for argument in arguments:
        if "\0" in argument:
            raise InputError(f"{argument!r}: holds a NUL character")
    both = _both(own, section)  # type: ignore[arg-type]
    names = [field.name for field in dataclasses.fields(own)]  # type: ignore[arg-type]
    valid = [as_flag(key) for key in [*names, *option_paths(section)]]
    switches = [as_flag(f.name) for f in dataclasses.fields(own) if f.default is False]  # type: ignore[arg-type]
    arguments = _joined(arguments, {*valid} - {*switches})
    given = [a.partition("=")[0].replace("_", "-") for a in arguments if a.startswith("--")]
    twice = [flag for flag in given if given.count(flag) > 1]
    if twice:
        raise InputError(f"{twice[0]}: is given twice; several values follow one flag")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Any
            parsed, unknown = tyro.cli(
                both,
                prog=prog,
                description=own.__doc__,
                args=arguments,
                return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if not end.code:
            raise  # --help was answered
        # The complaint stands in a box: a title, perhaps a rule, the text, another rule or the end.
        rows = [row.strip("╭╮╰╯│─ ") for row in complaint.getvalue().splitlines()[1:]]
        text = itertools.takewhile(
            lambda row: not _is_rule(row), itertools.dropwhile(_is_rule, rows)
        )
        message = " ".join(text)
        missing = re.match(r"Missing value for argument '(.*?)'", message)
        if missing and missing[1].startswith("--"):
            message += f" One that begins with two dashes follows a sign: {missing[1]}=--value"
        elif missing and any(a.startswith("-") and not FLAG.fullmatch(a) for a in arguments):
            message += " A file whose name begins with a dash is written ./-name"
        raise InputError(message) from None
    if unknown:
        flags = [text.partition("=")[0] for text in unknown if text.startswith("--")]
        first = unknown[0]
        raise InputError(
            "\n".join(f"{flag}: no such option{nearest(flag, valid)}" for flag in flags[:3])
            or f"{first!r}: one argument too many"
            + (f"; a file of that name is ./{first}" if first.startswith("-") else "")
        )
    options = {name: value for name, value in vars(parsed).items() if name not in names}
    return parsed, _given(options, section)


@functools.cache
def _both(own: type[Any], section: type[Section]) -> type[Any]:
    """A dataclass of the door's own arguments and the section's options."""
    whole = section.model_json_schema()
    schemas = {**whole.get("$defs", {}), section.__name__: whole}
    fields = _fields(section, schemas)
    return dataclasses.make_dataclass("Flags", fields, bases=(own,), kw_only=True)


def _joined(arguments: Sequence[str], valued: Set[str]) -> list[str]:
    """The arguments with `--prompt -x` written as `--prompt=-x`, which tyro reads as a value.

    What looks like a flag is never taken for a value: `--out-dir --dry-rnu` is a slip.

    Args:
        valued: flags that take a value.
    """
    joined: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":  # what follows is positional
            return [*joined, *arguments[index:]]
        is_value = argument.startswith("-") and not FLAG.fullmatch(argument)
        if is_value and joined and joined[-1].replace("_", "-") in valued:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


FLAG = re.compile(r"--[A-Za-z][\w.-]*(=.*)?|-h", re.DOTALL)


def _is_rule(row: str) -> bool:
    return not row.strip("- ")


def as_flag(key: str) -> str:
    """`model.norm.placement` -> `--model.norm.placement`, `out_dir` -> `--out-dir`."""
    return "--" + key.replace("_", "-")


def _fields(
    section: type[Section], schemas: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Any, Any]]:
    """The fields of a class that tyro turns into flags: one a option, its value left as text.

    Values are checked by pydantic, together with the YAML's; so a flag's type here is only shown.

    Args:
        schemas: the JSON schema of every section, by its class's name.
    """
    schema = schemas[section.__name__]["properties"]
    fields: list[tuple[str, Any, Any]] = []
    for name, info in section.model_fields.items():
        below = info.annotation
        if isinstance(below, type) and issubclass(below, Section):
            nested = dataclasses.make_dataclass(below.__name__, _fields(below, schemas))
            nested.__doc__ = below.__doc__
            told: Any = tyro.conf.arg(help=below.__doc__)  # or tyro looks for it in the source
            fields.append(
                (name, Annotated[(nested, told)], dataclasses.field(default_factory=nested))
            )
            continue
        branches = schema[name].get("anyOf", [schema[name]])
        several = any(branch.get("items") == {"type": "string"} for branch in branches)
        arg = tyro.conf.arg(
            help=info.description,
            metavar="PATH..." if several else _metavar(schema[name]),
            help_behavior_hint=f"(default: {_as_text(info.default)})",
        )
        kind = tuple[str, ...] if several else str
        fields.append((name, Annotated[kind, arg], (UNSET,) if several else UNSET))
    return fields


def _metavar(schema: Mapping[str, Any]) -> str:
    """What a flag's value looks like, from its JSON schema."""
    if "$ref" in schema or "$ref" in schema.get("items", ()):
        return "YAML"
    if "anyOf" in schema:
        return "|".join(_metavar(branch) for branch in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "{" + ",".join(schema["enum"]) + "}"
    names = {
        "integer": "INT",
        "number": "FLOAT",
        "boolean": "{true,false}",
        "null": "null",
    }
    return names.get(schema["type"], "TEXT")


def _as_text(default: object) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default) if default not in ((), "") else "none"


def _given(values: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """The flags that were given, nested as the YAML is; `null` is None, but not for a text."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        annotation = section.model_fields[name].annotation
        kinds = get_args(annotation)
        if dataclasses.is_dataclass(value):
            assert isinstance(annotation, type)
            below = _given(vars(value), annotation)
            if below:
                given[name] = below
        elif value not in (UNSET, (UNSET,)):
            none = value == "null" and type(None) in kinds and str not in kinds
            given[name] = None if none else value
    return given

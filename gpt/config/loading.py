"""YAML, base files and flags in; one validated `Config` out.

A file may name one `base:` (a path relative to itself) whose values it overrides; flags override
the file; everything else has the default of `gpt.config.options`. All errors are reported at once,
by dotted path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gpt.config.options import Config, MixedSource
from gpt.config.shipped import find
from gpt.config.strict_yaml import read_yaml
from gpt.config.trees import leaves, merge, nest
from gpt.config.values import Section, expand_user
from gpt.errors import InputError, nearest, option

MAX_BASES = 16  # base files in a chain
MAX_ERRORS = 100  # errors described in one message
SectionType = TypeVar("SectionType", bound=Section)


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config in the YAML file `path`, its bases, and `overrides` on top.

    Args:
        path: a file, or the name of a config that comes with steadygpt, such as `quickstart`.
        overrides: options by dotted path, nested, or both:
            `{"optimizer.learning_rate": 3e-3, "model": {"layers": 6}}`.

    Raises:
        InputError: with every error at once, by dotted path, and the nearest valid name.
    """
    path = find(path, "config")
    tree = {"name": path.stem, **read(path)}
    given = dict(leaves(overrides or {}))

    def origin(key: str) -> str:
        if key in given:
            return option(key)
        return f"{path}: {key}" if key else str(path)

    merged = merge(tree, nest(given))
    kept = {*dict(leaves(merged)), *option_paths(Config)}
    # What is below an option that has a value, such as model.layers.x, is not merged, but unknown.
    unknown = {key: v for key, v in given.items() if key not in kept and v is not None}
    return validate(Config, {**merged, **unknown}, origin)


def read(path: Path) -> dict[str, Any]:
    """The options in a YAML file and its bases, not validated.

    Raises:
        InputError: a file is missing or not valid YAML, a base leads back to its file, or the
            chain of bases is too long.
    """
    trees: list[dict[str, Any]] = []  # the file's own, its base's, and so on
    seen: set[Path] = set()
    while True:
        tree = read_yaml(path)
        if path.resolve() in seen:
            raise InputError(f"{path}: base: the chain of base files loops back to this file")
        seen.add(path.resolve())
        base = tree.pop("base", None)
        trees.append(tree)
        if base is None:
            break
        if not isinstance(base, str):
            raise InputError(f"{path}: base: must be the path of one YAML file, found {base!r}")
        if len(seen) > MAX_BASES:
            raise InputError(f"{path}: base: a chain of more than {MAX_BASES} base files")
        path = base_of(path, base)
    merged = trees.pop()
    while trees:
        merged.pop("name", None)
        merged = merge(merged, trees.pop())
    return merged


def base_of(path: Path, base: str) -> Path:
    """The file that the file `path` names as its base, or the shipped config of that name.

    Raises:
        InputError: neither exists.
    """
    try:
        return find(expand_user(base), "config", start=path.parent)
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None


def validate(
    section: type[SectionType],
    tree: Mapping[str, Any],
    origin: Callable[[str], str] = lambda key: key,
) -> SectionType:
    """The options in the nested mapping `tree`, checked and converted.

    Args:
        origin: how a message names the option at a dotted path ("" for the whole).

    Raises:
        InputError: all errors at once, one line each, or three lines if there are more.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False)[:MAX_ERRORS]
        omitted = error.error_count() - len(details)
    problems: dict[str, list[str]] = {}
    options = option_paths(section)
    for each in details:
        key, problem = _describe(each, options)
        problems.setdefault(key, []).append(problem)
    lines = [f"{origin(key)}: {'; or '.join(each)}".lstrip(": ") for key, each in problems.items()]
    if len(lines) > 3:
        rest = "; ".join(lines[2:])
        lines = [*lines[:2], f"and {len(lines) - 2 + omitted:,} more: {rest}"]
    raise InputError("\n".join(lines))


def _describe(error: ErrorDetails, options: list[str]) -> tuple[str, str]:
    """One of pydantic's errors as (dotted path, problem)."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return key, f"no such option{nearest(key, _candidates(key, options))}"
    key = _without_branches(error["loc"], options)
    found, message = _shorten(error["input"]), error["msg"]
    match error["type"]:
        case "value_error":  # raised by a section's own check
            return key, str(error["ctx"]["error"])
        case "choice" | "number" | "range" | "empty" | "nul" | "reserved" | "characters":
            return key, f"{found} {message}"
        case "string_unicode":
            return key, f"{found} is not Unicode text"
        case "model_type":
            return key, f"must be a mapping of options, found {found}"
        case "missing":
            return key, "is missing"
        case "conflict":
            return key, message
    message = message.partition(", unable to parse")[0]
    message = re.sub(r"^\w+ should ", "must ", message)  # such as "Input should be a valid integer"
    message = message.replace("tuple", "list").replace("dictionary", "mapping")
    return key, f"{message[0].lower()}{message[1:]}, found {found}"


def _candidates(key: str, options: list[str]) -> list[str]:
    """The names that an unknown key may have meant: options, and sections of them."""
    sections = sorted({option.rpartition(".")[0] for option in options} - {""})
    parent = key.rpartition(".")[0]
    in_source = "data" in parent.split(".") and parent not in sections
    if in_source:  # within data.mix or data.validation
        return [f"{parent}.{name}" for name in MixedSource.model_fields]
    return [*sections, *options]


def _without_branches(location: tuple[int | str, ...], options: list[str]) -> str:
    """The dotted path of an error's location, without pydantic's names for a union's branches."""
    names = {part for path in options for part in path.split(".")} | _fields_below(Section)
    parts = [str(part) for part in location]
    while parts and not (parts[-1] in names or "." in parts[-1] or parts[-1].isdecimal()):
        parts.pop()
    return ".".join(parts)


def _fields_below(section: type[Section]) -> set[str]:
    """The fields of all sections, including those of list items, which `option_paths` omits."""
    return {
        name
        for each in section.__subclasses__()
        for name in (*each.model_fields, *_fields_below(each))
    }


def _shorten(value: object) -> str:
    """A value as Python writes it, in at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        return "a very long number"
    return text if len(text) <= 60 else text[:57] + "..."


def option_paths(section: type[Section]) -> list[str]:
    """Dotted paths of every option, such as `model.norm.placement`."""
    paths: list[str] = []
    for name, field in section.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Section):
            paths += [f"{name}.{path}" for path in option_paths(below)]
        else:
            paths.append(name)
    return paths


def schema() -> str:
    """The JSON schema of a config file, for editors."""
    tree = Config.model_json_schema()
    tree["properties"]["base"] = {
        "type": "string",
        "description": "A YAML file, relative to this one, or the name of a config that comes with "
        "steadygpt; this file overrides its values.",
    }
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"

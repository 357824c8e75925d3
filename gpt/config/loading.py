"""YAML, base files and flags in; one validated `Config` out.

A file may name one `base:` (a path relative to itself) whose values it overrides; flags override
the file. Everything else has the value of the pretrained network that `init_from` names (source.py)
or the default of `gpt.config.options`. All errors are reported at once, by dotted path.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gpt.config.cautions import cautions
from gpt.config.layouts import effective
from gpt.config.options import Config, ModelConfig
from gpt.config.shipped import find
from gpt.config.source import Source, describe
from gpt.config.strict_yaml import read_yaml
from gpt.config.trees import leaves, merge, nest
from gpt.config.values import Section, expand_user, spell, unquoted
from gpt.errors import InputError, nearest, option

MAX_BASES = 16  # base files in a chain
MAX_ERRORS = 100  # errors described in one message
SectionType = TypeVar("SectionType", bound=Section)


def load(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    out_dir: str | Path | None = None,
) -> Config:
    """The config in the YAML file `path`, its bases, and `overrides` on top.

    Args:
        path: a file, or the name of a config that comes with steadygpt, such as `quickstart`.
        overrides: options by dotted path, nested, or both:
            `{"optimizer.learning_rate": 3e-3, "model": {"layers": 6}}`.
        out_dir: the run directory; runs/NAME by default. If it holds a run that started from
            `init_from`, the source itself is no longer needed.

    Raises:
        InputError: with every error at once, by dotted path, and the nearest valid name; or the
            source that `init_from` names is missing, or conflicts with an option.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"path: must name a config file, found {type(path).__name__}")
    if not isinstance(overrides, Mapping | None):
        raise InputError(
            "overrides: must be a dict of options, such as {'training.steps': 100}, "
            f"found {overrides!r}"
        )
    path = find(path, "config")
    given, options = dict(leaves(overrides or {})), set(option_paths(Config))
    layers = [{"name": path.stem}, *_layers(path), nest(given)]

    def origin(key: str) -> str:
        if any(f"{key}.".startswith(f"{name}.") for name in given):  # or it is in the flag's list
            whole = re.sub(r"\.\d+$", "", key)  # the list's flag, not the number of its item
            return option(whole if whole in options else key)
        return f"{path}: {key}" if key else str(path)

    merged = functools.reduce(merge, layers)
    kept = options | dict(leaves(merged)).keys()
    # A key below an option that has a value, such as model.layers.x, is not merged: it is unknown.
    unknown = {
        key: value
        for key, value in given.items()
        if key not in kept and not (value is None or isinstance(value, Mapping))
    }
    config = _validated({**merged, **unknown}, origin, out_dir)
    config.set_cautions(cautions(config, layers))
    return config


def _validated(
    tree: Mapping[str, Any], origin: Callable[[str], str], out_dir: str | Path | None
) -> Config:
    """The config of a tree of options, together with those of the source of its weights."""
    name = tree.get("init_from")
    if not (isinstance(name, str) and name):
        return validate(Config, tree, origin)
    source = _source(name, Path(out_dir or f"runs/{tree['name']}"), origin)
    model = validate(ModelConfig, source.model, source.origin)
    config = validate(Config, _with_source(tree, source, model), origin)
    _check_agreement(config, model, source, origin)
    return config


def load_resolved(path: Path) -> Config:
    """The config in a file that `Config.to_yaml` wrote, which needs no other file.

    Raises:
        InputError: as `load`.
    """
    return validate(Config, _named(path), lambda key: f"{path}: {key}".removesuffix(": "))


def _named(path: Path) -> dict[str, Any]:
    """The options in a file and its bases; the default name is that of the file."""
    return {"name": path.stem, **read(path)}


# ---------------------------------------------------------------------------------------------
# init_from


def _source(name: str, out_dir: Path, origin: Callable[[str], str]) -> Source:
    """The source that `init_from` names; if it is gone, the run that started from it."""
    try:
        return describe(name)
    except InputError as error:
        run = out_dir / "config.yaml"
        if run.is_file() and read(run).get("init_from") == expand_user(name):
            return describe(str(out_dir))
        raise type(error)(f"{origin('init_from')}: {error}") from None


def _with_source(tree: Mapping[str, Any], source: Source, model: ModelConfig) -> dict[str, Any]:
    """The options in `tree`, and those of the source that it does not set."""
    data = tree.get("data")
    chosen = isinstance(data, Mapping) and {"tokenizer", "vocabulary"} & data.keys()
    options = {"model": model.model_dump(), "data": {} if chosen else source.data}
    return merge(options, tree)


# Options of the model in which a run may differ from the source of its weights: `context` may be
# smaller. With another value of any other option, the weights would compute something else.
MAY_DIFFER = ("dropout", "context")


def _check_agreement(
    config: Config, model: ModelConfig, source: Source, origin: Callable[[str], str]
) -> None:
    """Refuse options of the model that do not suit the source's weights.

    Raises:
        InputError: names at most three of them.
    """
    given, theirs = effective(config.model), effective(model)
    lines = [
        f"{origin(f'model.{option}')}: {given[option]} conflicts with {value}, the value of the "
        f"weights of init_from {source.name}; leave it out"
        for option, value in theirs.items()
        if given[option] != value and option not in MAY_DIFFER
    ]
    if config.model.context > model.context:
        lines.append(
            f"{origin('model.context')}: {config.model.context} is longer than {model.context}, "
            f"the context of the weights of init_from {source.name}"
        )
    if lines:
        raise InputError("\n".join(lines[:3]))


def read(path: Path) -> dict[str, Any]:
    """The options in a YAML file and its bases, not validated.

    Raises:
        InputError: see `_layers`.
    """
    return functools.reduce(merge, _layers(path))


def _layers(path: Path) -> list[dict[str, Any]]:
    """The options in a YAML file and in its bases, a mapping for each, the lowest base first.

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
            raise InputError(
                f"{path}: base: must be the path of one YAML file, found {spell(base)}"
            )
        if len(seen) > MAX_BASES:
            raise InputError(f"{path}: base: a chain of more than {MAX_BASES} base files")
        path = base_of(path, base)
    for tree in trees[1:]:
        tree.pop("name", None)
    return trees[::-1]


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
    problems: dict[str, list[ErrorDetails]] = {}
    for each in details:
        problems.setdefault(_key(each["loc"]), []).append(each)
    lines = [
        f"{origin(key)}: {_explain(section, key, errors)}".lstrip(": ")
        for key, errors in problems.items()
    ]
    if len(lines) > 3:
        rest = "; ".join(lines[2:])
        lines = [*lines[:2], f"and {len(lines) - 2 + omitted:,} more: {rest}"]
    raise InputError("\n".join(lines))


# What a value must be, by the type of pydantic's error.
REQUIRED = {
    "string_type": "text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "dict_type": "a mapping",
    "model_type": "a mapping of options",
}
BRANCH = re.compile(r"\[key\]|(str|int|float|bool|literal|dict|list|tuple|function-\w+)(\[.*\])?")
# How an option is switched off in other programs, or by those who guess.
OFF = ("none", "off", "no", "false", "never", "null", "0", "0.0", "-1", "inf")


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted path of an error, without pydantic's names for the branches of a union."""
    return ".".join(str(part) for part in location if not BRANCH.fullmatch(str(part)))


def _explain(section: type[Section], key: str, errors: list[ErrorDetails]) -> str:
    """What is wrong with the value at a dotted path; of a union's value, what each branch says."""
    problems = [problem for error in errors if (problem := _problem(section, key, error))]
    if not problems:
        wanted = [name for error in errors for name in _wanted(error)]
        found, names = errors[0]["input"], ", ".join(dict.fromkeys(wanted))
        names = " or ".join(names.rsplit(", ", 1))
        problems = [f"must be {names}, found {spell(found)}{nearest(unquoted(found), wanted)}"]
    hint = _off_hint(section, key, errors[0]["input"])
    return "; or ".join(dict.fromkeys(problems)) + hint


def _problem(section: type[Section], key: str, error: ErrorDetails) -> str:
    """What is wrong; empty if the value is of the wrong type, or not one of the allowed words."""
    found, message, context = spell(error["input"]), error["msg"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"no such option{nearest(key, _candidates(section, key))}"
        case "value_error":  # raised by a section's own check
            return str(context["error"])
        case "choice" | "number" | "range" | "empty" | "nul" | "reserved" | "characters":
            return f"{found} {message}"
        case "pattern":
            return f"{message}, found {found}"
        case "string_unicode":
            return f"{found} is not Unicode text"
        case "missing":
            return "is missing"
        case "invalid_key":  # a number, for example
            return "no such option"
        case "conflict" | "blank":
            return message
        case "too_short":
            least = context["min_length"]
            return f"must have at least {least} item{'s' * (least > 1)}, found {found}"
        case "too_long":
            return f"must have at most {context['max_length']} items, found {found}"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters, found {found}"
        case other if other not in (*REQUIRED, "literal_error"):
            return f"{message[0].lower()}{message[1:]}, found {found}"
    return ""


def _wanted(error: ErrorDetails) -> list[str]:
    """What a value of the wrong type must be: a type, or the words that are allowed."""
    if error["type"] == "literal_error":
        return re.findall(r"'([^']*)'", error["ctx"]["expected"])
    return [REQUIRED[error["type"]]]


def _off_hint(section: type[Section], key: str, value: object) -> str:
    """How to switch an option off, where `value` is a word for that but not the right one."""
    above, _, name = re.sub(r"\.\d+$", "", key).rpartition(".")
    below = _section_at(section, above)
    field = below.model_fields.get(name) if below else None
    if field is None or unquoted(value).lower() not in OFF:
        return ""
    if get_origin(field.annotation) is tuple:
        return "; [] means none"
    if type(None) not in get_args(field.annotation):
        return ""
    meaning = re.search(r"(null|Unset): (.+?)\.(?:\s|$)", field.description or "", re.DOTALL)
    if meaning is None:
        return "; null switches it off"
    return f"; null {'switches it off' if meaning[1] == 'null' else 'unsets it'}: {meaning[2]}"


def _candidates(section: type[Section], key: str) -> list[str]:
    """The names that an unknown key may have meant: options, and sections of them."""
    options = option_paths(section)
    sections = {option.rpartition(".")[0] for option in options} - {""}
    parent = key.rpartition(".")[0]
    of_item = _section_at(section, parent) if parent not in {"", *sections} else None
    if of_item is not None:  # of a list, such as a source within data.mix
        return [f"{parent}.{name}" for name in of_item.model_fields]
    return [*sorted(each for each in sections if not key.startswith(f"{each}.")), *options]


def _section_at(section: type[Section], path: str) -> type[Section] | None:
    """The section at a dotted path, in which a number is an index into a list; None if none is."""
    found: type[Section] | None = section
    for part in path.split(".") if path else ():
        if found is not None and not part.isdecimal():
            field = found.model_fields.get(part)
            found = _section_in(field.annotation) if field else None
    return found


def _section_in(annotation: object) -> type[Section] | None:
    """The section in an annotation: the type of its values, or of the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((each for each in map(_section_in, get_args(annotation)) if each), None)


def option_fields(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Every option's field by its dotted path, such as `model.norm.placement`."""
    fields: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Section):
            fields |= option_fields(below, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = field
    return fields


def option_paths(section: type[Section]) -> list[str]:
    """Dotted paths of every option."""
    return list(option_fields(section))


def schema() -> str:
    """The JSON schema of a config file, for editors."""
    tree = Config.model_json_schema()
    tree["properties"]["base"] = {
        "type": "string",
        "description": "A YAML file, relative to this one, or the name of a config that comes with "
        "steadygpt; this file overrides its values.",
    }
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"

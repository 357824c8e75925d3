"""Command lines made from pydantic sections, so that every option of a config is also a flag.

argparse splits the command line and prints the help. Values remain text until pydantic checks them:
those for a config together with its YAML file, so that all errors are reported at once.
"""

from __future__ import annotations

import argparse
import functools
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_args

from pydantic.fields import FieldInfo

from gpt.config import Section, nest, option_paths, validate
from gpt.errors import InputError, nearest

Arguments = TypeVar("Arguments", bound=Section)
Schema = Mapping[str, Any]

FLAG = re.compile(r"--[A-Za-z][\w.-]*(=.*)?|-h", re.DOTALL)


def parse(
    arguments: type[Arguments],
    prog: str,
    argv: Sequence[str],
    config: type[Section] | None = None,
) -> tuple[Arguments, dict[str, Any]]:
    """Read a command line. `--help` prints the help and exits with code 0.

    Args:
        arguments: the command's own arguments. Required ones are positional, and booleans are
            switches without a value; the docstring is the help's first line.
        argv: the words after the command.
        config: the options that are flags too, `--model.norm.placement` for nested ones.

    Returns:
        The command's own arguments, and the options of `config` that were given: nested and not
        validated.

    Raises:
        InputError: a flag is unknown, repeated or without a value, an argument is missing, or one
            of the command's own has a wrong value.
    """
    fields = arguments.model_fields
    names = [name for name, field in fields.items() if not field.is_required()]
    flags = [as_flag(path) for path in [*names, *(option_paths(config) if config else [])]]
    switches = {as_flag(name) for name in names if fields[name].annotation is bool}
    words = _normalize(argv, set(flags) - switches)
    try:
        namespace, unknown = _parser(arguments, prog, config).parse_known_args(words)
    except argparse.ArgumentError as error:
        raise InputError(_describe(error, words, switches)) from None
    if unknown:
        raise InputError(_describe_unknown(unknown, flags))
    given = vars(namespace)
    own = {name: given.pop(name) for name in fields if name in given}

    def origin(path: str) -> str:
        name = path.split(".")[0]  # `widths` of `widths.1`, an element of a list
        return as_flag(name) if name in names else str(fields[name].title)

    return validate(arguments, own, origin), nest(given)


def as_flag(path: str) -> str:
    """`model.tied_head` becomes `--model.tied-head`; `json_`, whose name is taken, `--json`."""
    return "--" + path.rstrip("_").replace("_", "-")


def _normalize(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """The words, with `--out_dir x` as `--out-dir x` and `--prompt -x` as `--prompt=-x`.

    argparse takes a word that begins with a dash for a flag. A word that looks like a flag is never
    taken for a value: `--out-dir --dry-rnu` is a mistake.

    Args:
        flags: those that take a value.

    Raises:
        InputError: a word contains a NUL character.
    """
    words: list[str] = []
    for index, word in enumerate(argv):
        if "\0" in word:
            raise InputError(f"{word!r}: contains a NUL character")
        if word == "--":  # only positional arguments follow
            return [*words, *argv[index:]]
        if FLAG.fullmatch(word):
            flag, *value = word.split("=", 1)
            words.append("=".join([flag.replace("_", "-"), *value]))
        elif word.startswith("-") and words and words[-1] in flags:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _describe(error: argparse.ArgumentError, words: list[str], switches: Collection[str]) -> str:
    flag = error.argument_name
    if flag in switches:
        return f"{flag}: takes no value"
    if flag is not None:
        return f"{flag}: needs a value; one that begins with two dashes is written {flag}=--value"
    dashed = any(word.startswith("-") and not FLAG.fullmatch(word) for word in words)
    hint = "; write ./-name for a file whose name begins with a dash" if dashed else ""
    return error.message + hint


def _describe_unknown(words: list[str], flags: Collection[str]) -> str:
    unknown = [word.partition("=")[0] for word in words if word.startswith("--")]
    if unknown:
        return "\n".join(f"{flag}: no such option{nearest(flag, flags)}" for flag in unknown[:3])
    hint = f"; write ./{words[0]} for a file" if words[0].startswith("-") else ""
    return f"{words[0]!r}: unexpected argument{hint}"


# ---------------------------------------------------------------------------------------------
# The parser


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's own, except that names such as post-norm are not broken at the hyphen."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


class _StoreOnce(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            raise InputError(f"{option_string}: given twice; all values of a list follow one flag")
        setattr(namespace, self.dest, values)


@functools.cache
def _parser(arguments: type[Section], prog: str, config: type[Section] | None) -> _Parser:
    titles = [str(f.title) for f in arguments.model_fields.values() if f.is_required()]
    parser = _Parser(
        usage=" ".join([prog, "[-h] [OPTIONS]", *titles]),
        description=arguments.__doc__,
        formatter_class=functools.partial(_HelpFormatter, max_help_position=6),
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,  # only what is given is in the namespace
    )
    schemas = arguments.model_json_schema()["properties"]
    for name, field in arguments.model_fields.items():
        if field.is_required():
            parser.add_argument(name, metavar=field.title, help=field.description)
        elif field.annotation is bool:
            flag = as_flag(name)
            parser.add_argument(flag, dest=name, action="store_true", help=field.description)
        else:
            parser.add_argument(as_flag(name), dest=name, **_settings(field, schemas[name]))
    if config is not None:
        whole = config.model_json_schema()
        sections = {**whole.get("$defs", {}), config.__name__: whole}
        _add_section(parser, config, sections, "")
    return parser


def _add_section(
    parser: _Parser, section: type[Section], schemas: Mapping[str, Schema], prefix: str
) -> None:
    """Add the flags of a section as a group, then those of its subsections.

    Args:
        schemas: the JSON schema of every section, by the name of its class.
        prefix: dotted path of the section, with a dot at its end.
    """
    group = parser.add_argument_group(f"{prefix.rstrip('.') or 'run'} options", section.__doc__)
    for name, field in section.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Section):
            _add_section(parser, below, schemas, f"{prefix}{name}.")
        else:
            settings = _settings(field, schemas[section.__name__]["properties"][name])
            path = f"{prefix}{name}"
            group.add_argument(as_flag(path), dest=path, **settings)


def _settings(field: FieldInfo, schema: Schema) -> dict[str, Any]:
    """A flag's settings for `add_argument`; one for a list of strings takes several values."""
    several = {"type": "string"} in [b.get("items") for b in schema.get("anyOf", ())]
    nullable = _is_nullable(field)
    described = field.default is None or "(default: " in str(field.description)
    default = "" if described else f" (default: {_format_default(field.default)})"
    return {
        "action": _StoreOnce,
        "nargs": "*" if several else None,
        "type": _none_if_null if nullable else str,
        "metavar": field.title or ("PATH" if several else _metavar(schema, nullable)),
        "help": f"{field.description}{default}".replace("%", "%%"),
    }


def _is_nullable(field: FieldInfo) -> bool:
    """Whether `null` means None; a string option takes it literally."""
    kinds = get_args(field.annotation)
    return type(None) in kinds and str not in kinds


def _none_if_null(text: str) -> str | None:
    return None if text == "null" else text


def _metavar(schema: Schema, nullable: bool) -> str:
    """What a flag's value looks like, such as `INT|null`, from its JSON schema."""
    branches = schema.get("anyOf", [schema])
    return "|".join(_kind(b) for b in branches if nullable or b.get("type") != "null")


def _kind(schema: Schema) -> str:
    if "$ref" in schema or "$ref" in schema.get("items", ()):
        return "YAML"
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "{" + ",".join(schema["enum"]) + "}"
    if schema.get("format") == "path":
        return "PATH"
    names = {"integer": "INT", "number": "FLOAT", "boolean": "{true,false}", "null": "null"}
    return names.get(schema["type"], "TEXT")


def _format_default(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) if default not in ((), "") else "none"

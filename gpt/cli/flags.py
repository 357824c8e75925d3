"""Command lines made from pydantic sections, so that every option of a config is also a flag.

argparse splits the command line and prints the help. Values remain text until pydantic checks them:
those for a config together with its YAML file, so that all errors are reported at once.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import shlex
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_args

from pydantic.fields import FieldInfo

from gpt import __version__
from gpt.cli import tab
from gpt.config import Section, nest, option_fields, validate
from gpt.errors import InputError, as_flag, nearest

Arguments = TypeVar("Arguments", bound=Section)
Schema = Mapping[str, Any]

STANDARD = ("-h", "--help", "--help-all", "-V", "--version")  # flags of every command
FLAG = re.compile(r"--[A-Za-z][\w.-]*(=.*)?|-h|-V", re.DOTALL)
BOOLEANS = {*("true", "yes", "on", "t", "y", "1"), *("false", "no", "off", "f", "n", "0"), "null"}


def parse(
    arguments: type[Arguments],
    prog: str,
    argv: Sequence[str],
    config: type[Section] | None = None,
    common: tuple[str, ...] = (),
) -> tuple[Arguments, dict[str, Any]]:
    """Read a command line. Tab prints completions.

    `--help` prints the arguments and the options in `common`, `--help-all` every option; both exit
    with code 0.

    Args:
        arguments: the command's own arguments. Required ones are positional, and so are those
            whose title is in brackets, such as `[DIR]`; a title that ends in `...` takes several
            values. Booleans are switches without a value. The first paragraph of the docstring
            begins the help, and the others, such as examples, end it; `%(prog)s` is the command.
        argv: the words after the command.
        config: the options that are flags too, `--model.norm.placement` for nested ones.
        common: the options that `--help` shows, by name or dotted path; none: all.

    Returns:
        The command's own arguments, and the options of `config` that were given: nested and not
        validated.

    Raises:
        InputError: a flag is unknown, repeated or without a value, an argument is missing, or one
            of the command's own has a wrong value.
    """
    if tab.is_completing():
        tab.complete(_parser(arguments, prog, config, ()), words_before=2)
    fields = arguments.model_fields
    names = [name for name, field in fields.items() if not _is_positional(field)]
    options = option_fields(config) if config else {}
    flags = [as_flag(path) for path in [*names, *options]]
    switches = {as_flag(name) for name in names if fields[name].annotation is bool}
    booleans = {as_flag(path) for path, field in options.items() if _is_boolean(field)}
    titles = {as_flag(name): _title(field) for name, field in fields.items() if name not in names}
    words = _normalize(argv, set(flags) - switches, booleans)
    shown = () if "--help-all" in words else common
    try:
        namespace, unknown = _parser(arguments, prog, config, shown).parse_known_args(words)
    except argparse.ArgumentError as error:
        wrong = "" if error.argument_name else _describe_flags(words, flags, titles)
        raise InputError(wrong or _describe(error, words, switches)) from None
    if unknown:
        text = _describe_flags(unknown, flags, titles)
        raise InputError(text or _describe_unknown(unknown, flags, words, booleans, switches))
    given = vars(namespace)
    own = {name: given.pop(name) for name in fields if name in given}

    def origin(path: str) -> str:
        name = path.split(".")[0]  # `widths` of `widths.1`, an element of a list
        return as_flag(name) if name in names else str(fields[name].title)

    return validate(arguments, own, origin), nest(given)


def _is_boolean(field: FieldInfo) -> bool:
    return bool in (field.annotation, *get_args(field.annotation))


def _normalize(argv: Sequence[str], flags: Collection[str], booleans: Collection[str]) -> list[str]:
    """The words, with `--out_dir x` as `--out-dir x` and `--prompt -x` as `--prompt=-x`.

    argparse takes a word that begins with a dash for a flag. A word that looks like a flag is never
    taken for a value: `--out-dir --dry-rnu` is a mistake. `--model.bias` without a value becomes
    `--model.bias=true`, and `--no-model.bias` becomes `--model.bias=false`.

    Args:
        flags: those that take a value.
        booleans: those of them whose value may be omitted.

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
            flag, following = flag.replace("_", "-"), "".join(argv[index + 1 : index + 2])
            if flag in booleans and not value and following.lower() not in BOOLEANS:
                value = ["true"]
            elif flag.replace("--no-", "--", 1) in booleans and flag not in flags and not value:
                flag, value = flag.replace("--no-", "--", 1), ["false"]
            words.append("=".join([flag, *value]))
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
    hint = "write ./-name for a file whose name begins with a dash" if dashed else "see --help"
    return f"{error.message.replace('the following arguments are required', 'missing')}; {hint}"


def _quoted(words: list[str]) -> str:
    return shlex.quote(" ".join(words))


def _describe_flags(words: list[str], flags: Collection[str], titles: Mapping[str, str]) -> str:
    """The flags among the words that do not exist, and what they may have meant; "" if all do.

    Args:
        titles: the names of the arguments that have no flag, by the flag that they would have.
    """
    before = words[: words.index("--")] if "--" in words else words
    given = (word.partition("=")[0] for word in before if FLAG.fullmatch(word))
    wrong = [flag for flag in given if flag not in {*flags, *STANDARD}]
    return "\n".join(
        f"{flag}: no such option"
        + (f"; {titles[flag]} is written without it" if flag in titles else nearest(flag, flags))
        for flag in wrong[:3]
    )


def _describe_unknown(
    unknown: list[str],
    flags: Collection[str],
    words: list[str],
    booleans: Collection[str],
    switches: Collection[str],
) -> str:
    """What is wrong with words that argparse could not use, and what they may have meant."""
    word = unknown[0]
    at = words.index(word) if word in words else 0
    flag, value = words[max(at - 2, 0)], words[max(at - 1, 0)]
    name, equals, given = word.partition("=")
    if word.startswith("-"):
        hint = nearest(word, flags) or f"; write ./{word} for a file"
    elif equals:
        hint = f"; an option begins with two dashes: {as_flag(name)}={given}"
    elif value.partition("=")[0] in booleans:
        hint = f"; {value.partition('=')[0]} is true or false, or has no value"
    elif value in switches:
        hint = f"; {value} takes no value"
    elif flag.endswith("prompt"):
        hint = f"; a text of several words is quoted: {flag} {_quoted([value, *unknown])}"
    elif word.endswith((".yaml", ".yml")):
        hint = "; a file builds on another by naming it as its base"
    elif "--prompt" in flags:
        hint = f"; to continue a text: --prompt {_quoted(unknown)}"
    else:
        hint = ""
    return f"{word!r}: unexpected argument{hint}"


# ---------------------------------------------------------------------------------------------
# The parser


def _is_positional(field: FieldInfo) -> bool:
    """Whether an argument has no flag: a required one, or one whose title is in brackets."""
    return field.is_required() or str(field.title).startswith("[")


def _title(field: FieldInfo) -> str:
    """What the help calls an argument without a flag: `DIR`, whose title is `[DIR ...]`."""
    return str(field.title).strip("[]").removesuffix("...").strip()


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's own, except that names such as post-norm are not broken at the hyphen.

    Long lists of choices are wrapped.
    """

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = super()._format_action_invocation(action)
        if "{" not in text:
            return text
        lines = textwrap.wrap(text.replace(",", ", "), self._width - 8, break_on_hyphens=False)
        return "\n      ".join(lines).replace(", ", ",")

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Lines that are indented, such as examples, are kept."""
        return text if "\n  " in text else super()._fill_text(text, width, indent)


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
            hint = "; all values of a list follow one flag" if self.nargs == "*" else ""
            raise InputError(f"{option_string}: given twice{hint}")
        setattr(namespace, self.dest, values)


@functools.cache
def _parser(
    arguments: type[Section], prog: str, config: type[Section] | None, common: tuple[str, ...]
) -> _Parser:
    """The parser of all options, whose help shows those in `common`; none: all."""
    titles = [str(f.title) for f in arguments.model_fields.values() if _is_positional(f)]
    description, _, epilog = inspect.cleandoc(str(arguments.__doc__)).partition("\n\n")
    options = option_fields(config) if config else {}
    count = len(arguments.model_fields) - len(titles) + len(options)
    rest = f"All {count} options: %(prog)s --help-all" if common else ""
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, "[-h] [OPTIONS]", *titles]),
        description=description,
        epilog="\n\n".join(filter(None, [epilog, rest])),
        add_help=False,
        formatter_class=functools.partial(_HelpFormatter, max_help_position=24 if common else 6),
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,  # only what is given is in the namespace
    )
    version = f"steadygpt {__version__}"
    for flags, action, text in (
        (("-h", "--help"), "help", "show the common options and exit"),
        (("--help-all",), "help", "show every option and exit"),
        (("-V", "--version"), "version", "show the version and exit"),
    ):
        standard: dict[str, Any] = {"version": version} if action == "version" else {}
        text = _if_shown(flags[-1], text, common)
        parser.add_argument(*flags, action=action, help=text, **standard)
    schemas = arguments.model_json_schema()["properties"]
    for name, field in arguments.model_fields.items():
        if _is_positional(field):
            title = str(field.title)
            optional, several = title.startswith("["), title.strip("[]").endswith("...")
            nargs = {(True, False): "?", (False, True): "+", (True, True): "*"}
            parser.add_argument(
                name,
                metavar=_title(field),
                nargs=nargs.get((optional, several)),
                help=field.description,
            )
        elif field.annotation is bool:
            flag = as_flag(name)
            text = _if_shown(name, str(field.description), common)
            parser.add_argument(flag, dest=name, action="store_true", help=text)
        else:
            settings = _settings(field, schemas[name])
            settings["help"] = _if_shown(name, settings["help"], common)
            parser.add_argument(as_flag(name), dest=name, **settings)
    if config is not None:
        whole = config.model_json_schema()
        sections = {**whole.get("$defs", {}), config.__name__: whole}
        _add_section(parser, config, sections, "", common)
    return parser


def _if_shown(name: str, text: str, common: tuple[str, ...]) -> str:
    """The help of an option; for argparse to leave out if only `common` is shown."""
    return text if not common or name in common else argparse.SUPPRESS


def _add_section(
    parser: _Parser,
    section: type[Section],
    schemas: Mapping[str, Schema],
    prefix: str,
    common: tuple[str, ...],
) -> None:
    """Add the flags of a section as a group, then those of its subsections.

    Args:
        schemas: the JSON schema of every section, by the name of its class.
        prefix: dotted path of the section, with a dot at its end.
    """
    title = f"{prefix.rstrip('.') or 'run'} options"
    group = parser if common else parser.add_argument_group(title, section.__doc__)
    for name, field in section.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Section):
            _add_section(parser, below, schemas, f"{prefix}{name}.", common)
        else:
            settings = _settings(field, schemas[section.__name__]["properties"][name])
            path = f"{prefix}{name}"
            settings["help"] = _if_shown(path, settings["help"], common)
            group.add_argument(as_flag(path), dest=path, **settings)


def _settings(field: FieldInfo, schema: Schema) -> dict[str, Any]:
    """A flag's settings for `add_argument`; one for a list of strings takes several values."""
    items = [b["items"] for b in schema.get("anyOf", ()) if "items" in b]
    several = bool(items) and items[0].get("type") == "string"
    nullable = _is_nullable(field)
    described = field.default is None or "(default: " in str(field.description)
    default = "" if described else f" (default: {_format_default(field.default)})"
    return {
        "action": _StoreOnce,
        "nargs": "*" if several else None,
        "type": _none_if_null if nullable else str,
        "metavar": field.title or _metavar(field, schema, nullable),
        "help": f"{field.description}{default}".replace("%", "%%"),
    }


def _is_nullable(field: FieldInfo) -> bool:
    """Whether `null` means None; a string option takes it literally."""
    kinds = get_args(field.annotation)
    return type(None) in kinds and str not in kinds


def _none_if_null(text: str) -> str | None:
    return None if text == "null" else text


def _metavar(field: FieldInfo, schema: Schema, nullable: bool) -> str:
    """What a flag's value looks like, such as `INT|null`, from its JSON schema."""
    branches = schema.get("anyOf", [schema])
    kinds = [_kind(b) for b in branches if nullable or b.get("type") != "null"]
    joined = "|".join(dict.fromkeys(kinds))
    return f"[{joined}]" if _is_boolean(field) else joined


def _kind(schema: Schema) -> str:
    if "$ref" in schema or "$ref" in schema.get("items", ()):
        return "YAML"
    if "items" in schema:
        return _kind(schema["items"])
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

"""The kinds of value that options have: numbers with a range, names of variants, files.

A kind converts and checks one value. Its error message completes the sentence "VALUE ...", as in
"0 is not between 1 and 10"; `gpt.config.loading.validate` adds the value and the option's path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from gpt import variants
from gpt.errors import InputError, nearest


class Section(BaseModel):
    """A mapping of options. Unknown keys are errors; an empty mapping takes the defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: object) -> object:
        return {} if value is None else value

    def refuse(self, conflicts: Mapping[str, str]) -> None:
        """Fail validation with a message for each option, by its dotted path in this section.

        Raises:
            ValidationError: there are conflicts; it lists them all.
        """
        if conflicts:
            details: list[InitErrorDetails] = [
                {
                    "type": PydanticCustomError("conflict", "{text}", {"text": text}),
                    "loc": tuple(path.split(".")),
                    "input": self,
                }
                for path, text in conflicts.items()
            ]
            raise ValidationError.from_exception_data(type(self).__name__, details)


def spell(value: object) -> str:
    """A value of any type as YAML would have it, in at most 60 characters."""
    try:
        text = _flow(value)
    except ValueError:  # an int of thousands of digits
        return "a very long number"
    return text if len(text) <= 60 else text[:57] + "..."


def unquoted(value: object) -> str:
    """A text itself, and any other value as `spell` has it."""
    return value if isinstance(value, str) else spell(value)


def _flow(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(map(_flow, value))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_flow(each)}' for key, each in value.items())}}}"
    return repr(value)


# ---------------------------------------------------------------------------------------------
# Names of variants


@dataclass(frozen=True)
class Choice:
    """A string that must be a key of the dict `table` in `module`, such as `gpt.model.norm.NORMS`.

    That dict, next to the code of its variants, is the only list of their names; `gpt.variants`
    reads it without importing torch.
    """

    module: str
    table: str

    def names(self) -> tuple[str, ...]:
        """The valid values, in the table's order."""
        return variants.names(self.module, self.table)

    def _check(self, value: object) -> object:
        names = self.names()
        if value not in names:
            raise PydanticCustomError(
                "choice",
                "is not one of {names}{hint}",
                {"names": ", ".join(names), "hint": nearest(unquoted(value), names)},
            )
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.names())}


@dataclass(frozen=True)
class Pattern:
    """Text that matches a regular expression, which `words` describe in a message: "must ..."."""

    pattern: str
    words: str

    def _check(self, value: str) -> str:
        if not re.search(self.pattern, value):
            raise PydanticCustomError("pattern", "must {words}", {"words": self.words})
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": self.pattern}


def _switch(value: object) -> object:
    """YAML 1.1 reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Device = Literal["auto", "cpu", "cuda", "mps"]
Weights = Literal["fp32", "bf16", "int8"]  # number format of the weights when sampling


def as_list(value: object) -> object:
    """A single string is read as a list of one, and null as an empty one."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(as_list, json_schema_input_type=str | list[str])]


# ---------------------------------------------------------------------------------------------
# Options that depend on a variant


@dataclass(frozen=True)
class Only:
    """Marks an option that is read only with some values of another option of its section.

    With no values, it is read only if the other option is set.
    """

    other: str
    values: tuple[str | None, ...] = ()

    def applies(self, value: object) -> bool:
        """Whether the option is read if the other option has this value."""
        return value in self.values if self.values else bool(value)

    def describe(self, value: object, prefix: str) -> str:
        """How the other option, whose value is `value`, keeps this one from being read."""
        other = f"{prefix}{self.other}"
        if not self.values:
            return f"without {other}"
        if self.values == (None,):
            return f"with {other}"
        return f"with {other} {value}, only with {', '.join(filter(None, self.values))}"


@dataclass(frozen=True)
class TunedFor:
    """Marks an option whose value suits one value of another option of its section.

    A value that suits one of those in `alike` suits all of them.
    """

    other: str
    alike: tuple[str, ...] = ()

    def differ(self, before: object, after: object) -> bool:
        """Whether a value chosen for `before` may not suit `after`."""
        return before != after and not {before, after} <= set(self.alike)


@dataclass(frozen=True)
class Unit:
    """The unit of an option's value, for the reference."""

    name: str


@dataclass(frozen=True, init=False)
class From:
    """Where an option comes from: keys of `LINKS`, gpt/config/bibliography.py."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


# ---------------------------------------------------------------------------------------------
# Numbers


@dataclass(frozen=True)
class Between:
    """A number from `minimum` to `maximum`, both included. Booleans are not numbers.

    A whole number may be written as `1e6`, which YAML 1.1 reads as text.
    """

    minimum: float
    maximum: float

    def check(self, value: object) -> object:
        """The number that `value` is or spells; anything else is left to the type's own check."""
        if isinstance(value, bool):
            raise PydanticCustomError("number", "is a boolean, not a number")
        number = _parse_number(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and not self.minimum <= number <= self.maximum:
            raise PydanticCustomError("range", "is not {range}", {"range": str(self)})
        return number

    def __str__(self) -> str:
        bounds = (self.minimum, self.maximum)
        return "between {} and {}".format(
            *(f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in bounds)
        )

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "minimum": self.minimum, "maximum": self.maximum}


def _parse_number(text: str) -> int | float | str:
    """The number that a text spells, as an int if it is whole; the text itself otherwise."""
    try:
        return int(text)
    except ValueError:  # also raised for thousands of digits, which are infinite as a float
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


# Each range is wider than anyone needs, and excludes values that would overflow or run forever.
# Whether the machine has the memory for a combination is checked in gpt/hardware/size.py.
Count = Annotated[int, Between(1, 10**9)]
CountOrZero = Annotated[int, Between(0, 10**9)]
Steps = Annotated[Count, Unit("steps")]
StepsOrZero = Annotated[CountOrZero, Unit("steps")]
Sequences = Annotated[Count, Unit("sequences")]
Tokens = Annotated[Count, Unit("tokens")]
Layers = Annotated[int, Between(1, 2_000), Unit("blocks")]
Channels = Annotated[int, Between(1, 100_000)]
ContextLength = Annotated[int, Between(1, 10_000_000), Unit("tokens")]
VocabularySize = Annotated[int, Between(257, 1_000_000), Unit("tokens")]
SampleCount = Annotated[int, Between(1, 10_000)]
WorkerCount = Annotated[int, Between(1, 1000)]
Seed = Annotated[int, Between(0, 2**63 - 1)]
Positive = Annotated[float, Between(1e-30, 1e30)]
Rate = Positive  # a learning rate
Epsilon = Annotated[float, Between(1e-30, 1e3)]
Factor = Annotated[float, Between(0.0, 1e3)]  # multiplies a loss, a weight or a logit
Ratio = Annotated[float, Between(1e-6, 1e6)]  # relative to other numbers of its kind
Resource = Annotated[float, Between(0.0, 1e4)]  # a part of the CPUs or GPUs of a machine
SoftCap = Annotated[float, Between(1e-3, 1e6)]
Multiple = Annotated[float, Between(1e-5, 1e3)]
Seconds = Annotated[float, Between(1e-3, 1e9), Unit("seconds")]
Hours = Annotated[float, Between(1e-6, 1e6), Unit("hours")]
Fraction = Annotated[float, Between(0.0, 1.0)]
PositiveFraction = Annotated[float, Between(1e-6, 1.0)]
SplitFraction = Annotated[float, Between(1e-6, 0.999999)]  # leaves something on both sides
BelowOne = Annotated[float, Between(0.0, 0.999999)]


# ---------------------------------------------------------------------------------------------
# Files


def expand_user(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that user's home directory.

    Raises:
        InputError: there is no such user.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise InputError(f"{path}: there is no user {user[1:]}; write ./{user} for a file")
    return expanded


def _file_name(value: str) -> str:
    if not value:
        raise PydanticCustomError("empty", "is empty, and must name a file or folder")
    if "\0" in value:
        raise PydanticCustomError("nul", "contains a NUL character, which file names cannot")
    return expand_user(value)


FileName = Annotated[
    str, AfterValidator(_file_name), WithJsonSchema({"type": "string", "format": "path"})
]
FileNames = Annotated[
    tuple[FileName, ...],
    BeforeValidator(as_list, json_schema_input_type=FileName | list[FileName]),
]

_RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}


def is_reserved(name: str) -> bool:
    """Whether Windows reserves a file name, whatever its extension."""
    return name.partition(".")[0].rstrip().lower() in _RESERVED


def _run_name(name: str) -> str:
    if is_reserved(name) or name.endswith("."):
        raise PydanticCustomError("reserved", "is not a valid file name on Windows")
    return name


RunName = Annotated[
    str,
    Field(max_length=100),
    Pattern(
        r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        "begin with a letter or digit, and contain only letters, digits, dots, hyphens and "
        "underscores",
    ),
    AfterValidator(_run_name),
]

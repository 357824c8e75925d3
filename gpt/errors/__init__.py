"""Errors: in the user's input, which the command line turns into exit code 2, and in a run.

`InputError` is for mistakes in configs, flags, files and directories. Its text is shown without a
traceback, so it names the key or file, what was found and what is allowed, in at most three lines.
Bugs remain ordinary exceptions with a traceback.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from gpt.errors.names import closest, nearest

__all__ = [
    "Fault",
    "InputError",
    "LostProcessError",
    "NonFiniteError",
    "OutOfMemoryError",
    "StepInterruptedError",
    "StoppedError",
    "UnreachableError",
    "as_flag",
    "closest",
    "format_error",
    "naming_flags",
    "nearest",
    "option",
    "printable",
]

HALF_LINE = 1000  # characters at either end of a line that are always shown


class InputError(ValueError):
    """The user's input is wrong. The message has one to three lines."""


class OutOfMemoryError(InputError):
    """The config needs more memory than the device has."""


class UnreachableError(InputError):
    """A server does not answer; the same command may succeed later."""


class LostProcessError(Exception):
    """One of the processes of a run was killed, or does not respond."""


class StoppedError(Exception):
    """The user asked to stop; the work so far is saved, and the next start continues it."""


_named_as_flags = False


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """A context in which messages name options as flags, for users of a command line."""
    global _named_as_flags
    before, _named_as_flags = _named_as_flags, True
    try:
        yield
    finally:
        _named_as_flags = before


def option(path: str) -> str:
    """How a message names an option: `out_dir` to Python, `--out-dir` in a command."""
    return as_flag(path) if _named_as_flags else path


def as_flag(path: str) -> str:
    """`model.tied_head` becomes `--model.tied-head`; `json_`, whose name is taken, `--json`."""
    return "--" + path.rstrip("_").replace("_", "-")


def format_error(error: InputError) -> list[str]:
    """The message as one to three lines that a terminal can show.

    It may quote anything from the input: terminal escapes, or 5,000 letters.
    """
    lines = [printable(line) for line in str(error).split("\n", 2)]
    return [
        line if len(line) <= 2 * HALF_LINE else f"{line[:HALF_LINE]} ... {line[-HALF_LINE:]}"
        for line in lines
    ]


def printable(text: str, keep: str = "") -> str:
    """`text` with every character escaped that could control a terminal, except those in `keep`.

    Control characters, bidirectional overrides, zero-width characters, lone surrogates and
    unassigned code points are escaped; letters of every script, emoji and spaces are not.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or _can_be_shown(c) else ascii(c)[1:-1] for c in text)


def _can_be_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


class Fault(NamedTuple):
    """A non-finite number: the update, the quantity, and a sentence for the user."""

    step: int
    quantity: str
    text: str


class NonFiniteError(Exception):
    """A loss, gradient or weight is not finite; `training.nonfinite` says how that is handled."""

    def __init__(self, step: int, quantity: str, text: str) -> None:
        super().__init__(text)
        self.fault = Fault(step, quantity, text)


class StepInterruptedError(Exception):
    """A stop was requested in the middle of a step; a resumed run repeats the interrupted part."""

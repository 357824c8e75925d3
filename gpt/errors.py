"""What a user can get wrong, as one exception that the command line turns into exit code 2.

`InputError` is for mistakes in configs, flags, files and directories; its text is shown as it is,
so it names the key or file, what was found and what is allowed, in at most three lines. It is not
for faults of the program: those stay ordinary exceptions and keep their traceback.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

HALF = 1000  # characters at either end of a line that are always shown


class InputError(ValueError):
    """The user's input is wrong. The message is one to three finished lines."""


class OutOfMemoryError(InputError):
    """The device's memory does not hold what the config asks for."""


class UnreachableError(InputError):
    """Something on the network does not answer: the same start may succeed later."""


class StoppedError(Exception):
    """The user asked to stop, and what was done so far is kept for the next start."""


def told(error: InputError) -> list[str]:
    """The message as one to three lines, of a length and of characters that a terminal can show.

    Words of the input stand in it, and may hold anything: escapes of a terminal, or 5,000 letters.
    """
    lines = []
    for line in str(error).split("\n", 2):
        shown = printable(line)
        cut = len(shown) > 2 * HALF
        lines.append(f"{shown[:HALF]} ... {shown[-HALF:]}" if cut else shown)
    return lines


def printable(text: str, keep: str = "") -> str:
    """`text` with each character escaped that could steer a terminal, but for those in `keep`.

    Control characters, bidirectional overrides, characters without width, lone surrogates and what
    Unicode does not assign are escaped; letters of every script, emoji and spaces are not.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or _can_be_shown(c) else ascii(c)[1:-1] for c in text)


def _can_be_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def nearest(name: str, names: Iterable[str]) -> str:
    """`"; perhaps you meant X"` for the valid name closest to `name`, or an empty string.

    A dotted name matches by its whole path first and by its last part next, so that
    `learning_rate` finds `optimizer.learning_rate`; `prenorm` finds `pre`, with which it begins.
    """
    names, name = list(names), name.lower().replace("-", "_")
    leaf = name.rpartition(".")[2]
    leaves = {n.rpartition(".")[2]: n for n in reversed(names)}
    begun = [n for n in names if "." not in name and len(n) > 2 and name.startswith(n)]
    found = [  # the surest first
        leaves.get(leaf),
        *difflib.get_close_matches(name, names, n=1, cutoff=0.8),
        *begun,
        *difflib.get_close_matches(name, names, n=1, cutoff=0.6),
        *(leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)),
    ]
    return next((f"; perhaps you meant {n}" for n in found if n), "")


class Fault(NamedTuple):
    """A number that is not finite: after which update, which quantity, and a sentence for users."""

    step: int
    quantity: str
    text: str


class NonFiniteError(Exception):
    """A loss, gradient or weight is not finite; `training.nonfinite` says how that is handled."""

    def __init__(self, step: int, quantity: str, text: str) -> None:
        super().__init__(text)
        self.fault = Fault(step, quantity, text)


class StopRequestedError(Exception):
    """A stop was requested during work that a resumed run does again."""

"""What a shell offers when Tab is pressed: the options of a command, their values, and files.

The script that `steadygpt completion` prints makes the shell start the program with the line typed
so far, and argcomplete answers. What a value may be is read from the placeholder in the help, such
as `{adamw,radam}`, `auto|INT` or `RUN_DIR`, so nothing is listed a second time.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, cast

from gpt.config.shipped import Kind, names

if TYPE_CHECKING:
    from argcomplete.completers import BaseCompleter

SHIPPED: dict[str, Kind] = {  # by placeholder
    "CONFIG.yaml": "config",
    "GRID.yaml": "grid",
    "LADDER.yaml": "ladder",
}
WORD = re.compile(r"(?<![\w.])[a-z][\w.-]*")  # in a placeholder: a value that is typed as it is
FOLDER = re.compile(r"DIR|CHECKPOINT")
FILE = re.compile(r"PATH|FILE|\.yaml")


def is_completing() -> bool:
    """Whether a shell asks for completions instead of running a command."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: argparse.ArgumentParser, words_before: int) -> NoReturn:
    """Print what may follow the line typed so far, and exit.

    Args:
        words_before: number of words before the arguments of `parser`.
    """
    from argcomplete import autocomplete

    os.environ["_ARGCOMPLETE"] = str(words_before)
    completer = cast("BaseCompleter", _values)  # a function serves as well
    autocomplete(parser, always_complete_options=False, default_completer=completer)
    raise AssertionError("argcomplete exits")


def typed_command() -> str:
    """The command in the line typed so far; empty if it is not complete."""
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", 0))]
    _, *words = f"{line}|".split()  # the bar marks where the cursor is
    return words[0] if len(words) > 1 else ""


def _values(prefix: str, action: argparse.Action, **context: Any) -> Iterator[str]:
    """What an argument, or the value of an option, may be."""
    placeholder = str(action.metavar)
    if placeholder in SHIPPED:
        yield from names(SHIPPED[placeholder])
    yield from WORD.findall(placeholder)
    if FOLDER.search(placeholder) or FILE.search(placeholder):
        suffix = None if FOLDER.search(placeholder) else placeholder.partition(".")[2]
        yield from _paths(prefix, suffix)


def _paths(prefix: str, suffix: str | None) -> Iterator[str]:
    """Folders, and files with a suffix, that begin with `prefix`; None: no files."""
    folder, start = os.path.split(prefix)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith(".") > start.startswith("."):
            continue
        if entry.is_dir():
            yield f"{path}/"
        elif suffix is not None and entry.name.endswith(suffix):
            yield path

"""`steadygpt clean [DIR ...]`: list and remove files that are no longer needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from gpt.cli.flags import parse
from gpt.config import FileNames, Section
from gpt.errors import InputError, format_error
from gpt.io.console import show

if TYPE_CHECKING:
    from gpt.run.cleanup import Leftover

DEFAULT = ("runs", "cache")  # where training puts runs and prepared data


class Arguments(Section):
    """List what is no longer needed, with sizes, and remove it after asking: checkpoints of ended
    runs other than latest, best and those of checkpoint.keep_every, damaged ones that were set
    aside, prepared data that no known run uses, and what killed processes left.

    Examples:
      %(prog)s
      %(prog)s runs/quickstart cache --yes
    """

    directories: FileNames = Field((), title="[DIR ...]")
    """Folders of runs, comparisons and prepared data (default: runs and cache). Whatever a run in
    these or below the working directory uses is kept; runs elsewhere are not known."""
    yes: bool = False
    """Remove without asking."""


def main(argv: Sequence[str], prog: str = "steadygpt clean") -> int:
    """`steadygpt clean [DIR ...]`; returns the exit code."""
    arguments, _ = parse(Arguments, prog, argv)
    given = [Path(name) for name in arguments.directories]
    for folder in given:
        if not folder.is_dir():
            what = "is not a folder" if os.path.lexists(folder) else "no such directory"
            raise InputError(f"{folder}: {what}")
    clean(given or [Path(name) for name in DEFAULT if Path(name).is_dir()], arguments.yes)
    return 0


def clean(folders: Sequence[Path], yes: bool) -> None:
    """List what can go below some folders, and remove it if `yes`, or if the user agrees."""
    from gpt.run import cleanup

    users = [Path(), Path(DEFAULT[0])]  # runs/ may be a link
    leftovers, left_alone = cleanup.find(folders, users)
    for line in left_alone:
        show(line, sys.stderr)
    if not leftovers:
        show("nothing to remove")
        return
    show(_table(leftovers))
    if not (yes or _agrees(len(leftovers))):
        show("nothing was removed" + ("" if sys.stdin.isatty() else "; --yes removes them all"))
        return
    freed, number = 0, 0
    still = leftovers if yes else cleanup.find(folders, users)[0]  # runs may have changed meanwhile
    for leftover in (each for each in leftovers if each in still):
        try:
            cleanup.remove(leftover)
        except InputError as error:  # in use since it was listed
            show("\n".join(format_error(error)), sys.stderr)
            continue
        freed, number = freed + leftover.size, number + 1
    show(f"removed {number:,} of {len(leftovers):,}, {_megabytes(freed)}")


def _table(leftovers: Sequence[Leftover]) -> str:
    """Size, path and description of each, and the sum."""
    rows = [(_megabytes(each.size), str(each.path), each.why) for each in leftovers]
    rows.append((_megabytes(sum(each.size for each in leftovers)), "in all", ""))
    width = max(len(size) for size, _, _ in rows)
    return "\n".join(f"{size:>{width}}  {path}{why and f': {why}'}" for size, path, why in rows)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _agrees(number: int) -> bool:
    """Whether the user, if there is a terminal, answers yes."""
    if not sys.stdin.isatty():
        return False
    print(f"remove {'it' if number == 1 else f'these {number:,}'}? [y/N] ", end="", file=sys.stderr)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")

"""`steadygpt checkpoint verify DIR`, also `python -m gpt.checkpoint`: are checkpoints intact?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from gpt.cli.flags import parse
from gpt.config import FileName, Section
from gpt.errors import InputError, format_error, nearest
from gpt.io.console import show


class Arguments(Section):
    """Check every file of a run's checkpoints against its manifest.

    Examples:
      %(prog)s verify runs/quickstart
      %(prog)s verify runs/quickstart/checkpoints/latest
    """

    action: Literal["verify"] = Field(title="verify")
    """The only action."""
    directory: FileName = Field(title="DIR")
    """A run directory, its checkpoints/, or one of them, such as checkpoints/latest."""


def main(argv: Sequence[str], prog: str = "python -m gpt.checkpoint") -> int:
    """`steadygpt checkpoint verify DIR`; returns the exit code."""
    action = argv[0] if argv else "--help"
    if action != "verify" and not action.startswith("-"):
        path = "DIR" if nearest(action, ["verify"]) or not Path(action).exists() else action
        raise InputError(f"{action!r} is not an action; write: {prog} verify {path}")
    arguments, _ = parse(Arguments, prog, argv)
    verify(Path(arguments.directory))
    return 0


def verify(directory: Path) -> None:
    """Load every checkpoint in a directory, and print whether it is intact.

    Raises:
        InputError: one of them is damaged, or there is none.
    """
    from gpt import checkpoint as store

    folder = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    one = store.named(str(directory), folder)
    found = [one] if one is not None else list(store.steps(folder).values())
    if not found:
        raise InputError(f"{directory}: contains no checkpoint")
    damaged = 0
    for path in found:
        try:
            store.load(path)
            show(f"{path}: intact")
        except store.PrunedError as pruned:  # by the run, which is still training
            show(str(pruned))
        except InputError as error:
            damaged += 1
            show("\n".join(format_error(error)))
    if damaged:
        raise InputError(f"{directory}: {damaged} of {len(found)} checkpoints are damaged")

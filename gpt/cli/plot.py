"""`steadygpt plot RUN ...`: the curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from gpt.cli.flags import parse
from gpt.config import FileName, Section
from gpt.io.console import show, write_result
from gpt.watch.curves import X


class Arguments(Section):
    """Plot loss, learning rate and gradient norm of several runs in one picture.

    Examples:
      %(prog)s runs/quickstart runs/lower-rate
      %(prog)s runs/quickstart --x seconds --out curves.svg
    """

    runs: tuple[FileName, ...] = Field(title="RUN ...")
    """Directories of runs; also a comparison, for its cells, a folder of runs, or a pattern."""
    x: X = "step"
    """What to plot against; seconds are those of updates, without evaluations."""
    out: FileName = Field("curves.png", title="FILE.png|FILE.svg")
    """Where to save the picture; an existing file is replaced only if it is an earlier one."""
    csv: bool = False
    """Print the plotted numbers as CSV, and draw nothing."""


def main(argv: Sequence[str], prog: str = "steadygpt plot") -> int:
    """`steadygpt plot RUN ...`; returns the exit code."""
    arguments, _ = parse(Arguments, prog, argv)

    from gpt.watch.picture import plot  # imports matplotlib

    plotted = plot(*arguments.runs, x=arguments.x)
    if arguments.csv:
        write_result(plotted.to_csv())
    else:
        show(str(plotted.save(Path(arguments.out))))
    return 0

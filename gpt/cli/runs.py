"""`steadygpt runs [DIR]`: a table of runs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from pydantic import Field

from gpt.cli.flags import parse
from gpt.config import FileName, Section
from gpt.io.console import show, write_result
from gpt.watch.table import list_runs


class Arguments(Section):
    """List the runs in a folder: status, losses, size, time, and the options that differ.

    Examples:
      %(prog)s
      %(prog)s runs/quick --cells --csv
    """

    folder: FileName = Field("runs", title="[DIR]")
    """A folder of runs, a comparison, or a run."""
    cells: bool = False
    """List the cells of comparisons, which otherwise are one line each."""
    csv: bool = False
    """Print CSV: all numbers in full, and a column for each option that differs."""


def main(argv: Sequence[str], prog: str = "steadygpt runs") -> int:
    """`steadygpt runs [DIR] ...`; returns the exit code."""
    arguments, _ = parse(Arguments, prog, argv)
    table = list_runs(arguments.folder, cells=arguments.cells)
    if arguments.csv:
        write_result(table.to_csv())
    elif table.rows:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        show(table.format(width))
    else:
        show(f"{prog}: {arguments.folder} contains no runs", sys.stderr)
    return 0

"""`compare.py GRID.yaml`: compare training stability over a grid of runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from gpt.cli.cells import CellArguments
from gpt.cli.common import StopSignals
from gpt.cli.flags import parse
from gpt.cli.paths import check_directory, explained
from gpt.compare import grid as grids
from gpt.compare.grid import Cell, Grid
from gpt.config import Config, FileName, FileNames
from gpt.config.shipped import names
from gpt.errors import InputError
from gpt.io.console import Console, show

if TYPE_CHECKING:
    from gpt.compare.analysis.results import Summary


# The options that `--help` shows; `--help-all` shows all.
COMMON = ("out_dir", "workers", "engine", "dry_run", "report_only", "seeds", "training.steps")


class Arguments(CellArguments):
    """Compare arms over learning rates, settings and seeds. Every option of the cells is also a
    flag.

    Examples:
      %(prog)s quick
      %(prog)s norms --training.steps 100 --seeds 4 --out-dir runs/short
      %(prog)s runs/quick --report-only
      %(prog)s quick --engine slurm --sbatch time=1:00:00 partition=small
    """

    grid: FileName = Field(
        title="GRID.yaml",
        description="A grid file, the directory of a comparison, or the name of a shipped grid: "
        + ", ".join(names("grid")),
    )
    runner: Literal["auto", "processes", "batched"] | None = Field(
        None, title="auto|processes|batched"
    )
    """batched: train all cells of one shape together; processes: train each cell alone, in one
    of the worker processes; auto: batched on a GPU, else processes (default: the grid's)."""
    extend: bool = False
    """Add arms, rates, seeds or contrasts to the comparison in the directory; its results stay. The
    report says what was added after results were known."""
    reuse: FileNames = Field((), title="DIR")
    """Other comparisons, whose finished runs are copied if their configs are the same."""
    beside: FileName | None = Field(None, title="DIR")
    """Another comparison, to show next to this one in the report."""


@dataclass(frozen=True)
class Comparison:
    """A grid, its cells, and the directory of their runs."""

    grid: Grid
    cells: list[Cell]
    directory: Path


def main(argv: Sequence[str], prog: str = "compare.py") -> int:
    """`compare.py GRID.yaml ...`; returns the exit code."""
    arguments, comparison = load(argv, prog)
    summary = compare(arguments, comparison)
    return report(summary, comparison)


def load(argv: Sequence[str], prog: str = "compare.py") -> tuple[Arguments, Comparison]:
    """Read the command line and the grid.

    Raises:
        InputError: either is invalid.
    """
    arguments, options = parse(Arguments, prog, argv, Config, common=COMMON)
    arguments.check_report_only("dry_run", "extend", "reuse")
    arguments.check_engine()
    with explained(arguments.grid, prog, "grid"):
        path, directory = _locate(arguments)
        grid, cells = grids.load(path, options, arguments.seeds)
    check_directory(directory, prog, "comparison")
    if arguments.runner is not None:
        grid = grid.model_copy(update={"runner": arguments.runner})
    if not arguments.report_only:
        grids.check_sizes(cells)
    return arguments, Comparison(grid, cells, directory)


def _locate(arguments: Arguments) -> tuple[Path, Path]:
    """The grid file and the directory of the comparison."""
    path = Path(arguments.grid)
    if not path.is_dir():
        return path, Path(arguments.out_dir or f"runs/{path.stem}")
    grid = path / "grid.yaml"
    if not grid.is_file():
        raise InputError(f"{path}: is not a comparison directory (no grid.yaml)")
    if arguments.out_dir is not None:
        raise InputError(f"--out-dir: {path} is already a comparison directory")
    return grid, path


def compare(arguments: Arguments, comparison: Comparison) -> Summary | None:
    """Run the cells that have no result yet, and write the report.

    Returns:
        The summary; None after --dry-run, which only lists the cells.

    Raises:
        StoppedError: it was interrupted.
    """
    from gpt.compare import comparison as comparisons
    from gpt.compare.execution.tasks import default_workers

    grid, cells, directory = comparison.grid, comparison.cells, comparison.directory
    other = Path(arguments.beside) if arguments.beside is not None else None
    if other is not None:
        comparisons.read_comparison(other)  # raises before any cell runs
    if arguments.report_only:
        comparisons.check_directory(grid, cells, directory)
        workers = arguments.workers or default_workers(cells)
        return comparisons.report(grid, cells, directory, other, workers=workers)
    with arguments.make_engine() as engine:
        workers = engine.workers(cells, arguments.workers)
        extend, reuse = arguments.extend, [Path(each) for each in arguments.reuse]
        if arguments.dry_run:
            show(
                comparisons.dry_run(
                    grid, cells, directory, workers, extend=extend, reuse=reuse, engine=engine
                )
            )
            return None
        with StopSignals(arguments.max_seconds) as stop, contextlib.closing(Console()) as console:
            return comparisons.compare(
                grid,
                cells,
                directory,
                workers=workers,
                console=console,
                stop=stop,
                beside=other,
                extend=extend,
                reuse=reuse,
                engine=engine,
            )


def report(summary: Summary | None, comparison: Comparison) -> int:
    """Print the summary, and return the exit code: 1 if the status of a cell is "error"."""
    if summary is None:
        return 0
    from gpt.compare.messages import format_summary

    show(format_summary(summary, comparison.directory))
    return 1 if "error" in summary.lost.values() else 0

"""`steadygpt scaling LADDER.yaml`: how the loss depends on model size, tokens and compute."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from gpt.cli.cells import CellArguments
from gpt.cli.common import StopSignals
from gpt.cli.flags import parse
from gpt.cli.paths import check_directory, explained
from gpt.compare import grid as grids
from gpt.config import Config, FileName
from gpt.config.shipped import find, names
from gpt.errors import InputError
from gpt.io.console import Console, show
from gpt.scaling import ladder as ladders

# The options that `--help` shows; `--help-all` shows all.
COMMON = (
    "out_dir", "workers", "engine", "dry_run", "report_only", "seeds", "extend", "max_seconds",
)  # fmt: skip


class Arguments(CellArguments):
    """Train a ladder of model sizes with several compute budgets, and fit Chinchilla's law. Every
    option of the runs is also a flag.

    Examples:
      %(prog)s tiny --dry-run
      %(prog)s tiny --workers 2
      %(prog)s runs/tiny --report-only
    """

    ladder: FileName = Field(
        title="LADDER.yaml",
        description="A ladder file, the directory of a study, or the name of a shipped ladder: "
        + ", ".join(names("ladder")),
    )
    extend: bool = False
    """Add sizes, budgets or seeds to the study in the directory; its results stay."""


def main(argv: Sequence[str], prog: str = "steadygpt scaling") -> int:
    """`steadygpt scaling LADDER.yaml ...`; returns the exit code."""
    arguments, options = parse(Arguments, prog, argv, Config, common=COMMON)
    arguments.check_report_only("dry_run", "extend")
    arguments.check_engine()
    path = Path(arguments.ladder)
    is_directory = path.is_dir()
    directory = path if is_directory else Path(arguments.out_dir or f"runs/{path.stem}")
    check_directory(directory, prog, "study")
    with explained(arguments.ladder, prog, "ladder"):
        if is_directory:
            _check_fixed(arguments, options)
            grid, cells = grids.load(path / "grid.yaml")
        else:
            path = find(path, "ladder")
            ladder, configs = ladders.load(path, options, arguments.seeds)

    from gpt.compare import comparison
    from gpt.scaling import study as studies
    from gpt.scaling.report import format_study

    if not is_directory:
        grid, cells = studies.plan(ladder, configs, path)
    if arguments.report_only:
        comparison.check_directory(grid, cells, directory)
        study = studies.report(grid, cells, directory)
    else:
        extend = arguments.extend
        with arguments.make_engine() as engine:
            workers = engine.workers(cells, arguments.workers)
            if arguments.dry_run:
                show(
                    comparison.dry_run(
                        grid, cells, directory, workers, extend=extend, engine=engine
                    )
                )
                return 0
            grids.check_sizes(cells)
            with (
                StopSignals(arguments.max_seconds) as stop,
                contextlib.closing(Console()) as console,
            ):
                study = studies.run(
                    grid,
                    cells,
                    directory,
                    workers=workers,
                    console=console,
                    stop=stop,
                    extend=extend,
                    engine=engine,
                )
    show(format_study(study, directory))
    return 1 if "error" in study.missing.values() else 0


def _check_fixed(arguments: Arguments, options: Mapping[str, object]) -> None:
    """Refuse what would change a study that is given as a directory.

    Raises:
        InputError: it has no grid, or a flag or option was given.
    """
    path = arguments.ladder
    if not (Path(path) / "grid.yaml").is_file():
        raise InputError(f"{path}: is not the directory of a scaling study (no grid.yaml)")
    for flag, given in (("--out-dir", arguments.out_dir), ("--seeds", arguments.seeds)):
        if given is not None:
            raise InputError(f"{flag}: {path} is a study's directory, whose grid is fixed")
    if options:
        raise InputError(f"{path}: is a study's directory, whose options are fixed")

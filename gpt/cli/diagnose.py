"""`steadygpt diagnose RUN_DIR`, also `python -m gpt.diagnostics`: plot the layers' statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from gpt.cli.flags import parse
from gpt.cli.paths import find_run
from gpt.config import FileName, Section
from gpt.errors import InputError
from gpt.io.console import show


class Arguments(Section):
    """Plot the statistics of a run's layers, recorded every diagnostics.every steps.

    Examples:
      %(prog)s runs/post-norm
    """

    run_dir: FileName = Field(title="RUN_DIR")
    """A run directory, such as runs/pre-norm."""


def main(argv: Sequence[str], prog: str = "python -m gpt.diagnostics") -> int:
    """`steadygpt diagnose RUN_DIR`; returns the exit code."""
    arguments, _ = parse(Arguments, prog, argv)
    picture = diagnose(find_run(arguments.run_dir, prog))
    show(str(picture))
    return 0


def diagnose(run_dir: Path) -> Path:
    """Plot the statistics of a run's layers; returns the path of the picture.

    Raises:
        InputError: the directory is not a run, or has no such statistics.
    """
    from gpt import metrics
    from gpt.run.directory import RunDirectory
    from gpt.run.layer_plot import has_layers, plot_layers

    run = RunDirectory(run_dir)
    run.read_config()  # refuses a directory that is not a run
    records = metrics.read(run.metrics)
    if not has_layers(records):
        raise InputError(f"{run.path}: has no layer statistics; train with --diagnostics.every 50")
    plot_layers(records, run.layers, title=str(run.path))
    return run.layers

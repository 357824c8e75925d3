"""A scaling study from beginning to end: ladder -> grid -> runs -> fits -> report.

    runs/NAME/
      grid.yaml       the grid of the runs: it alone reproduces the study
      cells/CELL/     a run directory each
      cells.csv       one row per cell, as in a comparison
      summary.json    the law and the best size of each budget, with intervals
      report.md, figures/

The other files of a comparison (command.json, registration.json, lost.json) are there too.
Started again, a study runs only the cells that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from gpt.compare import comparison
from gpt.compare.analysis.searches import read_outcomes
from gpt.compare.execution.engine import Engine
from gpt.compare.grid import Cell, Grid
from gpt.compare.report.cells_csv import csv_text
from gpt.config import Config
from gpt.data import preparation
from gpt.io.console import Console
from gpt.io.files import write_text
from gpt.model.gpt2 import GPT
from gpt.scaling.ladder import Ladder, make_grid
from gpt.scaling.report import write_report
from gpt.scaling.results import Study, summarize

VERSION = 1  # of summary.json


def plan(ladder: Ladder, configs: Mapping[str, Config], path: Path) -> tuple[Grid, list[Cell]]:
    """The grid of a ladder, and its cells.

    Args:
        ladder, configs: from `gpt.scaling.ladder.load`.
        path: the ladder's file, for messages.

    Raises:
        InputError: a size has no budget, or one of too few steps; or the data cannot be read.
    """
    vocabulary = preparation.vocab_size(next(iter(configs.values())).data)
    with torch.device("meta"):
        sizes = {
            name: GPT(config.model, vocabulary).num_parameters() for name, config in configs.items()
        }
    return make_grid(ladder, configs, sizes, path)


def run(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    *,
    workers: int,
    console: Console,
    stop: Callable[[], bool],
    extend: bool = False,
    engine: Engine | None = None,
) -> Study:
    """Run the missing cells of a study, and write its report.

    Args:
        workers, extend, engine: as for `gpt.compare.comparison.run`.

    Raises:
        InputError: the directory holds something else, or the grid cannot be run here.
        StoppedError: `stop` became true; there is no report.
    """

    def finish(grid: Grid) -> Study:
        return report(grid, cells, directory, wait=comparison.REPORT_WAIT)

    return comparison.run(
        grid,
        cells,
        directory,
        finish,
        workers=workers,
        console=console,
        stop=stop,
        extend=extend,
        engine=engine,
    )


def report(grid: Grid, cells: Sequence[Cell], directory: Path, wait: float = 0.0) -> Study:
    """Write cells.csv, summary.json, report.md and figures/ from finished cells.

    Args:
        wait: seconds to wait for another process that writes this report.

    Raises:
        InputError: no cell has a result, a file is damaged, there is a symbolic link, or another
            process writes this report.
    """
    with comparison.writing_report(directory, wait):
        outcomes = read_outcomes(grid, cells, directory)
        study = summarize(grid.title, outcomes)
        write_text(directory / "cells.csv", csv_text(outcomes))
        tree = {"version": VERSION, **asdict(study)}
        write_text(directory / "summary.json", comparison.to_json(tree))
        write_report(directory, study, outcomes)
        return study

"""A scaling study from beginning to end: ladder -> grid -> runs -> fits -> report.

    runs/NAME/
      grid.yaml       the grid of the runs: it alone reproduces the study
      cells/CELL/     a run directory each
      cells.csv       one row per cell, as in a comparison
      summary.json    the law and the best size of each budget, with intervals
      report.md, figures/

What a comparison also writes of its runs (command.json, registration.json, lost.json) is there too.
Started again, a study runs only the cells that are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter, methodcaller
from pathlib import Path

import numpy as np
import torch

from gpt.compare import comparison
from gpt.compare import grid as grids
from gpt.compare.analysis.outcomes import NO_RESULT, Outcome
from gpt.compare.analysis.searches import read_outcomes
from gpt.compare.analysis.statistics import Interval
from gpt.compare.grid import Cell, Grid
from gpt.compare.report.cells_csv import csv_text
from gpt.config import Config
from gpt.data import preparation
from gpt.errors import InputError
from gpt.io.console import Console
from gpt.io.files import lock_file, refuse_links, write_text
from gpt.model.gpt2 import GPT
from gpt.scaling import isoflop
from gpt.scaling import law as laws
from gpt.scaling.isoflop import LEAST_SIZES, Curve, Exponent
from gpt.scaling.ladder import FACTOR, Ladder, make_grid
from gpt.scaling.law import LEAST_SETTINGS, Law, Runs

VERSION = 1  # of summary.json
RESAMPLES = 500  # of the settings, for intervals
CONSTANTS = ("E", "A", "B", "alpha", "beta", "a", "b")
EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")


@dataclass(frozen=True)
class Point:
    """A run that the fits use.

    Attributes:
        cell: its id.
        size: the name of its size.
        parameters: N, embeddings included.
        non_embedding: N without the embeddings of tokens and positions.
        tokens: D.
        loss: final validation loss, nats per token.
    """

    cell: str
    size: str
    seed: int
    parameters: int
    non_embedding: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Estimate:
    """A number that the law gives, and its 95% interval over resamples of the settings."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Best:
    """The size with the lowest loss for a budget of 6 N D FLOPs, by the law."""

    flops: float
    parameters: Estimate
    tokens_per_parameter: float


@dataclass(frozen=True)
class Fit:
    """The parametric law.

    Attributes:
        constants: E, A, B, alpha and beta, and the exponents a and b of the best N and D.
        best: of each budget.
        error: root mean square of log observed minus log predicted loss.
        a_without_embeddings: the exponent a if N, and with it C, leaves out the embeddings.
        resamples: number of them.
    """

    constants: dict[str, Estimate]
    best: list[Best]
    error: float
    a_without_embeddings: float
    resamples: int

    @property
    def law(self) -> Law:
        """The law of the constants."""
        return Law(**{field.name: self.constants[field.name].value for field in fields(Law)})


@dataclass(frozen=True)
class Study:
    """The results of a scaling study.

    Attributes:
        planned: number of cells.
        failed: id -> status, of runs that failed: results, but the law does not describe them.
        missing: id -> status, of cells without a result.
        fit: None if there are too few settings; `unfitted` says why.
    """

    title: str
    planned: int
    points: list[Point]
    failed: dict[str, str]
    missing: dict[str, str]
    fit: Fit | None
    unfitted: str
    curves: list[Curve]
    exponent: Exponent | None


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


def check_study(path: Path) -> tuple[Grid, list[Cell]]:
    """The grid in a study's directory, and its cells.

    Raises:
        InputError: the directory does not hold a scaling study.
    """
    if not (path / "grid.yaml").is_file():
        raise InputError(f"{path}: is not the directory of a scaling study (no grid.yaml)")
    grid, cells = grids.load(path / "grid.yaml")
    if list(grid.arms) != [FACTOR]:
        raise InputError(f"{path}: is a comparison; `steadygpt compare` runs and reports it")
    return grid, cells


def run(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    *,
    workers: int,
    console: Console,
    stop: Callable[[], bool],
    extend: bool = False,
) -> Study:
    """Run the missing cells of a study, and write its report.

    Args:
        workers, extend: as for `gpt.compare.comparison.run`.

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
    )


def report(grid: Grid, cells: Sequence[Cell], directory: Path, wait: float = 0.0) -> Study:
    """Write cells.csv, summary.json, report.md and figures/ from finished cells.

    Args:
        wait: seconds to wait for another process that writes this report.

    Raises:
        InputError: no cell has a result, a file is damaged, there is a symbolic link, or another
            process writes this report.
    """
    from gpt.scaling.report import write_report  # imports matplotlib

    if not directory.is_dir():
        raise InputError(f"{directory}: {NO_RESULT}")
    refuse_links(directory)
    busy = f"{directory}: another process is writing its report; run this again in a minute"
    with lock_file(directory / comparison.REPORT_LOCK, busy, wait):
        outcomes = read_outcomes(grid, cells, directory)
        study = summarize(grid.title, outcomes)
        write_text(directory / "cells.csv", csv_text(outcomes))
        tree = {"version": VERSION, **asdict(study)}
        write_text(directory / "summary.json", comparison.to_json(tree))
        write_report(directory, study, outcomes)
        return study


def summarize(title: str, outcomes: Sequence[Outcome]) -> Study:
    """The results of a study.

    Raises:
        InputError: no cell has a result.
    """
    done = [outcome for outcome in outcomes if outcome.verdict is not None]
    if not done:
        raise InputError(NO_RESULT)
    points = [_point(outcome) for outcome in done if not outcome.failed]
    runs = _runs(points, without_embeddings=False)
    curves = isoflop.curves(runs) if points else []
    fitted, why = _fit(points, runs, [curve.flops for curve in curves])
    return Study(
        title,
        len(outcomes),
        points,
        {outcome.cell.id: outcome.status for outcome in done if outcome.failed},
        {outcome.cell.id: outcome.status for outcome in outcomes if outcome.verdict is None},
        fitted,
        why,
        curves,
        isoflop.exponent(curves),
    )


def _point(outcome: Outcome) -> Point:
    weights = (outcome.environment or {})["initial_weights"]
    counts = {name: math.prod(weight["shape"]) for name, weight in weights.items()}
    config, total = outcome.cell.config, sum(counts.values())
    return Point(
        outcome.cell.id,
        outcome.cell.arm,
        outcome.seed,
        total,
        total - sum(counts.get(name, 0) for name in EMBEDDINGS),
        config.training.steps * config.batch_sequences * config.model.context,
        outcome.loss,
    )


def _runs(points: Sequence[Point], *, without_embeddings: bool) -> Runs:
    n = [p.non_embedding if without_embeddings else p.parameters for p in points]
    d, loss = [p.tokens for p in points], [p.loss for p in points]
    return Runs(*(np.asarray(values, dtype=np.float64) for values in (n, d, loss)))


def _fit(points: Sequence[Point], runs: Runs, budgets: Sequence[float]) -> tuple[Fit | None, str]:
    """The law, or why there is none.

    Args:
        budgets: for which to compute the best size.
    """
    settings = {(point.parameters, point.tokens) for point in points}
    sizes = len({parameters for parameters, _ in settings})
    if len(settings) < LEAST_SETTINGS or sizes < LEAST_SIZES:
        return None, (
            f"The law has five constants and needs at least {LEAST_SETTINGS} pairs of N and D with "
            f"{LEAST_SIZES} sizes; here are {len(settings)} with {sizes}."
        )
    law = laws.fit(runs)
    resampled = laws.bootstrap(runs, law, RESAMPLES)

    def estimate(quantity: Callable[[Law], float]) -> Estimate:
        return Estimate(quantity(law), laws.interval(resampled, quantity))

    fitted = Fit(
        {name: estimate(attrgetter(name)) for name in CONSTANTS},
        [
            Best(
                flops,
                estimate(methodcaller("best_size", flops)),
                law.tokens_per_parameter(flops),
            )
            for flops in budgets
        ],
        float(np.sqrt(np.mean(np.log(runs.loss / law.loss(runs.n, runs.d)) ** 2))),
        laws.fit(_runs(points, without_embeddings=True)).a,
        len(resampled),
    )
    return fitted, ""

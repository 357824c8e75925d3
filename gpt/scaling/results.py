"""The results of a scaling study: runs -> points -> the law and the best size of each budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter, methodcaller

import numpy as np

from gpt.compare.analysis.outcomes import NO_RESULT, Outcome
from gpt.compare.analysis.statistics import Interval
from gpt.errors import InputError
from gpt.scaling import isoflop
from gpt.scaling import law as laws
from gpt.scaling.isoflop import LEAST_SIZES, Curve, Exponent
from gpt.scaling.law import LEAST_SETTINGS, Law, Runs

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
            f"{LEAST_SIZES} sizes; this study has {len(settings)} with {sizes}."
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

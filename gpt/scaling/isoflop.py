"""The best model size of each compute budget: approach 2 of Hoffmann et al. 2022.

Among runs of one budget, the loss is about a parabola in log N. Its minimum is the best size, and
the slope of log best size over log budget the exponent a of N ~ C^a. Where alpha and beta differ,
or sizes lie mostly on one side of the best one, the parabola's minimum is biased; that of the
parametric law (law.py) is not.

This module knows nothing of cells or files, only numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gpt.compare.analysis.statistics import ALPHA, Interval
from gpt.scaling.ladder import FLOPS
from gpt.scaling.law import Runs, Values

SAME_BUDGET = 1.03  # largest ratio of budgets that count as the same: steps are rounded
LEAST_SIZES = 4  # of a budget, so that the parabola leaves a degree of freedom
LEAST_BUDGETS = 3  # for an exponent with an interval


@dataclass(frozen=True)
class Curve:
    """The runs of one budget.

    Attributes:
        flops: the budget, 6 N D.
        n: parameters of each size, from small to large.
        loss: mean final validation loss of each, over seeds.
        parabola: coefficients of the loss in log N, of the highest power first; None under
            LEAST_SIZES.
        best: N at the parabola's minimum; None if there is no minimum among the sizes.
        interval: of `best`; None if the curvature is not clearly above 0.
    """

    flops: float
    n: tuple[float, ...]
    loss: tuple[float, ...]
    parabola: tuple[float, float, float] | None = None
    best: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Exponent:
    """The slope of log best size over log budget, and its interval."""

    a: float
    interval: Interval
    budgets: int


def curves(runs: Runs) -> list[Curve]:
    """The curve of each budget that several sizes share, from small to large."""
    flops = FLOPS * runs.n * runs.d
    order = np.argsort(flops, kind="stable")
    ends = np.flatnonzero(np.diff(np.log(flops[order])) > math.log(SAME_BUDGET)) + 1
    groups = np.split(order, ends)
    found = [_curve(runs.at(group)) for group in groups]
    return [curve for curve in found if len(curve.n) > 1]


def _curve(runs: Runs) -> Curve:
    sizes = np.unique(runs.n)
    means = np.array([runs.loss[runs.n == size].mean() for size in sizes])
    flops = float(np.exp(np.log(FLOPS * runs.n * runs.d).mean()))
    curve = Curve(flops, tuple(map(float, sizes)), tuple(map(float, means)))
    if len(sizes) < LEAST_SIZES:
        return curve
    center = np.log(sizes).mean()
    x = np.log(sizes) - center
    columns = np.vander(x, 3)
    (c2, c1, c0), *_ = np.linalg.lstsq(columns, means)
    parabola = (
        float(c2),
        float(c1 - 2 * c2 * center),
        float(c0 - c1 * center + c2 * center**2),
    )
    residuals = means - columns @ [c2, c1, c0]
    freedom = len(sizes) - 3
    covariance = np.linalg.inv(columns.T @ columns) * (residuals @ residuals / freedom)
    best = interval = None
    if c2 > 0 and x[0] <= -c1 / (2 * c2) <= x[-1]:
        best = float(np.exp(center - c1 / (2 * c2)))
        interval = _fieller(c2, c1, covariance, freedom, float(center))
    return Curve(flops, curve.n, curve.loss, parabola, best, interval)


def _fieller(
    c2: float, c1: float, covariance: Values, freedom: int, center: float
) -> Interval | None:
    """The interval of the minimum, after Fieller 1954: where the slope may be 0.

    The slope at x is c1 + 2 c2 x, whose variance follows from the coefficients' covariance. The
    interval holds every x at which the slope is within t standard errors of 0. It is bounded only
    if the curvature c2 is clearly not 0.
    """
    t2 = float(stats.t.ppf(1 - ALPHA / 2, freedom)) ** 2
    square = 4 * (c2**2 - t2 * covariance[0, 0])
    linear = 4 * (c1 * c2 - t2 * covariance[0, 1])
    constant = c1**2 - t2 * covariance[1, 1]
    if square <= 0:
        return None
    half = math.sqrt(max(0.0, linear**2 - 4 * square * constant)) / (2 * square)
    middle = -linear / (2 * square)
    return Interval(math.exp(center + middle - half), math.exp(center + middle + half))


def exponent(curves: Sequence[Curve]) -> Exponent | None:
    """The exponent a from budgets with a best size, by least squares with Student's interval.

    None with fewer than LEAST_BUDGETS.
    """
    found = {math.log(each.flops): math.log(each.best) for each in curves if each.best is not None}
    if len(found) < LEAST_BUDGETS:
        return None
    line = stats.linregress([*found], [*found.values()])
    half = float(stats.t.ppf(1 - ALPHA / 2, len(found) - 2) * line.stderr)
    a = float(line.slope)
    return Exponent(a, Interval(a - half, a + half), len(found))

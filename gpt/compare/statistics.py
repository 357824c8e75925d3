"""Intervals, tests and thresholds for runs that share their seeds; pure functions on numbers.

The unit is the seed. Arms with the same seed share data order and common weights, so differences
are taken seed by seed, and intervals resample seeds, never steps, tokens or rates. Intervals are
at 95%. A failed run is not left out: it counts with its initial loss (`capped`), so that no average
is over survivors alone.

With few seeds little can be concluded, and the results show how little: each test comes with the
smallest p-value that its number of pairs can give, and no failure in n seeds still has an interval.

This module knows nothing of runs, arms or files, and decides neither what a failure is nor which
contrasts to make.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

ALPHA = 0.05  # level of the tests; intervals are at 1 - ALPHA


@dataclass(frozen=True)
class Interval:
    """A 95% interval, in the unit of its quantity."""

    low: float
    high: float


def wilson(failures: int, n: int) -> Interval:
    """Wilson's score interval (1927) of a failure rate, from `failures` in n >= 1 runs."""
    interval = stats.binomtest(failures, n).proportion_ci(1 - ALPHA, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def bootstrap(n: int, statistic: Callable[[NDArray[np.int_]], float]) -> Interval | None:
    """BCa interval (Efron 1987) of a statistic of n seeds; None for fewer than two.

    From 9999 resamples, the same in every call. Where BCa is undefined, the percentile interval is
    returned: when all jackknife values are equal (the acceleration is 0 / 0), or all resamples lie
    on one side of the estimate (the bias correction is infinite). If all resamples give v, the
    interval is [v, v].

    Args:
        statistic: finite; takes a sorted array of seed indices 0 ... n - 1 with repetitions: n of
            them, or n - 1 for the jackknife. Called once for each distinct resample; with few
            seeds these are few, so it may be slow.
    """
    if n < 2:
        return None

    def each(indices: NDArray[np.int_], axis: int = -1) -> NDArray[np.float64]:
        """(..., k) indices -> (...) values; the parameter `axis` tells scipy that it is batched."""
        rows = np.sort(indices).reshape(-1, indices.shape[-1])
        distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
        values = np.array([statistic(row) for row in distinct], dtype=np.float64)
        return values[inverse].reshape(indices.shape[:-1])

    seeds = np.arange(n)
    result = stats.bootstrap((seeds,), each, method="percentile", confidence_level=1 - ALPHA, rng=0)
    values, estimate = result.bootstrap_distribution, each(seeds)
    jackknife = each(np.array([np.delete(seeds, seed) for seed in seeds]))
    if values.min() <= estimate <= values.max() and jackknife.min() < jackknife.max():
        result = stats.bootstrap(
            (seeds,),
            each,
            method="BCa",
            confidence_level=1 - ALPHA,
            n_resamples=0,
            bootstrap_result=result,
        )
    interval = result.confidence_interval
    return Interval(float(interval.low), float(interval.high))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """`bootstrap` of the mean, with one value per seed."""
    x = np.asarray(values, dtype=np.float64)
    return bootstrap(len(x), lambda seeds: float(x[seeds].mean()))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the mean difference, over all 2^n choices of signs (Fisher 1935).

    The hypothesis is that each difference is symmetric about 0. Exact for up to 16 differences;
    from 99,999 random choices of signs for more.
    """
    n = len(differences)
    if n == 1:
        return 1.0  # both choices of its sign are equally extreme
    result = stats.permutation_test(
        (np.asarray(differences, dtype=np.float64),),
        np.mean,
        permutation_type="samples",  # of one sample: its signs
        n_resamples=2**n if n <= 16 else 99_999,
        rng=0,
    )
    return float(result.pvalue)


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two arms, seed by seed.

    Attributes:
        interval: of the mean.
        n: pairs.
        p: of `sign_flip_p`.
        least_p: the smallest p that n pairs can give.
    """

    mean: float
    median: float
    interval: Interval | None
    n: int
    p: float
    least_p: float


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """The difference a - b, where a[i] and b[i] share a seed; at least one pair."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return PairedDifference(
        mean=float(np.mean(differences)),
        median=float(np.median(differences)),
        interval=mean_interval(differences),
        n=len(differences),
        p=sign_flip_p(differences),
        least_p=least_p(len(differences)),
    )


@dataclass(frozen=True)
class McNemar:
    """Paired failures of two arms, as numbers of seeds.

    Attributes:
        p: exact and two-sided.
        least_p: the smallest p that so many pairs can give.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float
    least_p: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Exact test that two arms fail equally often, where a[i] and b[i] share a seed (McNemar 1947).

    A binomial test at 1/2 of the discordant pairs. Without any, p is 1.
    """
    pairs = Counter(zip(map(bool, a), map(bool, b), strict=True))
    only_a, only_b = pairs[True, False], pairs[False, True]
    discordant = only_a + only_b
    return McNemar(
        both=pairs[True, True],
        only_a=only_a,
        only_b=only_b,
        neither=pairs[False, False],
        p=float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0,
        least_p=least_p(len(a)),
    )


def least_p(n: int) -> float:
    """The smallest two-sided p-value that a paired test of n seeds can give.

    Its most extreme outcomes are the 2 in 2^n with all n signs equal.
    """
    return min(1.0, 2 * 0.5**n)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p-values, in the given order."""
    order = np.argsort(ps)
    steps = np.asarray(ps)[order] * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


def firth(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of a logistic regression of y (0 or 1) on x, with Firth's penalty.

    Maximizes log likelihood + 1/2 log det I(beta), where I is the Fisher information: Jeffreys'
    prior (Firth 1993). Finite even where x separates the outcomes (Heinze and Schemper 2002). Uses
    Fisher scoring with step-halving on standardized x, which takes at least two values.
    """
    raw, outcomes = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    center, scale = raw.mean(), raw.std()
    design = np.column_stack([np.ones_like(raw), (raw - center) / scale])

    def information(beta: NDArray[np.float64]) -> NDArray[np.float64]:
        p = special.expit(design @ beta)
        return (design.T * (p * (1 - p))) @ design

    def penalized(beta: NDArray[np.float64]) -> float:
        logits = design @ beta
        likelihood = outcomes @ logits - np.logaddexp(0, logits).sum()
        return float(likelihood + np.linalg.slogdet(information(beta)).logabsdet / 2)

    beta, step = np.zeros(2), np.ones(2)
    while np.abs(step).max() > 1e-7:  # terminates: every step climbs towards a finite maximum
        p = special.expit(design @ beta)
        inverse = np.linalg.inv(information(beta))
        leverage = p * (1 - p) * ((design @ inverse) * design).sum(axis=1)
        score = design.T @ (outcomes - p + leverage * (0.5 - p))
        step, here = inverse @ score, penalized(beta)
        while penalized(beta + step) < here + step @ score / 4:  # Armijo's rule
            step = step / 2
        beta = beta + step
    slope = float(beta[1] / scale)
    return float(beta[0] - slope * center), slope


def highest_stable_rate(rates: Sequence[float], failed: Sequence[bool]) -> float | None:
    """The highest rate tried such that no run failed at it or at any lower one.

    Args:
        rates, failed: one entry per run, in any order.
    """
    failing = [rate for rate, fails in zip(rates, failed, strict=True) if fails]
    return max((rate for rate in rates if rate < min(failing, default=math.inf)), default=None)


@dataclass(frozen=True)
class Threshold:
    """LR50, the learning rate at which half of the runs fail.

    Attributes:
        bound: "above" if LR50 is above `rate`, the highest tried; "below" if it is below the
            lowest; "unclear" if failures do not become more frequent with the rate, and `rate` is
            only the geometric mean of the range; else "".
        low: the highest rate tried such that at it and at every lower one at most half failed.
        high: the lowest rate tried such that at it and at every higher one more than half failed.
    """

    rate: float
    bound: Literal["", "above", "below", "unclear"]
    low: float | None
    high: float | None


def lr50(rates: Sequence[float], failed: Sequence[bool]) -> Threshold:
    """Where `firth`'s regression of failure on log rate crosses 1/2; low and high need no model.

    Args:
        rates, failed: one entry per run, in any order.
    """
    tried = sorted(set(rates))
    lowest, highest = tried[0], tried[-1]
    runs = list(zip(rates, failed, strict=True))
    fractions = [fmean(fails for r, fails in runs if r == rate) for rate in tried]
    stable = [rate for rate, fraction in zip(tried, fractions, strict=True) if fraction <= 0.5]
    threshold = partial(
        Threshold,
        low=highest_stable_rate(tried, [fraction > 0.5 for fraction in fractions]),
        high=min((rate for rate in tried if rate > max(stable, default=0)), default=None),
    )
    if not any(failed):
        return threshold(highest, "above")
    if all(failed):
        return threshold(lowest, "below")
    intercept, slope = firth([math.log(r) for r in rates], failed) if len(tried) > 1 else (0.0, 0.0)
    if slope * math.log(highest / lowest) < 1e-6:  # flat, up to rounding
        return threshold(math.sqrt(lowest * highest), "unclear")
    crossing = -intercept / slope
    if crossing > math.log(highest):
        return threshold(highest, "above")
    if crossing < math.log(lowest):
        return threshold(lowest, "below")
    return threshold(math.exp(crossing), "")


def capped(loss: float | None, initial: float) -> float:
    """The loss, but `initial` (nats, at step 0) where it is higher, not finite or missing."""
    return initial if loss is None or not math.isfinite(loss) else min(loss, initial)


@dataclass(frozen=True)
class Sensitivity:
    """The cost of a wrong learning rate.

    Attributes:
        value: nats, on average over the grid of rates; comparable only on the same grid.
        best_rate: the rate with the lowest loss; among equals the lowest.
        at_edge: whether that is the lowest or highest rate tried, so a better one may lie beyond.
    """

    value: float
    best_rate: float
    at_edge: bool


def lr_sensitivity(
    rates: Sequence[float], losses: Sequence[float | None], initial: float
) -> Sensitivity:
    """Mean over rates of min(loss, initial) - best (Wortsman et al. 2023), of one seed.

    A seed that learns at no rate has sensitivity 0, so read it together with the loss.

    Args:
        rates, losses: one entry per run, in any order; losses are `capped`.
        initial: loss at step 0.
    """
    curve = [capped(loss, initial) for loss in losses]
    best, best_rate = min(zip(curve, rates, strict=True))
    return Sensitivity(fmean(curve) - best, best_rate, best_rate in (min(rates), max(rates)))


def loglog_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log y on log x: the exponent of a power law."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


Runs = Sequence[tuple[float, bool]]  # of one arm and seed: (rate, failed)


def threshold_interval(
    arms: Sequence[Sequence[Runs]], weights: Sequence[float] = (1.0,)
) -> Interval | None:
    """Interval of a weighted sum of log `lr50`s; None for fewer than two seeds.

    Two things are uncertain: the choice of seeds, and where between two rates of the grid a
    threshold lies. So thresholds are fitted to each of 999 resamples of the seeds, the same for all
    arms, and each is then moved ten times by a uniform draw as wide as its bracket. If only seeds
    were resampled, seeds that agree would seem free of error, however coarse the grid. A threshold
    beyond the rates tried may lie anywhere there, so an end of the interval may be infinite.

    Args:
        arms: for each arm the runs of each seed, with seeds in the same order.
        weights: of the arms in the sum, such as (1, -1) for a difference.
    """
    n = len(arms[0])
    assert all(len(seeds) == n for seeds in arms), "arms have the same seeds"
    assert len(arms) == len(weights)
    if n < 2:
        return None
    random = np.random.default_rng(0)
    rows = np.sort(random.integers(n, size=(999, n)))
    distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
    lows, highs = np.moveaxis(
        np.array(
            [
                [_log_span(seeds, row, w) for seeds, w in zip(arms, weights, strict=True)]
                for row in distinct
            ]
        ),
        -1,
        0,
    )
    position = random.random((len(rows) * 10, len(arms)))
    lows, highs = (np.tile(ends[inverse], (10, 1)) for ends in (lows, highs))
    width = np.where(np.isfinite(highs - lows), highs - lows, 0.0)
    tail = 100 * ALPHA / 2
    low = np.percentile((lows + width * position).sum(1), tail, method="lower")
    high = np.percentile((highs - width * (1 - position)).sum(1), 100 - tail, method="higher")
    return Interval(float(low), float(high))


def _log_span(
    seeds: Sequence[Runs], chosen: NDArray[np.int_], weight: float
) -> tuple[float, float]:
    """The range of weight * log `lr50` of resampled seeds: the bracket around the fit."""
    found = lr50(*zip(*(run for seed in chosen for run in seeds[seed]), strict=True))
    fit, half = math.log(found.rate), 0.0
    if found.low is not None and found.high is not None:
        half = math.log(found.high / found.low) / 2
    ends = {
        "": (fit - half, fit + half),
        "above": (fit, math.inf),
        "below": (-math.inf, fit),
        "unclear": (-math.inf, math.inf),
    }[found.bound]
    low, high = sorted(weight * end for end in ends)
    return low, high

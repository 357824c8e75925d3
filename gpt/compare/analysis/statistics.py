"""Intervals, tests and thresholds for runs that share their seeds; pure functions on numbers.

The unit is the seed. Arms with the same seed share data order and common weights, so differences
are taken seed by seed, and intervals are over seeds, never steps, tokens or rates. Intervals are
at 1 - ALPHA, 95%, unless a level is given. A failed run is not left out: it counts with its own
loss, capped at that of a uniform guess (`capped`), so that no average is over survivors alone.

With few seeds little can be concluded, and the results show how little: each test comes with the
smallest p-value that its number of pairs can give, and no failure in n seeds still has an interval.

This module knows nothing of cells, configs or files, only numbers. It decides neither what a
failure is nor which contrasts to make.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

ALPHA = 0.05  # level of the tests and, subtracted from 1, of the intervals
MIN_SEEDS = 5  # under which means and thresholds have no interval


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in the unit of its quantity."""

    low: float
    high: float


def wilson(failures: int, n: int) -> Interval:
    """Wilson's score interval (1927) of a failure rate, from `failures` in n >= 1 runs."""
    interval = stats.binomtest(failures, n).proportion_ci(1 - ALPHA, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def mean_interval(values: Sequence[float], alpha: float = ALPHA) -> Interval | None:
    """Student's t interval of the mean, with one value per seed; None under MIN_SEEDS.

    Bootstrap intervals of so few values are too narrow (benchmarks/intervals.py has the coverage).
    """
    n = len(values)
    if n < MIN_SEEDS:
        return None
    mean = fmean(values)
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean - half, mean + half)


def at_least(interval: Interval, half: float) -> Interval:
    """An interval, or one of this half width about its middle, whichever is wider.

    For values that are known only to within `half`, on average. If their spread is larger, it
    includes that error; if they agree, all may err on the same side (benchmarks/intervals.py).
    """
    middle = (interval.low + interval.high) / 2
    return Interval(min(interval.low, middle - half), max(interval.high, middle + half))


def fraction_interval(
    differences: Sequence[float], runs: int = 1, limit: float = 1.0, alpha: float = ALPHA
) -> Interval | None:
    """Interval of a mean difference of failed fractions, one per seed; None under MIN_SEEDS.

    If all seeds agree, Student's interval has no width. So it is extended to cover Wald's interval
    with two more seeds: one with difference 0, and one counted half as 1 / runs, half as -1 / runs.
    With one run per seed, the latter is Agresti and Min's (2005) interval.

    Args:
        runs: of each arm and seed.
        limit: the largest possible difference: 2 for a difference of differences.
    """
    student = mean_interval(differences, alpha)
    if student is None:
        return None
    n = len(differences) + 2
    mean = sum(differences) / n
    variance = (sum(x * x for x in differences) + 1 / runs**2) / n - mean**2
    half = float(stats.norm.ppf(1 - alpha / 2)) * math.sqrt(variance / n)
    return Interval(
        max(min(student.low, mean - half), -limit), min(max(student.high, mean + half), limit)
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the mean difference, over all 2^n choices of signs (Fisher 1935).

    The hypothesis is that each difference is symmetric about 0. Exact for up to 16 differences, and
    if all have the same sign; else from 99,999 random choices of signs.
    """
    n = len(differences)
    if min(differences) > 0 or max(differences) < 0:
        return least_p(n)
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
        interval: of the difference of the two failed fractions.
        p: exact and two-sided.
        least_p: the smallest p that this many pairs can give.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    interval: Interval
    p: float
    least_p: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Exact test that two arms fail equally often, where a[i] and b[i] share a seed (McNemar 1947).

    At least one pair. A binomial test at 1/2 of the discordant pairs. Without any, p is 1.
    """
    pairs = Counter(zip(map(bool, a), map(bool, b), strict=True))
    both, neither = pairs[True, True], pairs[False, False]
    only_a, only_b = pairs[True, False], pairs[False, True]
    discordant = only_a + only_b
    return McNemar(
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=neither,
        interval=newcombe(both, only_a, only_b, neither),
        p=float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0,
        least_p=least_p(len(a)),
    )


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """Interval of the difference of two paired fractions (Newcombe 1998, method 10).

    It joins the Wilson intervals of the two, and never has the width 0. Takes at least one pair.
    """
    n = both + only_a + only_b + neither
    a, b = both + only_a, both + only_b
    product = a * (n - a) * b * (n - b)
    covariance: float = both * neither - only_a * only_b
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    correlation = covariance / math.sqrt(product) if product else 0.0
    of_a, of_b, difference = wilson(a, n), wilson(b, n), (a - b) / n

    def joined(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    return Interval(
        difference - joined(a / n - of_a.low, of_b.high - b / n),
        difference + joined(of_a.high - a / n, b / n - of_b.low),
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
    Fisher scoring with step-halving on standardized x, which needs two distinct values or more.
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
            lowest; "unclear" if the failed fraction crosses 1/2 more than once, or does not rise
            with the rate, or if seeds ran at different rates (`rate` is then only the geometric
            mean of the range); else "".
        low: the highest rate tried up to which at most half of the runs failed at each rate.
        high: the lowest rate tried from which on more than half of the runs failed at each rate.
        unequal: whether it is unclear because seeds ran at different rates.
    """

    rate: float
    bound: Literal["", "above", "below", "unclear"]
    low: float | None
    high: float | None
    unequal: bool = False


def lr50(rates: Sequence[float], failed: Sequence[bool]) -> Threshold:
    """Where `firth`'s regression of failure on log rate crosses 1/2; low and high need no model.

    Args:
        rates, failed: one entry per run, in any order.
    """
    tried = sorted(set(rates))
    lowest, highest = tried[0], tried[-1]
    runs = list(zip(rates, failed, strict=True))
    fractions = [fmean(fails for r, fails in runs if r == rate) for rate in tried]
    mostly = [fraction > 0.5 for fraction in fractions]
    stable = [rate for rate, fails in zip(tried, mostly, strict=True) if not fails]
    threshold = partial(
        Threshold,
        low=highest_stable_rate(tried, mostly),
        high=min((rate for rate in tried if rate > max(stable, default=0)), default=None),
    )
    if not any(failed):
        return threshold(highest, "above")
    if all(failed):
        return threshold(lowest, "below")
    intercept, slope = firth([math.log(r) for r in rates], failed) if len(tried) > 1 else (0.0, 0.0)
    flat = slope * math.log(highest / lowest) < 1e-6  # up to rounding
    if flat or mostly != sorted(mostly):
        return threshold(math.sqrt(lowest * highest), "unclear")
    crossing = -intercept / slope
    if crossing > math.log(highest):
        return threshold(highest, "above")
    if crossing < math.log(lowest):
        return threshold(lowest, "below")
    return threshold(math.exp(crossing), "")


def capped(loss: float | None, cap: float) -> float:
    """`loss`, or `cap` (nats) if the loss is higher, not finite or missing.

    The cap is ln V, the loss of a uniform guess over V tokens: it is known before any run, and the
    same for all arms. Wortsman et al. (2023) cap at the loss at step 0, which differs between arms.
    """
    return cap if loss is None or not math.isfinite(loss) else min(loss, cap)


@dataclass(frozen=True)
class Sensitivity:
    """The cost of a wrong learning rate.

    Attributes:
        value: nats, on average over the grid of rates; comparable only on the same grid.
        at_edge: whether the best rate is the lowest or highest tried, so that a better one may lie
            beyond; among equals, the lowest rate is best.
    """

    value: float
    at_edge: bool


def lr_sensitivity(rates: Sequence[float], losses: Sequence[float]) -> Sensitivity:
    """Mean over rates of loss - best (Wortsman et al. 2023), of one arm and seed.

    An arm that is bad at every rate has a sensitivity near 0, the best value: see `regret`.

    Args:
        rates, losses: one entry per run, in any order; losses are `capped`.
    """
    best, best_rate = min(zip(losses, rates, strict=True))
    return Sensitivity(fmean(losses) - best, best_rate in (min(rates), max(rates)))


def regret(losses: Sequence[float], best: float) -> float:
    """Mean over rates of loss - best, of one arm and seed, in nats.

    Unlike in `lr_sensitivity`, `best` is the lowest loss of any arm at any rate with this seed. The
    sensitivity compares an arm with itself, so that an arm that is bad everywhere looks best. As
    arms share `best`, the difference of their regrets is that of their mean losses; so contrasts
    have only the measure `loss`.

    Args:
        losses: `capped`, one entry per rate.
    """
    return fmean(losses) - best


def loglog_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log y on log x: the exponent of a power law."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


Runs = Sequence[tuple[float, bool]]  # of one arm and seed: (rate, failed)


def lr50_of_seeds(seeds: Sequence[Runs]) -> Threshold:
    """`lr50` of the runs of several seeds; unclear unless all seeds ran at the same rates.

    Otherwise the threshold would depend on which seeds ran at which rates.
    """
    threshold = lr50(*zip(*(run for runs in seeds for run in runs), strict=True))
    rates = [{rate for rate, _ in runs} for runs in seeds]
    if all(each == rates[0] for each in rates):
        return threshold
    every = set.union(*rates)
    middle = math.sqrt(min(every) * max(every))
    return replace(threshold, rate=middle, bound="unclear", unequal=True)


def threshold_interval(
    arms: Sequence[Sequence[Runs]], weights: Sequence[float] = (1.0,), alpha: float = ALPHA
) -> Interval | None:
    """Interval of a weighted sum of log `lr50`s; None under MIN_SEEDS.

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
    if n < MIN_SEEDS:
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
    tail = 100 * alpha / 2
    low = np.percentile((lows + width * position).sum(1), tail, method="lower")
    high = np.percentile((highs - width * (1 - position)).sum(1), 100 - tail, method="higher")
    return Interval(float(low), float(high))


def _log_span(
    seeds: Sequence[Runs], chosen: NDArray[np.int_], weight: float
) -> tuple[float, float]:
    """The range of weight * log `lr50` of resampled seeds: the bracket around the fit."""
    if weight == 0:  # times an open end, it would be NaN
        return 0.0, 0.0
    found = _lr50(tuple(sorted(run for seed in chosen for run in seeds[seed])))
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


@lru_cache(maxsize=10_000)
def _lr50(runs: Runs) -> Threshold:
    """`lr50`, cached: resamples of seeds that agree have the same runs."""
    return lr50(*zip(*runs, strict=True))

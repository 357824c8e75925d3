"""Intervals, tests and thresholds for runs that share their seeds; pure functions on numbers.

The unit is the seed. Arms with the same seed share data order and common weights, so differences
are taken seed by seed, and intervals resample seeds, never steps, tokens or rates. Intervals are
at 95%. A failed run keeps its place: it counts as its initial loss (`capped`), and no average is of
survivors alone.

With few seeds little can be said, and the results say how little: each test comes with the
smallest p-value that its number of pairs can give, and no failure in n seeds still has an interval.

Nothing here knows of runs, arms or files, decides what a failure is, or picks which contrasts to
make.
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


@dataclass(frozen=True)
class Interval:
    """A 95% interval, in the unit of what it is of."""

    low: float
    high: float


def wilson(failures: int, n: int) -> Interval:
    """Wilson's score interval (1927) of a failure rate, from `failures` in n >= 1 runs."""
    interval = stats.binomtest(failures, n).proportion_ci(method="wilson")
    return Interval(float(interval.low), float(interval.high))


def bootstrap(n: int, statistic: Callable[[NDArray[np.int_]], float]) -> Interval | None:
    """BCa interval (Efron 1987) of a statistic of n seeds; None for fewer than two.

    From 9999 resamples, the same in every call. Where BCa is undefined this is the percentile
    interval: when all jackknife values are equal (the acceleration is 0 / 0), or all resamples lie
    on one side of the estimate (the bias correction is infinite). So where all resamples give v,
    it is [v, v].

    Args:
        statistic: finite, of an array of indices 0 ... n - 1 of seeds, sorted and with repetitions:
            n of them, or n - 1 for the jackknife. Not called again for a resample drawn again, so
            few seeds, which have few distinct resamples, allow a slow one.
    """
    if n < 2:
        return None

    def each(indices: NDArray[np.int_], axis: int = -1) -> NDArray[np.float64]:
        """(..., k) indices -> (...) values; by `axis` scipy knows that it takes them in bulk."""
        rows = np.sort(indices).reshape(-1, indices.shape[-1])
        distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
        values = np.array([statistic(row) for row in distinct], dtype=np.float64)
        return values[inverse].reshape(indices.shape[:-1])

    seeds = np.arange(n)
    result = stats.bootstrap((seeds,), each, method="percentile", rng=0)
    values, estimate = result.bootstrap_distribution, each(seeds)
    jackknife = each(np.array([np.delete(seeds, seed) for seed in seeds]))
    if values.min() <= estimate <= values.max() and jackknife.min() < jackknife.max():
        result = stats.bootstrap(
            (seeds,), each, method="BCa", n_resamples=0, bootstrap_result=result
        )
    interval = result.confidence_interval
    return Interval(float(interval.low), float(interval.high))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """`bootstrap` of the mean, one value a seed."""
    x = np.asarray(values, dtype=np.float64)
    return bootstrap(len(x), lambda seeds: float(x[seeds].mean()))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the mean difference, over all 2^n choices of signs (Fisher 1935).

    For the hypothesis that each difference is symmetric about 0. Exact for up to 16 differences,
    from 99,999 random choices of signs for more.
    """
    n = len(differences)
    if n == 1:
        return 1.0  # of two choices both are as extreme
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
    """How much more one arm has than another, seed by seed.

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
    """Of a - b, where a[i] and b[i] share a seed; at least one pair."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return PairedDifference(
        mean=float(np.mean(differences)),
        median=float(np.median(differences)),
        interval=mean_interval(differences),
        n=len(differences),
        p=sign_flip_p(differences),
        least_p=_least_p(len(differences)),
    )


@dataclass(frozen=True)
class McNemar:
    """Paired failures of two arms, in seeds.

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

    Only the discordant pairs speak: a binomial test at 1/2. Without any, p is 1.
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
        least_p=_least_p(len(a)),
    )


def _least_p(n: int) -> float:
    """Of a two-sided test whose most extreme outcomes are the 2 in 2^n with all n signs equal."""
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

    The maximum of log likelihood + 1/2 log det I(beta), I the Fisher information: Jeffreys' prior
    (Firth 1993). Finite where x separates the outcomes, too (Heinze and Schemper 2002). By Fisher
    scoring with step-halving, on x standardised. x takes two values or more.
    """
    raw, outcomes = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    centre, scale = raw.mean(), raw.std()
    design = np.column_stack([np.ones_like(raw), (raw - centre) / scale])

    def information(beta: NDArray[np.float64]) -> NDArray[np.float64]:
        p = special.expit(design @ beta)
        return (design.T * (p * (1 - p))) @ design

    def penalized(beta: NDArray[np.float64]) -> float:
        logits = design @ beta
        likelihood = outcomes @ logits - np.logaddexp(0, logits).sum()
        return float(likelihood + np.linalg.slogdet(information(beta)).logabsdet / 2)

    beta, step = np.zeros(2), np.ones(2)
    while np.abs(step).max() > 1e-7:  # ends: each step climbs, and the top is finite
        p = special.expit(design @ beta)
        inverse = np.linalg.inv(information(beta))
        leverage = p * (1 - p) * ((design @ inverse) * design).sum(axis=1)
        score = design.T @ (outcomes - p + leverage * (0.5 - p))
        step, here = inverse @ score, penalized(beta)
        while penalized(beta + step) < here + step @ score / 4:  # Armijo's rule
            step = step / 2
        beta = beta + step
    slope = float(beta[1] / scale)
    return float(beta[0] - slope * centre), slope


def highest_stable_rate(rates: Sequence[float], failed: Sequence[bool]) -> float | None:
    """The highest rate tried such that no run failed at it or at any lower one.

    Args:
        rates, failed: an entry a run, in any order.
    """
    failing = [rate for rate, fails in zip(rates, failed, strict=True) if fails]
    return max((rate for rate in rates if rate < min(failing, default=math.inf)), default=None)


@dataclass(frozen=True)
class Threshold:
    """LR50, the learning rate at which half of the runs fail.

    Attributes:
        bound: "above" if it lies above `rate`, the highest tried; "below" if below the lowest;
            "unclear" if failures do not become more frequent with the rate, which then is only the
            geometric middle of the range.
        low: the highest rate tried such that at it and at every lower one at most half failed.
        high: the lowest rate tried such that at it and at every higher one more than half failed.
    """

    rate: float
    bound: Literal["", "above", "below", "unclear"]
    low: float | None
    high: float | None


def lr50(rates: Sequence[float], failed: Sequence[bool]) -> Threshold:
    """Where `firth`'s regression of failure on log rate passes 1/2; low and high need no model.

    Args:
        rates, failed: an entry a run, in any order.
    """
    tried = sorted(set(rates))
    lowest, highest = tried[0], tried[-1]
    runs = list(zip(rates, failed, strict=True))
    shares = [fmean(fails for r, fails in runs if r == rate) for rate in tried]
    stable = [rate for rate, share in zip(tried, shares, strict=True) if share <= 0.5]
    threshold = partial(
        Threshold,
        low=highest_stable_rate(tried, [share > 0.5 for share in shares]),
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
    """What a wrong learning rate costs.

    Attributes:
        value: nats, on average over the grid of rates; comparable only on the same grid.
        best_rate: of the lowest loss; of equals the lowest rate.
        at_edge: whether that is the lowest or highest rate tried, so that a better may lie beyond.
    """

    value: float
    best_rate: float
    at_edge: bool


def lr_sensitivity(
    rates: Sequence[float], losses: Sequence[float | None], initial: float
) -> Sensitivity:
    """Mean over rates of min(loss, initial) - best (Wortsman et al. 2023), of one seed.

    A seed that learns at no rate has sensitivity 0: read it beside the loss.

    Args:
        rates, losses: an entry a run, in any order; losses are `capped`.
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

    Two things are uncertain: which seeds one happened to have, and where between two rates of the
    grid a threshold lies. So each of 999 resamples of the seeds, the same for all arms, has its
    thresholds fitted, and each of these is moved ten times by a uniform draw as wide as its own
    bracket. Were only seeds resampled, seeds that agree would look like knowledge without error,
    however coarse the grid. A threshold beyond the rates tried may lie anywhere there, so the
    interval may be open: an end of it infinite.

    Args:
        arms: for each arm the runs of each seed, seeds in the same order.
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
    place = random.random((len(rows) * 10, len(arms)))
    lows, highs = (np.tile(ends[inverse], (10, 1)) for ends in (lows, highs))
    width = np.where(np.isfinite(highs - lows), highs - lows, 0.0)
    low = np.percentile((lows + width * place).sum(1), 2.5, method="lower")
    high = np.percentile((highs - width * (1 - place)).sum(1), 97.5, method="higher")
    return Interval(float(low), float(high))


def _log_span(
    seeds: Sequence[Runs], chosen: NDArray[np.int_], weight: float
) -> tuple[float, float]:
    """Where weight * log `lr50` of resampled seeds may lie: within the bracket around the fit."""
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

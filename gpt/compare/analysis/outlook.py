"""What would settle an open question: how many seeds, and how long they would take."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
from scipy import stats

from gpt.compare.analysis.statistics import ALPHA, MIN_SEEDS, least_p
from gpt.compare.grid import Claim

MOST_SEEDS = 1_000
NO_SEEDS = (
    "How many seeds would settle it cannot be estimated, because the measure has no value, or only "
    "a bound, for some seed. More rates near the thresholds may help more than seeds."
)
REPEAT = "Run the same command again: it repeats the lost runs."


def fewest_seeds(alpha: float) -> int:
    """The smallest number of seeds whose paired test can reach the level alpha."""
    return next(n for n in range(MIN_SEEDS, MOST_SEEDS) if least_p(n) <= alpha)


def seeds_needed(distance: float, spread: float, alpha: float = ALPHA) -> int | None:
    """The smallest number of seeds that settles a question; None above MOST_SEEDS.

    Their paired test can reach alpha, and half the width of Student's t interval is less than the
    distance: t(1 - alpha / 2; n - 1) spread / sqrt(n) < distance.

    Args:
        distance: of the mean difference from the nearest margin.
        spread: standard deviation of the seeds' differences.
    """
    n = np.arange(fewest_seeds(alpha), MOST_SEEDS + 1)
    half = stats.t.ppf(1 - alpha / 2, n - 1) * spread / np.sqrt(n)
    settled = n[half < distance]
    return int(settled[0]) if len(settled) else None


def outlook(
    differences: Sequence[float],
    claim: Claim,
    margin: float,
    seconds: float | None = None,
    workers: int = 1,
    alpha: float = ALPHA,
) -> str:
    """How many seeds would settle an open question, if their mean and spread stay, in words.

    Args:
        differences: one per seed, at least one.
        seconds: that one more seed takes, summed over its cells; None if that is unknown.
        workers: how many share its cells.
        alpha: the level of the test.
    """
    seeds, mean = len(differences), fmean(differences)
    if seeds == 1:
        return (
            f"At least {fewest_seeds(alpha)} seeds are needed; one seed does not show how much "
            "they vary."
        )
    margins = (margin, -margin) if claim == "within" else (margin,)
    supports = {"above": mean > margin, "below": mean < margin, "within": abs(mean) < margin}[claim]
    needed = seeds_needed(min(abs(mean - each) for each in margins), stdev(differences), alpha)
    against = (
        "" if supports else "The mean lies on the wrong side of the margin, within the noise. "
    )
    if needed is None:
        return f"{against}At this mean and spread, even {MOST_SEEDS:,} seeds would not settle it."
    more = max(needed - seeds, 1)
    cost = f"{more} more"
    if seconds is not None:
        minutes = max(1, round(more * seconds / workers / 60))
        cost += (
            f", about {minutes:,} minute{'s' if minutes > 1 else ''} with {workers} "
            f"worker{'s' if workers > 1 else ''}"
        )
    answer = (
        "settle it" if supports else "settle it, as NO; more seeds are not expected to give YES"
    )
    return f"{against}At this mean and spread, about {seeds + more} seeds ({cost}) would {answer}."

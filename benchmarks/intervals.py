"""Simulations of the comparison's intervals and answers: coverage, power, errors.

    python benchmarks/intervals.py [--repetitions 4000] [--json FILE]

Each row simulates many comparisons; the results of their seeds come from a
known distribution. For an interval, it shows how often the 95% interval
contains the true value; for a rule, how often the rule answers YES where the
claim is true, and where it is not; for an estimate, its bias. All tables are
printed at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from gpt.compare.analysis.statistics import (
    ALPHA,
    Interval,
    at_least,
    fraction_interval,
    least_p,
    mcnemar,
    mean_interval,
    sign_flip_p,
    threshold_interval,
    wilson,
)
from gpt.compare.analysis.verdicts import still_falling
from gpt.compare.grid import Search
from gpt.compare.search import Ending, bracket, next_step

SEEDS = (5, 6, 8, 10, 16)
Values = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Values]
Trial = Callable[[np.random.Generator, int], bool]  # takes the number of seeds
Rows = dict[str, dict[str, float]]

# Differences of seeds: name -> (a draw of n of them, their true mean).
DIFFERENCES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda random, n: random.normal(size=n), 0.0),
    "uniform": (lambda random, n: random.uniform(-1, 1, size=n), 0.0),
    "skewed (log-normal, 0.75)": (
        lambda random, n: random.lognormal(0, 0.75, size=n),
        float(np.exp(0.75**2 / 2)),
    ),
    "three in ten seeds fail": (
        lambda random, n: 2.0 * (random.random(n) < 0.3) + random.normal(0, 0.1, size=n),
        0.6,
    ),
}
# Failure probabilities of two arms (a - b), or of four ((a - b) - (c - d)).
PROBABILITIES = (
    (0.9, 0.1),
    (0.5, 0.5),
    (0.98, 0.02),
    (0.9, 0.1, 0.3, 0.1),
    (0.98, 0.05, 0.02, 0.02),
)
SIGNS = (1, -1, -1, 1)
FIRST_STAGE, ALL_SEEDS = 6, 10
EFFECTS = (0.0, 0.5, 1.0, 2.0)  # standard deviations


SEARCH = Search(start=0.003)  # with the ratio and the number of runs that grids have by default
# Spread of log thresholds over seeds, softness of an edge, and steps from the start to their mean.
SEARCHES = (
    (0.1, 0.0, 0),
    (0.1, 0.3, 0),
    *((0.5, softness, steps) for softness in (0.0, 0.1, 0.3) for steps in (0, 4, -4)),
)
UNIFORM_LOSS = float(np.log(256))  # of bytes


def contains(interval: Interval | None, value: float) -> bool:
    """Whether an interval contains a value, up to rounding."""
    assert interval is not None
    return interval.low - 1e-9 <= value <= interval.high + 1e-9


def share(repetitions: int, trial: Callable[[np.random.Generator], bool]) -> float:
    """The fraction of trials that are true, each with a generator of its own."""
    return float(np.mean([trial(np.random.default_rng(seed)) for seed in range(repetitions)]))


def by_seeds(repetitions: int, trials: dict[str, Trial]) -> Rows:
    """`share` of each trial, for each number of seeds."""

    def at(trial: Trial, n: int) -> float:
        return share(repetitions, lambda random: trial(random, n))

    return {name: {str(n): at(trial, n) for n in SEEDS} for name, trial in trials.items()}


def mean_coverage(repetitions: int) -> Rows:
    """Coverage of `mean_interval`."""

    def trial(draw: Draw, true: float, random: np.random.Generator, n: int) -> bool:
        return contains(mean_interval(draw(random, n).tolist()), true)

    trials: dict[str, Trial] = {name: partial(trial, *case) for name, case in DIFFERENCES.items()}
    return by_seeds(repetitions, trials)


def fraction_coverage(repetitions: int) -> Rows:
    """Coverage of `fraction_interval`, for runs that fail independently."""

    def trial(
        probabilities: tuple[float, ...], runs: int, random: np.random.Generator, n: int
    ) -> bool:
        differences, true = np.zeros(n), 0.0
        for sign, p in zip(SIGNS, probabilities, strict=False):
            differences += sign * (random.random((n, runs)) < p).mean(axis=1)
            true += sign * p
        limit = len(probabilities) / 2
        return contains(fraction_interval(differences.tolist(), runs, limit), true)

    trials: dict[str, Trial] = {
        f"{', '.join(map(str, probabilities))}; runs per seed: {runs}": partial(
            trial, probabilities, runs
        )
        for probabilities in PROBABILITIES
        for runs in (1, 2, 4)
    }
    return by_seeds(repetitions, trials)


def newcombe_coverage(repetitions: int) -> Rows:
    """Coverage of `newcombe`, as `mcnemar` returns it."""

    def trial(a: float, b: float, random: np.random.Generator, n: int) -> bool:
        table = mcnemar((random.random(n) < a).tolist(), (random.random(n) < b).tolist())
        return contains(table.interval, a - b)

    pairs = ((0.9, 0.1), (0.5, 0.5), (0.98, 0.02), (0.6, 0.02))
    return by_seeds(repetitions, {f"{a}, {b}": partial(trial, a, b) for a, b in pairs})


def wilson_coverage(repetitions: int) -> Rows:
    """Coverage of `wilson`."""

    def trial(p: float, random: np.random.Generator, n: int) -> bool:
        return contains(wilson(int(random.binomial(n, p)), n), p)

    return by_seeds(repetitions, {f"{p}": partial(trial, p) for p in (0.02, 0.1, 0.3, 0.5)})


def threshold_coverage(repetitions: int) -> Rows:
    """Coverage of `threshold_interval`, on learning rates a factor of 2 apart.

    The seeds' log thresholds are normal; their mean is uniform within half a step of a rate.
    """
    rates = [2.0**power for power in range(-6, 7)]

    def trial(spread: float, random: np.random.Generator, n: int) -> bool:
        mean = random.uniform(-0.5, 0.5) * np.log(2.0)
        thresholds = np.exp(random.normal(mean, spread, size=n))
        runs = [[(rate, bool(rate >= t)) for rate in rates] for t in thresholds]
        return contains(threshold_interval([runs]), mean)

    spreads = (0.1, 0.5, 1.0)
    trials: dict[str, Trial] = {f"spread {spread}": partial(trial, spread) for spread in spreads}
    return by_seeds(max(1, repetitions // 20), trials)


def answer(differences: list[float], alpha: float) -> str:
    """The answer to the claim that their mean is above 0: YES, NO or NOT SETTLED."""
    interval = mean_interval(differences, alpha)
    assert interval is not None
    if interval.low <= 0 <= interval.high or sign_flip_p(differences) > alpha:
        return "NOT SETTLED"
    return "YES" if interval.low > 0 else "NO"


def power(repetitions: int) -> Rows:
    """How often a mean of `effect` standard deviations is answered with YES.

    YES requires an interval above 0 and a sign-flip test at 5%; at effect 0, YES is an error.
    """

    def trial(effect: float, random: np.random.Generator, n: int) -> bool:
        return answer(random.normal(effect, 1, size=n).tolist(), ALPHA) == "YES"

    return by_seeds(max(1, repetitions // 4), {f"effect {e}": partial(trial, e) for e in EFFECTS})


def trends(repetitions: int) -> Rows:
    """How often `still_falling` finds a trend in the loss of a run, by its number of updates.

    The noise is an autoregressive process of order 1 with standard deviation 1; the trend is a
    straight line through the last quarter of the updates. Without a trend, each is an error.
    """

    def trial(correlation: float, fall: float, n: int, random: np.random.Generator) -> bool:
        noise = lfilter([np.sqrt(1 - correlation**2)], [1, -correlation], random.normal(size=2 * n))
        noise = noise[n:]  # without the start from 0
        trend = fall * np.maximum(np.arange(n) / n - 0.75, 0) * 4
        return still_falling((noise - trend).tolist())

    return {
        f"fall {fall}, correlation {correlation}": {
            str(n): share(repetitions, partial(trial, correlation, fall, n))
            for n in (200, 300, 1000)
        }
        for fall in (0.0, 1.0, 2.0, 4.0)
        for correlation in (0.0, 0.5, 0.9)
    }


def two_stages(repetitions: int) -> Rows:
    """Answers of a comparison with a first stage, see `gpt.compare.analysis.stages`.

    At effect 0, YES and NO are errors.
    """
    found: Rows = {}
    first = least_p(FIRST_STAGE)
    for effect in EFFECTS:
        answers, stops = [], []
        for seed in range(repetitions):
            values = np.random.default_rng(seed).normal(effect, 1, size=ALL_SEEDS).tolist()
            found_first = answer(values[:FIRST_STAGE], first)
            stops.append(found_first != "NOT SETTLED")
            answers.append(found_first if stops[-1] else answer(values, ALPHA - first))
        found[f"effect {effect}"] = {
            "YES": answers.count("YES") / repetitions,
            "NO": answers.count("NO") / repetitions,
            "stops": float(np.mean(stops)),
            "seeds, on average": ALL_SEEDS - (ALL_SEEDS - FIRST_STAGE) * float(np.mean(stops)),
        }
    return found


def searched(edge: float, softness: float, random: np.random.Generator) -> tuple[float, float, int]:
    """A search for a threshold: the logs of its ends, open if it has only one, and its runs.

    Args:
        edge: log rate at which half of the runs train.
        softness: the fraction that trains is logistic in the log rate, with this scale; at 0 it is
            a step. Whether a run trains is independent of all others.
    """
    endings: dict[int, Ending] = {}
    step: int | None = SEARCH.step(SEARCH.start_of(""))
    while step is not None:
        above = np.log(SEARCH.rate(step)) - edge
        trains = above < (random.logistic(0, softness) if softness else 0.0)
        endings[step] = "trained" if trains else "failed"
        step = next_step(endings, SEARCH.most_runs - len(endings), step).step
    found = bracket(endings)
    low = -np.inf if found.low is None else np.log(SEARCH.rate(found.low))
    high = np.inf if found.high is None else np.log(SEARCH.rate(found.high))
    return low, high, len(endings)


def search_coverage(repetitions: int) -> Rows:
    """Coverage of the interval of mean log thresholds by search, their bias and their runs.

    The seeds' log thresholds are normal. Their mean is a number of steps above the start, and
    uniform within half a step of there. A bound counts as the threshold, and opens the interval on
    its side, as in comparisons.
    """
    width, start = np.log(SEARCH.ratio), np.log(SEARCH.start_of(""))

    def trial(
        spread: float, softness: float, steps: int, random: np.random.Generator
    ) -> list[float]:
        mean = start + (steps + random.uniform(-0.5, 0.5)) * width
        edges = random.normal(mean, spread, size=max(SEEDS))
        ends = np.array([searched(edge, softness, random) for edge in edges])
        (lows, highs), runs = ends[:, :2].T, ends[:, 2]
        middles = np.where(
            np.isinf(lows), highs, np.where(np.isinf(highs), lows, lows / 2 + highs / 2)
        )
        covered = []
        for n in SEEDS:
            student = mean_interval(middles[:n].tolist())
            assert student is not None
            halves = (highs[:n] - lows[:n]) / 2
            interval = at_least(student, np.where(np.isfinite(halves), halves, 0).mean())
            low = -np.inf if np.isinf(lows[:n]).any() else interval.low
            high = np.inf if np.isinf(highs[:n]).any() else interval.high
            covered.append(contains(Interval(low, high), mean))
        return [*covered, middles.mean() - mean, runs.mean()]

    found: Rows = {}
    columns = [*map(str, SEEDS), "bias", "runs"]
    for case in SEARCHES:
        trials = [trial(*case, np.random.default_rng(seed)) for seed in range(repetitions)]
        name = "spread {}, softness {}, {:+} steps".format(*case)
        found[name] = dict(zip(columns, np.mean(trials, axis=0).tolist(), strict=True))
    return found


def lost_coverage(repetitions: int) -> Rows:
    """Coverage of the interval of a difference of two arms, one of whose runs has no result.

    As in `gpt.compare.analysis.measures.measure`, the run counts at its best and at its worst, and
    the interval covers both intervals. For comparison, one row leaves the seed of the lost run out;
    its number of seeds does not include that seed.
    """

    def covering(
        a: Values, b: Values, worst: float, of: Callable[[list[float]], Interval | None]
    ) -> Interval:
        """Of a - b, where the first run of `a` is lost."""
        both = []
        for value in (a[1:].min() if worst > 1 else 0.0, worst):
            interval = of([value - b[0], *(a[1:] - b[1:]).tolist()])
            assert interval is not None
            both.append(interval)
        return Interval(min(i.low for i in both), max(i.high for i in both))

    def losses(rule: str, random: np.random.Generator, n: int) -> bool:
        n += rule == "left out"
        common = random.normal(2.5, 0.1, size=n)
        a, b = (common + random.normal(0, 0.05, size=n) for _ in range(2))
        order = np.argsort(-a) if rule != "any" else np.arange(n)
        a, b = a[order], b[order]
        if rule == "left out":
            return contains(mean_interval((a[1:] - b[1:]).tolist()), 0.0)
        return contains(covering(a, b, UNIFORM_LOSS, mean_interval), 0.0)

    def fractions(random: np.random.Generator, n: int) -> bool:
        a, b = (np.sort(random.random(n) < p)[::-1].astype(float) for p in (0.5, 0.5))
        return contains(covering(a, random.permutation(b), 1.0, fraction_interval), 0.0)

    return by_seeds(
        repetitions,
        {
            "loss, any run is lost": partial(losses, "any"),
            "loss, the highest is lost": partial(losses, "highest"),
            "loss, the highest is lost, and its seed left out": partial(losses, "left out"),
            "failed fraction, a failed run is lost": fractions,
        },
    )


TABLES: dict[str, Callable[[int], Rows]] = {
    "coverage of the t interval of a mean": mean_coverage,
    "coverage of the interval of a difference of failed fractions": fraction_coverage,
    "coverage of Newcombe's interval": newcombe_coverage,
    "coverage of Wilson's interval": wilson_coverage,
    "coverage of the interval of a log threshold": threshold_coverage,
    "coverage with thresholds by search": search_coverage,
    "coverage with a lost run": lost_coverage,
    "frequency of YES, by number of seeds": power,
    "frequency of a falling trend, by number of updates": trends,
    "two stages (6, then 10 seeds)": two_stages,
}


def table(title: str, rows: Rows) -> str:
    """A Markdown table."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in row.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Run all simulations and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=4000, help="per table entry, at most")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    found = {title: simulate(arguments.repetitions) for title, simulate in TABLES.items()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    print("\n\n".join(table(title, rows) for title, rows in found.items()))


if __name__ == "__main__":
    main()

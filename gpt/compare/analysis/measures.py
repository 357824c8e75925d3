"""The measures of contrasts: from the runs that arms share to a value and its uncertainty.

common_runs   the runs that arms share: every arm has every seed at every point
lost_runs     runs without a result, as if they had ended at their best and at their worst
OF_RUNS       a measure of one arm's runs with one seed
measure       values and differences by seed -> interval and p
measured      all of these, for a contrast; or an Unmeasured, with the reason
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gpt.compare.analysis import wording
from gpt.compare.analysis.outcomes import Outcome, column_value
from gpt.compare.analysis.results import (
    SIGNS,
    SearchResult,
    Unmeasured,
    signed_sum,
)
from gpt.compare.analysis.statistics import (
    Interval,
    Sensitivity,
    at_least,
    fraction_interval,
    lr50,
    lr_sensitivity,
    mean_interval,
    sign_flip_p,
    threshold_interval,
)
from gpt.compare.grid import Contrast, Point, shared_points

MOST_LOST = 6  # lost runs of a contrast; with more, its interval is unbounded
ROUNDING = 1e-12  # a difference smaller than this part of its terms is 0


@dataclass(frozen=True)
class CommonRuns:
    """The runs that arms have in common: every arm has every seed at every point.

    Attributes:
        dropped: how many points are left out.
        dropped_seeds: how many seeds that all arms have are left out.
        runs: (arm, seed, point) -> its outcome.
    """

    seeds: list[int]
    points: list[Point]
    dropped: int
    dropped_seeds: int
    runs: dict[tuple[str, int, Point], Outcome]

    def of(self, arm: str, seed: int, setting: str | None = None) -> list[Outcome]:
        """An arm's runs with a seed, at all points or those of a setting."""
        points = [point for point in self.points if setting in (None, point[0])]
        return [self.runs[arm, seed, point] for point in points]

    def compared(self, arms: Sequence[str]) -> list[Outcome]:
        """All runs that are compared."""
        return [run for arm in arms for seed in self.seeds for run in self.of(arm, seed)]


def common_runs(
    arms: Sequence[str],
    outcomes: Sequence[Outcome],
    *,
    own_rates: bool = False,
    slope: bool = False,
) -> CommonRuns | None:
    """The runs that the arms share, at `shared_points`; None if there are none.

    Args:
        own_rates: whether each arm has a rate of its own, so that rates need not agree.
        slope: see `shared_points`.
    """
    of_arms: dict[str, dict[tuple[int, Point], Outcome]] = {arm: {} for arm in arms}
    for o in outcomes:
        if o.cell.arm in of_arms:
            point = o.cell.setting_text, None if own_rates else o.rate
            of_arms[o.cell.arm][o.seed, point] = o
    seeds, points = shared_points(of_arms, slope=slope)
    if not seeds:
        return None
    runs = {(arm, *key): o for arm, own in of_arms.items() for key, o in own.items()}
    every = {point for _, _, point in runs}
    in_all = set.intersection(*({seed for seed, _ in own} for own in of_arms.values()))
    return CommonRuns(seeds, points, len(every) - len(points), len(in_all) - len(seeds), runs)


@dataclass(frozen=True)
class Measured:
    """A contrast's measure: the value of each arm, and the uncertainty of their signed sum.

    Attributes:
        p: of a paired test that the sum equals the margin; None for log_lr50, which has none.
        bounds, reach, by_seed: as in `ContrastResult`.
    """

    values: list[float]
    interval: Interval | None
    p: float | None
    bounds: tuple[str, ...] = ()
    reach: tuple[str, ...] = ("", "")
    by_seed: dict[int, tuple[float, ...]] = field(default_factory=dict)


OfRuns = Callable[[Sequence[Outcome]], float]


def _mean_of(number: Callable[[Outcome], float]) -> OfRuns:
    return lambda runs: float(np.mean([number(run) for run in runs]))


def sensitivity(outcomes: Sequence[Outcome]) -> Sensitivity:
    """`lr_sensitivity` of one seed's runs."""
    return lr_sensitivity([o.rate for o in outcomes], [o.loss for o in outcomes])


# The measures of one arm's runs with one seed in one setting, given the contrast's column.
OF_RUNS: dict[str, Callable[[str], OfRuns]] = {
    "failure": lambda _: _mean_of(lambda run: run.failed),
    "loss": lambda _: _mean_of(lambda run: run.loss),
    "sensitivity": lambda _: lambda runs: sensitivity(runs).value,
    "column": lambda column: _mean_of(lambda run: _number(run, column)),
    "log_column": lambda column: _mean_of(lambda run: math.log(_number(run, column))),
}


# The measures that have a worst and a best value. Nothing bounds the columns of a lost run, and a
# threshold is a fit; so for other measures a lost run is missing (see `common_runs`).
BOUNDED = ("loss", "failure")
LostRun = tuple[Outcome, Outcome]  # as if it had ended at its best, and at its worst


def lost_runs(contrast: Contrast, outcomes: Sequence[Outcome]) -> list[LostRun]:
    """The contrast's lost runs.

    At best, such a run did not fail and has the lowest loss of any run of its arm in its setting;
    at worst, it diverged. A lost run whose arm has no result in its setting is left out, as are
    cells that were not started.
    """
    found = []
    for lost in outcomes:
        if lost.error is None or lost.verdict is not None or not contrast.includes(lost.cell):
            continue
        where = lost.cell.arm, lost.cell.setting
        like = [o for o in outcomes if o.verdict and (o.cell.arm, o.cell.setting) == where]
        if like:
            lowest = min(like, key=lambda run: run.loss)
            assert lowest.verdict is not None
            trained = replace(lowest.verdict, status="trained")
            diverged = replace(lowest.verdict, status="diverged", final_val_loss=None)
            best = replace(lost, verdict=trained, vocabulary=lowest.vocabulary)
            found.append((best, replace(best, verdict=diverged)))
    return found


def measured(
    contrast: Contrast,
    outcomes: Sequence[Outcome],
    searches: Sequence[SearchResult],
    alpha: float,
) -> tuple[CommonRuns, Measured] | Unmeasured:
    """A contrast's measure and the runs that it is from; or why it cannot be computed.

    Args:
        alpha: the interval is at 1 - alpha.
    """
    included = [o for o in outcomes if o.verdict is not None and contrast.includes(o.cell)]
    lost = lost_runs(contrast, outcomes) if contrast.measure in BOUNDED else []
    common = common_runs(
        contrast.arms,
        [*included, *(worst for _, worst in lost)],
        own_rates=contrast.own_rates,
        slope=bool(contrast.slope),
    )
    if common is None:
        return Unmeasured(wording.NOTHING_IN_COMMON)
    if contrast.slope and len(set(_axis(contrast.slope, common).values())) < 2:
        return Unmeasured(wording.one_value_text(contrast.slope))
    if contrast.column is not None:
        for run in common.compared(contrast.arms):
            value = column_value(run, contrast.column)
            if value is None or (contrast.measure == "log_column" and value <= 0):
                return Unmeasured(wording.no_value_text(run.cell.id, contrast.column, value))
    return common, measure(contrast, common, lost, searches, alpha)


def measure(
    contrast: Contrast,
    common: CommonRuns,
    lost: Sequence[LostRun],
    searches: Sequence[SearchResult],
    alpha: float,
) -> Measured:
    """The contrast's measure; with lost runs, valid whatever their results would have been.

    The interval covers those of all choices of each lost run's best or worst. No value in between
    has an interval outside it: an interval's width is convex in each value.

    Args:
        alpha: the interval is at 1 - alpha.
    """
    if contrast.measure == "log_threshold":
        return _log_threshold(contrast, common, searches, alpha)
    if contrast.measure == "log_lr50":
        return _log_lr50(contrast, common, alpha)
    of = OF_RUNS[contrast.measure](contrast.column or "")
    here = {
        (arm, seed, point): pair
        for (arm, seed, point), run in common.runs.items()
        for pair in lost
        if run is pair[1] and seed in common.seeds and point in common.points
    }
    if not here:
        return _mean_difference(contrast, common, of, alpha)
    few = len(here) <= MOST_LOST
    choices = [*itertools.product((0, 1), repeat=len(here))] if few else []
    possible = []
    for choice in (*choices, *_extremes(contrast, common, [*here])):
        chosen = {key: pair[end] for (key, pair), end in zip(here.items(), choice, strict=True)}
        runs = {**common.runs, **chosen}
        possible.append(_mean_difference(contrast, replace(common, runs=runs), of, alpha))
    low, high = possible[-2:]
    values = signed_sum(low.values), signed_sum(high.values)
    interval = None
    if low.interval is not None:
        intervals = [each.interval for each in possible if each.interval is not None]
        interval = Interval(min(i.low for i in intervals), max(i.high for i in intervals))
        interval = interval if few else Interval(-math.inf, math.inf)
    return Measured(
        values=[(a + b) / 2 for a, b in zip(low.values, high.values, strict=True)],
        interval=interval,
        p=max(each.p for each in possible if each.p is not None) if few else 1.0,
        bounds=(wording.lost_text(contrast, len(here), *values),),
        by_seed={
            seed: tuple((a + b) / 2 for a, b in zip(lows, high.by_seed[seed], strict=True))
            for seed, lows in low.by_seed.items()
        },
    )


def _extremes(
    contrast: Contrast, common: CommonRuns, keys: Sequence[tuple[str, int, Point]]
) -> list[tuple[int, ...]]:
    """The ends of the lost runs, best (0) or worst (1), that make the contrast lowest; highest."""
    weights = _weights(contrast, common)
    signs = dict(zip(contrast.arms, SIGNS, strict=False))
    return [
        tuple(int(end * signs[arm] * weights[point[0]] > 0) for arm, _, point in keys)
        for end in (-1, 1)
    ]


def _margins(contrast: Contrast) -> tuple[float, ...]:
    return (contrast.margin, -contrast.margin)[: 2 if contrast.claim == "within" else 1]


def _number(run: Outcome, column: str) -> float:
    value = column_value(run, column)
    assert value is not None, "contrasts with an empty field are not computed"
    return value


def _weights(contrast: Contrast, common: CommonRuns) -> dict[str, float]:
    """Setting -> its weight: in the mean, or in the least-squares slope over the log of an axis."""
    if not contrast.slope:
        settings = dict.fromkeys(setting for setting, _ in common.points)
        return dict.fromkeys(settings, 1 / len(settings))
    values = _axis(contrast.slope, common)
    x = np.log([*values.values()])
    x -= x.mean()
    weights = np.where(abs(x) < ROUNDING, 0.0, x / (x @ x))
    return dict(zip(values, weights.tolist(), strict=True))


def _axis(axis: str, common: CommonRuns) -> dict[str, float]:
    """Setting -> its value of an axis."""
    varied = {point[0]: run.cell.varied for (_, _, point), run in common.runs.items()}
    return {setting: float(varied[setting][axis]) for setting, _ in common.points}


def _mean_difference(contrast: Contrast, common: CommonRuns, of: OfRuns, alpha: float) -> Measured:
    weights = _weights(contrast, common)
    by_arm = [
        [
            sum(weight * of(common.of(name, seed, at)) for at, weight in weights.items())
            for seed in common.seeds
        ]
        for name in contrast.arms
    ]
    by_seed = dict(zip(common.seeds, zip(*by_arm, strict=True), strict=True))
    differences = [_difference(values) for values in by_seed.values()]
    if contrast.measure == "failure":
        scale = sum(map(abs, weights.values()))
        scaled = [difference / scale for difference in differences]
        limit = len(contrast.arms) / 2
        interval = fraction_interval(scaled, len(common.points), limit, alpha)
        interval = interval and Interval(scale * interval.low, scale * interval.high)
    else:
        interval = mean_interval(differences, alpha)
    p = max(sign_flip_p([d - margin for d in differences]) for margin in _margins(contrast))
    values = [float(np.mean(of_arm)) for of_arm in by_arm]
    return Measured(values, interval, p, by_seed=by_seed)


def _difference(values: Sequence[float]) -> float:
    """The signed sum of a seed's values; 0 if it is only their rounding."""
    found = signed_sum(values)
    return 0.0 if abs(found) < ROUNDING * max(map(abs, values)) else found


def _log_lr50(contrast: Contrast, common: CommonRuns, alpha: float) -> Measured:
    weights = _weights(contrast, common)
    runs = {
        (name, setting): [
            [(o.rate, o.failed) for o in common.of(name, seed, setting)] for seed in common.seeds
        ]
        for name in contrast.arms
        for setting in weights
    }
    found = {
        key: lr50(*zip(*itertools.chain(*by_seed), strict=True)) for key, by_seed in runs.items()
    }
    signs = dict(zip(contrast.arms, SIGNS, strict=False))
    return Measured(
        values=[
            sum(w * math.log(found[name, setting].rate) for setting, w in weights.items())
            for name in contrast.arms
        ],
        interval=threshold_interval(
            list(runs.values()), [signs[name] * weights[setting] for name, setting in runs], alpha
        ),
        p=None,
        bounds=tuple(
            wording.bound_text(*key, threshold)
            for key, threshold in found.items()
            if threshold.bound
        ),
        reach=tuple(
            _reach(*([(found[arm, s].bound, w) for s, w in weights.items()] for arm in pair))
            for pair in contrast.arm_pairs
        ),
    )


def _log_threshold(
    contrast: Contrast, common: CommonRuns, searches: Sequence[SearchResult], alpha: float
) -> Measured:
    """The mean of the logs of thresholds, or of their bounds, which open the interval.

    A threshold may lie anywhere between the two rates that bracket it. That is noise if seeds
    differ by more than a bracket, but if they agree, all may err on the same side: so the interval
    is never narrower than the brackets, on average over the seeds.
    """
    settings = _weights(contrast, common)
    compared = {
        (each.arm, each.seed, each.setting): each
        for each in searches
        if each.arm in contrast.arms and each.seed in common.seeds and each.setting in settings
    }

    def of(runs: Sequence[Outcome]) -> float:
        (run,) = runs  # one of those of a search
        rate = compared[run.cell.arm, run.seed, run.cell.setting_text].rate
        assert rate is not None, "a search with a result has a bound"
        return math.log(rate)

    lost = [each for each in searches if each.arm in contrast.arms and each.is_lost]
    bounds: dict[str, list[tuple[str, float]]] = {name: [] for name in contrast.arms}
    for each in (*compared.values(), *lost):
        bounds[each.arm].append((each.bound, settings.get(each.setting, 1.0)))
    reaches = [_reach(bounds[a], bounds[b]) for a, b in contrast.arm_pairs]
    found = _mean_difference(contrast, common, of, alpha)
    resolution = sum(
        abs(settings[each.setting]) * math.log(each.high / each.low) / 2
        for each in compared.values()
        if each.low is not None and each.high is not None
    ) / len(common.seeds)
    return replace(
        found,
        interval=found.interval
        and _opened(at_least(found.interval, resolution), _difference_reach(reaches)),
        bounds=wording.search_notes([*compared.values(), *lost]),
        reach=tuple(reaches),
    )


def _opened(interval: Interval, reach: str) -> Interval:
    """An interval of bounds, open where the quantity itself may lie beyond it."""
    return Interval(
        -math.inf if reach in ("at most", "unknown") else interval.low,
        math.inf if reach in ("at least", "unknown") else interval.high,
    )


Bounds = Sequence[tuple[str, float]]  # the bound of a threshold, and its weight
TURNED = {"above": "below", "below": "above"}


def _reach(of: Bounds, less: Bounds) -> str:
    """The bound on the difference of two arms' thresholds that their own bounds imply."""
    signed = [*of, *((bound, -weight) for bound, weight in less)]
    ends = {bound if weight > 0 else TURNED.get(bound, bound) for bound, weight in signed if weight}
    if "unclear" in ends or {"above", "below"} <= ends:
        return "unknown"
    return "at least" if "above" in ends else "at most" if "below" in ends else ""


def _difference_reach(reaches: Sequence[str]) -> str:
    """The bound on a part, or on the difference of two parts, that their bounds imply."""
    of_bound = {"at least": "above", "at most": "below", "unknown": "unclear", "": ""}
    first, *second = [[(of_bound[reach], 1.0)] for reach in reaches]
    return _reach(first, second[0] if second else [])

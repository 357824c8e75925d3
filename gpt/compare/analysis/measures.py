"""The measures of contrasts: from the runs that arms share to a value and its uncertainty.

common_runs   the runs that arms share: every arm has every seed at every point
lost_runs     runs without a result, as if they had ended at their best and at their worst
OF_RUNS       a measure of one arm's runs with one seed
measure       values and differences by seed -> interval and p
measured      all of these, for a contrast
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gpt.compare.analysis import wording
from gpt.compare.analysis.outcomes import Outcome, column_value
from gpt.compare.analysis.results import (
    SIGNS,
    SearchResult,
    signed_sum,
)
from gpt.compare.analysis.statistics import (
    Interval,
    Sensitivity,
    fraction_interval,
    lr50,
    lr_sensitivity,
    mean_interval,
    sign_flip_p,
    threshold_interval,
)
from gpt.compare.grid import Contrast

Point = tuple[str, float | None]  # setting, learning rate; None if each arm has its own


@dataclass(frozen=True)
class CommonRuns:
    """The runs that arms have in common: every arm has every seed at every point.

    Attributes:
        dropped: points at which some arm lacks some seed.
        runs: (arm, seed, point) -> its outcome.
    """

    seeds: list[int]
    points: list[Point]
    dropped: int
    runs: dict[tuple[str, int, Point], Outcome]

    def of(self, arm: str, seed: int, setting: str | None = None) -> list[Outcome]:
        """An arm's runs with a seed, at all points or those of a setting."""
        points = [point for point in self.points if setting in (None, point[0])]
        return [self.runs[arm, seed, point] for point in points]


def common_runs(
    arms: Sequence[str], outcomes: Sequence[Outcome], *, own_rates: bool = False
) -> CommonRuns | None:
    """The runs that the arms share; None if there are none.

    Args:
        own_rates: whether each arm has a rate of its own, so that rates need not agree.
    """
    runs: dict[tuple[str, int, Point], Outcome] = {
        (o.cell.arm, o.seed, (o.cell.setting_text, None if own_rates else o.rate)): o
        for o in outcomes
        if o.cell.arm in arms
    }
    every = list(dict.fromkeys(point for _, _, point in runs))
    by_arm = [{seed for arm, seed, _ in runs if arm == name} for name in arms]
    seeds = sorted(set.intersection(*by_arm))
    points = [p for p in every if all((arm, seed, p) in runs for arm in arms for seed in seeds)]
    if not seeds or not points:
        return None
    return CommonRuns(seeds, points, len(every) - len(points), runs)


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
    "log_column": lambda column: _mean_of(lambda run: _log(_number(run, column))),
}


# The measures that have a worst and a best value. Nothing bounds the columns of a lost run, and a
# threshold is a fit; so other measures leave out the rate and setting of a lost run.
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
) -> tuple[CommonRuns, Measured] | None:
    """A contrast's measure and the runs that it is from; None where it cannot be computed.

    Args:
        alpha: the interval is at 1 - alpha.
    """
    included = [o for o in outcomes if o.verdict is not None and contrast.includes(o.cell)]
    lost = lost_runs(contrast, outcomes) if contrast.measure in BOUNDED else []
    common = common_runs(
        contrast.arms,
        [*included, *(worst for _, worst in lost)],
        own_rates=bool(contrast.rates) or contrast.measure == "log_threshold",
    )
    if common is None:
        return None
    if contrast.column is not None and any(
        column_value(outcome, contrast.column) is None for outcome in common.runs.values()
    ):
        return None
    return common, measure(contrast, common, lost, searches, alpha)


def measure(
    contrast: Contrast,
    common: CommonRuns,
    lost: Sequence[LostRun],
    searches: Sequence[SearchResult],
    alpha: float,
) -> Measured:
    """The contrast's measure; with lost runs, valid whatever their results would have been.

    The interval covers those of the lowest and of the highest possible value. With one lost run, no
    value in between has an interval outside it: an interval's width is convex in each value.

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
    weights = _weights(contrast, common)
    signs = dict(zip(contrast.arms, SIGNS, strict=False))

    def at(end: int) -> Measured:
        runs = {
            (arm, seed, point): pair[end * signs[arm] * weights[point[0]] > 0]
            for (arm, seed, point), pair in here.items()
        }
        return _mean_difference(contrast, replace(common, runs={**common.runs, **runs}), of, alpha)

    low, high = at(-1), at(1)
    values = [signed_sum(each.values) for each in (low, high)]
    both = [m.interval for m in (low, high) if m.interval is not None]
    return Measured(
        values=[(a + b) / 2 for a, b in zip(low.values, high.values, strict=True)],
        interval=Interval(min(i.low for i in both), max(i.high for i in both)) if both else None,
        p=max(m.p for m in (low, high) if m.p is not None),
        bounds=(wording.lost_text(contrast, len(here), *values),),
    )


def _number(run: Outcome, column: str) -> float:
    value = column_value(run, column)
    assert value is not None, "contrasts with an empty field are not computed"
    return value


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _weights(contrast: Contrast, common: CommonRuns) -> dict[str, float]:
    """Setting -> its weight: in the mean, or in the least-squares slope over the log of an axis."""
    settings = {
        setting: next(o.cell.varied for (_, _, p), o in common.runs.items() if p[0] == setting)
        for setting, _ in common.points
    }
    if not contrast.slope:
        return dict.fromkeys(settings, 1 / len(settings))
    x = np.log([float(varied[contrast.slope]) for varied in settings.values()])
    x -= x.mean()
    return dict(zip(settings, (x / (x @ x)).tolist(), strict=True))


def _mean_difference(contrast: Contrast, common: CommonRuns, of: OfRuns, alpha: float) -> Measured:
    weights = _weights(contrast, common)
    by_arm = [
        [
            sum(weight * of(common.of(name, seed, at)) for at, weight in weights.items())
            for seed in common.seeds
        ]
        for name in contrast.arms
    ]
    differences = [signed_sum(values) for values in zip(*by_arm, strict=True)]
    values = [float(np.mean(by_seed)) for by_seed in by_arm]
    if contrast.measure == "failure" and not contrast.slope:
        interval = fraction_interval(differences, len(common.points), len(contrast.arms) / 2, alpha)
    else:
        interval = mean_interval(differences, alpha)
    margins = (contrast.margin, -contrast.margin)[: 2 if contrast.claim == "within" else 1]
    p = max(sign_flip_p([value - margin for value in differences]) for margin in margins)
    by_seed = dict(zip(common.seeds, zip(*by_arm, strict=True), strict=True))
    return Measured(values, interval, p, by_seed=by_seed)


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
        reach=_reaches(contrast, {n: [found[n, s].bound for s in weights] for n in contrast.arms}),
    )


def _log_threshold(
    contrast: Contrast, common: CommonRuns, searches: Sequence[SearchResult], alpha: float
) -> Measured:
    """The mean of the logs of thresholds, or of their bounds, which open the interval."""
    of_arms = {
        (each.arm, each.seed, each.setting): each for each in searches if each.arm in contrast.arms
    }

    def of(runs: Sequence[Outcome]) -> float:
        (run,) = runs  # one of those of a search
        rate = of_arms[run.cell.arm, run.seed, run.cell.setting_text].rate
        assert rate is not None, "a search with a result has a bound"
        return math.log(rate)

    settings = {setting for setting, _ in common.points}
    bounds = {
        name: [
            found.bound
            for (arm, seed, setting), found in of_arms.items()
            if arm == name and seed in common.seeds and setting in settings
        ]
        for name in contrast.arms
    }
    found = _mean_difference(contrast, common, of, alpha)
    signed = list(zip(contrast.arms, SIGNS, strict=False))
    reach = _reach(
        [bound for name, sign in signed if sign > 0 for bound in bounds[name]],
        [bound for name, sign in signed if sign < 0 for bound in bounds[name]],
        slope=bool(contrast.slope),
    )
    return replace(
        found,
        interval=found.interval and _opened(found.interval, reach),
        bounds=wording.search_notes([*of_arms.values()]),
        reach=_reaches(contrast, bounds),
    )


def _opened(interval: Interval, reach: str) -> Interval:
    """An interval of bounds, open where the quantity itself may lie beyond it."""
    return Interval(
        -math.inf if reach in ("at most", "unknown") else interval.low,
        math.inf if reach in ("at least", "unknown") else interval.high,
    )


def _reaches(contrast: Contrast, bounds: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The bound on each part of a contrast that the bounds of its arms' thresholds imply."""
    return tuple(
        _reach(bounds[a], bounds[b], slope=bool(contrast.slope))
        for a, b in (contrast.of, *([contrast.against] if contrast.against else []))
    )


def _reach(of: Sequence[str], less: Sequence[str], *, slope: bool) -> str:
    """The bound on the difference of two arms' thresholds that their own bounds imply.

    Args:
        slope: whether it is a difference of slopes, which bounds on single thresholds do not bound.
    """
    if slope:
        return "unknown" if any((*of, *less)) else ""
    more = "above" in of or "below" in less
    fewer = "below" in of or "above" in less
    if "unclear" in (*of, *less) or (more and fewer):
        return "unknown"
    return "at least" if more else "at most" if fewer else ""

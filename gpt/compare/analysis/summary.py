"""From the outcomes of all cells to a Summary: arms, the registered contrasts, and pairs.

The numbers come from statistics.py, and the conclusions, which are sentences, from wording.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpt.compare.analysis import wording
from gpt.compare.analysis.matching import match
from gpt.compare.analysis.outcomes import Outcome, column_value
from gpt.compare.analysis.outlook import NO_SEEDS, outlook
from gpt.compare.analysis.results import (
    SIGNS,
    Answer,
    ArmSummary,
    AtRate,
    ContrastResult,
    PairAtRate,
    PairResult,
    SearchResult,
    Summary,
    signed_sum,
)
from gpt.compare.analysis.searches import search_results
from gpt.compare.analysis.statistics import (
    ALPHA,
    Interval,
    Runs,
    Sensitivity,
    fraction_interval,
    highest_stable_rate,
    holm,
    least_p,
    lr50,
    lr50_of_seeds,
    lr_sensitivity,
    mcnemar,
    mean_interval,
    paired_difference,
    regret,
    sign_flip_p,
    threshold_interval,
    wilson,
)
from gpt.compare.analysis.verdicts import MARGINS
from gpt.compare.grid import RATE, Contrast, Grid
from gpt.compare.registration import UNSAID, Registered
from gpt.schedule import lr_multiplier


def summarize(
    grid: Grid,
    outcomes: Sequence[Outcome],
    registered: Registered = UNSAID,
    workers: int = 1,
) -> Summary:
    """All results of a comparison; at least one cell has a result.

    Args:
        workers: that would train further seeds.
    """
    ended = [outcome for outcome in outcomes if outcome.verdict is not None]
    assert ended, "at least one cell has a result"
    groups = _grouped(outcomes, lambda o: (o.cell.arm, o.cell.setting_text))
    best = {
        key: min(o.loss for o in some)
        for key, some in _grouped(ended, lambda o: (o.cell.setting_text, o.seed)).items()
    }
    arms = tuple(
        _arm(arm, setting, group, {s: loss for (at, s), loss in best.items() if at == setting})
        for (arm, setting), group in groups.items()
        if any(o.verdict is not None for o in group)
    )
    searches = search_results(grid, outcomes)
    contrasts: list[ContrastResult | None] = []
    for number, contrast in enumerate(grid.contrasts):
        late = registered.late.get(number, "")
        first = all(b and b.confirmatory and b.answer == "supported" for b in contrasts)
        result = _contrast(contrast, outcomes, searches, confirmatory=first and not late, late=late)
        if result is not None and result.answer == "open" and result.learned:
            result = replace(result, outlook=_outlook(contrast, result, grid, ended, workers))
        contrasts.append(result)
    return Summary(
        title=grid.title,
        planned=len(outcomes),
        with_result=len(ended),
        lost={o.cell.id: o.status for o in outcomes if o.verdict is None},
        unigram_entropy=ended[0].unigram_entropy,
        arms=arms,
        searches=searches,
        contrasts=tuple(contrasts),
        pairs=_pairs(grid.pairs, ended),
        match=match(outcomes),
        registered=registered.text,
        conclusions=wording.conclusions(
            contrasts,
            grid.contrasts,
            _widest_failures(
                arms, [c for n, c in enumerate(grid.contrasts) if n not in registered.late]
            ),
            searches,
        ),
    )


def _grouped(items: Iterable[Outcome], key: Callable[[Outcome], Any]) -> dict[Any, list[Outcome]]:
    groups: dict[Any, list[Outcome]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# ---------------------------------------------------------------------------------------------
# Arms


def _arm(
    arm: str, setting: str, group: Sequence[Outcome], best_losses: dict[int, float]
) -> ArmSummary:
    """One arm in one setting; `best_losses`: each seed's lowest loss of any arm there."""
    ended = [o for o in group if o.verdict is not None]
    by_rate = tuple(
        _at_rate(rate, some) for rate, some in sorted(_grouped(ended, lambda o: o.rate).items())
    )
    seeds = _grouped(ended, lambda o: o.seed)
    complete = [some for some in seeds.values() if len(some) == len(by_rate)] or seeds.values()
    curves = [_sensitivity(some) for some in complete]
    regrets = [regret([o.loss for o in some], best_losses[some[0].seed]) for some in complete]
    threshold = lr50_of_seeds(_runs(seeds.values()))
    rises = [o.verdict.early_rise for o in ended if o.verdict and o.verdict.early_rise is not None]
    best = min(by_rate, key=lambda at: at.median_loss)
    config = ended[0].cell.config
    clipped = [o.verdict.clipped for o in ended if o.verdict and o.verdict.clipped is not None]
    return ArmSummary(
        arm=arm,
        setting=setting,
        runs=len(ended),
        **_plateaus(ended),
        failures=sum(o.failed for o in ended),
        failures_at={margin: sum(o.failed_at(margin) for o in ended) for margin in MARGINS},
        lost=len(group) - len(ended),
        seeds=len(seeds),
        by_rate=by_rate,
        lr50=threshold,
        lr50_interval=None if threshold.unequal else _lr50_interval(_runs(seeds.values())),
        highest_stable_rate=highest_stable_rate([o.rate for o in ended], [o.failed for o in ended]),
        median_loss=float(np.median([o.loss for o in ended])),
        lr_sensitivity=float(np.mean([curve.value for curve in curves])),
        lr_sensitivity_interval=mean_interval([curve.value for curve in curves]),
        regret=float(np.mean(regrets)),
        regret_interval=mean_interval(regrets),
        best_at_edge=sum(curve.at_edge for curve in curves),
        best_rate=best.rate,
        best_loss=best.median_loss,
        initial_loss=float(np.mean([o.initial_loss for o in ended])),
        summed_rate=sum(
            lr_multiplier(config.schedule, step, config.training.steps)
            for step in range(1, config.training.steps + 1)
        ),
        spiked=sum(o.verdict is not None and o.verdict.loss_spikes > 0 for o in ended),
        early_rise=float(np.mean(rises)) if rises else None,
        clipped=float(np.mean(clipped)) if clipped else None,
    )


def _runs(seeds: Iterable[Sequence[Outcome]]) -> list[list[tuple[float, bool]]]:
    return [[(o.rate, o.failed) for o in some] for some in seeds]


def _plateaus(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many of the plateaus are stuck, and how many slow."""
    slow = [o.verdict.slow for o in outcomes if o.verdict and o.verdict.status == "plateaued"]
    return {"stuck": slow.count(False), "slow": slow.count(True)}


def _lr50_interval(seeds: Sequence[Runs]) -> Interval | None:
    logs = threshold_interval([seeds])
    return None if logs is None else Interval(math.exp(logs.low), math.exp(logs.high))


def _at_rate(rate: float, outcomes: Sequence[Outcome]) -> AtRate:
    losses = [o.loss for o in outcomes]
    failures = sum(o.failed for o in outcomes)
    return AtRate(
        rate=rate,
        n=len(outcomes),
        failures=failures,
        **_plateaus(outcomes),
        interval=wilson(failures, len(outcomes)),
        losses=tuple(losses),
        mean_loss=float(np.mean(losses)),
        median_loss=float(np.median(losses)),
        loss_interval=mean_interval(losses),
        statuses=tuple(o.status for o in outcomes),
    )


def _sensitivity(outcomes: Sequence[Outcome]) -> Sensitivity:
    return lr_sensitivity([o.rate for o in outcomes], [o.loss for o in outcomes])


def _widest_failures(
    arms: Sequence[ArmSummary], contrasts: Sequence[Contrast]
) -> wording.Failures | None:
    """Failures where the arms differ most; None if there is no result at the rates compared."""
    contrasted = [name for contrast in contrasts for name in contrast.arms]
    names = list(dict.fromkeys(contrasted or [arm.arm for arm in arms]))
    registered = {float(rate) for contrast in contrasts for rate in contrast.at.get(RATE, ())}
    points: dict[tuple[float, str], dict[str, AtRate]] = {}
    for arm in arms:
        for at in arm.by_rate:
            if arm.arm in names and (not registered or at.rate in registered):
                points.setdefault((at.rate, arm.setting), {})[arm.arm] = at
    if not points:
        return None
    everywhere = [at for by_arm in points.values() for at in by_arm.values()]

    def spread(by_arm: dict[str, AtRate], of: Sequence[str]) -> float:
        fractions = [by_arm[name].failures / by_arm[name].n for name in of if name in by_arm]
        return max(fractions, default=0.0) - min(fractions, default=0.0)

    def difference(key: tuple[float, str]) -> tuple[float, float, int]:
        by_arm = points[key]
        failures = sum(at.failures for at in by_arm.values())
        return spread(by_arm, names[:2]), spread(by_arm, names), failures

    rate, setting = max(points, key=difference)
    return wording.Failures(
        rate=rate,
        setting=setting,
        by_arm=points[rate, setting],
        differ=spread(points[rate, setting], names) > 0,
        registered=bool(registered),
        only=len(points) == 1,
        fewest=min(everywhere, key=lambda at: at.n),
    )


# ---------------------------------------------------------------------------------------------
# Contrasts and pairs


Point = tuple[str, float | None]  # setting, learning rate; None if each arm has its own


@dataclass(frozen=True)
class _CommonRuns:
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


def _common_runs(
    arms: Sequence[str], outcomes: Sequence[Outcome], *, own_rates: bool = False
) -> _CommonRuns | None:
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
    return _CommonRuns(seeds, points, len(every) - len(points), runs)


@dataclass(frozen=True)
class _Measured:
    """A contrast's measure: the value of each arm, and the uncertainty of their signed sum.

    Attributes:
        p: of a paired test that the sum equals the margin; None for thresholds, which have none.
        bounds, reach, by_seed: as in `ContrastResult`.
    """

    values: list[float]
    interval: Interval | None
    p: float | None
    bounds: tuple[str, ...] = ()
    reach: tuple[str, ...] = ("", "")
    by_seed: dict[int, tuple[float, ...]] = field(default_factory=dict)


def _contrast(
    contrast: Contrast,
    outcomes: Sequence[Outcome],
    searches: Sequence[SearchResult],
    *,
    confirmatory: bool,
    late: str,
) -> ContrastResult | None:
    """A registered contrast: a mean over settings and rates, from the runs that its arms share."""
    names = contrast.arms
    included = [o for o in outcomes if o.verdict is not None and contrast.includes(o.cell)]
    lost = _lost_runs(contrast, outcomes) if contrast.measure in BOUNDED else []
    common = _common_runs(
        names,
        [*included, *(worst for _, worst in lost)],
        own_rates=bool(contrast.rates) or contrast.measure == "log_threshold",
    )
    if common is None:
        return None
    if contrast.column is not None and any(
        column_value(outcome, contrast.column) is None for outcome in common.runs.values()
    ):
        return None
    found = _measured(contrast, common, lost, searches)
    parts = tuple(found.values[i] - found.values[i + 1] for i in range(0, len(names), 2))
    seeds = len(common.seeds)
    # Thresholds have no test: an answer needs enough seeds for a test's smallest p to reach ALPHA.
    p = least_p(seeds) if found.p is None else found.p
    verdicts = [outcome.verdict for outcome in included if outcome.verdict is not None]
    learned = any(verdict.status != "plateaued" for verdict in verdicts)
    answer, reason = _answer(contrast, found.interval, p, learned=learned)
    return ContrastResult(
        question=contrast.question,
        measure=contrast.measure,
        parts=parts,
        bounds=found.bounds,
        reach=found.reach[: len(parts)],
        value=parts[0] - (parts[1] if len(parts) > 1 else 0.0),
        interval=found.interval,
        p=found.p,
        least_p=least_p(seeds),
        answer=answer,
        why=wording.reason(reason, contrast, seeds, found.p),
        confirmatory=confirmatory,
        late=late,
        learned=learned,
        seeds=seeds,
        dropped=common.dropped,
        by_seed=found.by_seed,
        outlook="",
    )


def _outlook(
    contrast: Contrast,
    result: ContrastResult,
    grid: Grid,
    outcomes: Sequence[Outcome],
    workers: int,
) -> str:
    """How many seeds would settle a contrast, and how long they would take."""
    if not result.by_seed:
        return NO_SEEDS
    runs = [outcome for outcome in outcomes if contrast.includes(outcome.cell)]
    # A batched cell's time is that of its batch, which does not add up.
    batched = grid.runner == "batched" or any(
        (run.environment or {}).get("device", "cpu") != "cpu" for run in runs
    )
    return outlook(
        list(result.differences.values()),
        contrast.claim,
        contrast.margin,
        None if batched else sum(run.seconds for run in runs) / len({run.seed for run in runs}),
        workers,
    )


Measured = Callable[[Sequence[Outcome]], float]


def _mean_of(number: Callable[[Outcome], float]) -> Measured:
    return lambda runs: float(np.mean([number(run) for run in runs]))


# The measures of one arm's runs with one seed in one setting, given the contrast's column.
OF_RUNS: dict[str, Callable[[str], Measured]] = {
    "failure": lambda _: _mean_of(lambda run: run.failed),
    "loss": lambda _: _mean_of(lambda run: run.loss),
    "sensitivity": lambda _: lambda runs: _sensitivity(runs).value,
    "column": lambda column: _mean_of(lambda run: _number(run, column)),
    "log_column": lambda column: _mean_of(lambda run: _log(_number(run, column))),
}


# The measures that have a worst and a best value. A lost run has no column, its neighbors may not
# bound it, and a threshold is a fit; so of other measures its rate and setting are left out.
BOUNDED = ("loss", "failure")
LostRun = tuple[Outcome, Outcome]  # as if it had ended at its best, and at its worst


def _lost_runs(contrast: Contrast, outcomes: Sequence[Outcome]) -> list[LostRun]:
    """The contrast's lost runs.

    At best, such a run did not fail and has the lowest loss of any run of its arm in its setting;
    at worst, it diverged. One without any such run is left out, as are those that were not started.
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


def _measured(
    contrast: Contrast,
    common: _CommonRuns,
    lost: Sequence[LostRun],
    searches: Sequence[SearchResult],
) -> _Measured:
    """The contrast's measure; with lost runs, whatever they would have added to it.

    The interval covers those of the lowest and of the highest possible value. With one lost run, no
    value in between has an interval outside it: an interval's width is convex in each value.
    """
    if contrast.measure == "log_threshold":
        return _log_threshold(contrast, common, searches)
    if contrast.measure == "log_lr50":
        return _log_lr50(contrast, common)
    of = OF_RUNS[contrast.measure](contrast.column or "")
    here = {
        (arm, seed, point): pair
        for (arm, seed, point), run in common.runs.items()
        for pair in lost
        if run is pair[1] and seed in common.seeds and point in common.points
    }
    if not here:
        return _mean_difference(contrast, common, of)
    weights = _weights(contrast, common)
    signs = dict(zip(contrast.arms, SIGNS, strict=False))

    def at(end: int) -> _Measured:
        runs = {
            (arm, seed, point): pair[end * signs[arm] * weights[point[0]] > 0]
            for (arm, seed, point), pair in here.items()
        }
        return _mean_difference(contrast, replace(common, runs={**common.runs, **runs}), of)

    low, high = at(-1), at(1)
    values = [signed_sum(each.values) for each in (low, high)]
    both = [m.interval for m in (low, high) if m.interval is not None]
    return _Measured(
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


def _weights(contrast: Contrast, common: _CommonRuns) -> dict[str, float]:
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


def _mean_difference(contrast: Contrast, common: _CommonRuns, of: Measured) -> _Measured:
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
        interval = fraction_interval(
            differences, runs=len(common.points), limit=len(contrast.arms) / 2
        )
    else:
        interval = mean_interval(differences)
    margins = (contrast.margin, -contrast.margin)[: 2 if contrast.claim == "within" else 1]
    p = max(sign_flip_p([value - margin for value in differences]) for margin in margins)
    by_seed = dict(zip(common.seeds, zip(*by_arm, strict=True), strict=True))
    return _Measured(values, interval, p, by_seed=by_seed)


def _log_lr50(contrast: Contrast, common: _CommonRuns) -> _Measured:
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
    return _Measured(
        values=[
            sum(w * math.log(found[name, setting].rate) for setting, w in weights.items())
            for name in contrast.arms
        ],
        interval=threshold_interval(
            list(runs.values()), [signs[name] * weights[setting] for name, setting in runs]
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
    contrast: Contrast, common: _CommonRuns, searches: Sequence[SearchResult]
) -> _Measured:
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
    measured = _mean_difference(contrast, common, of)
    signed = list(zip(contrast.arms, SIGNS, strict=False))
    reach = _reach(
        [bound for name, sign in signed if sign > 0 for bound in bounds[name]],
        [bound for name, sign in signed if sign < 0 for bound in bounds[name]],
        slope=bool(contrast.slope),
    )
    return replace(
        measured,
        interval=measured.interval and _opened(measured.interval, reach),
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
        slope: whether it is a difference of slopes, which no bound of one threshold bounds.
    """
    if slope:
        return "unknown" if any((*of, *less)) else ""
    more = "above" in of or "below" in less
    fewer = "below" in of or "above" in less
    if "unclear" in (*of, *less) or (more and fewer):
        return "unknown"
    return "at least" if more else "at most" if fewer else ""


def _answer(
    contrast: Contrast, interval: Interval | None, p: float, *, learned: bool
) -> tuple[Answer, wording.Reason]:
    """Supported or contradicted only if the interval is on one side and p is at most ALPHA.

    Args:
        learned: whether any run is not plateaued; if all are, the answer is open.
    """
    if not learned:
        return "open", "nothing learned"
    if interval is None:
        return "open", "too few for an interval"
    margin, low, high = contrast.margin, interval.low, interval.high
    supported, contradicted = {
        "above": (low > margin, high < margin),
        "below": (high < margin, low > margin),
        "within": (-margin < low and high < margin, high < -margin or low > margin),
    }[contrast.claim]
    if not supported and not contradicted:
        return "open", "undecided"
    if p > ALPHA:
        return "open", "too few seeds"
    return ("supported", "supported") if supported else ("contradicted", "contradicted")


def _pairs(pairs: Sequence[tuple[str, str]], outcomes: Sequence[Outcome]) -> tuple[PairResult, ...]:
    """All pairs that have runs in common, with Holm's correction over their tests of the loss."""
    found = [
        (a, b, common) for a, b in pairs if (common := _common_runs((a, b), outcomes)) is not None
    ]
    losses = [
        paired_difference(
            *(
                [float(np.mean([o.loss for o in common.of(arm, seed)])) for seed in common.seeds]
                for arm in (a, b)
            )
        )
        for a, b, common in found
    ]
    tests = [
        [
            mcnemar(*([common.runs[arm, s, point].failed for s in common.seeds] for arm in (a, b)))
            for point in common.points
        ]
        for a, b, common in found
    ]
    adjusted = holm([loss.p for loss in losses])
    return tuple(
        PairResult(
            a,
            b,
            loss,
            holm_p,
            common.dropped,
            tuple(
                PairAtRate(common.runs[a, common.seeds[0], point].rate, point[0], test)
                for point, test in zip(common.points, each, strict=True)
            ),
        )
        for (a, b, common), loss, each, holm_p in zip(found, losses, tests, adjusted, strict=True)
    )

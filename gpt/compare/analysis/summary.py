"""From the outcomes of all cells to a Summary: the arms here, contrasts and pairs in contrasts.py.

The numbers come from statistics.py, and the conclusions, which are sentences, from wording.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gpt.compare.analysis import wording
from gpt.compare.analysis.contrasts import contrast_results, pair_results
from gpt.compare.analysis.matching import match
from gpt.compare.analysis.measures import sensitivity
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import (
    ArmSummary,
    AtRate,
    ContrastResult,
    Summary,
)
from gpt.compare.analysis.searches import search_results
from gpt.compare.analysis.stages import decide, level
from gpt.compare.analysis.statistics import (
    Interval,
    Runs,
    highest_stable_rate,
    lr50_of_seeds,
    mean_interval,
    regret,
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
        workers: how many would train further seeds, for the estimate of their time.
    """
    searches = search_results(grid, outcomes)
    outcomes = [outcome for outcome in outcomes if not outcome.cell.longer]
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
    decision = None if grid.first_stage is None else decide(grid, outcomes)
    alpha = level(grid.first_stage, decision)
    contrasts = contrast_results(grid, outcomes, searches, registered, alpha, workers)
    return Summary(
        title=grid.title,
        planned=len(outcomes),
        with_result=len(ended),
        lost={o.cell.id: o.status for o in outcomes if o.verdict is None},
        unigram_entropy=ended[0].unigram_entropy,
        arms=arms,
        searches=searches,
        contrasts=tuple(c if isinstance(c, ContrastResult) else None for c in contrasts),
        pairs=pair_results(grid.pairs, ended),
        match=match(outcomes),
        registered=registered.text,
        stages=wording.stages_text(len(grid.first_seeds), decision, alpha) if decision else "",
        conclusions=wording.conclusions(
            contrasts,
            grid.contrasts,
            _widest_failures(
                arms, ended, [c for n, c in enumerate(grid.contrasts) if n not in registered.late]
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
    curves = [sensitivity(some) for some in complete]
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


def _widest_failures(
    arms: Sequence[ArmSummary], outcomes: Sequence[Outcome], contrasts: Sequence[Contrast]
) -> wording.Failures | None:
    """Failures where the arms differ most; None if no two arms ran at the same rate and setting.

    Args:
        contrasts: whose runs count; all runs if there are none.
    """
    included = {
        (o.cell.arm, o.rate, o.cell.setting_text)
        for o in outcomes
        if not contrasts or any(contrast.includes(o.cell) for contrast in contrasts)
    }
    points: dict[tuple[float, str], dict[str, AtRate]] = {}
    for arm in arms:
        for at in arm.by_rate:
            if (arm.arm, at.rate, arm.setting) in included:
                points.setdefault((at.rate, arm.setting), {})[arm.arm] = at
    points = {key: by_arm for key, by_arm in points.items() if len(by_arm) > 1}
    if not points:
        return None
    first = contrasts[0].of if contrasts else [arm.arm for arm in arms[:2]]

    def spread(by_arm: dict[str, AtRate], of: Sequence[str]) -> float:
        fractions = [by_arm[name].failures / by_arm[name].n for name in of if name in by_arm]
        return max(fractions, default=0.0) - min(fractions, default=0.0)

    def difference(key: tuple[float, str]) -> tuple[float, float, int]:
        by_arm = points[key]
        failures = sum(at.failures for at in by_arm.values())
        return spread(by_arm, first), spread(by_arm, [*by_arm]), failures

    rate, setting = max(points, key=difference)
    return wording.Failures(
        rate=rate,
        setting=setting,
        by_arm=points[rate, setting],
        differ=any(spread(by_arm, [*by_arm]) > 0 for by_arm in points.values()),
        registered=bool(contrasts) and all(RATE in c.at or c.rates for c in contrasts),
        only=len(points) == 1,
        fewest=min((at for by in points.values() for at in by.values()), key=lambda at: at.n),
    )

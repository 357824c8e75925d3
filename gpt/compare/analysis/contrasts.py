"""The answers to the registered contrasts, and further pairs of arms.

The values come from measures.py, the tests from statistics.py, and the sentences from wording.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gpt.compare.analysis import wording
from gpt.compare.analysis.measures import common_runs, measured
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.outlook import NO_SEEDS, REPEAT, outlook
from gpt.compare.analysis.results import (
    Answer,
    ContrastResult,
    PairAtRate,
    PairResult,
    SearchResult,
    Unmeasured,
)
from gpt.compare.analysis.statistics import (
    Interval,
    holm,
    least_p,
    mcnemar,
    paired_difference,
)
from gpt.compare.grid import Contrast, Grid
from gpt.compare.registration import Registered


def contrast_results(
    grid: Grid,
    outcomes: Sequence[Outcome],
    searches: Sequence[SearchResult],
    registered: Registered,
    alpha: float,
    workers: int,
) -> tuple[ContrastResult | Unmeasured, ...]:
    """The result of each contrast, in the grid's order; or why it cannot be computed.

    Args:
        alpha: the level of the tests.
        workers: how many would train further seeds, for the estimate of their time.
    """
    contrasts: list[ContrastResult | Unmeasured] = []
    first = True  # whether all contrasts before have a confirmatory YES
    for number, contrast in enumerate(grid.contrasts):
        late = registered.late.get(number, "")
        result = contrast_result(
            contrast, outcomes, searches, alpha, confirmatory=first and not late, late=late
        )
        if isinstance(result, Unmeasured):
            first = False
        else:
            first = result.confirmatory and result.answer == "supported"
            if result.answer == "open" and result.learned:
                words = _outlook(contrast, result, grid, outcomes, workers)
                result = replace(result, outlook=words)
        contrasts.append(result)
    return tuple(contrasts)


def contrast_result(
    contrast: Contrast,
    outcomes: Sequence[Outcome],
    searches: Sequence[SearchResult],
    alpha: float,
    *,
    confirmatory: bool = True,
    late: str = "",
) -> ContrastResult | Unmeasured:
    """A registered contrast: a mean over settings and rates, from the runs that its arms share.

    Args:
        alpha: as in `contrast_results`.
        confirmatory, late: see `ContrastResult`.
    """
    known = measured(contrast, outcomes, searches, alpha)
    if isinstance(known, Unmeasured):
        return known
    common, found = known
    parts = tuple(a - b for a, b in zip(found.values[::2], found.values[1::2], strict=True))
    seeds = len(common.seeds)
    # log_lr50 has no test: an answer needs enough seeds for a test's smallest p to reach alpha.
    p = least_p(seeds) if found.p is None else found.p
    verdicts = [o.verdict for o in outcomes if o.verdict and contrast.includes(o.cell)]
    learned = any(verdict.status != "plateaued" for verdict in verdicts)
    answer, reason = _answer(contrast, found.interval, p, alpha, learned=learned)
    return ContrastResult(
        question=contrast.question,
        measure=contrast.measure,
        parts=parts,
        bounds=found.bounds,
        reach=found.reach[: len(parts)],
        value=parts[0] - (parts[1] if len(parts) > 1 else 0.0),
        interval=found.interval,
        alpha=alpha,
        p=found.p,
        least_p=least_p(seeds),
        answer=answer,
        why=wording.reason(reason, contrast, seeds, found.p, alpha),
        confirmatory=confirmatory,
        late=late,
        learned=learned,
        seeds=seeds,
        dropped=common.dropped,
        dropped_seeds=common.dropped_seeds,
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
    compared = [outcome for outcome in outcomes if contrast.includes(outcome.cell)]
    if any(run.error is not None and run.verdict is None for run in compared):
        return REPEAT
    unbounded = result.interval and math.isinf(result.interval.high - result.interval.low)
    if not result.by_seed or unbounded:
        return NO_SEEDS
    runs = [run for run in compared if run.verdict is not None]
    # A batched cell's time is that of its whole batch, so times cannot be summed.
    batched = grid.runner == "batched" or any(
        (run.environment or {}).get("device", "cpu") != "cpu" for run in runs
    )
    return outlook(
        list(result.differences.values()),
        contrast.claim,
        contrast.margin,
        None if batched else sum(run.seconds for run in runs) / len({run.seed for run in runs}),
        workers,
        result.alpha,
    )


def _answer(
    contrast: Contrast, interval: Interval | None, p: float, alpha: float, *, learned: bool
) -> tuple[Answer, wording.Reason]:
    """Supported or contradicted only if the interval is on one side and p is at most alpha.

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
    if p > alpha:
        return "open", "too few seeds"
    return ("supported", "supported") if supported else ("contradicted", "contradicted")


def pair_results(
    pairs: Sequence[tuple[str, str]], outcomes: Sequence[Outcome]
) -> tuple[PairResult, ...]:
    """All pairs that have runs in common, with Holm's correction over their tests of the loss."""
    found = [
        (a, b, common) for a, b in pairs if (common := common_runs((a, b), outcomes)) is not None
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
            common.dropped_seeds,
            tuple(
                PairAtRate(common.runs[a, common.seeds[0], point].rate, point[0], test)
                for point, test in zip(common.points, each, strict=True)
            ),
        )
        for (a, b, common), loss, each, holm_p in zip(found, losses, tests, adjusted, strict=True)
    )

"""From the outcomes of all cells to summary.json: arms, contrasts, and what may be said of them.

The words of the verdict are bounded by the intervals: no failure in 3 seeds is "at most 56%", and
a claim is supported only where the whole interval is on its side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gpt.compare.grid import Contrast, Grid
from gpt.compare.outcomes import Match, Outcome, match
from gpt.compare.statistics import (
    Interval,
    McNemar,
    PairedDifference,
    Sensitivity,
    Threshold,
    highest_stable_rate,
    holm,
    lr50,
    lr_sensitivity,
    mcnemar,
    mean_interval,
    paired_difference,
    sign_flip_p,
    threshold_interval,
    wilson,
)
from gpt.schedule import lr_multiplier

Answer = Literal["supported", "contradicted", "open"]


@dataclass(frozen=True)
class AtRate:
    """One arm at one rate, over seeds. Losses in nats per token, failures at their first loss.

    Attributes:
        interval: of the failure rate.
        loss_interval: of the mean loss.
    """

    rate: float
    n: int
    failures: int
    interval: Interval
    losses: tuple[float, ...]
    mean_loss: float
    median_loss: float
    loss_interval: Interval | None
    statuses: tuple[str, ...]


@dataclass(frozen=True)
class ArmSummary:
    """One arm in one place, over rates and seeds.

    Attributes:
        place: the options on axes other than the rate, in words; empty if there are none.
        runs, failures: cells with a result, and those that failed.
        lost: cells without a result.
        lr50, lr50_interval: rate at which half of the runs fail, and its interval over seeds.
        highest_stable_rate: the largest rate up to which no seed failed; None: the lowest failed.
        lr_sensitivity, lr_sensitivity_interval: mean over seeds.
        best_at_edge: seeds whose best rate stands at the edge of the rates tried.
        best_rate, best_loss: of the lowest median loss, picked on these very seeds.
        initial_loss: mean validation loss before the first update.
        summed_rate: sum of the schedule's shares of the full rate over all updates.
        spiked: runs with a spike in the loss.
        clipped: mean share of updates whose gradients were clipped; None where none are.
    """

    arm: str
    place: str
    runs: int
    failures: int
    lost: int
    seeds: int
    by_rate: tuple[AtRate, ...]
    lr50: Threshold
    lr50_interval: Interval | None
    highest_stable_rate: float | None
    median_loss: float
    lr_sensitivity: float
    lr_sensitivity_interval: Interval | None
    best_at_edge: int
    best_rate: float
    best_loss: float
    initial_loss: float
    summed_rate: float
    spiked: int
    clipped: float | None


@dataclass(frozen=True)
class ContrastResult:
    """The primary contrast: (a - b) - (c - d), or a - b.

    Attributes:
        parts: a - b, and c - d.
        bounds: which thresholds could only be bounded, in words.
        reach: of each part: "at least", "at most" or "unknown" where bounds make it that.
        value, interval: log_lr50 in natural logarithms; failure as a share; loss in nats per token.
        answer, why: whether the claim stands, and what decides it.
        dropped: places and rates left out, because an arm or a seed has no run there.
    """

    question: str
    measure: str
    parts: tuple[float, ...]
    bounds: tuple[str, ...]
    reach: tuple[str, ...]
    value: float
    interval: Interval | None
    answer: Answer
    why: str
    seeds: int
    dropped: int


@dataclass(frozen=True)
class PairAtRate:
    """Paired failures of two arms at one rate."""

    rate: float
    place: str
    failures: McNemar
    holm_p: float


@dataclass(frozen=True)
class PairResult:
    """Two arms, paired by seed: mean loss over their common rates, and failures at each.

    Attributes:
        dropped: as of a contrast.
    """

    a: str
    b: str
    loss: PairedDifference
    holm_p: float
    dropped: int
    by_rate: tuple[PairAtRate, ...]


@dataclass(frozen=True)
class Summary:
    """summary.json."""

    title: str
    planned: int
    with_result: int
    lost: dict[str, str]
    unigram_entropy: float
    arms: tuple[ArmSummary, ...]
    contrast: ContrastResult | None
    pairs: tuple[PairResult, ...]
    match: Match
    verdict: tuple[str, ...]


def place_text(place: dict[str, Any]) -> str:
    """`layers 12, width 64`; empty for no options."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in place.items())


def summarize(grid: Grid, outcomes: Sequence[Outcome]) -> Summary:
    """All that a comparison says; at least one cell has a result."""
    ended = [outcome for outcome in outcomes if outcome.verdict is not None]
    assert ended, "there is something to summarize"
    groups = _grouped(outcomes, lambda o: (o.cell.arm, place_text(o.cell.place)))
    arms = tuple(
        _arm(arm, place, group)
        for (arm, place), group in groups.items()
        if any(o.verdict is not None for o in group)
    )
    contrast = _contrast(grid.contrast, ended) if grid.contrast is not None else None
    pairs = _pairs(grid.pairs, ended)
    return Summary(
        title=grid.title,
        planned=len(outcomes),
        with_result=len(ended),
        lost={o.cell.id: o.status for o in outcomes if o.verdict is None},
        unigram_entropy=ended[0].unigram_entropy,
        arms=arms,
        contrast=contrast,
        pairs=pairs,
        match=match(outcomes),
        verdict=_words(contrast, arms, grid),
    )


def _grouped(items: Iterable[Outcome], key: Callable[[Outcome], Any]) -> dict[Any, list[Outcome]]:
    groups: dict[Any, list[Outcome]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# ---------------------------------------------------------------------------------------------
# Arms


def _arm(arm: str, place: str, group: Sequence[Outcome]) -> ArmSummary:
    ended = [o for o in group if o.verdict is not None]
    by_rate = tuple(
        _at_rate(rate, some) for rate, some in sorted(_grouped(ended, lambda o: o.rate).items())
    )
    seeds = _grouped(ended, lambda o: o.seed)
    whole = [some for some in seeds.values() if len(some) == len(by_rate)]
    curves = [_sensitivity(some) for some in whole or seeds.values()]
    best = min(by_rate, key=lambda at: at.median_loss)
    config = ended[0].cell.config
    clipped = [o.verdict.clipped for o in ended if o.verdict and o.verdict.clipped is not None]
    return ArmSummary(
        arm=arm,
        place=place,
        runs=len(ended),
        failures=sum(_failed(o) for o in ended),
        lost=len(group) - len(ended),
        seeds=len(seeds),
        by_rate=by_rate,
        lr50=lr50([o.rate for o in ended], [_failed(o) for o in ended]),
        lr50_interval=_rates_interval(
            threshold_interval([[[(o.rate, _failed(o)) for o in some] for some in seeds.values()]])
        ),
        highest_stable_rate=highest_stable_rate(
            [o.rate for o in ended], [_failed(o) for o in ended]
        ),
        median_loss=float(np.median([o.loss for o in ended])),
        lr_sensitivity=float(np.mean([curve.value for curve in curves])),
        lr_sensitivity_interval=mean_interval([curve.value for curve in curves]),
        best_at_edge=sum(curve.at_edge for curve in curves),
        best_rate=best.rate,
        best_loss=best.median_loss,
        initial_loss=float(np.mean([o.initial_loss for o in ended])),
        summed_rate=sum(
            lr_multiplier(config.schedule, step, config.training.steps)
            for step in range(1, config.training.steps + 1)
        ),
        spiked=sum(o.verdict is not None and o.verdict.loss_spikes > 0 for o in ended),
        clipped=float(np.mean(clipped)) if clipped else None,
    )


def _rates_interval(logs: Interval | None) -> Interval | None:
    return None if logs is None else Interval(math.exp(logs.low), math.exp(logs.high))


def _failed(outcome: Outcome) -> bool:
    assert outcome.verdict is not None
    return outcome.verdict.failed


def _at_rate(rate: float, outcomes: Sequence[Outcome]) -> AtRate:
    losses = [o.loss for o in outcomes]
    failures = sum(map(_failed, outcomes))
    return AtRate(
        rate=rate,
        n=len(outcomes),
        failures=failures,
        interval=wilson(failures, len(outcomes)),
        losses=tuple(losses),
        mean_loss=float(np.mean(losses)),
        median_loss=float(np.median(losses)),
        loss_interval=mean_interval(losses),
        statuses=tuple(o.status for o in outcomes),
    )


def _sensitivity(outcomes: Sequence[Outcome]) -> Sensitivity:
    initial = float(np.mean([o.initial_loss for o in outcomes]))
    return lr_sensitivity([o.rate for o in outcomes], [o.loss for o in outcomes], initial)


# ---------------------------------------------------------------------------------------------
# Contrasts


SIGNS = (1, -1, -1, 1)  # of the arms in (a - b) - (c - d)


@dataclass(frozen=True)
class _Shared:
    """The runs that arms have in common: every arm has every seed at every spot.

    Attributes:
        spots: (place, rate).
        dropped: spots that some arm lacks, or lacks a seed at.
        runs: (arm, seed, spot) -> its outcome.
    """

    seeds: list[int]
    spots: list[tuple[str, float]]
    dropped: int
    runs: dict[tuple[str, int, tuple[str, float]], Outcome]

    def at(self, arm: str, seed: int, place: str | None = None) -> list[Outcome]:
        """An arm's runs of a seed, over all spots or those of a place."""
        spots = [spot for spot in self.spots if place in (None, spot[0])]
        return [self.runs[arm, seed, spot] for spot in spots]


def _shared(arms: Sequence[str], outcomes: Sequence[Outcome]) -> _Shared | None:
    runs = {
        (o.cell.arm, o.seed, (place_text(o.cell.place), o.rate)): o
        for o in outcomes
        if o.cell.arm in arms
    }
    every = list(dict.fromkeys(spot for _, _, spot in runs))
    by_arm = [{seed for arm, seed, _ in runs if arm == name} for name in arms]
    seeds = sorted(set.intersection(*by_arm))
    spots = [s for s in every if all((arm, seed, s) in runs for arm in arms for seed in seeds)]
    return _Shared(seeds, spots, len(every) - len(spots), runs) if seeds and spots else None


def _contrast(contrast: Contrast, outcomes: Sequence[Outcome]) -> ContrastResult | None:
    """The primary contrast: a mean over places, by the runs that all of its arms have."""
    names = [*contrast.of, *(contrast.against or ())]
    shared = _shared(names, outcomes)
    if shared is None:
        return None
    bounds: list[str] = []
    reach = [""] * (len(names) // 2)
    if contrast.measure == "log_lr50":
        places = list(dict.fromkeys(place for place, _ in shared.spots))
        runs = {
            (name, place): [
                [(o.rate, _failed(o)) for o in shared.at(name, seed, place)]
                for seed in shared.seeds
            ]
            for name in names
            for place in places
        }
        found = {
            key: lr50(*zip(*itertools.chain(*each), strict=True)) for key, each in runs.items()
        }
        bounds = [_bound(*key, threshold) for key, threshold in found.items() if threshold.bound]
        reach = [
            _reach(
                [found[a, place].bound for place in places],
                [found[b, place].bound for place in places],
            )
            for a, b in zip(names[::2], names[1::2], strict=True)
        ]
        values = [
            float(np.mean([math.log(found[name, place].rate) for place in places]))
            for name in names
        ]
        weights = [SIGNS[names.index(name)] / len(places) for name, _ in runs]
        interval = threshold_interval(list(runs.values()), weights)
        least_p = 1.0 if interval is None else _least_p(len(shared.seeds))
    else:
        measure = _failed if contrast.measure == "failure" else (lambda o: o.loss)
        by_arm = [
            [float(np.mean([measure(o) for o in shared.at(name, seed)])) for seed in shared.seeds]
            for name in names
        ]
        values = [float(np.mean(by_seed)) for by_seed in by_arm]
        differences = [
            sum(sign * value for sign, value in zip(SIGNS, each, strict=False))
            for each in zip(*by_arm, strict=True)
        ]
        interval = mean_interval(differences)
        least_p = sign_flip_p(differences)
    parts = tuple(values[i] - values[i + 1] for i in range(0, len(values), 2))
    answer, why = _answer(interval, least_p, len(shared.seeds))
    return ContrastResult(
        question=contrast.question,
        measure=contrast.measure,
        parts=parts,
        bounds=tuple(bounds),
        reach=tuple(reach),
        value=parts[0] - (parts[1] if len(parts) > 1 else 0.0),
        interval=interval,
        answer=answer,
        why=why,
        seeds=len(shared.seeds),
        dropped=shared.dropped,
    )


def _bound(name: str, place: str, threshold: Threshold) -> str:
    words = {
        "above": f"its threshold lies above {threshold.rate:g}, the highest rate tried",
        "below": f"its threshold lies below {threshold.rate:g}, the lowest rate tried",
        "unclear": "its failures do not rise with the rate: it has no one threshold",
    }
    return f"{name}{f' ({place})' if place else ''}: {words[threshold.bound]}"


def _reach(of: Sequence[str], less: Sequence[str]) -> str:
    """What the bounds of two arms' thresholds leave of the difference: a bound, or nothing."""
    more = "above" in of or "below" in less
    fewer = "below" in of or "above" in less
    if "unclear" in (*of, *less) or (more and fewer):
        return "unknown"
    return "at least" if more else "at most" if fewer else ""


def _least_p(seeds: int) -> float:
    """The smallest p of a paired test of so many."""
    return min(1.0, 2 * 0.5**seeds)


def _answer(interval: Interval | None, p: float, seeds: int) -> tuple[Answer, str]:
    """Supported or contradicted only if the interval is on one side and the seeds can tell.

    Args:
        p: of a paired test; of thresholds, the least that one could give.
    """
    if interval is None:
        return "open", "one seed tells nothing of the next"
    if interval.low <= 0 <= interval.high:
        return "open", "the interval holds both answers"
    if p > 0.05:
        return (
            "open",
            f"the interval points one way, but {seeds} seeds can not settle it (p = {p:.2g})",
        )
    return ("supported" if interval.low > 0 else "contradicted"), "the interval is on one side"


def _pairs(pairs: Sequence[tuple[str, str]], outcomes: Sequence[Outcome]) -> tuple[PairResult, ...]:
    """All pairs that have runs in common, with one correction by Holm over all of their tests."""
    found = [(a, b, shared) for a, b in pairs if (shared := _shared((a, b), outcomes)) is not None]
    losses = [
        paired_difference(
            *(
                [float(np.mean([o.loss for o in shared.at(arm, seed)])) for seed in shared.seeds]
                for arm in (a, b)
            )
        )
        for a, b, shared in found
    ]
    tests = [
        [
            mcnemar(*([_failed(shared.runs[arm, s, spot]) for s in shared.seeds] for arm in (a, b)))
            for spot in shared.spots
        ]
        for a, b, shared in found
    ]
    ps = [
        p for loss, each in zip(losses, tests, strict=True) for p in (loss.p, *(t.p for t in each))
    ]
    adjusted = iter(holm(ps))
    return tuple(
        PairResult(
            a,
            b,
            loss,
            next(adjusted),
            shared.dropped,
            tuple(
                PairAtRate(rate, place, test, next(adjusted))
                for (place, rate), test in zip(shared.spots, each, strict=True)
            ),
        )
        for (a, b, shared), loss, each in zip(found, losses, tests, strict=True)
    )


# ---------------------------------------------------------------------------------------------
# Words


def failures_text(failures: int, n: int, interval: Interval) -> str:
    """`no failure in 3 seeds (at most 56%)`, bounded by the interval."""
    seeds = f"{n} seed{'s' if n != 1 else ''}"
    if failures == 0:
        return f"no failure in {seeds} (at most {interval.high:.0%})"
    if failures == n:
        return f"failure in {'all of ' if n > 1 else ''}{seeds} (at least {interval.low:.0%})"
    several = "s" if failures > 1 else ""
    return f"{failures} failure{several} in {seeds} ({interval.low:.0%} to {interval.high:.0%})"


def _words(
    contrast: ContrastResult | None, arms: Sequence[ArmSummary], grid: Grid
) -> tuple[str, ...]:
    """The verdict in two sentences: the contrast, and the rate at which it shows the most."""
    words = []
    if contrast is not None and grid.contrast is not None:
        words.append(_contrast_words(contrast, grid.contrast))
    elif grid.contrast is not None:
        words.append(
            "The registered contrast can not be computed yet: its arms have no rate in common at "
            "which every seed has a result."
        )
    shown = list(grid.contrast.of + (grid.contrast.against or ())) if grid.contrast else []
    shown = shown or list(dict.fromkeys(arm.arm for arm in arms))
    words.append(_widest(arms, shown))
    return tuple(words)


ANSWERS: dict[Answer, str] = {
    "supported": "these runs support the claim",
    "contradicted": "these runs contradict the claim",
    "open": "these runs leave the question open",
}


# What changes, what the difference of two changes is called, and how its numbers read.
MEASURES: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "log_lr50": (
        "the rate at which half of the runs fail",
        "the ratio of the two is",
        lambda value: f"{math.exp(value):.2g}",
    ),
    "failure": (
        "the share of failed runs changes",
        "the difference of the two is",
        lambda value: f"{100 * value:+.0f} points",
    ),
    "loss": (
        "the mean loss changes",
        "the difference of the two is",
        lambda value: f"{value:+.3f} nats",
    ),
}


def _contrast_words(result: ContrastResult, contrast: Contrast) -> str:
    pairs = [contrast.of, *([contrast.against] if contrast.against else [])]
    what, size, number = MEASURES[result.measure]
    moved = [
        f"{_fold(part, reach) if result.measure == 'log_lr50' else f'by {number(part)}'} "
        f"from {b!r} to {a!r}"
        for (a, b), part, reach in zip(pairs, result.parts, result.reach, strict=True)
    ]
    sentence = f"{what} {', and '.join(moved)}"
    if len(pairs) > 1 and not any(result.reach):
        sentence += f"; {size} {number(result.value)}"
    interval = "one seed gives no interval"
    if result.interval is not None:
        interval = f"95% interval {ends_text(result.interval, number)}"
    notes = [*result.bounds]
    if result.dropped:
        notes.append(
            f"{result.dropped} rates or places are left out, where an arm or seed is missing"
        )
    noted = f" ({'; '.join(notes)})" if notes else ""
    text = f"{sentence} ({interval}): {ANSWERS[result.answer]}, as {result.why}{noted}."
    return text[0].upper() + text[1:]


def ends_text(interval: Interval, form: Callable[[float], str]) -> str:
    """`0.2 to 5`; an end that lies beyond the rates tried is said to be open."""
    low, high = interval.low, interval.high
    if math.isinf(low) and math.isinf(high):
        return "open at both ends"
    if math.isinf(high):
        return f"{form(low)} or more"
    if math.isinf(low):
        return f"{form(high)} or less"
    return f"{form(low)} to {form(high)}"


def rates_text(interval: Interval) -> str:
    """`ends_text` of an interval of rates, whose lower open end is 0."""
    low = -math.inf if interval.low == 0 else interval.low
    return ends_text(Interval(low, interval.high), lambda rate: f"{rate:.2g}")


def _fold(part: float, reach: str) -> str:
    """A change of a logarithm in words."""
    if reach == "unknown":
        return "moves by an unknown factor"
    if reach:
        return f"becomes {reach} {math.exp(part):.2g} times as high"
    if abs(part) < 0.005:
        return "does not change"
    return f"{'rises' if part > 0 else 'falls'} {math.exp(abs(part)):.2g}-fold"


def _widest(arms: Sequence[ArmSummary], names: Sequence[str]) -> str:
    """What failed and what did not, at the rate and place where the first two arms differ most."""
    cells: dict[tuple[float, str], dict[str, AtRate]] = {}
    for arm in arms:
        for at in arm.by_rate:
            if arm.arm in names:
                cells.setdefault((at.rate, arm.place), {})[arm.arm] = at
    if not cells:
        return "None of the contrast's arms has a result."
    if not any(at.failures for by_arm in cells.values() for at in by_arm.values()):
        fewest = min((at for each in cells.values() for at in each.values()), key=lambda at: at.n)
        return f"No run failed: {failures_text(0, fewest.n, fewest.interval)} at each rate."

    def spread(by_arm: dict[str, AtRate], of: Sequence[str]) -> float:
        shares = [by_arm[name].failures / by_arm[name].n for name in of if name in by_arm]
        return max(shares, default=0.0) - min(shares, default=0.0)

    def telling(key: tuple[float, str]) -> tuple[float, float, int]:
        found = cells[key]
        return (
            spread(found, names[:2]),
            spread(found, names),
            sum(a.failures for a in found.values()),
        )

    rate, place = max(cells, key=telling)
    if telling((rate, place))[1] == 0:
        return "At every rate tried the arms failed alike: the runs do not tell them apart."
    parts = [
        f"{name}: {failures_text(at.failures, at.n, at.interval)}"
        for name, at in cells[rate, place].items()
    ]
    where = f" ({place})" if place else ""
    return (
        f"At rate {rate:g}{where}, picked after the runs because the arms differ most there, "
        f"{'; '.join(parts)}."
    )

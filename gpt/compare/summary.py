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
    threshold_interval,
    wilson,
)
from gpt.schedule import rate as share_of_rate

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
        value, interval: log_lr50 in natural logarithms; failure as a share; loss in nats per token.
        answer: whether the interval is all above 0, all below, or neither.
    """

    question: str
    measure: str
    parts: tuple[float, ...]
    bounds: tuple[str, ...]
    value: float
    interval: Interval | None
    answer: Answer
    seeds: int


@dataclass(frozen=True)
class PairAtRate:
    """Paired failures of two arms at one rate."""

    rate: float
    place: str
    failures: McNemar
    holm_p: float


@dataclass(frozen=True)
class PairResult:
    """Two arms, paired by seed: mean loss over their common rates, and failures at each."""

    a: str
    b: str
    loss: PairedDifference
    holm_p: float
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
    curves = [_sensitivity(some) for some in seeds.values()]
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
            share_of_rate(config.schedule, step, config.training.steps)
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


def _contrast(contrast: Contrast, outcomes: Sequence[Outcome]) -> ContrastResult | None:
    """The primary contrast: a mean over the places, by the seeds, that all of its arms have."""
    names = [*contrast.of, *(contrast.against or ())]
    arms = [[o for o in outcomes if o.cell.arm == name] for name in names]
    places = _common([place_text(o.cell.place) for o in arm] for arm in arms)
    seeds = _common([o.seed for o in arm] for arm in arms)
    if not places or not seeds:
        return None
    cells = [
        [
            [
                [o for o in arm if o.seed == seed and place_text(o.cell.place) == place]
                for seed in seeds
            ]
            for place in places
        ]
        for arm in arms
    ]
    weights = [sign / len(places) for sign in (1, -1, -1, 1)]
    bounds: list[str] = []
    directions: set[str] = set()  # in which the true value may lie beyond the one found
    if contrast.measure == "log_lr50":
        values = []
        for name, sign, by_place in zip(names, (1, -1, -1, 1), cells, strict=False):
            found = [_threshold(itertools.chain(*by_seed)) for by_seed in by_place]
            values.append(float(np.mean([math.log(threshold.rate) for threshold in found])))
            for place, threshold in zip(places, found, strict=True):
                if threshold.bound:
                    bounds.append(_bound(name, place, threshold))
                    directions |= _directions(threshold, sign)
        flat = [
            ([[(o.rate, _failed(o)) for o in some] for some in by_seed], weight)
            for by_place, weight in zip(cells, weights, strict=False)
            for by_seed in by_place
        ]
        interval = threshold_interval([runs for runs, _ in flat], [weight for _, weight in flat])
    else:
        measure = _failed if contrast.measure == "failure" else (lambda o: o.loss)
        by_arm = [
            [
                float(np.mean([measure(o) for by_seed in by_place for o in by_seed[index]]))
                for index in range(len(seeds))
            ]
            for by_place in cells
        ]
        values = [float(np.mean(by_seed)) for by_seed in by_arm]
        differences = [
            sum(sign * value for sign, value in zip((1, -1, -1, 1), each, strict=False))
            for each in zip(*by_arm, strict=True)
        ]
        interval = mean_interval(differences)
    parts = tuple(values[i] - values[i + 1] for i in range(0, len(values), 2))
    return ContrastResult(
        question=contrast.question,
        measure=contrast.measure,
        parts=parts,
        bounds=tuple(bounds),
        value=parts[0] - (parts[1] if len(parts) > 1 else 0.0),
        interval=interval,
        answer=_answer(interval, directions),
        seeds=len(seeds),
    )


def _of(outcomes: Sequence[Outcome], place: str, seed: int) -> list[Outcome]:
    return [o for o in outcomes if o.seed == seed and place_text(o.cell.place) == place]


def _common(lists: Iterable[Iterable[Any]]) -> list[Any]:
    """What all lists hold, in the order of the first."""
    first, *others = map(list, lists)
    return [item for item in dict.fromkeys(first) if all(item in other for other in others)]


def _threshold(outcomes: Iterable[Outcome]) -> Threshold:
    runs = [(o.rate, _failed(o)) for o in outcomes]
    return lr50(*zip(*runs, strict=True))


def _bound(name: str, place: str, threshold: Threshold) -> str:
    words = {
        "above": f"its threshold lies above {threshold.rate:g}, the highest rate tried",
        "below": f"its threshold lies below {threshold.rate:g}, the lowest rate tried",
        "unclear": "its failures do not rise with the rate: it has no one threshold",
    }
    return f"{name}{f' ({place})' if place else ''}: {words[threshold.bound]}"


def _directions(threshold: Threshold, sign: int) -> set[str]:
    """Where a threshold that is only bounded lets the contrast lie."""
    if threshold.bound == "unclear":
        return {"higher", "lower"}
    return {"higher" if (threshold.bound == "above") == (sign > 0) else "lower"}


def _answer(interval: Interval | None, directions: set[str]) -> Answer:
    """Supported or contradicted only if neither the interval nor a bound reaches across 0."""
    if interval is not None and interval.low > 0 and "lower" not in directions:
        return "supported"
    if interval is not None and interval.high < 0 and "higher" not in directions:
        return "contradicted"
    return "open"


def _pairs(pairs: Sequence[tuple[str, str]], outcomes: Sequence[Outcome]) -> tuple[PairResult, ...]:
    """All pairs, with one correction by Holm over all of their tests."""
    found = []
    for a, b in pairs:
        losses, tests = _pair(a, b, outcomes)
        if losses is not None:
            found.append((a, b, losses, tests))
    ps = [p for _, _, losses, tests in found for p in (losses.p, *(test.p for *_, test in tests))]
    adjusted = iter(holm(ps))
    return tuple(
        PairResult(
            a,
            b,
            losses,
            next(adjusted),
            tuple(PairAtRate(rate, place, test, next(adjusted)) for rate, place, test in tests),
        )
        for a, b, losses, tests in found
    )


def _pair(
    a: str, b: str, outcomes: Sequence[Outcome]
) -> tuple[PairedDifference | None, list[tuple[float, str, McNemar]]]:
    """Differences a - b of the mean loss over common rates and places, and failures at each."""
    cells = {
        name: {
            (o.seed, place_text(o.cell.place), o.rate): o for o in outcomes if o.cell.arm == name
        }
        for name in (a, b)
    }
    places = _common([(place, rate) for _, place, rate in cells[name]] for name in (a, b))
    seeds = [
        seed
        for seed in _common([seed for seed, _, _ in cells[name]] for name in (a, b))
        if all((seed, *place) in cells[name] for place in places for name in (a, b))
    ]
    if not places or not seeds:
        return None, []
    losses = {
        name: [float(np.mean([cells[name][seed, *p].loss for p in places])) for seed in seeds]
        for name in (a, b)
    }
    tests = []
    for place, rate in places:
        failed = {
            name: [_failed(cells[name][seed, place, rate]) for seed in seeds] for name in (a, b)
        }
        tests.append((rate, place, mcnemar(failed[a], failed[b])))
    return paired_difference(losses[a], losses[b]), tests


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
        words.append("The primary contrast could not be computed: an arm of it has no result.")
    shown = list(grid.contrast.of + (grid.contrast.against or ())) if grid.contrast else []
    shown = shown or list(dict.fromkeys(arm.arm for arm in arms))
    words.append(_widest(arms, shown))
    return tuple(words)


ANSWERS: dict[Answer, str] = {
    "supported": "these runs support the claim",
    "contradicted": "these runs contradict the claim",
    "open": "these runs leave the question open",
}


def _contrast_words(result: ContrastResult, contrast: Contrast) -> str:
    pairs = [contrast.of, *([contrast.against] if contrast.against else [])]
    if result.measure == "log_lr50":
        what, form, read = "the rate at which half of the runs fail", _fold, math.exp
        size = f"the ratio of the two is {math.exp(result.value):.2g}"
        plain = "{:.2g}"
    else:
        what = "the share of failed runs" if result.measure == "failure" else "the mean loss"
        plain = "{:+.0%}" if result.measure == "failure" else "{:+.3f} nats"
        form, read = (lambda part: f"changes by {plain.format(part)}"), float
        size = f"the difference of the two is {plain.format(result.value)}"
    moved = [
        f"{form(part)} from {b!r} to {a!r}"
        for (a, b), part in zip(pairs, result.parts, strict=True)
    ]
    sentence = f"{what} {', and '.join(moved)}{f'; {size}' if len(pairs) > 1 else ''}"
    if result.interval is None:
        interval = "one seed gives no interval"
    else:
        ends = (plain.format(read(x)) for x in (result.interval.low, result.interval.high))
        interval = f"95% interval {' to '.join(ends)}"
    bounds = f" ({'; '.join(result.bounds)})" if result.bounds else ""
    text = f"{sentence} ({interval}): {ANSWERS[result.answer]}{bounds}."
    return text[0].upper() + text[1:]


def _fold(part: float) -> str:
    """A change of a logarithm in words."""
    return f"{'rises' if part >= 0 else 'falls'} {math.exp(abs(part)):.2g}-fold"


def _widest(arms: Sequence[ArmSummary], names: Sequence[str]) -> str:
    """What failed and what did not, at the rate and place where the first two arms differ most."""
    cells: dict[tuple[float, str], dict[str, AtRate]] = {}
    for arm in arms:
        for at in arm.by_rate:
            if arm.arm in names:
                cells.setdefault((at.rate, arm.place), {})[arm.arm] = at
    if not any(at.failures for by_arm in cells.values() for at in by_arm.values()):
        most = max((at for by_arm in cells.values() for at in by_arm.values()), key=lambda at: at.n)
        return f"No run failed: {failures_text(0, most.n, most.interval)} at each rate."

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
    parts = [
        f"{name}: {failures_text(at.failures, at.n, at.interval)}"
        for name, at in cells[rate, place].items()
    ]
    return f"At rate {rate:g}{f' ({place})' if place else ''}, {'; '.join(parts)}."

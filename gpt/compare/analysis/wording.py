"""Results in words: the conclusions, and the sentences of the report and of the console.

No sentence claims more than its interval: no failure in 3 seeds reads "at most 56%", and a claim is
supported only where the whole interval lies on its side of the margin. The numbers come from
summary.py; this module computes only the limits that follow from the number of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import geometric_mean
from typing import Literal, NamedTuple

from gpt.compare.analysis.results import (
    Answer,
    ArmSummary,
    AtRate,
    ContrastResult,
    Decision,
    PairResult,
    SearchResult,
    Summary,
    Unmeasured,
)
from gpt.compare.analysis.statistics import MIN_SEEDS, Interval, Threshold, least_p, wilson
from gpt.compare.grid import Contrast, Grid, Measure, Search, as_text
from gpt.metrics import LEARNED_MARGIN

UNIGRAM_ENTROPY = "H₁, the unigram entropy: the loss of guessing by token frequency"

LOSSES = (
    "Losses are in nats per token. A failed run counts with its own loss, but at most ln V, that "
    "of a uniform guess; a diverged run counts with ln V."
)
ARM_COLUMNS = (
    "The sensitivity is the mean loss over the rates minus the arm's own best, so it is low for an "
    "arm that is bad at every rate; the regret is the mean loss minus the best of all arms. The "
    "early rise is the largest rise of the smoothed training loss above its lowest value so far, "
    "in the first quarter of the updates, on average over runs."
)

ANSWERS: dict[Answer, tuple[str, str]] = {
    "supported": ("YES", "these runs support the claim"),
    "contradicted": ("NO", "these runs contradict the claim"),
    "open": ("NOT SETTLED", "these runs leave the question open"),
}

NOTHING_LEARNED = "the runs are too short, or their learning rates are wrong"

EXPLORATORY = "An earlier question has no confirmatory YES, so this answer is exploratory."

Reason = Literal[
    "nothing learned",
    "too few for an interval",
    "undecided",
    "too few seeds",
    "supported",
    "contradicted",
]


class Words(NamedTuple):
    """How a contrast's measure is put into words: what it is, and its numbers with their unit.

    Attributes:
        log: whether a difference is of logarithms, and read as a factor.
    """

    subject: str
    form: Callable[[float], str]
    unit: str = ""
    log: bool = False

    def number(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.form(value)}{self.unit}"

    def interval(self, interval: Interval) -> str:
        """An interval with its unit."""
        return f"{interval_text(interval, self.form)}{self.unit}"

    def edge(self, value: float) -> str:
        """A margin with its unit; no margin is 0, or 1 for a ratio."""
        return self.number(value).lstrip("+") if value or self.log else "0"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:+.0f}"


def _factor(value: float) -> str:
    return f"{math.exp(value):.2g}"


MEASURES: dict[Measure, Words] = {
    "loss": Words("the mean loss", _signed, " nats"),
    "sensitivity": Words("the sensitivity to the learning rate", _signed, " nats"),
    "failure": Words("the fraction of failed runs", _percent, " percentage points"),
    "log_lr50": Words("the rate at which half of the runs fail", _factor, log=True),
    "log_threshold": Words("the highest trainable rate", _factor, log=True),
    "column": Words("the mean of {column}", lambda value: f"{value:+.3g}"),
    "log_column": Words("the geometric mean of {column}", _factor, log=True),
}


def words_for(contrast: Contrast) -> Words:
    """The words for a contrast's measure, or for its slope."""
    words = MEASURES[contrast.measure]
    subject = words.subject.format(column=contrast.column)
    if not contrast.slope:
        return words._replace(subject=subject)
    axis = contrast.slope.rpartition(".")[2]
    if words.log:  # the slope of one logarithm over another
        return Words(f"the exponent of {subject} as a power of {axis}", _signed)
    return words._replace(subject=f"the slope of {subject} over the log of {axis}")


# ---------------------------------------------------------------------------------------------
# Numbers


def failures_text(at: AtRate) -> str:
    """`no failure in 3 seeds (at most 56%)`, bounded by the interval; how many were slow."""
    failures, n, interval = at.failures, at.n, at.interval
    slow = f", {at.slow} of which {'was' if at.slow == 1 else 'were'} still falling"
    seeds = f"{n} seed{'s' if n != 1 else ''}"
    if failures == 0:
        return f"no failure in {seeds} (at most {interval.high:.0%})"
    if failures == n:
        words = f"failure in {'all ' if n > 1 else ''}{seeds} (at least {interval.low:.0%})"
    else:
        words = (
            f"{failures} failure{'s' if failures > 1 else ''} in {seeds} "
            f"({interval.low:.0%} to {interval.high:.0%})"
        )
    return words + (slow if at.slow else "")


def failed_text(arm: ArmSummary) -> str:
    """`5 of 16`, or `5 of 16, 2 of which were still falling`."""
    slow = f", {arm.slow} of which {'was' if arm.slow == 1 else 'were'} still falling"
    return f"{arm.failures} of {arm.runs}" + (slow if arm.slow else "")


def margins_text(summary: Summary) -> str:
    """How many runs would have failed by another margin below H₁ than LEARNED_MARGIN."""
    margins = [f"{margin:g}" for margin in summary.arms[0].failures_at]
    listed = f"{', '.join(margins[:-1])} and {margins[-1]} nats below H₁"
    changed = [arm for arm in summary.arms if len(set(arm.failures_at.values())) > 1]
    if not changed:
        return (
            f"The margin below H₁ that counts as having learned, {LEARNED_MARGIN:g} nats, does not "
            f"matter here: at margins of {listed}, the same number of each arm's runs fail."
        )
    counts = "; ".join(
        f"{arm.label!r}: {', '.join(map(str, arm.failures_at.values()))}" for arm in changed
    )
    others = len(changed) < len(summary.arms)
    rest = " In all other arms, the number is the same at each margin." if others else ""
    return f"Failed runs if the margin is {listed}: {counts}.{rest}"


def interval_text(interval: Interval, form: Callable[[float], str]) -> str:
    """`0.2 to 5`; an end beyond the rates tried is open: `0.2 or more`."""
    low, high = interval.low, interval.high
    if math.isinf(low) and math.isinf(high):
        return "unbounded"
    if math.isinf(high):
        return f"{form(low)} or more"
    if math.isinf(low):
        return f"{form(high)} or less"
    return f"{form(low)} to {form(high)}"


def rates_text(interval: Interval) -> str:
    """`interval_text` of learning rates, whose open lower end is 0."""
    low = -math.inf if interval.low == 0 else interval.low
    return interval_text(Interval(low, interval.high), lambda rate: f"{rate:.2g}")


def threshold_text(threshold: Threshold) -> str:
    """`0.05`, `above 0.1`, `below 0.001` or `unclear`, and why if rates are unequal."""
    if threshold.unequal:
        return "not estimated, as the seeds differ in their rates"
    rate = f"{threshold.rate:.2g}"
    return {"": rate, "above": f"above {rate}", "below": f"below {rate}", "unclear": "unclear"}[
        threshold.bound
    ]


def lr50_text(arm: ArmSummary) -> str:
    """An arm's LR50 with its interval: `0.05 (0.02 to 0.1)`."""
    interval = "" if arm.lr50_interval is None else f" ({rates_text(arm.lr50_interval)})"
    return threshold_text(arm.lr50) + interval


def p_text(result: ContrastResult) -> str:
    """`8 seeds, p = 0.0078, the smallest possible`; log_lr50 has no test."""
    seeds = f"{result.seeds} seed{'s' if result.seeds != 1 else ''}"
    if result.p is None:
        return seeds
    least = result.least_p
    limit = "the smallest possible" if result.p <= least else f"smallest possible: {least:.2g}"
    return f"{seeds}, p = {result.p:.2g}, {limit}"


def level_text(alpha: float) -> str:
    """`95%`, or `96.9%`: the level of the intervals that go with tests at the level alpha."""
    return f"{100 * (1 - alpha):.3g}%"


def stages_text(first_stage: int, decision: Decision, alpha: float) -> str:
    """Whether a comparison stopped after its first stage, and why."""
    stage = f"the first stage of {first_stage} seeds"
    if decision == "undecided":
        return f"{stage.capitalize()} has not ended."
    why = {
        "answered": f"Stopped after {stage}, which answered the first contrast",
        "open": f"Not stopped after {stage}, which left the first contrast open",
        "a run was lost": f"Not stopped after {stage}, in which a run was lost",
        "the second has results": f"Not stopped after {stage}: later seeds had run before its end",
    }[decision]
    return (
        f"{why}. So an answer needs a p of at most {alpha:.2g}, and has a {level_text(alpha)} "
        "interval."
    )


def reason(reason: Reason, contrast: Contrast, seeds: int, p: float | None, alpha: float) -> str:
    """Why a contrast has its answer; `p` None: it has no test."""
    words = words_for(contrast)
    edge, minus = words.edge(contrast.margin), words.edge(-contrast.margin)
    within = contrast.claim == "within"
    side, other = ("below", "above") if contrast.claim == "below" else ("above", "below")
    several = f"{seeds} seeds" if seeds != 1 else "one seed"
    return {
        "nothing learned": (
            f"{NOTHING_LEARNED}: none of those compared ended clearly below H₁, the loss of "
            "guessing by token frequency"
        ),
        "too few for an interval": (
            f"an interval needs at least {MIN_SEEDS} seeds, and these arms share {several}"
        ),
        "undecided": f"the interval contains {f'{minus} or {edge}' if within else edge}",
        "too few seeds": (
            f"the interval would decide it, but {several} are too few to settle it"
            + ("" if p is None else f" (p = {p:.2g}, above {alpha:.2g})")
        ),
        "supported": "the whole interval is "
        + (f"between {minus} and {edge}" if within else f"{side} {edge}"),
        "contradicted": "the whole interval is "
        + (f"outside {minus} to {edge}" if within else f"{other} {edge}"),
    }[reason]


def answer(result: ContrastResult | None) -> str:
    """YES, NO or NOT SETTLED, and whether it is only exploratory."""
    found = ANSWERS["open" if result is None else result.answer][0]
    return found if result is None or result.confirmatory else f"{found} (exploratory)"


def difference(contrast: Contrast) -> str:
    """`(a − b) − (c − d) at learning rate 0.003`: what a contrast compares, and where."""
    (a, b), against = contrast.of, contrast.against
    text = f"{a} − {b}" if against is None else f"({a} − {b}) − ({against[0]} − {against[1]})"
    points = where(contrast)
    return f"{text} at {points}" if points else text


def where(contrast: Contrast) -> str:
    """`learning rate 0.003 and 0.004`: where a contrast compares; empty if at all values."""
    found = [
        f"{key.rpartition('.')[2].replace('_', ' ')} {' and '.join(map(as_text, values))}"
        for key, values in contrast.at.items()
    ]
    found += [f"rate {rate:g} of {arm!r}" for arm, rate in contrast.rates.items()]
    return ", ".join(found)


def measure_text(contrast: Contrast) -> str:
    """`loss`, `column spikes` or `log_lr50, slope over layers`."""
    text = " ".join(filter(None, (contrast.measure, contrast.column)))
    return f"{text}, slope over {contrast.slope.rpartition('.')[2]}" if contrast.slope else text


def claim_text(contrast: Contrast) -> str:
    """`above 0`, or `below 0.050 nats`: where the claim says that the contrast lies."""
    words = words_for(contrast)
    edge = words.edge(contrast.margin)
    if contrast.claim == "within":
        return f"between {words.edge(-contrast.margin)} and {edge}"
    return f"{contrast.claim} {edge}"


def bound_text(arm: str, setting: str, threshold: Threshold) -> str:
    """Why a threshold is only bounded."""
    words = {
        "above": f"its threshold is above {threshold.rate:g}, the highest rate tried",
        "below": f"its threshold is below {threshold.rate:g}, the lowest rate tried",
        "unclear": "its failures do not rise steadily with the rate: it has no single threshold",
    }
    return f"{arm}{f' ({setting})' if setting else ''}: {words[threshold.bound]}"


def search_text(search: SearchResult) -> str:
    """`0.003354 (0.003 to 0.00375)`, `above 0.00375`, `unclear`, and `*` if it is not monotone."""
    ends = f"{_rate(search.low)} to {_rate(search.high)}"
    text = {
        "": f"{_rate(search.rate)} ({ends})",
        "above": f"above {_rate(search.low)}",
        "below": f"below {_rate(search.high)}",
        "unclear": "unclear",
    }[search.bound]
    return f"{text} *" if search.monotone is False else text


def thresholds_text(searches: Sequence[SearchResult], *, brief: bool = False) -> str:
    """`0.00292 (0.00268 to 0.00335)`: geometric mean and range of clear thresholds or bounds.

    Args:
        brief: whether to leave out the range.
    """
    rates = [each.rate for each in searches if each.is_clear and each.rate is not None]
    if not rates:
        return "unclear"
    mean = f"{geometric_mean(rates):.3g}"
    return mean if brief else f"{mean} ({min(rates):.3g} to {max(rates):.3g})"


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.4g}"


NOTHING_IN_COMMON = "its arms have no runs in common, with the same seed, rate and setting"


def one_value_text(axis: str) -> str:
    """Why there is no slope."""
    return f"its arms have runs in common at only one value of {axis}"


def no_value_text(cell: str, column: str, value: float | None) -> str:
    """Why a contrast of a column cannot be computed: a run has no value, or no logarithm of it."""
    what = "has no value" if value is None else f"has the value {value:g}, which has no logarithm,"
    return f"{cell} {what} in column {column}"


def search_notes(searches: Sequence[SearchResult]) -> tuple[str, ...]:
    """Which searches found only a bound, and in how many a run above the threshold trained."""
    notes = []
    for each in searches:
        if each.bound or not each.ended:
            why = each.ended or "it has not ended"
            if each.bound == "below" and each.ended:
                why = "no run trained below the lowest rate that failed"
            notes.append(f"{each.label}, seed {each.seed}: {search_text(each)}, because {why}")
    checked = [each for each in searches if each.monotone is not None]
    odd = sum(not each.monotone for each in checked)
    if odd:
        notes.append(f"in {odd} of {len(checked)} searches a run trained above the threshold")
    return tuple(notes)


# ---------------------------------------------------------------------------------------------
# The conclusions


class Failures(NamedTuple):
    """Failures of the contrasts' arms, or of all arms, where they differ most.

    Attributes:
        rate, setting: where the first two arms differ most; in a tie, all arms.
        differ: whether the arms differ anywhere in their fraction of failed runs.
        registered: whether all contrasts register rates.
        only: whether there was no other rate and setting to choose.
        fewest: the arm and rate with the fewest runs.
    """

    rate: float
    setting: str
    by_arm: dict[str, AtRate]
    differ: bool
    registered: bool
    only: bool
    fewest: AtRate


def conclusions(
    results: Sequence[ContrastResult | Unmeasured],
    contrasts: Sequence[Contrast],
    failures: Failures | None,
    searches: Sequence[SearchResult] = (),
) -> tuple[str, ...]:
    """The answer to each registered contrast, and where arms differ most or what searches found."""
    answers = [
        f"{ANSWERS['open'][0]}: this contrast cannot be computed: {result.why}."
        if isinstance(result, Unmeasured)
        else _contrast_sentence(result, contrast)
        for result, contrast in zip(results, contrasts, strict=True)
    ]
    return *answers, _searches_sentence(searches) if searches else _failures_sentence(failures)


def _contrast_sentence(result: ContrastResult, contrast: Contrast) -> str:
    sentences = (f"{ANSWERS[result.answer][0]}: {finding(result, contrast)}", because(result))
    return " ".join(filter(None, (*sentences, result.outlook)))


def finding(result: ContrastResult, contrast: Contrast) -> str:
    """The changes that a contrast compares, their difference, its interval, p and n: a sentence."""
    if not result.learned:
        return f"{result.why}."
    pairs = contrast.arm_pairs
    words = words_for(contrast)
    changes = [
        f"{_fold(part, reach) if words.log else _change(words.number(part), reach)} "
        f"from {b!r} to {a!r}"
        for (a, b), part, reach in zip(pairs, result.parts, result.reach, strict=True)
    ]
    verb = "" if words.log else "changes "
    sentence = f"{words.subject} {verb}{', and '.join(changes)}"
    if len(pairs) > 1 and not any(result.reach):
        combined = "the ratio of the two" if words.log else "the difference of the two"
        sentence += f"; {combined} is {words.number(result.value)}"
    interval = "no interval"
    if result.interval is not None:
        interval = f"{level_text(result.alpha)} interval {words.interval(result.interval)}"
    return f"{sentence} ({interval}; {p_text(result)})."


def because(result: ContrastResult) -> str:
    """Why a contrast has its answer, what limits it, and whether it is exploratory."""
    notes = [*result.bounds]
    if result.dropped or result.dropped_seeds:
        notes.append(dropped_text(result))
    noted = f" ({'; '.join(notes)})" if notes else ""
    meaning = f"{ANSWERS[result.answer][1].capitalize()}, because {result.why}{noted}."
    exploratory = "" if result.confirmatory else EXPLORATORY
    if result.late:
        exploratory = f"This answer is exploratory: {result.late}."
    return " ".join(filter(None, (meaning if result.learned else "", exploratory)))


def lost_text(contrast: Contrast, count: int, low: float, high: float) -> str:
    """`2 runs without a result count at their best and at their worst: +0.1 to +0.3 nats`."""
    one = count == 1
    counted = f"counts at {'its best and at its' if one else 'their best and at their'} worst"
    counted = counted if one else counted.replace("counts", "count", 1)
    values = words_for(contrast).interval(Interval(low, high))
    return f"{count} run{'' if one else 's'} without a result {counted}: {values}"


def dropped_text(result: ContrastResult | PairResult) -> str:
    """`1 combination of setting and rate and 2 seeds are left out, because runs are missing`."""
    counted = [
        f"{count} {what}{'' if count == 1 else 's'}{rest}"
        for count, what, rest in (
            (result.dropped, "combination", " of setting and rate"),
            (result.dropped_seeds, "seed", ""),
        )
        if count
    ]
    one = result.dropped + result.dropped_seeds == 1
    return f"{' and '.join(counted)} {'is' if one else 'are'} left out, because runs are missing"


def _change(number: str, reach: str) -> str:
    """A difference in words, after the verb."""
    if reach == "unknown":
        return "by an unknown amount"
    return f"by {reach} {number}" if reach else f"by {number}"


def _fold(part: float, reach: str) -> str:
    """The change of a logarithm as a factor."""
    if reach == "unknown":
        return "changes by an unknown factor"
    if reach:
        return f"becomes {reach} {math.exp(part):.2g} times as high"
    if abs(part) < 0.005:
        return "does not change"
    return f"{'rises' if part > 0 else 'falls'} {math.exp(abs(part)):.2g}-fold"


def _searches_sentence(searches: Sequence[SearchResult]) -> str:
    by_arm: dict[str, list[SearchResult]] = {}
    for each in searches:
        if each.is_clear:
            by_arm.setdefault(each.label, []).append(each)
    if not by_arm:
        return "No search found a threshold: no run trained, and none failed."
    found = [f"{where!r}: {thresholds_text(some)}" for where, some in by_arm.items()]
    unclear = len(searches) - sum(map(len, by_arm.values()))
    bounded = sum(each.bound in ("above", "below") for each in searches)
    notes = f"; {bounded} of {len(searches)} are only bounds" if bounded else ""
    notes += f"; {unclear} of {len(searches)} are unclear and left out" if unclear else ""
    means = "; ".join(found)
    return f"Highest trainable rates, geometric means and ranges over seeds{notes}: {means}."


def _failures_sentence(found: Failures | None) -> str:
    if found is None:
        return "No two arms ran at the same rate, so their failures cannot be compared."
    if not any(at.failures for at in found.by_arm.values()):
        fewest = found.fewest
        return f"No run failed: {failures_text(fewest)} at each rate."
    if not found.differ:
        return (
            f"At every rate {'registered' if found.registered else 'tried'}, the same fraction of "
            "each arm's runs failed: their failures do not tell the arms apart."
        )
    counts = [f"{name!r}: {failures_text(at)}" for name, at in found.by_arm.items()]
    where = f" ({found.setting})" if found.setting else ""
    if found.only:
        chosen = f", the only rate {'registered' if found.registered else 'tried'}"
    elif found.registered:
        chosen = ", where failures differ most among the registered rates"
    else:
        chosen = ", chosen after the runs because failures differ most there"
    return f"At rate {found.rate:g}{where}{chosen}, {'; '.join(counts)}."


# ---------------------------------------------------------------------------------------------
# Limits


def limits(grid: Grid, summary: Summary) -> list[str]:
    """What these runs cannot show."""
    seeds = max(arm.seeds for arm in summary.arms)
    found = [
        f"With no failure in {seeds} seed{'s' if seeds > 1 else ''}, the failure rate can be up to "
        f"{wilson(0, seeds).high:.0%}; the smallest p-value that a paired test of this many seeds "
        f"can give is {least_p(seeds):.2g}."
        + (f" Intervals of means need {MIN_SEEDS} or more seeds." if seeds < MIN_SEEDS else ""),
        "Short runs measure the onset of instability, not the quality of a finished model. A run "
        "that is merely slow, because of its learning rate or its optimizer, also counts as "
        "plateaued; where its training loss was clearly still falling, it is called slow.",
        *(_search_limits(grid.search, summary) if grid.search else _axis_limits(summary)),
        "Results on this corpus, at this size and in this precision may not carry over to others.",
    ]
    for setting in dict.fromkeys(arm.setting for arm in summary.arms):
        sums = [arm.summed_rate for arm in summary.arms if arm.setting == setting]
        if max(sums) > 1.001 * min(sums):
            found.append(
                "The schedules also differ in their summed learning rate: over all updates it is "
                f"{min(sums):,.0f} to {max(sums):,.0f} times the full rate. Warm-up lowers it."
            )
            break
    if any(arm.clipped is not None for arm in summary.arms):
        found.append(
            "Some arms clip their gradients, which hides instability; see clipped in cells.csv."
        )
    return found


def _axis_limits(summary: Summary) -> list[str]:
    edge = "; ".join(arm.label for arm in summary.arms if arm.best_at_edge)
    beyond = "is the lowest or highest tried, so a better one may lie beyond"
    return [
        "Sensitivities and thresholds depend on the rates tried; another grid gives other values.",
        "An arm's best rate is chosen on the same seeds, so its best loss is optimistic.",
        *([f"In some seed of these arms, the best rate {beyond}: {edge}."] if edge else []),
    ]


def _search_limits(search: Search, summary: Summary) -> list[str]:
    checked = [each.monotone for each in summary.searches if each.monotone is not None]
    return [
        "A search assumes that runs train at all rates below its threshold and at none above. One "
        f"run above each threshold checks this: {checked.count(False)} of {len(checked)} trained.",
        f"A threshold is known to within a factor of {search.ratio:g}, the ratio of its lattice. "
        "Failed fractions and losses are those of the rates that the searches chose, which differ "
        "between arms and seeds.",
    ]

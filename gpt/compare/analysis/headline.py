"""The first screen of a report: the first question's answer, its outcomes, and what it holds for.

The numbers are those of summary.py, the sentence is wording.py's; this module chooses and arranges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gpt.compare.analysis import wording
from gpt.compare.analysis.matching import Match
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import ContrastResult, SearchResult, Summary
from gpt.compare.analysis.statistics import wilson
from gpt.compare.grid import Contrast, Grid, as_text
from gpt.config import Config, DataConfig

MOST_RATES = 8  # that are listed


@dataclass(frozen=True)
class Answer:
    """A question and its answer in a few words.

    Attributes:
        badge: YES, NO or NOT SETTLED, and whether it is exploratory; empty without a question.
        answer: "supported", "contradicted" or "open".
        finding: the numbers, in one sentence.
        because: why they have this answer, and what would settle an open one.
    """

    question: str
    badge: str
    answer: str
    finding: str
    because: str


@dataclass(frozen=True)
class Table:
    """Outcomes: a row for each level of the first factor, or for each arm.

    Attributes:
        corner: what the rows are.
        rows: the name of each row, and its texts.
    """

    caption: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Headline:
    """What the first screen says.

    Attributes:
        answers: one for each contrast; without contrasts, one about failures.
        matching: whether the arms were matched, in a few words.
    """

    answers: tuple[Answer, ...]
    table: Table
    holds_for: str
    not_shown: str
    matching: str


def headline(grid: Grid, summary: Summary, outcomes: Sequence[Outcome]) -> Headline:
    """The first screen of a comparison; at least one cell has a result."""
    contrast = grid.contrasts[0] if grid.contrasts else None
    ended = [outcome for outcome in outcomes if outcome.verdict is not None]
    shown = [o for o in ended if contrast is None or contrast.includes(o.cell)] or ended
    answers = [
        _answer(each, result, sentence)
        for each, result, sentence in zip(
            grid.contrasts, summary.contrasts, summary.conclusions, strict=False
        )
    ]
    return Headline(
        answers=tuple(answers) or (_without_question(summary),),
        table=_thresholds(grid, summary) if grid.search else _table(grid, contrast, ended),
        holds_for=holds_for(shown),
        not_shown=_not_shown(len({o.seed for o in shown})),
        matching=matching_text(summary.match),
    )


def _answer(contrast: Contrast, result: ContrastResult | None, sentence: str) -> Answer:
    badge = wording.answer(result)
    if result is None:
        return Answer(contrast.question, badge, "open", sentence.partition(": ")[2], "")
    found = wording.finding(result, contrast)
    why = " ".join(filter(None, (wording.because(result), result.outlook)))
    return Answer(contrast.question, badge, result.answer, found[0].upper() + found[1:], why)


def _without_question(summary: Summary) -> Answer:
    """About failures: the last of the conclusions."""
    statuses = {status for arm in summary.arms for at in arm.by_rate for status in at.statuses}
    found = summary.conclusions[-1]
    if statuses == {"plateaued"}:
        found = f"{wording.NOTHING_LEARNED.capitalize()}: none ended clearly below H₁."
    return Answer("No question was registered", "", "open", found, "")


# ---------------------------------------------------------------------------------------------
# Outcomes


def mean_sd(losses: Sequence[float]) -> str:
    """`2.345 ± 0.012`: mean and sample standard deviation; of one run its loss alone."""
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{fmean(losses):.3f}{spread}"


def mean_table(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Mean and standard deviation of the final loss: arm, rate, `mean_sd`, failed of n."""
    return [
        (arm.label, f"{at.rate:g}", mean_sd(at.losses), f"{at.failures}/{at.n}")
        for arm in summary.arms
        for at in arm.by_rate
    ]


def _table(grid: Grid, contrast: Contrast | None, outcomes: Sequence[Outcome]) -> Table:
    """A 2 x 2 table of two factors with two levels each, or one with a row for each arm."""
    where = (contrast and wording.where(contrast)) or "all rates and settings"
    if contrast is not None and contrast.rates:
        where = "each arm's own rate"
    runs = {arm.name: _runs_of(arm.name, contrast, outcomes) for arm in grid.all_arms()}
    if [len(levels) for levels in grid.arms.values()] == [2, 2]:
        (corner, rows), (of, columns) = grid.arms.items()
        return Table(
            f"Trained runs and mean final loss by {corner} and {of}, at {where}",
            corner,
            tuple(columns),
            tuple(
                (row, tuple(", ".join(_outcome(runs[f"{row}, {column}"])) for column in columns))
                for row in rows
            ),
        )
    names = contrast.arms if contrast is not None and contrast.rates else list(runs)
    return Table(
        f"Trained runs and mean final loss at {where}",
        "arm",
        ("trained", "mean loss"),
        tuple((name, _outcome(runs[name])) for name in names),
    )


def _thresholds(grid: Grid, summary: Summary) -> Table:
    """The thresholds that searches found: an arm in a row, a setting in a column; or 2 x 2 arms."""
    found: dict[tuple[str, str], list[SearchResult]] = {}
    for each in summary.searches:
        found.setdefault((each.arm, each.setting), []).append(each)
    settings = tuple(dict.fromkeys(setting for _, setting in found))

    brief = len(settings) > 2
    caption = f"Highest trainable rate, geometric mean{'' if brief else ' and range'} over seeds"

    def text(arm: str, setting: str) -> str:
        return wording.thresholds_text(found.get((arm, setting), []), brief=brief)

    if settings == ("",) and [len(levels) for levels in grid.arms.values()] == [2, 2]:
        (corner, rows), (of, columns) = grid.arms.items()
        return Table(
            f"{caption}, by {corner} and {of}",
            corner,
            tuple(columns),
            tuple((row, tuple(text(f"{row}, {column}", "") for column in columns)) for row in rows),
        )
    return Table(
        caption,
        "arm",
        tuple(setting or "highest trainable rate" for setting in settings),
        tuple(
            (arm.name, tuple(text(arm.name, setting) for setting in settings))
            for arm in grid.all_arms()
        ),
    )


def _runs_of(arm: str, contrast: Contrast | None, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """The runs of an arm at the contrast's points; of an arm outside it, at the same values."""
    own = [outcome for outcome in outcomes if outcome.cell.arm == arm]
    if contrast is None:
        return own
    if arm in contrast.arms:
        return [outcome for outcome in own if contrast.includes(outcome.cell)]
    if contrast.rates:
        return []
    points = {(o.cell.setting_text, o.rate) for o in outcomes if contrast.includes(o.cell)}
    return [o for o in own if (o.cell.setting_text, o.rate) in points]


def _outcome(runs: Sequence[Outcome]) -> tuple[str, str]:
    """`8 of 8 trained` and the mean loss."""
    if not runs:
        return "no run", "–"
    trained = sum(not run.failed for run in runs)
    return f"{trained} of {len(runs)} trained", f"{fmean(run.loss for run in runs):.3f}"


# ---------------------------------------------------------------------------------------------
# Scope


def holds_for(outcomes: Sequence[Outcome]) -> str:
    """Data, size, weights, steps, optimizer, precision, seeds, rates of the runs, with all values.

    Args:
        outcomes: at least one, each with a result.
    """

    def values(value: Callable[[Config], Any]) -> str:
        found = sorted({value(outcome.cell.config) for outcome in outcomes})
        return ", ".join(map(as_text, found))

    counts = sorted({_parameters(outcome) for outcome in outcomes})
    sizes = [f"{size / 1e6:.2g}" for size in (counts[0], counts[-1])]
    return "; ".join(
        [
            values(lambda config: _corpus(config.data)),
            f"{values(lambda config: config.model.layers)} blocks of width "
            + values(lambda config: config.model.width)
            + f" ({' to '.join(dict.fromkeys(sizes))} M parameters)",
            f"{values(lambda config: config.model.init.regime)} weights",
            f"{values(lambda config: config.training.steps)} steps of "
            + values(lambda config: config.batch_sequences * config.model.context)
            + " tokens",
            values(lambda config: config.optimizer.name),
            values(lambda config: config.training.precision),
            f"seeds {spans([outcome.seed for outcome in outcomes])}",
            _rates([outcome.rate for outcome in outcomes]),
        ]
    )


def _rates(rates: Sequence[float]) -> str:
    """`rates 0.001, 0.003`; of many, only their range."""
    found = [f"{rate:g}" for rate in sorted(set(rates))]
    return "rates " + (
        ", ".join(found) if len(found) <= MOST_RATES else f"{found[0]} to {found[-1]}"
    )


def _parameters(outcome: Outcome) -> int:
    weights = (outcome.environment or {}).get("initial_weights", {})
    return sum(math.prod(weight["shape"]) for weight in weights.values())


def _corpus(data: DataConfig) -> str:
    """`tiny.txt as bytes`: the sources and the tokenizer."""
    names = [
        ", ".join(Path(path).name for path in each.path)
        or each.hub.name
        or {"stdlib": "Python's standard library"}.get(each.source, each.source)
        for each in data.sources
    ]
    return f"{' and '.join(names)} as {data.tokenizer}"


def spans(numbers: Iterable[int]) -> str:
    """`0 to 7, 12`: distinct integers in order, with spans of three or more joined."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(
        f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in found
    )


def _not_shown(seeds: int) -> str:
    """The limits of `wording.limits` that hold for every comparison, in one line."""
    return (
        "the quality of a finished model, since short runs measure the onset of instability; other "
        f"corpora, sizes and precisions; failure rates under {wilson(0, seeds).high:.0%}, which "
        f"{seeds} seed{'s' if seeds > 1 else ''} cannot exclude"
    )


def matching_text(match: Match) -> str:
    """`matched: same inputs, same initial weights, same software`, or what did not match."""
    if match.exceptions:
        more = len(match.exceptions) - 1
        return f"NOT MATCHED: {match.exceptions[0]}" + (f", and {more} more" if more else "")
    if not match.cells:
        return "nothing to match: no two runs share a seed and a setting"
    rescaled = f" ({match.rescaled} of {match.parameters} rescaled)" if match.rescaled else ""
    return f"matched: same inputs, same initial weights{rescaled}, same software"

"""The report of a scaling study, report.md, and what the command prints."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt.compare.analysis.headline import holds_for
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.statistics import Interval
from gpt.compare.comparison import read_commands
from gpt.compare.figures.base import save
from gpt.compare.report import environment_facts
from gpt.compare.report.rendering import render
from gpt.io.files import write_text
from gpt.scaling.figures import count_text, draw
from gpt.scaling.isoflop import LEAST_BUDGETS, Curve
from gpt.scaling.law import DELTA
from gpt.scaling.results import Study

SYMBOLS = {"alpha": "α", "beta": "β"}
MEANINGS = {
    "E": "irreducible loss, nats per token",
    "A": "coefficient of the term of N",
    "B": "coefficient of the term of D",
    "alpha": "exponent of N",
    "beta": "exponent of D",
    "a": "best N grows as C^a",
    "b": "best D grows as C^b",
}
# E is identified if its interval is narrower than this fraction of the lowest loss.
IDENTIFIED = 0.2
DISAGREEMENT = 1.5  # factor between best sizes


def write_report(directory: Path, study: Study, outcomes: Sequence[Outcome]) -> None:
    """Write report.md and figures/ into a study's directory."""
    plots = draw(study)
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    for name, plot in plots.items():
        save(name, plot, folder)
    context = {
        "study": study,
        "conclusions": conclusions(study),
        "limits": limits(study),
        "law": law_rows(study),
        "best": best_rows(study),
        "losses": loss_rows(study),
        "plots": plots,
        "holds_for": holds_for([o for o in outcomes if o.verdict is not None]),
        "rates": rate_rule(outcomes),
        "delta": DELTA,
        "commands": [f"{each.began}  {shlex.join(each.argv)}" for each in read_commands(directory)],
        "environment": environment_facts(outcomes),
    }
    write_text(directory / "report.md", render("report.md", context, "gpt.scaling"))


def format_study(study: Study, directory: Path) -> str:
    """The conclusions, the law, the best size of each budget, and where the report is."""
    lines = conclusions(study)
    for rows in (law_rows(study), best_rows(study)):
        lines += ["", *_table(rows)] if len(rows) > 1 else []
    return "\n".join([*lines, "", f"  report  {directory / 'report.md'}"])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text, all but the first aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]


def conclusions(study: Study) -> list[str]:
    """What the runs show, in sentences."""
    found = []
    if study.fit is not None:
        a, b = study.fit.constants["a"].value, study.fit.constants["b"].value
        interval = study.fit.constants["a"].interval
        half = "includes" if interval.low <= 0.5 <= interval.high else "does not include"
        found.append(
            f"By the parametric law, the best size for C FLOPs grows as C^{a:.2f} (95% interval of "
            f"the exponent {_interval(interval, '.2f')}) and the best number of tokens as "
            f"C^{b:.2f}. The interval {half} 0.5, equal growth of both."
        )
        found.append(
            "If N leaves out the embeddings, as Kaplan et al. 2020 counted, the same runs give an "
            f"exponent of {study.fit.a_without_embeddings:.2f} instead of {a:.2f}."
        )
    else:
        found.append(f"There is no parametric law. {study.unfitted}")
    if study.exponent is not None:
        found.append(
            f"By the parabolas' minima for {study.exponent.budgets} budgets, the exponent is "
            f"{study.exponent.a:.2f} ({_interval(study.exponent.interval, '.2f')})."
        )
    else:
        count = sum(curve.best is not None for curve in study.curves)
        found.append(
            f"Parabolas give no exponent: {count} of {len(study.curves)} budgets have a minimum "
            f"among their sizes, and an exponent needs {LEAST_BUDGETS}."
        )
    found += _disagreement(study)
    if study.failed:
        found.append(
            f"{len(study.failed)} of {study.planned} runs failed ({_by_status(study.failed)}; "
            "cells.csv names them) and are not in the fits, as the law describes runs that train."
        )
    if study.missing:
        found.append(
            f"{len(study.missing)} of {study.planned} runs have no result "
            f"({_by_status(study.missing)}); run the same command to retry them."
        )
    return found


def _disagreement(study: Study) -> list[str]:
    """A warning if the law and the parabola of the largest budget have different best sizes."""
    parabola = study.curves[-1].best if study.curves else None
    if study.fit is None or parabola is None:
        return []
    law = study.fit.best[-1].parameters.value
    factor = max(law / parabola, parabola / law)
    if factor < DISAGREEMENT:
        return []
    return [
        f"Law and parabola disagree: for {study.curves[-1].flops:.2g} FLOPs the best size is "
        f"{count_text(law)} by the law and {count_text(parabola)} by the parabola, a factor of "
        f"{factor:.1f}. So at least one of them does not describe these runs, and neither exponent "
        "should be quoted."
    ]


def _by_status(cells: Mapping[str, str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in Counter(cells.values()).items())


def limits(study: Study) -> list[str]:
    """What cannot be concluded from these runs, in sentences."""
    found = []
    if study.points:
        of_n = _span([point.parameters for point in study.points])
        of_d = _span([point.tokens for point in study.points])
        found.append(
            f"Nothing is known outside the ranges of these runs: N {of_n}, D {of_d}. Hoffmann et "
            "al. 2022 trained 70 million to 16 billion parameters on 5 to 500 billion tokens; the "
            "exponents of a small range at small sizes need not equal theirs."
        )
    if study.fit is not None:
        interval = study.fit.constants["E"].interval
        lowest = min(point.loss for point in study.points)
        known = interval.high - interval.low < IDENTIFIED * lowest
        found.append(
            f"The interval of E, the irreducible loss, is {_interval(interval, '.2f')}, and the "
            f"lowest loss of a run is {lowest:.2f}. "
            + (
                "E is an extrapolation of the law, not a measured entropy of the text."
                if known
                else "So E is not identified: other values of E, with other exponents alpha and "
                "beta, describe the runs as well."
            )
        )
        found.append(
            "The intervals show how the fit depends on which pairs of N and D were run, not "
            "whether the law holds: any other formula with a similar curvature would fit as well. "
            f"The runs deviate from the law by {100 * study.fit.error:.2g}% (root mean square)."
        )
    found += [
        "Losses are per token of this vocabulary, so E, A and B are not those of another one.",
        "Learning rate, batch and shape were not tuned for each size and budget. A choice that "
        "suits small sizes better than large ones, or short runs better than long ones, biases the "
        "exponents.",
        "The law is for tokens seen once. Runs over more than one epoch would end above it.",
    ]
    return found


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,} to {high:,} (a factor of {high / low:,.0f})"


def rate_rule(outcomes: Sequence[Outcome]) -> str:
    """How the learning rate of each size was chosen, from the configs."""
    configs = {outcome.cell.arm: outcome.cell.config for outcome in outcomes}
    rates = {name: config.optimizer.learning_rate for name, config in configs.items()}
    bases = {config.model.mup_base_width for config in configs.values()}
    if len(set(rates.values())) == 1:
        rate, base = next(iter(rates.values())), next(iter(bases))
        if len(bases) == 1 and base is not None:
            return f"{rate:g} at width {base}, and at other widths by muP"
        return f"{rate:g} for all sizes"
    return "; ".join(f"{name}: {rate:g}" for name, rate in rates.items())


def law_rows(study: Study) -> list[tuple[str, str, str, str]]:
    """A table of the law's constants."""
    rows = [("constant", "estimate", "95% interval", "meaning")]
    if study.fit is not None:
        for name, each in study.fit.constants.items():
            interval = _interval(each.interval, ".4g")
            rows.append((SYMBOLS.get(name, name), f"{each.value:.4g}", interval, MEANINGS[name]))
    return rows


def best_rows(study: Study) -> list[tuple[str, ...]]:
    """A table of the best size of each budget."""
    rows: list[tuple[str, ...]] = [
        ("FLOPs", "sizes", "lowest mean loss", "best N, parabola", "best N, law", "its D / N")
    ]
    best = study.fit.best if study.fit is not None else [None] * len(study.curves)
    for curve, by_law in zip(study.curves, best, strict=True):
        law = ("", "")
        if by_law is not None:
            size = by_law.parameters
            law = (
                f"{count_text(size.value)} ({_counts(size.interval)})",
                f"{by_law.tokens_per_parameter:.3g}",
            )
        lowest = min(curve.loss)
        at = count_text(curve.n[curve.loss.index(lowest)])
        rows.append(
            (
                f"{curve.flops:.2g}",
                f"{len(curve.n)}",
                f"{lowest:.3f} at {at}",
                _parabola(curve),
                *law,
            )
        )
    return rows


def _parabola(curve: Curve) -> str:
    if curve.parabola is None:
        return "too few sizes"
    if curve.best is None:
        return "none among the sizes"
    interval = "not bounded" if curve.interval is None else _counts(curve.interval)
    return f"{count_text(curve.best)} ({interval})"


def loss_rows(study: Study) -> list[tuple[str, ...]]:
    """A table of mean final losses, by size and budget."""
    sizes = {point.size: point.parameters for point in study.points}
    losses = [dict(zip(curve.n, curve.loss, strict=True)) for curve in study.curves]
    rows: list[tuple[str, ...]] = [
        ("size", "parameters", *(f"{curve.flops:.2g}" for curve in study.curves))
    ]
    for name, parameters in sorted(sizes.items(), key=lambda item: item[1]):
        means = (f"{each[parameters]:.3f}" if parameters in each else "" for each in losses)
        rows.append((name, f"{parameters:,}", *means))
    return rows


def _interval(interval: Interval, form: str, between: str = " to ") -> str:
    return f"{interval.low:{form}}{between}{interval.high:{form}}"


def _counts(interval: Interval) -> str:
    return f"{count_text(interval.low)} to {count_text(interval.high)}"

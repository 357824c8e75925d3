"""The report of a comparison: report.html, report.md and figures/.

report.html is one file that opens offline and reads like a short paper; its figures are SVG, in the
page's own colors, light or dark. A reader can hover over a run, and follow a link
to its row; switching arms off and marking the curve of a chosen row need a few lines of script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from markupsafe import Markup

from gpt.compare.analysis import wording
from gpt.compare.analysis.headline import headline, mean_table
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import ArmSummary, SearchResult, Summary
from gpt.compare.analysis.statistics import ALPHA
from gpt.compare.figures import draw
from gpt.compare.figures.base import PlotData, Section, save
from gpt.compare.grid import Grid
from gpt.compare.init_probes import InitProbe
from gpt.compare.report.rendering import TEMPLATES, render
from gpt.compare.report.svg import inline
from gpt.io.files import read_small, write_text

Comparison = tuple[Grid, Summary, list[Outcome]]


def write_report(
    directory: Path,
    grid: Grid,
    summary: Summary,
    outcomes: Sequence[Outcome],
    init_probes: Sequence[InitProbe],
    commands: Sequence[str],
    beside: tuple[Path, Comparison] | None = None,
) -> None:
    """Write report.html, report.md and figures/ into a comparison directory.

    Args:
        init_probes: probes of the networks; empty if there are none.
        commands: the command lines that ran it.
        beside: the directory and the contents of another comparison, to be shown next to this one.
    """
    other = None if beside is None else PlotData(*beside[1], name=beside[0].name)
    data = PlotData(grid, summary, outcomes, init_probes, directory.name, other)
    plots = draw(data)
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    drawings = {name: save(name, plot, folder) for name, plot in plots.items()}
    tips = {outcome.cell.id: cell_tip(outcome) for outcome in outcomes}
    context: dict[str, Any] = {
        "grid": grid,
        "summary": summary,
        "headline": headline(grid, summary, outcomes),
        "means": mean_table(summary),
        "outcomes": outcomes,
        "sections": {
            section: {name: plot for name, plot in plots.items() if plot.section == section}
            for section in get_args(Section)
        },
        "styles": data.styles,
        "svg": {name: inline(svg, name, tips) for name, svg in drawings.items()},
        "curve_of": {cell: name for name, plot in plots.items() for cell in plot.cells},
        "commands": commands,
        "environment": environment_facts(outcomes),
        "script": Markup((TEMPLATES / "report.js").read_text("utf-8")),  # noqa: S704 - our own
        "grid_yaml": read_small(directory / "grid.yaml").decode(),
        "level": wording.level_text(next((c.alpha for c in summary.contrasts if c), ALPHA)),
        "limits": wording.limits(grid, summary),
        "uniform_loss": math.log(next(o.vocabulary for o in outcomes if o.verdict is not None)),
        "other": other,
        "names": (directory.name, other.name if other else ""),
        "searches": _by_arm_and_seed(summary.searches),
        "side_by_side": _side_by_side(summary, other.summary) if other else {},
        "difference_text": lambda interval: wording.interval_text(interval, "{:+.3f}".format),
        "loss_text": lambda interval: wording.interval_text(interval, "{:.3f}".format),
        "wording": wording,
    }
    for name in ("report.html", "report.md"):
        write_text(directory / name, render(name, context))


def _by_arm_and_seed(searches: Sequence[SearchResult]) -> dict[str, dict[int, SearchResult]]:
    found: dict[str, dict[int, SearchResult]] = {}
    for each in searches:
        found.setdefault(each.label, {})[each.seed] = each
    return found


def _side_by_side(
    mine: Summary, theirs: Summary
) -> dict[str, tuple[ArmSummary | None, ArmSummary | None]]:
    """The arms of two comparisons by their labels; None where one has no such arm."""
    one, two = ({arm.label: arm for arm in summary.arms} for summary in (mine, theirs))
    return {label: (one.get(label), two.get(label)) for label in {**one, **two}}


def cell_tip(outcome: Outcome) -> str:
    """A cell in one line."""
    cell = outcome.cell
    where = f"{cell.arm}, {cell.setting_text}" if cell.setting_text else cell.arm
    head = f"{where}, rate {outcome.rate:g}, seed {outcome.seed}: {outcome.status}"
    return head if outcome.verdict is None else f"{head}. {outcome.reason}"


def environment_facts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The facts of environment.json; where cells differ, all values."""
    seen: dict[str, list[str]] = {}
    for outcome in outcomes:
        facts = dict(outcome.environment or {})
        facts |= facts.pop("versions", {})
        for key in ("argv", "initial_weights", "unigram_entropy"):
            facts.pop(key, None)
        for key, value in facts.items():
            if str(value) not in seen.setdefault(key, []):
                seen[key].append(str(value))
    return {key: "; ".join(values) for key, values in seen.items()}

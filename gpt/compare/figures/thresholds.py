"""Where arms become unstable: LR50, the highest stable rate, sensitivity, searched thresholds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from gpt.compare.analysis.results import ArmSummary
from gpt.compare.analysis.wording import search_text, threshold_text
from gpt.compare.figures.base import (
    HEIGHT,
    INK,
    WIDTH,
    Plot,
    PlotData,
    Style,
    legend,
    numeric_axis,
    panels,
    plain_numbers,
    rate_axis,
)

# Threshold.bound -> marker along x, and along y.
BOUND_MARKS: dict[str, tuple[str, str]] = {"": ("", ""), "above": (">", "^"), "below": ("<", "v")}


def thresholds(data: PlotData) -> Plot | None:
    """LR50 with its interval and the highest stable rate: against depth, or a row per arm."""
    if data.summary.searches:
        return None
    depths = _depths(data)
    arms = data.summary.arms
    figure, (axes,) = panels(1, width=7.2, height=4.0 if depths else 1.2 + 0.32 * len(arms))
    names = list(data.styles)
    for row, arm in enumerate(arms):
        shift = 1 + 0.02 * (names.index(arm.arm) - len(names) / 2)
        at = depths[arm.setting] * shift if depths else float(row)
        _draw_threshold(axes, arm, data.styles[arm.arm], at, data.rates, upright=bool(depths))
    if depths:
        _rates_by(axes, "blocks, L", depths.values())
        legend(figure, data.styles)
    else:
        rate_axis(axes, data.rates)
        axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
        axes.invert_yaxis()
    return Plot(
        "arms",
        "The rate at which half of the runs fail, and the highest stable rate",
        "Points: the rate at which a logistic regression (Firth's) of failure on the log rate "
        "crosses 1/2; a triangle means that it lies beyond the rates tried. Lines: 95% intervals "
        "over seeds, widened by the grid's spacing; a line that runs past the rates tried is open "
        "there. Crossbars: the highest rate up to which no seed failed.",
        "; ".join(f"{arm.label}: {threshold_text(arm.lr50)}" for arm in arms),
        figure,
    )


def _draw_threshold(
    axes: Axes,
    arm: ArmSummary,
    style: Style,
    at: float,
    rates: Sequence[float],
    *,
    upright: bool,
) -> None:
    """One arm's threshold at position `at`; `upright`: rates are on the y axis."""

    def draw(rates: Sequence[float], **options: Any) -> None:
        ats = [at] * len(rates)
        axes.plot(*((ats, rates) if upright else (rates, ats)), gid=style.gid, **options)

    half, interval = arm.lr50, arm.lr50_interval
    if half.bound != "unclear":
        marker = BOUND_MARKS[half.bound][upright] or style.shape
        draw([half.rate], marker=marker, color=style.color, linestyle="none")
        if interval is not None:
            span = np.clip([interval.low, interval.high], min(rates) / 2, max(rates) * 2)
            draw(list(span), lw=1.4, **style.line)
    if arm.highest_stable_rate is not None:
        bar = "_" if upright else "|"
        draw(
            [arm.highest_stable_rate],
            marker=bar,
            ms=11,
            mew=2,
            color=style.color,
            linestyle="none",
        )


def _rates_by(axes: Axes, name: str, values: Collection[float]) -> None:
    """Label x as the logarithmic axis `name` with a tick at each value, and y as rates."""
    ticks = sorted(set(values))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)
    axes.set_ylabel("learning rate")


def searched(data: PlotData) -> Plot | None:
    """Each seed's highest trainable rate: against a numeric axis, or a row per arm and setting."""
    found = [(each, each.rate) for each in data.summary.searches if each.rate is not None]
    if not found:
        return None
    name, at = numeric_axis(data)
    rows = list(dict.fromkeys(each.label for each, _ in found))
    width, height = (WIDTH, HEIGHT) if at else (7.2, 1.2 + 0.4 * len(rows))
    figure, (axes,) = panels(1, width=width, height=height)
    names, seeds = list(data.styles), data.grid.seeds
    for each, rate in found:
        style = data.styles[each.arm]
        spread = seeds.index(each.seed) / len(seeds) - 0.5  # so that equal ones do not coincide
        beside = 0.04 * (names.index(each.arm) - len(names) / 2) + 0.03 * spread
        x, y = (
            (at[each.setting] * (1 + beside), rate)
            if at
            else (rate, rows.index(each.label) + 0.5 * spread)
        )
        marker = BOUND_MARKS.get(each.bound, ("x", "x"))[bool(at)] or style.shape
        axes.plot(x, y, marker=marker, ms=5, color=style.color, alpha=0.75, gid=style.gid)
    if at:
        _rates_by(axes, name, at.values())
        plain_numbers(axes.yaxis)
        legend(figure, data.styles)
    else:
        rate_axis(axes, data.rates)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
    return Plot(
        "answer" if at else "arms",
        "The highest trainable rate of each seed",
        "The geometric mean of the highest rate at which a run trained and the lowest at which "
        "one failed, found by a search for each seed. A triangle is only a bound, and the "
        "threshold lies in its direction; a cross is unclear.",
        "; ".join(f"{each.arm}, seed {each.seed}: {search_text(each)}" for each, _ in found),
        figure,
    )


def _depths(data: PlotData) -> dict[str, int]:
    """The number of blocks in each setting, if settings differ in nothing else."""
    name, values = numeric_axis(data)
    return {text: int(value) for text, value in values.items()} if name == "layers" else {}


def sensitivity(data: PlotData) -> Plot | None:
    """The cost of a wrong learning rate, a bar per arm, and its regret."""
    arms = data.summary.arms
    if data.summary.searches or all(len(arm.by_rate) < 2 for arm in arms):
        return None
    figure, (axes,) = panels(1, width=7.2, height=1.2 + 0.32 * len(arms))
    for row, arm in enumerate(arms):
        style = data.styles[arm.arm]
        axes.barh(
            row,
            arm.lr_sensitivity,
            0.6,
            color=style.color,
            gid=style.gid,
        )
        below = row + 0.2  # the regret, apart from the sensitivity's interval
        for interval, at in ((arm.lr_sensitivity_interval, row), (arm.regret_interval, below)):
            if interval is not None:
                axes.plot([interval.low, interval.high], [at, at], color=INK, lw=1.4, gid=style.gid)
        axes.plot([arm.regret], [below], "D", ms=5, mfc="white", mec=INK, gid=style.gid)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("learning-rate sensitivity, and regret (nats)")
    return Plot(
        "arms",
        "Learning-rate sensitivity and regret",
        _sensitivity_caption(arms),
        "; ".join(
            f"{arm.label}: {arm.lr_sensitivity:.2f} nats, regret {arm.regret:.2f}" for arm in arms
        ),
        figure,
    )


def _sensitivity_caption(arms: Sequence[ArmSummary]) -> str:
    tried = dict.fromkeys(tuple(at.rate for at in arm.by_rate) for arm in arms)
    rates = "; or ".join(", ".join(f"{rate:g}" for rate in each) for each in tried)
    caption = (
        "How far the loss, at most ln V, is above the seed's lowest, on average over the rates and "
        "over the seeds run at all of them. Bars: the sensitivity, above the arm's own lowest "
        "(Wortsman et al. 2023), so an arm that learns at no rate has one near 0. Diamonds: the "
        "regret, above the lowest of all arms. Lines: 95% intervals, where there are enough such "
        f"seeds. Rates: {rates}; on another grid the values differ."
    )
    if len(tried) > 1:
        caption += " Arms with rates of their own cannot be compared with the others."
    return caption

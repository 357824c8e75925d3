"""Final loss against learning rate, and which runs failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes

from gpt.compare.analysis.wording import UNIGRAM_ENTROPY, failed_text
from gpt.compare.figures.base import (
    HEIGHT,
    PALE,
    WIDTH,
    Plot,
    PlotData,
    Style,
    legend,
    numeric_axis,
    panels,
    rate_axis,
)
from gpt.compare.grid import RATE
from gpt.metrics import LEARNED_MARGIN
from gpt.run.plot import label

COLUMNS = 3  # panels in a row
MOST_RATES = 24  # in a table of failures; searches try more, and have a figure of their own
Y_LABEL = "final loss (nats per token)"


def loss_by_rate(data: PlotData) -> Plot:
    """Final loss against learning rate, a line per arm, a panel per setting."""
    settings = data.settings
    rows, columns = math.ceil(len(settings) / COLUMNS), min(COLUMNS, len(settings))
    figure, axes_list = panels(
        len(settings), width=WIDTH / columns, height=max(HEIGHT / rows, 1.7), most=COLUMNS
    )
    for axes, setting in zip(axes_list, settings, strict=True):
        _draw_losses(axes, data, setting, data.styles)
        _mark_registered(axes, data, setting)
        axes.set_title(setting)
    axes_list[0].set_ylabel(Y_LABEL)
    legend(figure, data.styles)
    return Plot(
        "losses" if data.summary.searches and numeric_axis(data)[1] else "answer",
        "Final loss against learning rate",
        "Each point is a run, a cross a failed one; lines join the medians over seeds. Losses "
        "are at most ln V, that of a uniform guess. The dashed line is "
        f"{UNIGRAM_ENTROPY}.{_marks_text(data)}",
        _median_losses(data),
        figure,
    )


def _mark_registered(axes: Axes, data: PlotData, setting: str) -> None:
    """Mark the rates of the first contrast: a band, or a ring around an arm's median."""
    for contrast in data.grid.contrasts[:1]:
        for rate in map(float, contrast.at.get(RATE, ())):
            axes.axvspan(rate / 1.06, rate * 1.06, color=PALE, alpha=0.25, lw=0)
        for arm in data.summary.arms:
            for at in arm.by_rate:
                if arm.setting == setting and contrast.rates.get(arm.arm) == at.rate:
                    style = data.styles[arm.arm]
                    axes.plot(
                        [at.rate],
                        [at.median_loss],
                        marker="o",
                        ms=14,
                        mfc="none",
                        mew=1.5,
                        color=style.color,
                        gid=style.gid,
                    )


def _marks_text(data: PlotData) -> str:
    for contrast in data.grid.contrasts[:1]:
        if contrast.rates or RATE in contrast.at:
            mark = "Rings" if contrast.rates else "Bands"
            return f" {mark} mark the rates registered for the first question."
    return ""


def loss_beside(data: PlotData) -> Plot | None:
    """Final loss against learning rate in two comparisons; arms of one name share a style."""
    other = data.beside
    if other is None:
        return None
    names = label(data.name, 40), label(other.name, 40)
    only_other = {name: style for name, style in other.styles.items() if name not in data.styles}
    styles = {name: replace(style, index=None) for name, style in only_other.items()} | data.styles
    shown = [
        (each, setting, name)
        for each, name in zip((data, other), names, strict=True)
        for setting in each.settings
    ]
    figure, axes_list = panels(len(shown), width=4.2, height=4.0)
    for axes, (each, setting, name) in zip(axes_list, shown, strict=True):
        _draw_losses(axes, each, setting, styles, has_rows=each is data)
        axes.set_title(f"{name}{f': {setting}' if setting else ''}")
    low, high = zip(*(axes.get_ylim() for axes in axes_list), strict=True)
    for axes in axes_list:
        axes.set_ylim(min(low), max(high))
    axes_list[0].set_ylabel(Y_LABEL)
    legend(figure, styles)
    return Plot(
        "losses",
        f"{names[0]} and {names[1]}",
        "Final loss against learning rate in two comparisons, on the same scale. Arms of the same "
        "name have the same style.",
        f"{names[0]}: {_median_losses(data)}. {names[1]}: {_median_losses(other)}",
        figure,
    )


def _draw_losses(
    axes: Axes, data: PlotData, setting: str, styles: dict[str, Style], *, has_rows: bool = True
) -> None:
    """One panel; `has_rows`: the report has a row for each cell, to which its point links."""
    for arm in data.summary.arms:
        if arm.setting != setting:
            continue
        style = styles[arm.arm]
        axes.plot(
            [at.rate for at in arm.by_rate],
            [at.median_loss for at in arm.by_rate],
            **style.line,
            lw=1.6,
            gid=style.gid,
        )
    for outcome in data.outcomes:
        if outcome.verdict is None or outcome.cell.setting_text != setting:
            continue
        style = styles[outcome.cell.arm]
        failed = outcome.failed
        axes.plot(
            [outcome.rate],
            [outcome.loss],
            marker="x" if failed else style.shape,
            ms=5.5 if failed else 4.5,
            mew=1.4 if failed else 0,
            color=style.color,
            linestyle="none",
            gid=f"{style.gid} cell-{outcome.cell.id}" if has_rows else style.gid,
        )
    _mark_unigram_entropy(axes, data.summary.unigram_entropy)
    rate_axis(axes, data.rates)


def _mark_unigram_entropy(axes: Axes, level: float) -> None:
    """A line at H₁ with its meaning above it, and room for that."""
    axes.axhline(level, color=PALE, lw=1, linestyle="--")
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, level + 0.16 * (level - low)))
    axes.annotate(
        "H₁: learned only frequencies",
        (0, level),
        xycoords=("axes fraction", "data"),
        xytext=(2, 5),
        textcoords="offset points",
        va="bottom",
        fontsize=8,
    )


def _median_losses(data: PlotData) -> str:
    parts = []
    for arm in data.summary.arms:
        losses = ", ".join(f"{at.median_loss:.2f} at {at.rate:g}" for at in arm.by_rate)
        parts.append(f"{arm.label}: {losses}")
    return "Median final loss. " + "; ".join(parts)


def failures(data: PlotData) -> Plot | None:
    """Fraction of failed seeds: arm against rate; with several settings, a panel per arm."""
    arms, settings, rates = list(data.styles), data.settings, data.rates
    if len(rates) > MOST_RATES:
        return None
    counts = {
        (arm.arm, arm.setting, at.rate): (at.failures, at.n)
        for arm in data.summary.arms
        for at in arm.by_rate
    }
    if len(settings) == 1:
        groups = {"": [(arm, (arm, settings[0])) for arm in arms]}
    else:
        groups = {arm: [(setting, (arm, setting)) for setting in settings] for arm in arms}
    rows = len(next(iter(groups.values())))
    width = (1.8 if len(groups) == 1 else 1.2) + 0.52 * len(rates)
    for_titles = 0.7 + 0.085 * max(map(len, groups))  # the layout makes no room for their width
    figure, axes_list = panels(len(groups), width=max(width, for_titles), height=0.9 + 0.34 * rows)
    for axes, (title, keys) in zip(axes_list, groups.items(), strict=True):
        table = [[counts.get((*key, rate), (0, 0)) for rate in rates] for _, key in keys]
        _draw_failures(axes, table)
        axes.set_title(title)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], rotation=45)
        axes.set_yticks(range(rows), [name for name, _ in keys])
        axes.set_xlabel("learning rate")
    return Plot(
        "losses",
        "Which runs failed",
        "Failed seeds out of all. A run failed if its loss became non-finite, did not end more "
        f"than {LEARNED_MARGIN} nats below H₁, or ended well above its own minimum.",
        "; ".join(f"{arm.label}: failed runs: {failed_text(arm)}" for arm in data.summary.arms),
        figure,
    )


def _draw_failures(axes: Axes, table: Sequence[Sequence[tuple[int, int]]]) -> None:
    """One panel: (failures, seeds) by row and column, (0, 0) where there is no run."""
    fractions = np.array([[failed / n if n else np.nan for failed, n in row] for row in table])
    for row, column in np.argwhere(np.isfinite(fractions)):
        failed, n = table[row][column]
        color = "white" if failed > n / 2 else "black"
        text = f"{failed}/{n}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    rows, columns = fractions.shape
    axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        fractions,
        cmap="cividis_r",
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=1,
    )
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)

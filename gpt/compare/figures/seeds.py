"""The first question seed by seed."""

from __future__ import annotations

import math

from gpt.compare.analysis.wording import words_for
from gpt.compare.figures.base import (
    HEIGHT,
    PALE,
    SYMBOLS,
    WIDTH,
    Plot,
    PlotData,
    panels,
    plain_numbers,
)
from gpt.run.plot import label

LEGEND = 0.36  # inches, so that the figure is about as high as its neighbor, which has a legend
MOST_LABELS = 20  # seeds whose numbers fit


def by_seed(data: PlotData) -> Plot | None:
    """The first contrast, a dumbbell per pair of arms and seed.

    None without a contrast, with a measure that has no value for each seed, or if nothing was
    learned.
    """
    contrast = next(iter(data.grid.contrasts), None)
    result = next(iter(data.summary.contrasts), None)
    if contrast is None or result is None or not result.by_seed or not result.learned:
        return None
    words = words_for(contrast)
    figure, (axes,) = panels(1, width=WIDTH, height=HEIGHT + LEGEND)
    pairs = contrast.arm_pairs
    ticks: dict[float, str] = {}
    for number, (to, start) in enumerate(pairs):
        above = number * (len(result.by_seed) + 1.5)
        names = (f"{SYMBOLS[data.styles[arm].shape]} {label(arm, 30)}" for arm in (start, to))
        axes.annotate(
            " → ".join(names),
            (0, above),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
        )
        for row, (seed, values) in enumerate(result.by_seed.items(), 1):
            ticks[above + row] = str(seed)
            ends = [_shown(values[2 * number + n], log=words.log) for n in (1, 0)]
            axes.plot(ends, [above + row] * 2, color=PALE, lw=1.2, zorder=1)
            for end, arm in zip(ends, (start, to), strict=True):
                style = data.styles[arm]
                axes.plot(
                    [end],
                    [above + row],
                    marker=style.shape,
                    ms=5,
                    color=style.color,
                    linestyle="none",
                    gid=style.gid,
                )
    axes.set_yticks(list(ticks), list(ticks.values()) if len(ticks) <= MOST_LABELS else None)
    axes.set_ylim(max(ticks) + 0.7, -0.8)
    axes.set_ylabel("seed")
    axes.grid(axis="y", visible=False)
    unit = f" ({words.unit.strip()})" if "nats" in words.unit else ""
    axes.set_xlabel(words.subject.removeprefix("the ") + unit)
    if words.log:
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
    if contrast.measure == "loss" and not contrast.slope:
        axes.axvline(data.summary.unigram_entropy, color=PALE, lw=1, linestyle="--")
    changes = [
        f"{a} minus {b}: "
        + ", ".join(
            f"{values[2 * n] - values[2 * n + 1]:+.3f}" for values in result.by_seed.values()
        )
        for n, (a, b) in enumerate(pairs)
    ]
    return Plot(
        "answer",
        "Seed by seed",
        f"Each line is a seed: {words.subject} of two arms, over the runs that the first question "
        "compares."
        + (" The dashed line is H₁." if contrast.measure == "loss" and not contrast.slope else ""),
        f"For seeds {', '.join(map(str, result.by_seed))}, {'; '.join(changes)}",
        figure,
    )


def _shown(value: float, *, log: bool) -> float:
    """A value as it is drawn; for a logarithm, its exponential."""
    return math.exp(value) if log else value

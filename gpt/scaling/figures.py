"""The figures of a scaling study: loss against size, and the best size against compute."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from gpt.compare.figures.base import INK, PALE, Plot, plain_numbers, plot_style
from gpt.plan import TOKENS_PER_PARAMETER
from gpt.scaling.ladder import FLOPS
from gpt.scaling.results import Study

POINTS = 100  # of a curve


def count_text(number: float) -> str:
    """A number to three digits, such as 59,800."""
    return f"{float(f'{number:.3g}'):,.0f}" if number < 1e15 else f"{number:.3g}"


def isoflop(study: Study) -> Plot | None:
    """Loss against size, a curve for each budget."""
    if not study.curves:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(study.curves)))
    sizes = [n for curve in study.curves for n in curve.n]
    for curve, color in zip(study.curves, colors, strict=True):
        axes.plot(curve.n, curve.loss, "o", color=color, ms=4, label=f"{curve.flops:.2g}")
        line = np.geomspace(curve.n[0], curve.n[-1], POINTS)
        if curve.parabola is not None:
            axes.plot(line, np.polyval(curve.parabola, np.log(line)), color=color, lw=1)
        if curve.best is not None and curve.parabola is not None:
            lowest = np.polyval(curve.parabola, np.log(curve.best))
            axes.plot(curve.best, lowest, "*", color=color, ms=11, mec=INK, mew=0.5)
        if study.fit is not None:
            line = np.geomspace(min(sizes), max(sizes), POINTS)
            inside = (line >= 0.8 * curve.n[0]) & (line <= 1.25 * curve.n[-1])
            line = line[inside]
            predicted = study.fit.law.loss(line, curve.flops / FLOPS / line)
            axes.plot(line, predicted, ":", color=color, lw=1.2)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("parameters N, embeddings included")
    axes.set_ylabel("final validation loss, nats per token")
    axes.legend(title="C = 6 N D, FLOPs", fontsize=8, title_fontsize=8)
    best = [
        f"{count_text(curve.best)} parameters for {curve.flops:.2g} FLOPs"
        for curve in study.curves
        if curve.best is not None
    ]
    return Plot(
        "losses",
        "Loss against size, by budget",
        "Each point is the mean over seeds. Lines are parabolas in log N, stars their minima; "
        "dotted lines are the parametric law.",
        f"Lowest loss: {'; '.join(best) or 'no minimum among the sizes'}",
        figure,
    )


def best_size(study: Study) -> Plot | None:
    """The best size against compute, by both approaches."""
    found = [curve for curve in study.curves if curve.best is not None]
    best = study.fit.best if study.fit is not None else []
    if len(study.curves) < 2 or not (found or best):
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    budgets = np.array([curve.flops for curve in study.curves])
    rule = np.sqrt(budgets / FLOPS / TOKENS_PER_PARAMETER)
    axes.plot(budgets, rule, "--", color=PALE, label=f"{TOKENS_PER_PARAMETER} tokens per parameter")
    if study.fit is not None:
        law = study.fit.law
        axes.plot(
            budgets,
            [b.parameters.value for b in best],
            color="#0072b2",
            label=f"law, a = {law.a:.2f}",
        )
        intervals = [b.parameters.interval for b in best]
        low, high = [each.low for each in intervals], [each.high for each in intervals]
        axes.fill_between(budgets, low, high, color="#0072b2", alpha=0.15, lw=0)
    minima = {curve.flops: curve.best for curve in found if curve.best is not None}
    for curve in found:
        if curve.interval is not None:
            bar = [curve.interval.low, curve.interval.high]
            axes.plot([curve.flops] * 2, bar, color="#d55e00", lw=1)
    if minima:
        label = "parabolas" + (f", a = {study.exponent.a:.2f}" if study.exponent else "")
        (line,) = axes.plot([*minima], [*minima.values()], "*", color="#d55e00", ms=11, label=label)
        line.set(markeredgecolor=INK, markeredgewidth=0.5)
    sizes = [n for curve in study.curves for n in curve.n]
    axes.set_ylim(min(sizes) / 1.5, max(sizes) * 1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.set_xlabel("C = 6 N D, FLOPs")
    axes.set_ylabel("best N")
    axes.legend(fontsize=8)
    texts = [f"{count_text(b.parameters.value)} for {b.flops:.2g} FLOPs" for b in best]
    return Plot(
        "losses",
        "Best size against compute",
        "Bars and band are 95% intervals; a bar is missing where the curvature of a parabola is "
        "not established. The dashed line is Chinchilla's ratio of tokens to parameters.",
        f"Best size by the law: {'; '.join(texts) or 'no law'}",
        figure,
    )


PLOTS: dict[str, Callable[[Study], Plot | None]] = {"isoflop": isoflop, "best-size": best_size}


def draw(study: Study) -> dict[str, Plot]:
    """All plots for which there is data, by name."""
    with plot_style():
        drawn = {name: plot(study) for name, plot in PLOTS.items()}
        return {name: plot for name, plot in drawn.items() if plot is not None}

"""The networks at initialization, before any training; see gpt/compare/probes.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log
from statistics import fmean
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from gpt.compare.analysis.statistics import MIN_SEEDS, loglog_slope, mean_interval
from gpt.compare.figures.base import (
    BETAS,
    STREAM,
    Plot,
    PlotData,
    by_block,
    panels,
    plain_numbers,
)
from gpt.compare.init_probes import InitProbe
from gpt.compare.probes import SHARPNESS_SEQUENCES, Probe


def gradient_by_depth(data: PlotData) -> Plot | None:
    """Gradient norm of the last block against the number of blocks, log-log."""
    if not _networks(data, "token"):
        return None
    figure, (axes,) = panels(1, width=6.0, height=3.6)
    slopes = _by_depth(axes, data, lambda probe: probe.last_gradients)
    axes.set_ylabel("gradient norm of the last block's W₂")
    figure.legend(loc="outside lower center", ncols=2 if len(slopes) < 9 else 3)
    return Plot(
        "initialization",
        "Gradient of the last block at initialization, by depth",
        f"For a single token, as in the theory of Xiong et al. 2020. {_means(data, 'token')} "
        "In theory, with xavier weights, the norm is flat in post-norm, and in "
        "pre-norm it falls with a slope near -0.45. In the gpt2 regime at small widths both slopes "
        f"are near 0. Slopes: {'; '.join(slopes)}.",
        "; ".join(slopes),
        figure,
    )


def amplification(data: PlotData) -> Plot | None:
    """Change of the output due to a change of the weights, against the number of sublayers."""
    if not _networks(data, "token"):
        return None
    figure, axes_list = panels(2, width=4.6, height=3.6)
    random = _by_depth(axes_list[0], data, lambda probe: probe.amplifications, sublayers=True)
    adam = _by_depth(axes_list[1], data, lambda probe: probe.adam_amplifications, sublayers=True)
    axes_list[0].set_title("random change of the weights: E|Δout|² / δ²")
    axes_list[1].set_title("one Adam update: E|Δout|²")
    names = [_name(data, each) for each in _networks(data, "token")]
    figure.legend(axes_list[0].lines, names, loc="outside lower center", ncols=min(len(names), 5))
    return Plot(
        "initialization",
        "Amplification of a change of the weights, by depth",
        "For a single token, per channel: each matrix of the blocks is changed at random by δ = 1% "
        "of its standard deviation, or by one Adam update at rate 1e-5. In theory (Liu et al. "
        "2020), with xavier weights, the effect of the random change grows in post-norm as the "
        "number of sublayers, a slope of 1, and in pre-norm as its logarithm. "
        f"{_means(data, 'token')} Slopes: random change "
        f"{'; '.join(random)}; Adam {'; '.join(adam)}.",
        f"Random change: {'; '.join(random)}. Adam: {'; '.join(adam)}",
        figure,
    )


def sharpness_by_depth(data: PlotData) -> Plot | None:
    """Largest eigenvalue of the Hessian against the number of blocks, log-log."""
    if not any(probe.sharpness for each in data.init_probes for probe in each.text):
        return None
    figure, (axes,) = panels(1, width=6.0, height=3.6)
    slopes = _by_depth(axes, data, lambda probe: probe.sharpness, of="text")
    axes.set_ylabel("sharpness")
    figure.legend(loc="outside lower center", ncols=2 if len(slopes) < 9 else 3)
    return Plot(
        "initialization",
        "Sharpness at initialization, by depth",
        "The largest eigenvalue of the Hessian of the loss, on "
        f"{SHARPNESS_SEQUENCES} sequences of the training text. Gradient descent is unstable where "
        "it exceeds 2/η: at the start, warm-up keeps η small until training has reached flatter "
        f"weights (Gilmer et al. 2021). {_means(data, 'text')} Slopes: "
        f"{'; '.join(slopes)}.",
        "; ".join(slopes),
        figure,
    )


def _networks(data: PlotData, of: Literal["text", "token"]) -> list[InitProbe]:
    """The networks that were probed on text, or on single tokens."""
    return [each for each in data.init_probes if getattr(each, of)]


def _seeds(data: PlotData, of: Literal["text", "token"]) -> str:
    """How many seeds the probes have."""
    count = len(getattr(_networks(data, of)[0], of)[0].last_gradients)
    return f"{count} seeds, each with initial weights and tokens of its own"


def _means(data: PlotData, of: Literal["text", "token"]) -> str:
    """What `_by_depth` draws."""
    intervals = f"with 95% t intervals from {MIN_SEEDS} seeds on"
    return f"Geometric means over {_seeds(data, of)}, {intervals}."


def _by_depth(
    axes: Axes,
    data: PlotData,
    values: Callable[[Probe], Sequence[float] | None],
    *,
    of: Literal["text", "token"] = "token",
    sublayers: bool = False,
) -> list[str]:
    """Draw a measure, in values of each seed, against depth; returns the networks' slopes in words.

    Means and intervals are of logarithms, as slopes are, so that no interval reaches 0.
    """
    factor, slopes = 2 if sublayers else 1, []
    depths: set[int] = set()
    for each in _networks(data, of):
        found = {factor * probe.layers: values(probe) for probe in getattr(each, of)}
        measured = {x: ys for x, ys in found.items() if ys is not None}
        slopes.append(f"{_name(data, each)} {_slope(measured)}")
        style = {"marker": "o", "ms": 4, "label": slopes[-1], **_line(data, each)}
        logs = {x: [log(y) for y in ys] for x, ys in measured.items() if all(ys)}
        axes.plot(list(logs), [exp(fmean(ys)) for ys in logs.values()], **style)
        for x, ys in logs.items():
            interval = mean_interval(ys)
            if interval is not None:
                axes.vlines(x, exp(interval.low), exp(interval.high), color=style["color"], lw=1)
        depths |= set(measured)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(depths), [str(depth) for depth in sorted(depths)])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sublayers, 2L" if sublayers else "blocks, L")
    plain_numbers(axes.yaxis)
    return slopes


def _slope(measured: dict[int, Sequence[float]]) -> str:
    """The mean over seeds of the slope of log y on log x, and its interval."""
    if not all(map(all, measured.values())):  # ReZero's branches are 0 at initialization
        return "0 throughout"
    if len(measured) < 2:
        return "at one depth"
    of_seeds = [loglog_slope(list(measured), ys) for ys in zip(*measured.values(), strict=True)]
    interval = mean_interval(of_seeds)
    around = f" ({interval.low:+.2f} to {interval.high:+.2f})" if interval is not None else ""
    return f"{fmean(of_seeds):+.2f}{around}"


def start_by_layer(data: PlotData) -> Plot | None:
    """Gradient norm, residual dependency and residual stream by layer."""
    if not data.init_probes:
        return None
    depth = max(set.intersection(*({p.layers for p in each.text} for each in data.init_probes)))
    figure, axes_list = panels(4, width=2.8, height=3.2)
    alt = []
    for each in data.init_probes:
        probe = next(probe for probe in each.text if probe.layers == depth)
        style = {**_line(data, each), "marker": "o", "ms": 3}
        blocks = range(1, depth + 1)
        if all(probe.gradient_norms):  # ReZero's are 0
            axes_list[0].plot(blocks, probe.gradient_norms, **style)
        if probe.betas is not None:
            axes_list[1].plot(blocks, [attention for attention, _ in probe.betas], **style)
            axes_list[2].plot(blocks, [mlp for _, mlp in probe.betas], **style)
        axes_list[3].plot(blocks, probe.stream_rms, label=_name(data, each), **style)
        alt.append(
            f"{_name(data, each)}: gradient {probe.gradient_norms[0]:.2g} in block 1, "
            f"{probe.gradient_norms[-1]:.2g} in block {depth}"
        )
    by_block(axes_list, ("gradient norm of W₂", *BETAS, STREAM))
    figure.legend(loc="outside lower center", ncols=2 if len(alt) < 9 else 3)
    return Plot(
        "initialization",
        f"Inside the networks at initialization, {depth} blocks",
        f"The arms' networks with {depth} blocks, whatever the grid's depth, on batches of the "
        f"training text before any update. Means over {_seeds(data, 'text')}. "
        "β = Var[f]/Var[x + f] is the sublayer's share of the variance: it falls with depth where "
        "the stream grows, as in pre-norm, and is flat where every sum is normalized, as in "
        "post-norm.",
        "; ".join(alt),
        figure,
    )


def _name(data: PlotData, init_probe: InitProbe) -> str:
    """The levels that a network's arms have in common; they differ only in how they train."""
    levels = [arm.levels for arm in data.grid.all_arms() if arm.name in init_probe.arms]
    common = [
        name for factor, name in levels[0].items() if all(each[factor] == name for each in levels)
    ]
    return ", ".join(common) or init_probe.arms[0]


def _line(data: PlotData, init_probe: InitProbe) -> dict[str, Any]:
    gid = " ".join(data.styles[arm].gid for arm in init_probe.arms)
    return {**data.styles[init_probe.arms[0]].line, "lw": 1.5, "gid": gid}

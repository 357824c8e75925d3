"""Plots of a run: losses, learning rate and gradient norm; and the statistics of its layers."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import LogFormatter, MaxNLocator

from gpt.diagnostics.layers import MEASURES, MODEL_MEASURES, Measure
from gpt.errors import printable
from gpt.io.files import write_bytes
from gpt.metrics import Record

SMALLEST = 1e-100  # a logarithmic scale shows only larger values; fp32's smallest is 1e-45
TRAIN, SMOOTH = "#c6dbef", "#6baed6"  # these colors are distinguishable with color blindness
VALIDATION, OTHER, LEVEL = "#08519c", "#d95f02", "#737373"
SMOOTHING = 100  # the training loss is smoothed over 1/100 of the updates to either side

# These fonts, if installed, supply the characters that matplotlib's own font lacks.
FONTS = (
    *(
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "WenQuanYi Zen Hei",
        "Microsoft YaHei",
        "PingFang SC",
    ),
    *("Hiragino Sans", "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans", "Arial Unicode MS"),
)

_SETTINGS = threading.RLock()  # matplotlib's are global, and runs may be drawn in threads


@contextmanager
def literal_text() -> Iterator[None]:
    """A context in which plots show text literally, not as TeX formulas.

    A character that no installed font has is drawn as an empty box, without a warning.
    """
    installed = {font.name for font in fontManager.ttflist}
    options: dict[Any, Any] = {
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": ["DejaVu Sans", *(name for name in FONTS if name in installed)],
    }
    with _SETTINGS, mpl.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


def label(text: str, longest: int = 70) -> str:
    """`text` on one line; if it is long, only its end, by which paths differ."""
    text = printable(text)
    return text if len(text) <= longest else "..." + text[3 - longest :]


@literal_text()
def plot_run(
    records: list[Record],
    path: Path,
    title: str,
    *,
    levels: Mapping[str, float] | None = None,
    clip: float | None = None,
) -> None:
    """Plot losses, learning rate and gradient norm from a metrics.jsonl, as a PNG.

    Args:
        levels: the losses of guessing, in nats per token; see gpt/run/directory.py.
        clip: the gradient norm above which gradients are clipped.
    """
    training = [r for r in records if r.get("loss") is not None]
    evaluations = [r for r in records if r.get("val_loss") is not None]
    steps = [r["step"] for r in training]

    figure = Figure(figsize=(8, 7))  # with fixed margins: a layout engine draws everything twice
    figure.subplots_adjust(left=0.13, right=0.98, top=0.95, bottom=0.07, hspace=0.1)
    loss_axes, rate_axes, norm_axes = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1, 1]}
    )
    loss_axes.set_title(label(title))
    _plot_losses(loss_axes, training, evaluations, levels or {})
    rate_axes.plot(steps, [r["learning_rate"] for r in training], color=OTHER, lw=1.5)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", scilimits=(-3, 3))  # keeps the labels within the margin
    norms = [(r["step"], r["grad_norm"]) for r in training if r["grad_norm"] is not None]
    norm_axes.plot([s for s, _ in norms], [n for _, n in norms], color=OTHER, lw=0.8)
    norm_axes.set_ylabel("gradient norm")
    if clip is not None:
        norm_axes.axhline(
            clip, color=VALIDATION, lw=1, linestyle="--", label=f"clipped to {clip:g}"
        )
        norm_axes.legend(frameon=False, fontsize=8, loc="best")
    if any(n > 0 for _, n in norms):
        norm_axes.set_yscale("log")
        _label_plainly(norm_axes)
    norm_axes.set_xlabel("step")
    norm_axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    for axes in (loss_axes, rate_axes, norm_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    save(figure, path)


def _plot_losses(
    axes: Axes, training: list[Record], evaluations: list[Record], levels: Mapping[str, float]
) -> None:
    steps, losses = [r["step"] for r in training], [r["loss"] for r in training]
    axes.plot(steps, losses, color=TRAIN, lw=1, label="training")
    window = len(losses) // SMOOTHING
    if window > 1:
        label = f"training, mean of {2 * window + 1} updates"
        axes.plot(steps, smooth(losses, window), color=SMOOTH, lw=1.2, label=label)
    axes.plot(
        [r["step"] for r in evaluations],
        [r["val_loss"] for r in evaluations],
        color=VALIDATION,
        linestyle=":",  # nothing is known between two evaluations
        marker="o",
        ms=4,
        label="validation",
    )
    if evaluations:
        last = evaluations[-1]
        axes.annotate(
            f"{last['val_loss']:.3f}",
            (last["step"], last["val_loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color=VALIDATION,
        )
    for (name, level), style in zip(levels.items(), ("--", "-."), strict=False):
        axes.axhline(level, color=LEVEL, lw=1, linestyle=style, label=f"guessing {name}")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(framealpha=0.8, edgecolor="none")  # over the levels


def smooth(values: list[float], window: int) -> list[float]:
    """Means over each value and the `window` before and after it, fewer towards both ends.

    It is the same number on both sides, so the curve is not shifted, and ends at the last value.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(window, np.minimum(places, places[::-1]))
    means: list[float] = (
        (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
    ).tolist()
    return means


def has_layers(records: list[Record]) -> bool:
    """Whether the records contain any statistics of layers."""
    return any(record.get(key) is not None for record in _layers(records) for key in MEASURES)


def _layers(records: list[Record]) -> list[Record]:
    return [record for record in records if "layer" in record]


@literal_text()
def plot_layers(records: list[Record], path: Path, title: str) -> None:
    """Plot the statistics of layers in a metrics.jsonl, layer against step, as a PNG.

    Below them are those of the whole model, if any were measured.
    """
    layers = _layers(records)
    shown = [key for key in MEASURES if any(record.get(key) is not None for record in layers)]
    of_model = [key for key in MODEL_MEASURES if any(r.get(key) is not None for r in records)]
    count = len(shown) + len(of_model)
    rows = -(-count // 2)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    last = max(record["layer"] for record in layers)
    figure.suptitle(f"{label(title)} (layer 0: embeddings; layer {last}: final norm and head)")
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, key in zip(panels, shown, strict=False):
        own = [record for record in layers if record.get(key) is not None]
        _plot_measure(axes, own, key, MEASURES[key])
    for axes, key in zip(panels[len(shown) :], of_model, strict=False):
        _plot_model_measure(axes, [record for record in records if key in record], key)
    for axes in panels[count:]:
        axes.set_visible(False)
    save(figure, path)


def _plot_model_measure(axes: Axes, records: list[Record], key: str) -> None:
    """One statistic of the whole model, against its threshold if the optimizer has one."""
    measure, title = MODEL_MEASURES[key], MODEL_MEASURES[key].title
    styles: dict[str, Any] = {key: {"color": OTHER, "marker": "o", "ms": 3}}
    if measure.threshold is not None and any(measure.threshold in record for record in records):
        styles[measure.threshold] = {"color": VALIDATION, "linestyle": "--"}
        title += " (dashed: unstable above)"
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step")
    for each, style in styles.items():
        values = [np.nan if record.get(each) is None else record[each] for record in records]
        axes.plot([record["step"] for record in records], values, **style)
    if measure.log:
        axes.set_yscale("log", nonpositive="mask")
        _label_plainly(axes)
    axes.grid(alpha=0.25)


def _plot_measure(axes: Axes, records: list[Record], key: str, measure: Measure) -> None:
    """One statistic: a heat map over the layers that have it, or a line for a single layer."""
    axes.set_title(measure.title, fontsize=9)
    axes.set_xlabel("step")
    steps = sorted({record["step"] for record in records})
    numbers = range(
        min(record["layer"] for record in records), max(record["layer"] for record in records) + 1
    )
    values = np.full((len(numbers), len(steps)), np.nan)
    columns = {step: column for column, step in enumerate(steps)}
    for record in records:
        values[record["layer"] - numbers[0], columns[record["step"]]] = record[key]
    if len(numbers) == 1:
        axes.plot(steps, values[0], color=OTHER, marker="o", ms=3)
        axes.grid(alpha=0.25)
        return
    positive = values[values > SMALLEST]
    if measure.log and positive.size:
        norm: Normalize = LogNorm(positive.min(), positive.max())
    else:  # from 0, so that noise does not look like structure
        norm = Normalize(min(0.0, float(np.nanmin(values))), float(np.nanmax(values)))
    edges, lines = np.arange(len(steps) + 1) - 0.5, np.arange(len(numbers) + 1) - 0.5
    drawn = axes.pcolormesh(edges, lines + numbers[0], values, norm=norm)
    if measure.alarm is not None:
        low_layers, low_steps = np.nonzero(values < measure.alarm)
        axes.plot(low_steps, low_layers + numbers[0], "o", color=OTHER, ms=3)
    marked = range(0, len(steps), max(1, len(steps) // 8))  # snapshots need not be evenly spaced
    axes.set_xticks(marked, [str(steps[i]) for i in marked])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("layer")
    bar = axes.figure.colorbar(drawn, ax=axes)
    if isinstance(norm, LogNorm):
        _label_plainly(bar.ax)


def _label_plainly(axes: Axes) -> None:
    """Label a logarithmic y-axis with plain numbers, because matplotlib would write TeX."""
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    write_bytes(path, png.getvalue())

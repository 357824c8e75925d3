"""loss.png: losses, learning rate and gradient norm of a run; and what all plots share."""

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
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray

from gpt.errors import printable
from gpt.io.files import write_bytes
from gpt.metrics import Record

TRAIN, SMOOTH = "#c6dbef", "#6baed6"  # these colors are distinguishable with color blindness
VALIDATION, OTHER, LEVEL = "#08519c", "#d95f02", "#737373"
SMOOTHING = 100  # the training loss is smoothed over 1/100 of the updates to either side

# Okabe and Ito's colors, which color-blind readers can tell apart, for arms and runs.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")

NOTEBOOK_DPI = 80  # of pictures that a notebook stores

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
        levels, clip: as for `draw_run`.
    """
    save(draw_run(records, title, levels=levels, clip=clip), path)


@literal_text()
def draw_run(
    records: list[Record],
    title: str,
    *,
    levels: Mapping[str, float] | None = None,
    clip: float | None = None,
) -> Figure:
    """Losses, learning rate and gradient norm from a metrics.jsonl as a figure.

    Args:
        levels: the losses of guessing, in nats per token; see gpt/run/directory.py.
        clip: the gradient norm above which gradients are clipped.
    """
    training = [r for r in records if r.get("loss") is not None]
    evaluations = [r for r in records if r.get("val_loss") is not None]
    steps = [r["step"] for r in training]

    figure = Figure(figsize=(8, 7))
    figure.set_layout_engine("none")  # one draws everything twice; the user's settings may have one
    margins = {"left": 0.13, "right": 0.98, "top": 0.95, "bottom": 0.07, "hspace": 0.1}
    loss_axes, rate_axes, norm_axes = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1, 1], **margins}
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
        label_plainly(norm_axes)
    norm_axes.set_xlabel("step")
    norm_axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    for axes in (loss_axes, rate_axes, norm_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return figure


def _plot_losses(
    axes: Axes, training: list[Record], evaluations: list[Record], levels: Mapping[str, float]
) -> None:
    steps, losses = [r["step"] for r in training], [r["loss"] for r in training]
    axes.plot(steps, losses, color=TRAIN, lw=1, label="training")
    window = len(losses) // SMOOTHING
    if window > 1:
        label = f"training, mean of {2 * window + 1} updates"
        axes.plot(steps, smooth(np.array(losses)), color=SMOOTH, lw=1.2, label=label)
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


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over each finite value and its neighbors, 1/SMOOTHING of all values on either side.

    The number of neighbors is the same on both sides, so the curve is not shifted. It shrinks
    towards the start, where losses fall steeply. At the end there are those before alone, as a
    single loss would look like a sudden change. What is not finite becomes NaN.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(values[known])])
    places = np.arange(len(sums) - 1)
    before = np.minimum(len(places) // SMOOTHING, places)
    after = np.minimum(before, places[::-1])
    means = np.full(len(values), np.nan)
    means[known] = (sums[places + after + 1] - sums[places - before]) / (before + after + 1)
    return means


class _Plain(LogFormatter):
    """Plain numbers, such as 0.3, where matplotlib would write 3e-01 or TeX."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        assert self.axis is not None, "set by the axis"
        least, most = self.axis.get_view_interval()
        crowded = most > 10 * least and f"{x:.0e}"[0] not in "13"
        return f"{x:g}" if super().__call__(x, pos) and not crowded else ""


def label_plainly(axes: Axes) -> None:
    """Label a logarithmic y-axis with plain numbers that do not overlap."""
    axes.yaxis.set_major_formatter(_Plain())
    axes.yaxis.set_minor_formatter(_Plain())


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    write_bytes(path, to_bytes(figure))


@literal_text()
def to_bytes(
    figure: Figure, kind: str = "png", *, dpi: int = 120, metadata: dict[str, Any] | None = None
) -> bytes:
    """A figure as a PNG or SVG."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format=kind, metadata=metadata)
    return picture.getvalue()

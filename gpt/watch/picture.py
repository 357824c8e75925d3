"""The curves of runs as a picture: loss, learning rate and gradient norm above each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gpt.errors import InputError, nearest
from gpt.io.files import open_regular, reading, write_bytes
from gpt.run.directory import AnyRun
from gpt.run.plot import COLORS, NOTEBOOK_DPI, label, label_plainly, literal_text, to_bytes
from gpt.watch.curves import Column, Curve, X, read_curves
from gpt.watch.table import csv_text

DASHES = ("-", "--")
MOST_RUNS = len(COLORS) * len(DASHES)
POINTS = 2000  # of a line, at most
X_LABELS = {"step": "step", "tokens": "training tokens", "seconds": "seconds of updates"}
FAR = 10  # learning rates further apart than this factor are on a logarithmic axis
FORMATS = (".png", ".svg")
CREATOR = "steadygpt plot"  # in a picture's metadata, by which an earlier one is recognized
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": CREATOR},
    "svg": {"Creator": CREATOR, "Date": None},
}
CREATOR_WITHIN = 4096  # bytes at the start of a file


@dataclass(frozen=True, repr=False)
class Curves:
    """The curves of several runs; in a notebook, their picture.

    Attributes:
        x: what they are drawn against.
    """

    curves: Sequence[Curve]
    x: X = "step"

    def __iter__(self) -> Iterator[Curve]:
        return iter(self.curves)

    def __len__(self) -> int:
        return len(self.curves)

    def __repr__(self) -> str:
        return f"curves of {', '.join(str(curve.path) for curve in self)}"

    def save(self, path: str | Path) -> Path:
        """Write the picture to a .png or .svg file; only an earlier picture is replaced.

        Raises:
            InputError: the file has another ending, or exists and is something else; its folder
                cannot be written to; or there are too many runs for one picture.
        """
        path = Path(path)
        _check_target(path)
        kind = path.suffix.lower().removeprefix(".")
        write_bytes(path, to_bytes(draw(self), kind, metadata=METADATA[kind]))
        return path

    def records(self) -> list[dict[str, Any]]:
        """The plotted numbers, a dict for each run and step: `pandas.DataFrame(c.records())`."""
        keys = ["step", "tokens", "seconds", "loss", "loss_mean", "val_loss"]
        keys += ["learning_rate", "grad_norm"]
        return [
            {
                "run": str(curve.path),
                "label": curve.label,
                **{key: None if np.isnan(value) else value for key, value in row.items()},
            }
            for curve in self
            for row in _rows(curve.columns, keys)
        ]

    def to_csv(self) -> str:
        """The records as CSV; an empty field where a run has no value."""
        return csv_text(self.records())

    def _repr_png_(self) -> bytes:
        return to_bytes(draw(self), dpi=NOTEBOOK_DPI)


def _rows(columns: Mapping[str, Column], keys: Sequence[str]) -> Iterator[dict[str, float]]:
    whole = ("step", "tokens")
    for values in zip(*(columns[key].tolist() for key in keys), strict=True):
        yield {k: int(v) if k in whole else v for k, v in zip(keys, values, strict=True)}


def plot(*runs: AnyRun, x: X = "step", out: str | Path | None = None) -> Curves:
    """The curves of runs in one picture, which a notebook shows.

    Args:
        runs: directories of runs, results of `train`, glob patterns, comparisons (their cells), or
            folders of runs.
        x: what to plot against: "step", "tokens", or "seconds" (of updates alone).
        out: a .png or .svg file to save the picture to.

    Raises:
        InputError: there is no such run, or it is damaged; and as `Curves.save`.
    """
    if x not in get_args(X):
        raise InputError(
            f"x: {x!r} is not one of step, tokens, seconds{nearest(str(x), get_args(X))}"
        )
    curves = Curves(read_curves(runs), x)
    if out is not None:
        curves.save(out)
    return curves


def _check_target(path: Path) -> None:
    """Check that a picture can be saved in a file; see `Curves.save`."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: is neither a .png nor an .svg file")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise InputError(f"{path}: {path.parent} is not a folder that can be written to")
    if os.path.lexists(path):
        with reading(path), open_regular(path) as file:
            if CREATOR.encode() not in file.read(CREATOR_WITHIN):
                raise InputError(f"{path}: exists and is not a picture of runs; name another file")


@literal_text()
def draw(curves: Curves) -> Figure:
    """The picture as a matplotlib figure.

    Raises:
        InputError: there are too many runs to tell apart.
    """
    if len(curves) > MOST_RUNS:
        raise InputError(f"{len(curves)} runs: a picture shows at most {MOST_RUNS}; name fewer")
    figure = Figure(figsize=(8, 7 + 0.2 * len(curves)), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1, 1]})
    loss, rate, norm = panels
    loss.set_ylim(*_loss_range(curves))
    handles = []
    for index, curve in enumerate(curves):
        color, dashes = COLORS[index % len(COLORS)], DASHES[index // len(COLORS)]
        style: dict[str, Any] = {"color": color, "linestyle": dashes}
        loss.plot(*_thin(*curve.points(curves.x, "loss_mean")), lw=1.3, **style)
        rate.plot(*_thin(*curve.points(curves.x, "learning_rate")), lw=1.3, **style)
        norm.plot(*_thin(*curve.points(curves.x, "grad_norm")), lw=0.7, **style)
        loss.plot(*curve.points(curves.x, "val_loss"), "o", color=color, ms=4)
        if curve.diverged:
            _mark_end(loss, *curve.points(curves.x, "loss_mean"), color)
        text = label(curve.label) + (" (diverged)" if curve.diverged else "")
        handles.append(Line2D([], [], **style, label=text))
    loss.set_ylabel("loss (nats per token)")
    loss.set_title("lines: training, mean over 2% of the updates; points: validation", fontsize=9)
    rate.set_ylabel("learning rate")
    peaks = [np.nanmax(curve.columns["learning_rate"], initial=0.0) for curve in curves]
    if 0 < FAR * min(peaks) < max(peaks):
        rate.set_yscale("log")
        label_plainly(rate)
    else:
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", scilimits=(-3, 3))
    norm.set_ylabel("gradient norm")
    if any((curve.columns["grad_norm"] > 0).any() for curve in curves):
        norm.set_yscale("log")
        label_plainly(norm)
    norm.set_xlabel(X_LABELS[curves.x])
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)
    return figure


def _thin(x: Column, y: Column) -> tuple[Column, Column]:
    """At most POINTS of the points, evenly spaced, the first and the last included."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int))
    return x[kept], y[kept]


def _loss_range(curves: Curves) -> tuple[float | None, float | None]:
    """The ends of the loss's axis: a little beyond the lowest loss, and where the runs began.

    Otherwise a run that diverges would press all others to the bottom.
    """
    losses = [curve.points("step", key)[1] for curve in curves for key in ("loss_mean", "val_loss")]
    losses = [values for values in losses if len(values)]
    if not losses:
        return None, None
    low, high = min(values.min() for values in losses), max(values[0] for values in losses)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _mark_end(axes: Axes, x: Column, y: Column, color: str) -> None:
    """A cross at the last point, within the picture."""
    if len(x):
        within = min(y[-1], axes.get_ylim()[1])
        axes.plot(x[-1], within, "x", color=color, ms=9, mew=2, clip_on=False, zorder=5)

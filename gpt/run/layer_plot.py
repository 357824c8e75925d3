"""layers.png: the statistics of a run's layers, and of its whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gpt.diagnostics.layers import MEASURES, MODEL_MEASURES, Measure
from gpt.metrics import Record
from gpt.run.plot import OTHER, VALIDATION, label, label_plainly, literal_text, save

SMALLEST = 1e-100  # a logarithmic scale shows only larger values; fp32's smallest is 1e-45


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
    ends = f"layer 0: embeddings; layer {last}: head, and the final norm if any"
    figure.suptitle(f"{label(title)} ({ends})")
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
        label_plainly(axes)
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
        label_plainly(bar.ax)

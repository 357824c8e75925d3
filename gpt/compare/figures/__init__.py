"""The figures of a comparison.

base.py            what all figures share: data, styles, panels, legends, saving
seeds.py           the first question, seed by seed
losses.py          loss against learning rate, failed runs
thresholds.py      LR50 and highest stable rate, learning-rate sensitivity, searched thresholds
initialization.py  the networks before training
runs.py            the runs while they train: layers, loss curves

All are drawn by matplotlib, so that PNG, SVG and the report show the same. A figure's artists carry
ids: `arm-3` belongs to the fourth arm, `cell-ID` to a cell. The report turns them into elements
that a reader can hover over, follow by a link, and switch off.
"""

from __future__ import annotations

from collections.abc import Callable

from gpt.compare.figures.base import Plot, PlotData, plot_style
from gpt.compare.figures.initialization import (
    amplification,
    gradient_by_depth,
    sharpness_by_depth,
    start_by_layer,
)
from gpt.compare.figures.losses import failures, loss_beside, loss_by_rate
from gpt.compare.figures.runs import curves, layers
from gpt.compare.figures.seeds import by_seed
from gpt.compare.figures.thresholds import searched, sensitivity, thresholds

# Name of the files -> the function that draws them; it returns None if there is no data for it.
PLOTS: dict[str, Callable[[PlotData], Plot | None]] = {
    "by-seed": by_seed,
    "loss-by-rate": loss_by_rate,
    "beside": loss_beside,
    "failures": failures,
    "thresholds": thresholds,
    "searched": searched,
    "sensitivity": sensitivity,
    "gradient-by-depth": gradient_by_depth,
    "start-by-layer": start_by_layer,
    "amplification": amplification,
    "sharpness-by-depth": sharpness_by_depth,
    "layers": layers,
}


def draw(data: PlotData) -> dict[str, Plot]:
    """All plots for which there is data, by name, in the order of the report."""
    with plot_style():
        drawn = {name: plot(data) for name, plot in PLOTS.items()}
        return {name: plot for name, plot in drawn.items() if plot is not None} | curves(data)

"""The runs while they train: the layers at the last snapshot, and the loss curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gpt import metrics
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.verdicts import spikes
from gpt.compare.analysis.wording import UNIGRAM_ENTROPY
from gpt.compare.figures.base import (
    BETAS,
    PALE,
    STREAM,
    Plot,
    PlotData,
    by_block,
    legend,
    panels,
    plain_numbers,
)

CURVE_POINTS = 150
EARLY_STEPS = 200


def layers(data: PlotData) -> Plot | None:
    """Residual dependency and residual stream by layer, where diagnostics were on.

    From the setting and rate at which most arms trained.
    """
    snapshots = {o.cell.id: _last_snapshot(o) for o in data.outcomes if o.verdict is not None}
    trained = [o for o in data.outcomes if snapshots.get(o.cell.id) and not o.failed]
    if not trained:
        return None
    arms: dict[tuple[str, float], set[str]] = {}
    for outcome in trained:
        arms.setdefault((outcome.cell.setting_text, outcome.rate), set()).add(outcome.cell.arm)
    setting, rate = max(arms, key=lambda point: len(arms[point]))
    shown = [o for o in trained if (o.cell.setting_text, o.rate) == (setting, rate)]
    figure, axes_list = panels(3, width=3.4, height=3.2)
    for outcome in shown:
        for axes, measure in zip(
            axes_list, ("attention_beta", "mlp_beta", "stream_rms"), strict=True
        ):
            blocks = [
                r for r in snapshots[outcome.cell.id] if "attention_logit" in r and measure in r
            ]
            axes.plot(
                [r["layer"] for r in blocks],
                [r[measure] for r in blocks],
                **data.cell_line(outcome),
            )
    by_block(axes_list, (*BETAS, STREAM))
    legend(figure, data.styles)
    step = max(record["step"] for o in shown for record in snapshots[o.cell.id])
    return Plot(
        "training",
        "Inside the networks during training",
        f"A line per run at rate {rate:g}{f' ({setting})' if setting else ''} that did not fail, "
        f"at step {step}. β = Var[f]/Var[x + f], with x as the placement weights "
        "it; a placement that does not use its `add` module has none.",
        f"Residual dependency and RMS of the residual stream by block at step {step}, a line per "
        "run",
        figure,
    )


def _last_snapshot(outcome: Outcome) -> list[metrics.Record]:
    records = [r for r in metrics.read(outcome.directory / "metrics.jsonl") if "layer" in r]
    last = max((record["step"] for record in records), default=0)
    return [record for record in records if record["step"] == last]


def curves(data: PlotData) -> dict[str, Plot]:
    """Loss and gradient norm of every run, a plot for each setting and rate."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in data.outcomes:
        if outcome.verdict is not None:
            groups.setdefault((outcome.cell.setting_text, outcome.rate), []).append(outcome)
    order = sorted(groups, key=lambda point: (data.settings.index(point[0]), point[1]))
    return {
        f"curves-{number:02}": _curves(data, setting, rate, groups[setting, rate])
        for number, (setting, rate) in enumerate(order, 1)
    }


def _curves(data: PlotData, setting: str, rate: float, outcomes: Sequence[Outcome]) -> Plot:
    long = any(o.cell.config.training.steps > EARLY_STEPS for o in outcomes)
    early = [("loss", f"training loss, first {EARLY_STEPS} steps", EARLY_STEPS)] if long else []
    drawn = [("loss", "training loss", None), *early, ("grad_norm", "gradient norm", None)]
    figure, axes_list = panels(len(drawn), width=3.6, height=3.3)
    for outcome in outcomes:
        records = [
            record
            for record in metrics.read(outcome.directory / "metrics.jsonl")
            if "loss" in record and not record.get("skipped")
        ]
        for axes, (key, _, last) in zip(axes_list, drawn, strict=True):
            _draw_run(axes, records, key, last, data.cell_line(outcome))
    for axes, (key, title, _) in zip(axes_list, drawn, strict=True):
        axes.set_title(title)
        axes.set_xlabel("step")
        if key == "loss":
            axes.axhline(data.summary.unigram_entropy, color=PALE, lw=1, linestyle="--")
    axes_list[-1].set_yscale("log")
    plain_numbers(axes_list[-1].yaxis)
    legend(figure, data.styles)
    statuses = ", ".join(f"{o.cell.arm}, seed {o.seed}: {o.status}" for o in outcomes)
    return Plot(
        "curves",
        f"Rate {rate:g}{f', {setting}' if setting else ''}",
        f"A line per run; a ring marks a spike. The dashed line is {UNIGRAM_ENTROPY}.",
        f"Loss and gradient norm against the step. {statuses}",
        figure,
        tuple(outcome.cell.id for outcome in outcomes),
    )


def _draw_run(
    axes: Axes, records: Sequence[metrics.Record], key: str, last: int | None, style: dict[str, Any]
) -> None:
    steps, values = [r["step"] for r in records], [r[key] for r in records]
    axes.plot(*_thinned(steps, values, last), **{**style, "lw": 1.0})
    found = [n for n in spikes(values) if last is None or steps[n] <= last]
    axes.plot(
        [steps[n] for n in found],
        [values[n] for n in found],
        **{**style, "linestyle": "none", "marker": "o", "ms": 6, "mfc": "none"},
    )


def _thinned(
    steps: Sequence[int], values: Sequence[float | None], last: int | None
) -> tuple[list[float], list[float]]:
    """At most CURVE_POINTS points up to step `last`: means of neighbors, without None."""
    points = [
        (s, v)
        for s, v in zip(steps, values, strict=True)
        if v is not None and (last is None or s <= last)
    ]
    size = max(1, math.ceil(len(points) / CURVE_POINTS))
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [float(np.mean([s for s, _ in g])) for g in groups], [
        float(np.mean([v for _, v in g])) for g in groups
    ]

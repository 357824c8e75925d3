"""What the report's pictures and tables say, against the summary that they are made from.

Four arms in two settings, three rates and three seeds, of which no two agree in any number, so that
a number in the wrong place is noticed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_summary import ARMS, grid, outcome

from gpt import metrics
from gpt.compare import report
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import ArmSummary
from gpt.compare.analysis.summary import summarize
from gpt.compare.figures.base import Plot, PlotData, Section
from gpt.compare.figures.losses import MOST_RATES, failures, loss_by_rate
from gpt.compare.figures.runs import curves
from gpt.compare.figures.runs import layers as draw_layers
from gpt.compare.figures.thresholds import thresholds
from gpt.compare.grid import Grid

RATES, SEEDS, DEPTHS = (1e-3, 1e-2, 1e-1), 3, (2, 4)


def runs() -> list[Outcome]:
    """The share of failures rises with the rate, and more so from arm to arm and with depth."""
    found = []
    for number, (arm, layers) in enumerate((a, n) for a in ARMS for n in DEPTHS):
        for place, rate in enumerate(RATES):
            for seed in range(SEEDS):
                failed = 3 * place + seed >= number + 1
                loss = 2 + 0.1 * number + 0.02 * place + 0.3 * (seed == 2) + 0.001 * seed
                status = "plateaued" if failed else "trained"
                found.append(outcome(arm, rate, seed, loss, status=status, layers=layers))
    return found


@pytest.fixture(scope="module")
def data() -> PlotData:
    compared: Grid = grid(
        grid={"optimizer.learning_rate": list(RATES), "model.layers": list(DEPTHS)}, seeds=SEEDS
    )
    found = runs()
    return PlotData(compared, summarize(compared, found), found, [])


def panels(figure_axes: list[Axes]) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in figure_axes if axes.get_title()}


def test_lines_of_loss_by_rate_join_the_medians_of_their_arm(data: PlotData):
    drawn = panels(loss_by_rate(data).figure.axes)
    assert len(data.summary.arms) == 8
    for arm in data.summary.arms:
        style = data.styles[arm.arm]
        (line,) = [each for each in drawn[arm.setting].lines if each.get_gid() == style.gid]
        assert list(line.get_xdata()) == list(RATES)
        assert list(line.get_ydata()) == [at.median_loss for at in arm.by_rate]
        assert [at.median_loss for at in arm.by_rate] != [at.mean_loss for at in arm.by_rate]
        assert line.get_color() == style.color


def test_points_of_loss_by_rate_are_the_runs(data: PlotData):
    drawn = panels(loss_by_rate(data).figure.axes)
    for run in data.outcomes:
        style, (place,) = data.styles[run.cell.arm], run.cell.setting.values()
        gid = f"{style.gid} cell-{run.cell.id}"
        (point,) = [p for p in drawn[f"layers {place}"].lines if p.get_gid() == gid]
        assert (*point.get_xdata(), *point.get_ydata()) == (run.rate, run.loss)
        assert run.verdict is not None
        assert (point.get_marker() == "x") == run.verdict.failed


def test_the_figure_of_failures_has_each_arms_share_at_each_rate(data: PlotData):
    plot = failures(data)
    assert plot is not None
    drawn = panels(plot.figure.axes)
    for arm in data.summary.arms:
        axes = drawn[arm.arm]
        row = [label.get_text() for label in axes.get_yticklabels()].index(arm.setting)
        shares = np.asarray(axes.collections[0].get_array()).reshape(len(DEPTHS), len(RATES))[row]
        assert list(shares) == [at.failures / at.n for at in arm.by_rate]
        texts = {t.get_position(): t.get_text() for t in axes.texts}
        words = [texts[column, row] for column in range(len(RATES))]
        assert words == [f"{at.failures}/{at.n}" for at in arm.by_rate]


def test_a_table_of_failures_has_at_most_so_many_rates(data: PlotData):
    """A search tries other rates for each arm; with hundreds, nothing could be read."""
    found = [outcome("pre, cold", 1e-3 * (1 + n), 0, 2.0) for n in range(MOST_RATES + 1)]
    for count in (MOST_RATES, MOST_RATES + 1):
        plot = failures(replace(data, outcomes=found[:count]))
        assert (plot is None) == (count > MOST_RATES)


def test_arms_of_one_factor_differ_in_more_than_their_color(data: PlotData):
    placements = {name: {"model.norm.placement": name} for name in ("pre", "post", "peri", "none")}
    alone = grid(arms={"placement": placements}, contrasts=[], pairs=[])
    styles = replace(data, grid=alone).styles.values()
    for part in ("color", "shape", "dashes"):
        assert len({str(getattr(style, part)) for style in styles}) == 4
    assert len({style.color for style in data.styles.values()}) == 2  # of two factors
    assert len({style.shape for style in data.styles.values()}) == 2


def test_the_figure_of_thresholds_has_each_arms_lr50_at_each_depth(data: PlotData):
    axes = thresholds(data).figure.axes[0]
    for name, style in data.styles.items():
        arms = [arm for arm in data.summary.arms if arm.arm == name]
        drawn = {
            (float(x), float(y))
            for line in axes.lines
            if line.get_gid() == style.gid
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        }
        for depth, arm in zip(DEPTHS, arms, strict=True):
            assert any(
                x == pytest.approx(depth, rel=0.1) and y == arm.lr50.rate for x, y in drawn
            ), name


@pytest.fixture(scope="module")
def tables(data: PlotData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    (folder / "grid.yaml").write_text(data.grid.to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda data: {})
        report.write_report(folder, data.grid, data.summary, data.outcomes, [], [])
    return folder


def numbers(arm: ArmSummary) -> tuple[str, ...]:
    """What a table of arms must say of one."""
    return (
        f"{arm.failures} of {arm.runs}",
        f"{arm.highest_stable_rate:.3g}" if arm.highest_stable_rate else "none",
        f"{arm.lr_sensitivity:.3f}",
        f"{arm.best_loss:.3f} at {arm.best_rate:g}",
        f"{arm.initial_loss:.3f}",
    )


def test_the_pages_table_has_each_arms_own_numbers(data: PlotData, tables: Path):
    html = (tables / "report.html").read_text("utf-8")
    (section,) = re.findall(r'<h2 id="arms">.*?</table>', html, re.DOTALL)
    rows = [unescape(re.sub(r"<[^>]*>", " ", row)) for row in section.split("<tr ")[1:]]
    for arm, row in zip(data.summary.arms, rows, strict=True):
        assert arm.arm in row
        assert arm.setting in row
        for text in numbers(arm):
            assert text in row


def test_the_markdown_table_has_each_arms_own_numbers(data: PlotData, tables: Path):
    lines = (tables / "report.md").read_text("utf-8").splitlines()
    for arm in data.summary.arms:
        start = f"| {arm.arm} ({arm.setting}) | {arm.failures} of "
        (row,) = [line for line in lines if line.startswith(start)]
        for text in numbers(arm):
            assert text in row


def test_every_run_has_its_own_loss_in_the_page(data: PlotData, tables: Path):
    html = (tables / "report.html").read_text("utf-8")
    for run in data.outcomes:
        (row,) = re.findall(rf'<tr id="row-{re.escape(run.cell.id)}".*?</tr>', html, re.DOTALL)
        assert run.verdict is not None
        assert run.verdict.final_val_loss is not None
        assert f"{run.verdict.final_val_loss:.3f}" in row
        assert f"{run.cell.arm}, {run.rate:g}" in row
        assert f"seed {run.seed}" in row


@pytest.mark.parametrize("section", get_args(Section))
def test_a_new_plot_reaches_the_page_in_its_section(
    section: Section, data: PlotData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "grid.yaml").write_text(data.grid.to_yaml())
    plot = Plot(section, "A new title", "caption", "alt", Figure(figsize=(1, 1)))
    monkeypatch.setattr(report, "draw", lambda data: {"new": plot})
    report.write_report(tmp_path, data.grid, data.summary, data.outcomes, [], [])
    html = (tmp_path / "report.html").read_text("utf-8")
    assert '<figure id="new">' in html
    heading = html.partition('<figure id="new">')[0].rpartition('<h2 id="')[2].partition('"')[0]
    assert heading == ("curves" if section == "training" else section)


def test_a_skipped_update_is_not_drawn_as_a_spike(data: PlotData, monkeypatch: pytest.MonkeyPatch):
    """As it is not counted in the verdict."""
    records = [
        {"step": step, "loss": 2 + 0.1 * (step % 2), "grad_norm": 1.0} for step in range(1, 101)
    ]
    records[79]["loss"] = 90.0
    for skipped in (False, True):
        records[79]["skipped"] = skipped
        monkeypatch.setattr(metrics, "read", lambda path: records)
        plot = curves(replace(data, outcomes=data.outcomes[:1]))["curves-01"]
        _, rings = [line for line in plot.figure.axes[0].lines if line.get_gid()]
        assert list(rings.get_xdata()) == ([] if skipped else [80])


def test_the_step_of_the_layers_is_that_of_the_runs_drawn(
    data: PlotData, monkeypatch: pytest.MonkeyPatch
):
    """Another run, of another setting, has a later snapshot."""
    shown, other = data.outcomes[0], next(o for o in data.outcomes if o.cell.arm == ARMS[1])
    twin = replace(shown, cell=replace(shown.cell, id="twin", arm=ARMS[2]))
    assert not shown.failed
    assert not other.failed
    other = replace(other, cell=replace(other.cell, setting={"model.layers": 4}))
    runs = [replace(o, directory=Path(o.cell.id)) for o in (shown, twin, other)]
    snapshot = {"layer": 1, "attention_logit": 1.0, "stream_rms": 1.0}
    steps = {runs[0].cell.id: 20, "twin": 20, runs[2].cell.id: 90}
    monkeypatch.setattr(
        metrics, "read", lambda path: [{**snapshot, "step": steps[path.parent.name]}]
    )
    plot = draw_layers(replace(data, outcomes=runs))
    assert plot is not None
    assert "at step 20." in plot.caption
    assert "at step 20," in plot.alt

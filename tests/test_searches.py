"""Comparisons that search for the highest trainable rates."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean, geometric_mean

import pytest
from comparing import Make, Trainer, compare, write
from test_search import tree

from gpt.compare import comparison
from gpt.compare.analysis.headline import headline
from gpt.compare.analysis.searches import read_outcomes
from gpt.compare.analysis.statistics import at_least, mean_interval
from gpt.compare.figures.base import PlotData
from gpt.compare.figures.seeds import by_seed
from gpt.compare.figures.thresholds import searched, sensitivity, thresholds
from gpt.compare.grid import load

# Arm -> seed -> the highest rate at which its runs train.
EDGES = {"pre": (0.011, 0.014, 0.02, 0.02, 0.03), "post": (2e-3, 2.5e-3, 4e-3, 3e-3, 5e-3)}


@pytest.fixture
def trainer(trainer: Trainer) -> Trainer:
    trainer.edges = EDGES
    return trainer


def contents(directory: Path) -> dict[str, str]:
    names = ("search.json", "summary.json", "cells.csv", "report.md", "registration.json")
    texts = {name: (directory / name).read_text() for name in names}
    del texts["registration.json"]
    texts["report.md"] = re.sub("(Run with|Registered).*", "", texts["report.md"], flags=re.DOTALL)
    texts["summary.json"] = re.sub('"registered": .*', "", texts["summary.json"])
    return texts


def test_each_arm_and_seed_has_its_own_threshold(tiny: Make, tmp_path: Path, trainer: Trainer):
    found = compare(write(tmp_path / "grid.yaml", tree(tiny)), tmp_path / "run")
    assert len(found.searches) == 10
    for each in found.searches:
        edge = EDGES[each.arm][each.seed]
        assert each.low is not None
        assert each.high is not None
        assert each.rate is not None
        assert each.low <= edge < each.high == pytest.approx(1.25 * each.low, rel=1e-3)
        assert each.rate == pytest.approx(math.sqrt(each.low * each.high))
        assert (each.bound, each.monotone) == ("", True)
    assert len(trainer.seen) == len(set(trainer.seen)) == found.with_result
    logs = [math.log(e.rate) for e in found.searches if e.rate]
    of = [a - b for a, b in zip(logs[::2], logs[1::2], strict=True)]
    (contrast,) = found.contrasts
    assert contrast is not None
    assert contrast.value == pytest.approx(fmean(of))
    student = mean_interval(of)
    assert student is not None
    wider = at_least(student, math.log(1.25))  # half a bracket of each arm
    assert contrast.interval is not None
    assert contrast.interval.low == pytest.approx(wider.low, abs=1e-4)
    assert contrast.interval.low < student.low
    assert (contrast.p, contrast.reach, contrast.bounds) == (0.0625, ("",), ())
    assert "the highest trainable rate rises" in found.conclusions[0]
    assert found.conclusions[1].startswith("Highest trainable rates, geometric means")
    text = (tmp_path / "run/report.md").read_text()
    assert f"{found.searches[0].low:g} to {found.searches[0].high:g})" in text
    grid, cells = load(tmp_path / "grid.yaml")
    data = PlotData(grid, found, read_outcomes(grid, cells, tmp_path / "run"))
    plot = searched(data)
    assert plot is not None
    assert len(plot.figure.axes[0].lines) == 10
    assert thresholds(data) is sensitivity(data) is None
    screen = headline(grid, found, data.outcomes)
    assert screen.table.caption.startswith("Highest trainable rate, geometric mean and range")
    rates = [each.rate for each in found.searches if each.arm == "pre" and each.rate]
    mean = f"{geometric_mean(rates):.3g} ({min(rates):.3g} to {max(rates):.3g})"
    assert screen.table.rows[0] == ("pre", (mean,))
    tried = sorted({outcome.rate for outcome in data.outcomes})
    assert f"rates {tried[0]:g} to {tried[-1]:g}" in screen.holds_for
    dumbbell = by_seed(data)
    assert dumbbell is not None
    for figure in (dumbbell.figure, plot.figure):
        figure.draw_without_rendering()
        labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
        assert set(labels) & {"0.003", "0.01", "0.03"}
        assert not any("$" in text for text in labels)
    logged = json.loads((tmp_path / "run/search.json").read_text())
    assert sum(len(search["runs"]) for search in logged) == len(trainer.seen)
    assert [run["next"] for search in logged for run in search["runs"][-1:]] == [None] * 10


def test_bounds_open_the_interval_on_their_side(tiny: Make, tmp_path: Path, trainer: Trainer):
    """Post-norm never fails, so the difference may be lower than 0: the question stays open."""
    trainer.edges = {"pre": (0.01,) * 5, "post": (1e9,) * 5}
    rules = {"start": {"pre": 0.01, "post": 0.003}, "most_runs": 4}
    path = write(tmp_path / "grid.yaml", {**tree(tiny), "search": rules})
    found = compare(path, tmp_path / "run")
    assert {each.bound for each in found.searches if each.arm == "post"} == {"above"}
    assert max(each.runs for each in found.searches) == 4
    (contrast,) = found.contrasts
    assert contrast is not None
    assert (contrast.reach, contrast.answer) == (("at most",), "open")
    assert contrast.interval is not None
    assert contrast.interval.low == -math.inf


def test_a_slow_run_is_repeated_with_more_updates_which_decide(
    tiny: Make, tmp_path: Path, trainer: Trainer
):
    """Post-norm is slow at its first rates; with more updates it fails or trains."""
    trainer.slow_below = 0.0045
    trainer.edges = {**EDGES, "post": (0.001, 0.006)}
    path = write(tmp_path / "grid.yaml", {**tree(tiny), "seeds": 2})
    found = compare(path, tmp_path / "run")
    failed, trained = (each for each in found.searches if each.arm == "post")
    assert (trained.bound, trained.low, trained.high) == ("", 0.005859, 0.007324)
    assert (failed.low, failed.high, failed.runs) == (0.0007864, 0.001229, 8)
    assert failed.ended == "the limit of runs is reached"
    logged = json.loads((tmp_path / "run/search.json").read_text())
    runs = next(each["runs"] for each in logged if (each["arm"], each["seed"]) == ("post", 0))
    assert [(run["updates"], run["counts_as"]) for run in runs[:3]] == [
        (20, "slow"),
        (60, "failed"),
        (20, "slow"),
    ]
    longer = [name for name in trainer.seen if name.endswith("_steps-60")]
    assert runs[1]["cell"] in longer
    assert len(longer) == sum(run["updates"] == 60 for each in logged for run in each["runs"])
    rows = (tmp_path / "run/cells.csv").read_text().splitlines()[1:]
    assert len(rows) == found.with_result == found.planned == len(trainer.seen) - len(longer)
    assert not any("_steps-60" in row for row in rows)
    before = contents(tmp_path / "run")
    comparison.report(*load(path), tmp_path / "run")
    compare(path, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_slow_run_that_was_not_repeated_is_no_lower_end(
    tiny: Make, tmp_path: Path, trainer: Trainer
):
    """With seven runs, the last one is slow: the threshold is below the lowest that failed."""
    trainer.slow_below = 0.0045
    trainer.edges = {**EDGES, "post": (1e-4,)}
    rules = {"start": {"pre": 0.01, "post": 0.003}, "most_runs": 7}
    path = write(tmp_path / "grid.yaml", {**tree(tiny), "seeds": 1, "search": rules})
    found = next(each for each in compare(path, tmp_path / "run").searches if each.arm == "post")
    assert (found.bound, found.low, found.high, found.runs) == ("below", None, 0.001229, 7)
    assert found.rate == pytest.approx(0.001229)

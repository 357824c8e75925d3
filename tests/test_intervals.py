"""`benchmarks/intervals.py`: what it counts, and that it runs at small size."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import intervals
from gpt.compare.analysis.statistics import Interval


def test_the_share_is_of_true_trials_each_with_its_own_seed():
    assert intervals.share(400, lambda random: random.random() < 0.25) == pytest.approx(
        0.25, abs=0.06
    )


@pytest.mark.parametrize(
    ("value", "inside"), [(1.0, True), (2.0, True), (2.1, False), (0.9, False)]
)
def test_an_interval_contains_its_ends(value: float, inside: bool):
    assert intervals.contains(Interval(1.0, 2.0), value) == inside


def test_students_interval_covers_what_it_promises_and_an_error_is_rare(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(intervals, "SEEDS", (5, 8))
    normal = intervals.mean_coverage(300)["normal"]
    assert 0.91 < np.mean(list(normal.values())) < 0.98
    yes = intervals.power(400)
    assert max(yes["effect 0.0"].values()) < 0.07
    assert yes["effect 2.0"]["8"] > 0.9
    assert yes["effect 2.0"]["5"] == 0  # five pairs cannot give p <= 0.05


def test_two_stages_err_rarely_and_need_fewer_seeds_for_large_effects():
    found = intervals.two_stages(100)
    assert 0 < found["effect 0.0"]["YES"] + found["effect 0.0"]["NO"] < 0.08
    assert found["effect 2.0"]["YES"] > 0.9
    assert found["effect 2.0"]["seeds, on average"] < 8
    assert found["effect 0.0"]["seeds, on average"] > 9


def test_a_search_brackets_an_edge_and_a_soft_one_biases_it_towards_its_start(
    monkeypatch: pytest.MonkeyPatch,
):
    low, high, runs = intervals.searched(np.log(0.004), 0.0, np.random.default_rng(0))
    assert low < np.log(0.004) < high == pytest.approx(low + np.log(1.25), abs=1e-3)
    assert runs == 4
    monkeypatch.setattr(
        intervals, "SEARCHES", [(0.5, s, steps) for s in (0, 0.5) for steps in (4, -4)]
    )
    *sharp, from_below, from_above = (row["bias"] for row in intervals.search_coverage(40).values())
    assert from_below < min(sharp) - 0.05 < max(sharp) + 0.05 < from_above


def test_intervals_with_a_lost_run_cover_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intervals, "SEEDS", (8,))
    found = {name: row["8"] for name, row in intervals.lost_coverage(100).items()}
    without = found.pop("loss, the highest is lost, and its seed left out")
    assert without < 1.0
    assert min(found.values()) > 0.9


@pytest.mark.slow
def test_it_prints_a_table_of_each_kind():
    command = [sys.executable, ROOT / "benchmarks/intervals.py", "--repetitions", "4"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for title in intervals.TABLES:
        assert f"| {title} | " in text

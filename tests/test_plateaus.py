"""`benchmarks/plateaus.py`: the plateaus of a comparison, run again for more updates."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from comparing import Make, Trainer, compare, write
from test_search import tree

from benchmarks import plateaus
from gpt.compare.comparison import read_comparison
from gpt.run.directory import RunDirectory


def test_each_plateau_runs_again_and_is_counted(
    tiny: Make,
    tmp_path: Path,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Post-norm's first rate, 0.003, is too slow at first; pre-norm's plateaus stay."""
    trainer.edges, trainer.slow_below = {"pre": (0.011,), "post": (0.006,)}, 0.0045
    directory = tmp_path / "run"
    compare(write(tmp_path / "grid.yaml", {**tree(tiny), "seeds": 1}), directory)
    _, _, outcomes = read_comparison(directory)
    stuck = Counter(each.cell.arm for each in outcomes if each.status == "plateaued")
    failed = {each.cell.id for each in outcomes if each.status == "plateaued"}
    trainer.seen, trainer.slow_below = [], 0.0
    trainer.edges = {"pre": (0.011,), "post": (1.0,)}
    monkeypatch.setattr(sys, "argv", ["plateaus.py", str(directory), "--times", "2"])
    plateaus.main()
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert rows == [
        f"| post | stuck | {stuck['post'] - 1} | {stuck['post'] - 1} |",
        "| post | too slow | 1 | 1 |",
        f"| pre | stuck | {stuck['pre']} | 0 |",
    ]
    again = list(trainer.seen)
    assert set(again) == failed
    for name in again:
        config = RunDirectory(tmp_path / "run-x2/cells" / name).read_config()
        assert (config.training.steps, config.evaluation.every) == (40, 40)
        before = RunDirectory(directory / "cells" / name).read_config()
        assert (before.training.steps, before.seed) == (20, config.seed)
        assert config.schedule == before.schedule
    plateaus.main()
    assert trainer.seen == again  # what has run does not run again
    assert capsys.readouterr().out.splitlines()[-3:] == rows

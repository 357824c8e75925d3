"""Cells of one shape that a comparison trains together."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparing import Make, TwoCells, called, grid_tree, write, write_grid

from gpt import metrics
from gpt.compare.execution.tasks import make_tasks
from gpt.compare.grid import load
from gpt.errors import InputError, StoppedError


@pytest.fixture
def two_batched(tiny: Make, tmp_path: Path) -> TwoCells:
    """Of one shape, batched."""
    arms = {"warm-up": {"none": {"schedule.warmup": "none"}, "linear": {}}}
    changes: dict[str, Any] = {"contrasts": [], "pairs": [], "runner": "batched", "arms": arms}
    return TwoCells(tiny, tmp_path, steps=250, **changes)


@pytest.mark.usefixtures("in_this_process")
def test_batched_cells_give_what_processes_give(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The same files, verdicts and inputs; losses to rounding, which a wild rate magnifies."""
    tree = yaml.safe_load(write_grid(tiny, tmp_path).read_text())
    path, directory = write(tmp_path / "one.yaml", {**tree, "probes": False}), tmp_path / "one"
    each_alone = tmp_path / "each"
    assert called(capsys, path, "--runner", "processes", "--out-dir", each_alone)[0] == 0
    code, _, err = called(capsys, path, "--runner", "batched", "--out-dir", directory)
    assert code == 0, err
    assert (
        "with 2 batches of up to 4 cells, estimated from a short benchmark on this machine"
        in " ".join(err.split())
    )
    rows = []
    for each in (each_alone, directory):
        with (each / "cells.csv").open() as file:
            rows.append({row["id"]: row for row in csv.DictReader(file)})
    assert rows[0].keys() == rows[1].keys()
    for name, alone in rows[0].items():
        for key in ("status", "diverged_at", "steps"):
            assert rows[1][name][key] == alone[key]
        if alone["status"] == "trained":
            assert float(rows[1][name]["final_val_loss"]) == pytest.approx(
                float(alone["final_val_loss"]), abs=0.01
            )
        files = [
            sorted(p.name for p in (d / "cells" / name).iterdir()) for d in (each_alone, directory)
        ]
        assert files[0] == files[1]
        inputs = [
            [
                r["batches"]
                for r in metrics.read(d / "cells" / name / "metrics.jsonl")
                if "loss" in r
            ]
            for d in (each_alone, directory)
        ]
        assert inputs[0] == inputs[1]
    code, _, err = called(capsys, path, "--out-dir", directory)
    assert code == 0
    assert "all 8 cells have a result; reporting again" in err


def test_a_grid_without_a_batched_form_is_refused(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    base = tiny(model={"dropout": 0.1})
    path = write(tmp_path / "dropout.yaml", grid_tree(base, runner="batched"))
    with pytest.raises(SystemExit) as ended:
        cli.run("compare", [str(path), "--out-dir", str(tmp_path / "new")])
    assert ended.value.code == 2
    _, err = capsys.readouterr()
    assert "model.dropout: 0.1 cannot be batched" in err
    assert not (tmp_path / "new").exists()


def test_cells_are_divided_into_tasks_by_shape(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = tiny(sampling={"tokens": 0})
    arms = {
        "placement": {"pre": {}, "post": {"model.norm.placement": "post"}},
        "optimizer": {"adamw": {}, "muon": {"optimizer.name": "muon"}},
    }
    tree = grid_tree(base, arms=arms, contrasts=[], pairs=[])
    _, cells = load(write(tmp_path / "grid.yaml", tree))
    on_cpu = make_tasks(cells, "auto")
    assert [task.batched for task in on_cpu] == [False] * len(cells)
    monkeypatch.setattr(
        "gpt.compare.execution.tasks.pick_device", lambda name: torch.device("cuda")
    )
    on_gpu = make_tasks(cells, "auto")
    groups = [task for task in on_gpu if task.batched]
    assert [{cell.arm for cell in task.cells} for task in groups] == [
        {"pre, adamw"},
        {"post, adamw"},
    ]
    alone = [cell for task in on_gpu if not task.batched for cell in task.cells]
    assert {cell.arm for cell in alone} == {"pre, muon", "post, muon"}
    assert sum(len(task.cells) for task in on_gpu) == len(cells)
    assert not any(task.batched for task in make_tasks(cells, "processes"))
    with pytest.raises(InputError, match="muon cannot be batched"):
        make_tasks(cells, "batched")


@pytest.mark.slow
def test_batched_cells_are_stopped_saved_and_resumed(
    two_batched: TwoCells, request: pytest.FixtureRequest
):
    with pytest.raises(StoppedError):
        two_batched.run(stop=two_batched.are_training)
    stopped = two_batched.updates()
    assert len(set(stopped)) == 1
    assert 3 < stopped[0] < 250
    folders = list((two_batched.directory / "cells").iterdir())
    for folder in folders:
        assert (folder / "checkpoints" / "latest").is_file()
    request.getfixturevalue("in_this_process")
    assert two_batched.run()
    assert two_batched.updates() == [250, 250]
    for folder in folders:
        assert (folder / "loss.png").is_file()
        assert not (folder / "checkpoints").exists()


@pytest.mark.slow
def test_batched_cells_that_are_killed_are_tried_again(
    two_batched: TwoCells, request: pytest.FixtureRequest
):
    with pytest.raises(InputError, match="no cell has a result yet"):
        two_batched.run_and_kill_a_worker()
    lost = json.loads((two_batched.directory / "lost.json").read_text())
    assert [error["status"] for error in lost.values()] == ["killed", "killed"]
    request.getfixturevalue("in_this_process")
    assert two_batched.run()
    assert not (two_batched.directory / "lost.json").exists()

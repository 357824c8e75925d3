"""Runs that become longer, at another learning rate, and runs that end early."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_recovery import cut_off_at
from test_training import assert_same_run, records, stop_after

from gpt import checkpoint as checkpoints
from gpt import training
from gpt.checkpoint.state import Progress
from gpt.cli.train import report
from gpt.compare import grid as grids
from gpt.config import Config
from gpt.ensemble import train_together
from gpt.errors import InputError
from gpt.run import opening
from gpt.run.directory import RunDirectory, RunResult
from gpt.run.resume import describe_lr_change, lr_scale
from gpt.run.run import Run
from gpt.schedule import lr_multiplier

Make = Callable[..., Config]


def run(config: Config, out: Path, **options: Any) -> RunResult:
    return training.train(config, out, quiet=True, **options)


def rates(out: Path) -> dict[int, float]:
    return {r["step"]: r["learning_rate"] for r in records(out) if "learning_rate" in r}


# -- A longer run --------------------------------------------------------------------------------


def test_a_longer_run_says_how_its_learning_rate_jumps(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(tiny(), tmp_path / "run")
    longer = tiny(training={"steps": 30})
    training.train(longer, tmp_path / "run")
    full, schedule = longer.optimizer.learning_rate, longer.schedule
    before, after = full * lr_multiplier(schedule, 20, 20), full * lr_multiplier(schedule, 21, 30)
    printed = capsys.readouterr().err
    assert f"jumps from {before:.2e} at step 20 to {after:.2e} at step 21, by a factor" in printed
    assert f"{after / before:.3g}" in printed
    assert "schedule.rewarm: N" in printed


def test_a_rate_that_does_not_change_is_not_spoken_of(tiny: Make):
    body = {"warmup_steps": 5, "body": "constant"}
    short, long = tiny(schedule=body), tiny(schedule=body, training={"steps": 30})
    assert describe_lr_change(short, long, Progress(step=20)) is None
    warming_up = Progress(step=3)
    assert describe_lr_change(tiny(), tiny(training={"steps": 30}), Progress()) is None
    assert describe_lr_change(tiny(), tiny(training={"steps": 30}), warming_up) is None


def test_the_rate_moves_on_a_straight_line(tiny: Make):
    """By hand: from 0.0002 after step 10 towards a schedule that is constant at 0.001."""
    options = {"learning_rate": 1e-3}
    config = tiny(optimizer=options, schedule={"warmup": "none", "body": "constant", "rewarm": 4})
    scale = [lr_scale(config, step, (10, 2e-4)) for step in (9, 10, 11, 12, 13, 14, 15)]
    assert scale == pytest.approx([1, 1, 0.4, 0.6, 0.8, 1, 1])
    assert lr_scale(config, 1) == 1  # no line without a change


def test_a_rewarmed_run_is_the_same_when_it_is_stopped_or_killed(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Extended twice, the second time in the middle of the first line; each resumed in parts."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = {"warmup_steps": 5, "rewarm": 8}
    first, second, third = (
        tiny(schedule=schedule, training={"steps": steps}, checkpoint={"every": 5})
        for steps in (12, 16, 30)
    )
    for config in (first, second, third):
        run(config, whole)
    run(first, parts)
    for config, start, updates in ((second, 12, 2), (third, 16, 4)):
        with cut_off_at(monkeypatch, opening, "write_identity"):  # before config.yaml changes
            run(config, parts)
        with cut_off_at(monkeypatch, Run, "after_update"):  # before a checkpoint of it
            run(config, parts)
        assert checkpoints.newest_intact(parts / "checkpoints")[0].step == start
        assert run(config, parts, **stop_after(updates)).status == "interrupted"
        run(config, parts)
    assert_same_run(whole, parts, step=30)
    own = rates(whole)
    assert own == rates(parts)
    full, at = first.optimizer.learning_rate, lr_multiplier
    old, new = full * at(first.schedule, 12, 12), full * at(second.schedule, 13, 16)
    assert own[13] == pytest.approx(old + (new - old) / 8)
    last, target = own[16], full * at(third.schedule, 20, 30)
    assert own[20] == pytest.approx((last + target) / 2)
    assert own[24] == full * at(third.schedule, 24, 30)


def test_a_run_from_a_checkpoint_is_rewarmed_too(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(tiny(), tmp_path / "origin")
    faster = tiny(optimizer={"learning_rate": 0.05}, schedule={"rewarm": 5}, training={"steps": 30})
    training.train(
        faster, tmp_path / "run", resume=str(tmp_path / "origin/checkpoints/step-00000020")
    )
    last, reached = rates(tmp_path / "origin")[20], 0.05 * lr_multiplier(faster.schedule, 25, 30)
    text = f"moves from {last:.2e} at step 20 to {reached:.2e} at step 25, by a factor"
    assert text in capsys.readouterr().err
    same_length = faster.model_copy(update={"training": tiny().training})
    described = describe_lr_change(tiny(), same_length, Progress(step=10))
    assert described is not None
    assert described.startswith("another schedule or rate: the learning rate moves from")
    late = describe_lr_change(tiny(training={"steps": 29}), faster, Progress(step=28))
    assert late is not None
    assert late.endswith("; schedule.rewarm (5) is more than the 2 updates left")
    own = rates(tmp_path / "run")
    assert last < own[21] < own[22] < own[23] < own[24] < own[25] == reached


# -- A run that ends early -----------------------------------------------------------------------

# The validation losses, in order, at steps 0, 4, 8, ...
LOSSES = (5.0, 4.0, 4.5, 3.0, 3.0, 3.5)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Run._evaluate

    def fixed(self: Run) -> None:
        loss = LOSSES[self.progress.step // self.config.evaluation.every]
        monkeypatch.setattr(type(self.trainer), "evaluate", lambda *of: loss)
        evaluate(self)

    monkeypatch.setattr(Run, "_evaluate", fixed)


@pytest.mark.usefixtures("losses")
def test_a_run_stops_early_and_keeps_its_best_checkpoint(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """An equal loss is not a new lowest one; a rise before the best does not count later."""
    config = tiny(
        evaluation={"every": 3, "patience": 2}, checkpoint={"keep": 1}, training={"steps": 18}
    )
    result = run(config, tmp_path / "run")
    assert (result.status, result.step, result.stopped_early) == ("finished", 15, True)
    assert not result.gave_up
    assert result.best_val_loss == 3.0
    assert "stopped early at step 15: no validation loss below 3.0000 in 2 eval" in result.reason
    kept = checkpoints.steps(tmp_path / "run/checkpoints")
    assert list(kept) == [9, 15]
    assert report(result) == 0
    printed = capsys.readouterr().out
    assert f"best checkpoint  {kept[9]}" in printed
    assert "before the first update" not in printed
    assert run(config, tmp_path / "run").step == 15  # nothing is left to do


@pytest.mark.usefixtures("losses")
def test_a_run_that_only_becomes_worse_is_said_to(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(globals(), "LOSSES", (3.0, 5.0, 4.0))
    result = run(tiny(evaluation={"every": 3, "patience": 2}), tmp_path / "run")
    assert result.step == 6
    assert report(result) == 0
    printed = capsys.readouterr().out
    assert "No evaluation was better than the one before the first update." in printed
    assert "step-00000006 (lowest saved loss;" in printed


@pytest.mark.usefixtures("losses")
def test_patience_lasts_over_stops_and_kills(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(evaluation={"every": 3, "patience": 2}, training={"steps": 18})
    whole = run(config, tmp_path / "whole")
    for updates in (9, 4):
        assert run(config, tmp_path / "parts", **stop_after(updates)).status == "interrupted"
    with cut_off_at(monkeypatch, RunDirectory, "write_result"):
        run(config, tmp_path / "parts")
    assert run(config, tmp_path / "parts").reason == whole.reason
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=15)


@pytest.mark.usefixtures("losses")
def test_more_patience_continues_a_run_that_stopped_early(tiny: Make, tmp_path: Path):
    options = {"training": {"steps": 17}, "schedule": {"warmup_steps": 5}}
    run(tiny(evaluation={"every": 3, "patience": 1}, **options), tmp_path / "run")
    assert json.loads((tmp_path / "run/result.json").read_text())["step"] == 6
    patient = run(tiny(evaluation={"every": 3, "patience": 3}, **options), tmp_path / "run")
    assert (patient.step, patient.stopped_early) == (17, False)
    assert patient.reason == "completed all 17 steps"


@pytest.mark.usefixtures("losses")
def test_a_run_from_a_checkpoint_has_its_own_patience(tiny: Make, tmp_path: Path):
    """The losses 4.5, 3.0, 3.0: only the last one is no new lowest of this run."""
    options = {"checkpoint": {"keep": 9}, "training": {"steps": 12}}
    run(tiny(evaluation={"every": 3}, **options), tmp_path / "origin")
    config = tiny(evaluation={"every": 3, "patience": 1}, **options | {"training": {"steps": 15}})
    origin = str(tmp_path / "origin/checkpoints/step-00000006")
    result = run(config, tmp_path / "run", resume=origin)
    assert (result.step, result.stopped_early, result.best_val_loss) == (12, True, 3.0)


@pytest.mark.usefixtures("losses")
def test_runs_in_one_batch_stop_early_each_by_itself(tiny: Make, tmp_path: Path):
    config = tiny(evaluation={"every": 3, "patience": 2}, training={"steps": 18})
    others = [config.model_copy(update={"seed": seed}) for seed in (0, 1)]
    paths = [tmp_path / "0", tmp_path / "1"]
    nothing = partial(bool, False)
    results = train_together(
        others, paths, stop=nothing, on_update=lambda i: None, save_checkpoints=False
    )
    assert [result.stopped_early for result in results if isinstance(result, RunResult)] == [
        True
    ] * 2


def test_patience_needs_a_checkpoint_of_the_best_step(tiny: Make):
    with pytest.raises(ValueError, match=r"checkpoint\.every \(4\) must divide evaluation\.every"):
        tiny(evaluation={"every": 6, "patience": 2}, checkpoint={"every": 4})
    tiny(evaluation={"every": 6, "patience": 2}, checkpoint={"every": 3})


def test_a_comparison_refuses_patience(small_grid: dict[str, Any], tmp_path: Path):
    small_grid["options"] = {**small_grid.get("options", {}), "evaluation.patience": 3}
    (tmp_path / "grid.yaml").write_text(json.dumps(small_grid))
    with pytest.raises(InputError, match=r"evaluation\.patience: runs that stop early"):
        grids.load(tmp_path / "grid.yaml")

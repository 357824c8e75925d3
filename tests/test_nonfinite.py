"""Losses and gradients that are not finite: skipped, rolled back, or the end of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recovery import history, later, power_cut
from test_training import assert_same_run, records, run, stop_after, tensors

from gpt import checkpoint as checkpoints
from gpt.compare.analysis.outcomes import read_outcome
from gpt.compare.grid import Cell
from gpt.config import Config
from gpt.data.preparation import prepare
from gpt.data.sequences import TrainingSequences
from gpt.errors import InputError
from gpt.model.gpt2 import GPT
from gpt.run import recovery
from gpt.run.run import Run

Make = Callable[..., Config]


@pytest.fixture
def corrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.Tensor], bool]], None]:
    """`corrupt(when)` makes the training loss NaN for inputs of which `when` is true."""
    loss_fn = GPT.loss_fn

    def install(when: Callable[[torch.Tensor], bool]) -> None:
        def corrupted(self: GPT, x: torch.Tensor, *rest: Any) -> Any:
            total_loss, loss = loss_fn(self, x, *rest)
            nan = float("nan") if self.training and when(x) else 1.0
            return total_loss * nan, loss * nan

        monkeypatch.setattr(GPT, "loss_fn", corrupted)

    return install


def batch(config: Config, number: int) -> torch.Tensor:
    """Inputs of a run's batch of that number."""
    data = prepare(config.data)
    sequences = TrainingSequences(data.train, config.model.context, config.data_seed)
    return torch.from_numpy(sequences.batch(number, config.batch_sequences)[0])


def test_a_corrupted_update_is_skipped_and_counted(tiny: Make, tmp_path: Path, corrupt: Any):
    config = tiny(training={"nonfinite": "skip"}, diagnostics={"every": 7})
    bad = batch(config, 7)
    corrupt(lambda x: torch.equal(x, bad))
    whole = run(config, tmp_path / "whole")
    assert (whole.status, whole.step, whole.skipped_updates) == ("finished", 20, 1)
    lines = {r["step"]: r for r in records(tmp_path / "whole") if "loss" in r}
    assert [step for step in lines if lines[step]["loss"] is None] == [7]
    assert [step for step in lines if lines[step].get("skipped")] == [7]
    for _ in range(6):
        parts = run(config, tmp_path / "parts", **stop_after(4))
    assert parts.skipped_updates == 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_skipped_update_leaves_weights_and_moments_as_they_were(
    tiny: Make, tmp_path: Path, corrupt: Any
):
    config = tiny(
        training={"nonfinite": "skip"}, checkpoint={"every": 1, "keep": 30}, sampling={"tokens": 0}
    )
    bad = batch(config, 7)
    corrupt(lambda x: torch.equal(x, bad))
    run(config, tmp_path / "run")
    before, after, next_one = (tensors(tmp_path / "run", step) for step in (6, 7, 8))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in after if not torch.equal(after[name], next_one[name])] != []


def test_skipping_without_end_is_divergence(tiny: Make, tmp_path: Path, corrupt: Any):
    config = tiny(training={"nonfinite": "skip", "nonfinite_limit": 3})
    bad = [batch(config, number) for number in (2, 3, *range(6, 21))]
    corrupt(lambda x: any(torch.equal(x, each) for each in bad))
    result = run(config, tmp_path / "run")
    assert (result.status, result.step, result.skipped_updates) == ("diverged", 9, 6)
    assert "4 updates in a row were skipped" in result.reason


def test_the_failure_is_located_in_the_update_that_ended_the_run_not_in_a_skipped_one(
    tiny: Make, tmp_path: Path, corrupt: Any, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(training={"nonfinite": "skip", "nonfinite_limit": 1}, evaluation={"every": 20})
    bad = [batch(config, number) for number in (3, 6, 7)]
    corrupt(lambda x: any(torch.equal(x, each) for each in bad))
    searched = []
    monkeypatch.setattr(
        recovery, "locate_in_batch", lambda trainer, step, *batch: searched.append(step)
    )
    assert run(config, tmp_path / "run").status == "diverged"
    assert searched == [7]


@pytest.mark.parametrize("fails", [13, 3])
def test_wall_clock_time_counts_what_was_rolled_back(
    tiny: Make, tmp_path: Path, corrupt: Any, monkeypatch: pytest.MonkeyPatch, fails: int
):
    config = tiny(training={"nonfinite": "rollback"})
    bad, roll_back, seconds = batch(config, fails), Run.roll_back, []

    def noted(self: Run, fault: Any) -> bool:
        before = time.monotonic() - self.began
        done = roll_back(self, fault)
        seconds.append((before, self.progress.seconds))
        return done

    monkeypatch.setattr(Run, "roll_back", noted)
    corrupt(lambda x: torch.equal(x, bad))
    assert run(config, tmp_path / "run").rollbacks == 1
    ((before, after),) = seconds
    assert after >= before


@pytest.mark.parametrize(("fails", "back"), [(13, 10), (3, 0)])
def test_it_rolls_back_and_passes_over_the_batches_since(
    tiny: Make, tmp_path: Path, corrupt: Any, fails: int, back: int
):
    config = tiny(training={"nonfinite": "rollback"}, model={"dropout": 0.1})
    plain = run(config, tmp_path / "plain")
    bad = batch(config, fails)
    seen: list[torch.Tensor] = []

    def when(x: torch.Tensor) -> bool:
        seen.append(x.clone())
        return torch.equal(x, bad)

    corrupt(when)
    whole = run(config, tmp_path / "whole")
    assert (whole.status, whole.step, whole.rollbacks) == ("finished", 20, 1)
    assert whole.val_loss != plain.val_loss
    passed = fails - back
    order = [*range(1, fails + 1), *range(fails + 1, 21 + passed)]
    assert len(seen) == len(order)
    assert all(torch.equal(x, batch(config, n)) for x, n in zip(seen, order, strict=True))
    steps = [r["step"] for r in records(tmp_path / "whole") if "loss" in r]
    assert steps == list(range(1, 21))
    evaluated = [r["step"] for r in records(tmp_path / "whole") if "val_loss" in r]
    assert evaluated == [0, 10, 20]
    (event,) = history(tmp_path / "whole")
    assert (event["event"], event["step"], event["skipped_batches"]) == (
        "rolled back",
        back,
        passed,
    )
    for updates in (4, 11, 5, 2):  # cut off before, at and after it, it is the same run
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, tmp_path / "parts", **later(updates, power_cut))
    assert run(config, tmp_path / "parts").rollbacks == 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_rolling_back_without_end_is_divergence(tiny: Make, tmp_path: Path, corrupt: Any):
    config = tiny(training={"nonfinite": "rollback", "nonfinite_limit": 3})
    good = [batch(config, number) for number in range(1, 13)]
    corrupt(lambda x: not any(torch.equal(x, each) for each in good))
    result = run(config, tmp_path / "run")
    assert (result.status, result.step, result.rollbacks) == ("diverged", 11, 3)
    assert list(checkpoints.steps(tmp_path / "run/checkpoints")) == [10]


@pytest.mark.parametrize(
    ("nonfinite", "said"), [("skip", "; 1 updates skipped"), ("rollback", "; rolled back 1 times")]
)
def test_a_rollback_is_in_the_record(
    tiny: Make, tmp_path: Path, corrupt: Any, nonfinite: str, said: str
):
    config = tiny(training={"nonfinite": nonfinite})
    bad = batch(config, 13)
    corrupt(lambda x: torch.equal(x, bad))
    run(config, tmp_path / "cells/one")
    outcome = read_outcome(Cell("one", "arm", {}, {}, config), tmp_path)
    assert outcome.status != "diverged"
    assert outcome.verdict is not None
    assert outcome.verdict.reason.endswith(said)


@pytest.mark.parametrize("updates", [12, 11, 5])
def test_a_stop_changes_nothing_of_a_rollback(
    tiny: Make, tmp_path: Path, corrupt: Any, updates: int
):
    """What is saved for a stop is no checkpoint to go back to, and does not stay."""
    config = tiny(training={"nonfinite": "rollback"}, checkpoint={"every": 5})
    bad = batch(config, 13)
    corrupt(lambda x: torch.equal(x, bad))
    run(config, tmp_path / "whole")
    assert run(config, tmp_path / "parts", **stop_after(updates)).step == updates
    assert run(config, tmp_path / "parts").rollbacks == 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for folder in ("whole", "parts"):
        assert list(checkpoints.steps(tmp_path / folder / "checkpoints")) == [15, 20]


@pytest.mark.parametrize("nonfinite", ["stop", "skip", "rollback"])
def test_fp16_does_not_overflow_for_ever(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nonfinite: str
):
    loss_fn = GPT.loss_fn

    def overflowing(self: GPT, *arguments: Any) -> Any:
        total_loss, loss = loss_fn(self, *arguments)
        bad = self.token_embedding.weight[0, 0] * 1e30
        return total_loss + (bad - bad.detach()) * 1e30, loss

    monkeypatch.setattr(GPT, "loss_fn", overflowing)
    options = {"precision": "fp16", "nonfinite": nonfinite, "nonfinite_limit": 4}
    result = run(tiny(training=options), tmp_path / "run")
    assert result.status == "diverged"
    assert "5 updates in a row were skipped" in result.reason


def test_a_diverged_run_cannot_be_resumed(tiny: Make, tmp_path: Path, corrupt: Any):
    bad = batch(tiny(), 13)
    corrupt(lambda x: torch.equal(x, bad))
    assert run(tiny(), tmp_path / "run").status == "diverged"
    with pytest.raises(InputError, match="has diverged and cannot be resumed;"):
        run(tiny(training={"nonfinite": "rollback"}), tmp_path / "run")


def test_a_rollback_keeps_what_earlier_options_kept(tiny: Make, tmp_path: Path, corrupt: Any):
    """It returns to a checkpoint that was saved before the options changed."""
    common: dict[str, Any] = {"evaluation": {"every": 30}, "training": {"nonfinite": "rollback"}}
    before = tiny(checkpoint={"every": 2, "keep": 1, "keep_every": 4}, **common)
    run(before, tmp_path / "run", **stop_after(11))
    bad = batch(before, 12)
    corrupt(lambda x: torch.equal(x, bad))
    after = tiny(checkpoint={"every": 2, "keep": 1}, **common)
    assert run(after, tmp_path / "run").rollbacks == 1
    assert set(checkpoints.steps(tmp_path / "run/checkpoints")) >= {4, 8, 20}

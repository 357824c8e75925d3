"""Stops at any moment, runs in threads, and what training leaves as it was in its process."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import assert_same_run, records, stop_after

from gpt import checkpoint as checkpoints
from gpt import training
from gpt.config import Config
from gpt.data.preparation import prepare
from gpt.data.sequences import TrainingSequences
from gpt.ensemble import train_together
from gpt.errors import NonFiniteError
from gpt.io.wait import raise_if
from gpt.model.gpt2 import GPT
from gpt.run import opening
from gpt.run.directory import RunResult
from gpt.run.run import Run
from gpt.trainer import Trainer

Make = Callable[..., Config]


def run(config: Config, out: Path, **options: Any) -> RunResult:
    return training.train(config, out, quiet=True, **options)


def stop_when_asked(times: int) -> tuple[Callable[[], bool], list[None]]:
    """A `stop` that comes true when it is asked for the n-th time, and the list of those times."""
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) >= times

    return stop, asked


def files(out: Path) -> dict[str, str]:
    """SHA-256 of every file of a run that has no times in it."""
    with_times = {"metrics.jsonl", "result.json", "history.jsonl", "environment.json", "loss.png"}
    with_times |= {"state.json", "manifest.json"}
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in with_times
    }


@pytest.fixture
def every(tiny: Make) -> Config:
    """Six updates of two micro-batches, with everything that may come between two updates."""
    return tiny(
        model={"dropout": 0.2, "layers": 1},
        training={"steps": 6, "micro_batch": 2},
        evaluation={"every": 2, "sequences": 5},
        sampling={"tokens": 3, "every": 3},
        checkpoint={"every": 3},
        diagnostics={"every": 4},
    )


@pytest.mark.parametrize("moments", [13, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stop_whenever_it_is_asked_for_changes_nothing(
    every: Config, tmp_path: Path, moments: int
):
    """In an evaluation, between micro-batches, while a sample is drawn, before and after updates.

    Every third moment, as the moments repeat themselves from update to update; or only a few.
    """
    prepare(every.data)
    never, asked = stop_when_asked(10**9)
    run(every, tmp_path / "whole", stop=never)
    assert len(asked) > 30
    reasons = set()
    numbers = range(1, len(asked) + 1, moments)
    for number in numbers:
        out = tmp_path / str(number)
        stop, _ = stop_when_asked(number)
        stopped = run(every, out, stop=stop)
        assert stopped.status == "interrupted"
        reasons.add(stopped.reason)
        assert run(every, out).status == "finished"
        assert_same_run(tmp_path / "whole", out, step=6)
        assert files(out) == files(tmp_path / "whole")
    assert "stopped before step 1" in reasons
    assert len(reasons) >= min(5, len(numbers))  # and after several of the steps


def test_stops_one_after_the_other_change_nothing(every: Config, tmp_path: Path):
    """Also where a stop comes in the middle of what an earlier one left to be done."""
    run(every, tmp_path / "whole")
    out = tmp_path / "parts"
    for times in (7, 2, 3, 4, 5, 6, 7, 8):
        stop, _ = stop_when_asked(times)
        run(every, out, stop=stop)
    assert run(every, out).status == "finished"
    assert_same_run(tmp_path / "whole", out, step=6)
    assert files(out) == files(tmp_path / "whole")


def test_a_stop_does_not_wait_for_an_evaluation(tiny: Make, tmp_path: Path, monkeypatch: Any):
    """What is due after the last update is left, and comes first when the run is resumed."""
    config = tiny()
    loss_fn, evaluated = GPT.loss_fn, []

    def counted(self: GPT, *arguments: Any) -> Any:
        if not self.training:
            evaluated.append(None)
        return loss_fn(self, *arguments)

    monkeypatch.setattr(GPT, "loss_fn", counted)
    run(config, tmp_path / "run", **stop_after(10))
    assert len(evaluated) == 2  # before the first update; 8 sequences in micro-batches of 4
    assert not list((tmp_path / "run/samples").iterdir())
    run(config, tmp_path / "run", **stop_after(0))
    assert len(evaluated) == 2
    assert [r for r in records(tmp_path / "run") if "val_loss" in r and r["step"] == 10] == []
    run(config, tmp_path / "run")
    assert [r["step"] for r in records(tmp_path / "run") if "val_loss" in r] == [0, 10, 20]


@pytest.mark.parametrize("training", [True, False])
def test_a_stop_is_heard_between_two_parts_of_an_update_or_evaluation(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: bool
):
    loss_fn, computed = GPT.loss_fn, []

    def counted(self: GPT, *arguments: Any) -> Any:
        if self.training == training:
            computed.append(None)
        return loss_fn(self, *arguments)

    monkeypatch.setattr(GPT, "loss_fn", counted)
    config = tiny(training={"micro_batch": 2})
    ended = run(config, tmp_path / "run", stop=lambda: bool(computed))
    assert ended.status == "interrupted"
    assert len(computed) == 1


@pytest.mark.parametrize("moments", [15, pytest.param(4, marks=pytest.mark.slow)])
def test_a_stop_of_cells_whenever_it_is_asked_for_changes_nothing(
    tiny: Make, tmp_path: Path, moments: int
):
    configs = [
        tiny(
            seed=seed,
            model={"layers": 1},
            training={"steps": 4},
            evaluation={"every": 2, "sequences": 8},
            sampling={"tokens": 2},
        )
        for seed in range(2)
    ]

    def together(out: Path, stop: Callable[[], bool]) -> list[Any]:
        paths = [out / str(i) for i in range(2)]
        ended = train_together(
            configs, paths, stop=stop, on_update=lambda index: None, save_checkpoints=False
        )
        assert all(isinstance(each, RunResult) for each in ended), ended
        return ended

    (tmp_path / "whole").mkdir()
    prepare(configs[0].data)
    never, asked = stop_when_asked(10**9)
    together(tmp_path / "whole", never)
    for number in range(1, len(asked) + 1, moments):
        out = tmp_path / str(number)
        out.mkdir()
        stop, _ = stop_when_asked(number)
        stopped = together(out, stop)
        assert len({each.step for each in stopped}) == 1
        together(out, lambda: False)
        for cell in "01":
            assert records(out / cell) == records(tmp_path / "whole" / cell)


# -- Divergence --------------------------------------------------------------------------------


def corrupt(monkeypatch: pytest.MonkeyPatch, config: Config, step: int) -> None:
    """Have the loss of the batch of update `step` be NaN."""
    sequences = TrainingSequences(
        prepare(config.data).train, config.model.context, config.data_seed
    )
    bad = torch.from_numpy(sequences.batch(step, config.batch_sequences)[0])
    loss_fn = GPT.loss_fn

    def corrupted(self: GPT, x: torch.Tensor, *rest: Any) -> Any:
        total_loss, loss = loss_fn(self, x, *rest)
        nan = float("nan") if self.training and torch.equal(x, bad) else 1.0
        return total_loss * nan, loss * nan

    monkeypatch.setattr(GPT, "loss_fn", corrupted)


def test_a_stop_in_the_search_for_a_divergence_is_not_its_end(tiny: Make, tmp_path: Path):
    config = tiny(
        optimizer={"name": "sgd", "learning_rate": 1e6, "clip": None, "momentum": 0},
        schedule={"warmup": "none"},
    )
    whole = run(config, tmp_path / "whole")
    assert whole.status == "diverged"
    assert whole.failure is not None
    assert whole.failure.place is not None
    searched = Run._locate

    def stopped_search(self: Run, fault: Any, **options: Any) -> Any:
        self.trainer.check_stop = partial(raise_if, lambda: True)
        return searched(self, fault, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_locate", stopped_search)
        stopped = run(config, tmp_path / "parts")
    assert stopped.status == "interrupted"
    assert stopped.reason.startswith(whole.reason.partition(",")[0])
    resumed = run(config, tmp_path / "parts")
    assert resumed.failure == whole.failure
    assert resumed.reason == whole.reason
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


@pytest.mark.parametrize("updates", [2, 6])
def test_what_was_saved_for_a_stop_does_not_outlive_a_divergence(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
):
    """`latest` names what it names in the undisturbed run, before the first checkpoint as well."""
    every = {2: 10, 6: 5}[updates]
    config = tiny(checkpoint={"every": every}, evaluation={"every": 20})
    corrupt(monkeypatch, config, 8)
    assert run(config, tmp_path / "whole").status == "diverged"
    run(config, tmp_path / "parts", **stop_after(updates))
    assert checkpoints.read_pointer(tmp_path / "parts/checkpoints", "latest") is not None
    assert run(config, tmp_path / "parts").status == "diverged"
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_the_end_of_a_run_outlives_a_divergence_after_it_was_extended(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options: dict[str, Any] = {"checkpoint": {"every": 100}, "evaluation": {"every": 3}}
    run(tiny(training={"steps": 6}, **options), tmp_path / "run")
    longer = tiny(training={"steps": 12}, **options)
    corrupt(monkeypatch, longer, 9)
    run(longer, tmp_path / "run", **stop_after(2))
    assert run(longer, tmp_path / "run").status == "diverged"
    last = checkpoints.read_pointer(tmp_path / "run/checkpoints", "latest")
    assert last is not None
    assert last.name == "step-00000006"


def test_the_end_of_a_run_outlives_a_kill_while_it_is_extended(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The config names the new length already, and nothing has been saved since."""
    options: dict[str, Any] = {"checkpoint": {"every": 100}, "evaluation": {"every": 3}}
    run(tiny(training={"steps": 6}, **options), tmp_path / "run")
    longer = tiny(training={"steps": 12}, **options)
    corrupt(monkeypatch, longer, 9)
    write = opening.write_identity

    def killed(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(opening, "write_identity", killed)
        with pytest.raises(KeyboardInterrupt):
            run(longer, tmp_path / "run")
    assert run(longer, tmp_path / "run").status == "diverged"
    last = checkpoints.read_pointer(tmp_path / "run/checkpoints", "latest")
    assert last is not None
    assert last.name == "step-00000006"


def test_a_stop_between_micro_batches_saves_no_corrupted_weights(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(training={"steps": 8, "micro_batch": 2}, checkpoint={"every": 100})
    update, parts = Trainer.update, Trainer.micro_batches
    step = 0

    def corrupted(self: Trainer, *args: Any) -> bool:
        skipped = update(self, *args)
        if step == 3:
            with torch.no_grad():
                self.model.token_embedding.weight.fill_(math.inf)
        return skipped

    def counted(self: Trainer, number: int, *batch: Any) -> Any:
        nonlocal step
        step = number
        return parts(self, number, *batch)

    monkeypatch.setattr(Trainer, "update", corrupted)
    monkeypatch.setattr(Trainer, "micro_batches", counted)
    run(config, tmp_path / "run", stop=lambda: step == 4)
    assert not checkpoints.steps(tmp_path / "run/checkpoints")


def test_a_stop_does_not_wait_for_a_search_in_the_validation_text(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    searched = []
    monkeypatch.setattr("gpt.run.recovery.first_nonfinite", lambda *a: searched.append(a))
    loss_fn = GPT.loss_fn

    def corrupted(self: GPT, *arguments: Any) -> Any:
        total_loss, loss = loss_fn(self, *arguments)
        return total_loss, loss if self.training else loss * math.nan

    monkeypatch.setattr(GPT, "loss_fn", corrupted)
    ended = run(tiny(), tmp_path / "run", stop=lambda: bool(searched))
    assert ended.status == "interrupted"
    assert len(searched) == 1


# -- The process it runs in ----------------------------------------------------------------------


def test_runs_in_threads_are_the_runs_one_after_the_other(tiny: Make, tmp_path: Path):
    configs = [
        tiny(seed=seed, model={"dropout": 0.3}, training={"steps": 8}, sampling={"tokens": 0})
        for seed in range(3)
    ]
    for config in configs:
        run(config, tmp_path / f"turn-{config.seed}")
    corpus = configs[0].data.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    configs = [config.model_copy(update={"data": corpus}) for config in configs]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    threads = [
        threading.Thread(target=run, args=(config, tmp_path / f"thread-{config.seed}"))
        for config in configs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.rand(3), expected)
    for seed in range(3):
        assert_same_run(tmp_path / f"turn-{seed}", tmp_path / f"thread-{seed}", step=8)


DENORMALS = """
import sys
from functools import partial
from pathlib import Path
import torch
from gpt.config import Config
from gpt.training import train

torch.set_num_threads(2)
config = Config.model_validate_json(Path(sys.argv[1]).read_text())
train(config, sys.argv[2], quiet=True)
small = torch.full((2_000_000,), 1e-40) * 1.0  # shared by torch's threads
print(int((small == 0).sum()), sys.float_info.min / 2 > 0)
"""


def test_training_leaves_denormal_numbers_alone(tiny: Make, tmp_path: Path):
    torch.set_flush_denormal(False)  # the commands, which other tests run here, turn it on
    run(tiny(training={"steps": 1}), tmp_path / "run")
    assert sys.float_info.min / 2 > 0


@pytest.mark.slow
def test_training_leaves_the_denormal_numbers_of_other_threads_alone(
    tiny: Make, tmp_path: Path, environment: dict[str, str]
):
    config = tiny(training={"steps": 2, "batch_sequences": 64}, model={"width": 64})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", DENORMALS, tmp_path / "config.json", tmp_path / "run"],
        env={**environment, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "0 True\n", done.stderr


def test_a_huge_batch_does_not_hold_up_a_stop(tiny: Make, tmp_path: Path):
    config = tiny(training={"batch_sequences": 10**7, "micro_batch": 1})
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 20

    result = run(config, tmp_path / "run", stop=stop)
    assert (result.status, result.step) == ("interrupted", 0)


def test_an_evaluation_that_fails_after_a_resume_leaves_what_the_undisturbed_run_does(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The checkpoint of a stop before an evaluation is not one to roll back to, or to keep."""
    config = tiny(checkpoint={"every": 5}, training={"nonfinite": "rollback", "nonfinite_limit": 2})
    evaluate = Run._evaluate

    def failing(self: Run) -> None:
        evaluate(self)
        if self.progress.step == 10:
            raise NonFiniteError(10, "validation loss", "the validation loss became nan")

    monkeypatch.setattr(Run, "_evaluate", failing)
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", **stop_after(10))
    parts = run(config, tmp_path / "parts")
    assert (whole.status, whole.rollbacks) == (parts.status, parts.rollbacks) == ("diverged", 2)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")

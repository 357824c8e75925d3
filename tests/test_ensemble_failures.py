"""Cells trained together that fail, are stopped, or do not fit in memory."""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_ensemble import CELLS, losses, together
from test_training import assert_same_run

from gpt.config import Config
from gpt.ensemble import BatchedTrainer, train_together
from gpt.errors import InputError
from gpt.model.gpt2 import GPT
from gpt.trainer import Trainer
from gpt.training import train

Make = Callable[..., Config]


# -- A cell that fails -------------------------------------------------------------------------


def test_a_cell_that_diverges_does_not_affect_its_neighbors(tiny: Make, tmp_path: Path):
    """The others are, to the last bit, what they are beside a cell that does not."""
    wild = tiny(seed=3, optimizer={"learning_rate": 1e30})
    calm = [tiny(**cell) for cell in CELLS]
    ended = together([calm[0], wild, *calm[1:]], tmp_path / "wild")
    together([calm[0], tiny(seed=3), *calm[1:]], tmp_path / "calm")
    for i in (0, 2, 3):
        assert ended[i].status == "finished"
        assert_same_run(tmp_path / f"calm/{i}", tmp_path / f"wild/{i}")
    alone = train(wild, tmp_path / "alone", quiet=True)
    failed = ended[1]
    assert (failed.status, failed.step, failed.reason) == ("diverged", alone.step, alone.reason)
    assert failed.failure == alone.failure
    assert failed.failure is not None
    assert failed.failure.place is not None


def test_a_cell_that_failed_keeps_its_weights(tiny: Make):
    """Also while nobody has read its loss yet, and when later batches are fine again."""
    device = torch.device("cpu")
    trainers = [Trainer(tiny(seed=seed), 257, device) for seed in range(2)]
    for trainer in trainers:
        trainer.reset()
    models = [trainer.model for trainer in trainers]
    batched = BatchedTrainer(trainers)
    tokens = torch.randint(257, (2, 4, 17))
    x, y = tokens[..., :-1], tokens[..., 1:]
    losses, norms = batched.backward(x, y)
    losses[1] = math.nan
    before = [{n: p.clone() for n, p in model.named_parameters()} for model in models]
    batched.update([1.0, 1.0], losses, norms)
    batched.update([1.0, 1.0], *batched.backward(x, y))
    moved = [
        any(not torch.equal(p, old[n]) for n, p in model.named_parameters())
        for model, old in zip(models, before, strict=True)
    ]
    assert moved == [True, False]
    assert all(value.isfinite().all() for value in trainers[1].optimizer.state_tensors().values())


def test_an_error_of_the_batch_ends_all_cells_and_closes_their_files(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also those of cells at another step, whose turn had not come."""
    configs = [tiny(seed=seed) for seed in range(3)]
    together(configs[:1], tmp_path, updates=4)

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(BatchedTrainer, "backward", fail)
    paths = [tmp_path / str(i) for i in range(3)]
    options: dict[str, Any] = {"stop": lambda: False, "on_update": lambda i: None}
    ended = train_together(configs, paths, save_checkpoints=False, **options)
    assert [type(each) for each in ended] == [ZeroDivisionError] * 3
    opened = [file.path for file in psutil.Process().open_files()]
    assert [path for path in opened if path.startswith(str(tmp_path))] == []


def test_the_stack_shrinks_when_cells_have_ended(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = []

    class Counted(BatchedTrainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(len(self.alive))

    monkeypatch.setattr("gpt.ensemble.BatchedTrainer", Counted)
    wild = [tiny(seed=seed, optimizer={"learning_rate": 1e30}) for seed in (3, 4)]
    calm = [tiny(**cell) for cell in CELLS[:2]]
    ended = together([wild[0], calm[0], wild[1], calm[1]], tmp_path / "one")
    assert [each.status for each in ended] == ["diverged", "finished"] * 2
    assert made == [4, 2]
    for i, config in ((1, calm[0]), (3, calm[1])):
        train(config, tmp_path / f"alone-{i}", quiet=True)
        one, other = losses(tmp_path / f"one/{i}"), losses(tmp_path / f"alone-{i}")
        assert (one - other).abs().max() < 1e-4


def test_what_one_cell_raises_ends_that_cell_only(tiny: Make, tmp_path: Path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1/notes.txt").write_text("not a run")
    configs = [tiny(**cell) for cell in CELLS]
    ended = train_together(
        configs,
        [tmp_path / str(i) for i in range(3)],
        stop=lambda: False,
        on_update=lambda i: None,
        save_checkpoints=False,
    )
    assert isinstance(ended[1], InputError)
    assert [getattr(each, "status", None) for each in ended] == ["finished", None, "finished"]


# -- Stopping, memory --------------------------------------------------------------------------


def test_stopped_cells_continue_together_and_alone(tiny: Make, tmp_path: Path):
    configs = [tiny(**cell) for cell in CELLS]
    together(configs, tmp_path / "whole")
    first = together(configs, tmp_path / "parts", updates=10, saves=False)
    assert {(each.status, each.step) for each in first} == {("interrupted", 10)}
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "parts/0", alone)
    together(configs, tmp_path / "parts")
    for i in range(len(configs)):
        assert_same_run(tmp_path / f"whole/{i}", tmp_path / f"parts/{i}")
    train(configs[0], alone, quiet=True)
    assert (losses(alone) - losses(tmp_path / "whole/0")).abs().max() < 1e-4


def test_cells_at_several_steps_go_on_each_from_its_own(tiny: Make, tmp_path: Path):
    configs = [tiny(**cell) for cell in CELLS]
    together(configs[:2], tmp_path / "parts", updates=5)
    ended = together(configs, tmp_path / "parts")
    assert [each.step for each in ended] == [20, 20, 20]
    for i, config in enumerate(configs):
        train(config, tmp_path / f"alone-{i}", quiet=True)
        one, other = losses(tmp_path / f"parts/{i}"), losses(tmp_path / f"alone-{i}")
        assert (one - other).abs().max() < 1e-4


def test_checkpoints_are_saved_only_if_they_are_wanted(tiny: Make, tmp_path: Path):
    together([tiny()], tmp_path / "kept")
    together([tiny()], tmp_path / "not", saves=False)
    assert (tmp_path / "kept/0/checkpoints/step-00000020").is_dir()
    assert not (tmp_path / "not/0/checkpoints").exists()


def test_as_many_at_once_as_the_memory_holds(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gpt.hardware.memory.models_at_once", lambda *args: 2)
    configs = [tiny(**cell) for cell in CELLS]
    together(configs, tmp_path / "two")
    monkeypatch.undo()
    together(configs, tmp_path / "three")
    for i in range(3):
        one, other = losses(tmp_path / f"two/{i}"), losses(tmp_path / f"three/{i}")
        assert (one - other).abs().max() < 1e-4


def test_without_memory_for_all_fewer_are_trained_at_once(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Those that have ended stay ended; the others start from where they were."""
    whole = BatchedTrainer.backward

    def limited(self: BatchedTrainer, *batch: torch.Tensor) -> Any:
        if len(self.alive) > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(self, *batch)

    monkeypatch.setattr(BatchedTrainer, "backward", limited)
    configs = [tiny(seed=seed) for seed in range(5)]
    ended = together(configs, tmp_path / "few")
    assert [each.step for each in ended] == [20] * 5
    monkeypatch.setattr(BatchedTrainer, "backward", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        together([tiny(seed=9)], tmp_path / "none")


def no_room(*batch: Any) -> None:
    raise torch.OutOfMemoryError("no room")


def test_ended_cells_hold_no_memory(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a stack that was made smaller nothing is left."""
    stacks: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Watched(BatchedTrainer):
        def __init__(self, *args: Any) -> None:
            alive.append(sum(stack() is not None for stack in stacks))
            super().__init__(*args)
            stacks.append(weakref.ref(self.weights["token_embedding.weight"]))

    monkeypatch.setattr("gpt.ensemble.BatchedTrainer", Watched)
    wild = [tiny(seed=seed, optimizer={"learning_rate": 1e30}) for seed in (3, 4)]
    together([wild[0], tiny(), wild[1]], tmp_path / "one")
    gc.collect()
    assert alive == [0, 0]
    assert [stack() for stack in stacks] == [None, None]


def test_out_of_memory_makes_micro_batches_smaller(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, seen = GPT.loss_fn, []

    def loss_fn(self: GPT, x: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(x))
        if len(x) > 2 and len(seen) > 3:
            raise torch.OutOfMemoryError("no room")
        return whole(self, x, *rest)

    monkeypatch.setattr(GPT, "loss_fn", loss_fn)
    configs = [tiny(evaluation={"sequences": 2}, **cell) for cell in CELLS]
    ended = together(configs, tmp_path / "small")
    monkeypatch.undo()
    together(configs, tmp_path / "one")
    assert {each.status for each in ended} == {"finished"}
    assert {4, 2} <= set(seen)
    for i in range(3):
        one, other = losses(tmp_path / f"small/{i}"), losses(tmp_path / f"one/{i}")
        assert (one - other).abs().max() < 1e-4

"""A run that was stopped or killed resumes as if it had not been."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_training import assert_same_run, power_cut_after, records, run, stop_after, tensors

from gpt.config import Config
from gpt.data.preparation import prepare
from gpt.data.sequences import TrainingSequences
from gpt.errors import InputError
from gpt.hardware import memory
from gpt.model.placement import PLACEMENTS
from gpt.optim import OPTIMIZERS

Make = Callable[..., Config]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_20_steps_are_10_and_10_more(tiny: Make, tmp_path: Path, optimizer: str):
    config = tiny(
        model={"dropout": 0.1},
        optimizer={"name": optimizer},
        training={"micro_batch": 2},
    )
    whole = run(config, tmp_path / "whole")
    first = run(config, tmp_path / "parts", **stop_after(10))
    assert (first.status, first.step) == ("interrupted", 10)
    second = run(config, tmp_path / "parts")
    assert (second.status, second.step) == ("finished", 20)
    assert second.val_loss == whole.val_loss
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_on_a_fixed_batch_resumes_on_it(tiny: Make, tmp_path: Path):
    """In micro-batches, by the digest of all inputs so far and the loss, which only falls."""
    config = tiny(
        data={"windows": "fixed"}, training={"micro_batch": 2}, schedule={"warmup": "none"}
    )
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", **stop_after(7))
    run(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    train = prepare(config.data).train
    first = TrainingSequences(train, 16, config.data_seed).batch(1, 4)[0]
    digest, losses = "", []
    for record in records(tmp_path / "whole"):
        if "loss" in record:
            for sequence in first:
                digest = hashlib.sha256(digest.encode() + sequence.tobytes()).hexdigest()
            assert record["batches"] == digest[:16]
            losses.append(record["loss"])
    assert len(losses) == 20
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_resuming_changes_nothing_of_any_placement(tiny: Make, tmp_path: Path, placement: str):
    config = tiny(
        model={"layers": 4, "dropout": 0.2, "norm": {"placement": placement}},
        training={"steps": 3},
        sampling={"tokens": 0},
    )
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", **stop_after(2))
    run(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=3)


@pytest.mark.parametrize("placement", ["pre", "admin"])
def test_resuming_at_every_single_step_changes_nothing(tiny: Make, tmp_path: Path, placement: str):
    config = tiny(
        model={"layers": 4, "dropout": 0.2, "norm": {"placement": placement}},
        training={"steps": 7},
        evaluation={"every": 3},
    )
    run(config, tmp_path / "whole")
    statuses = [run(config, tmp_path / "parts", **stop_after(1)).status for _ in range(8)]
    assert statuses == ["interrupted"] * 7 + ["finished"]  # the last is evaluated when resumed
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=7)


def test_a_crash_resumes_from_the_last_checkpoint(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny()
    run(config, tmp_path / "whole")

    for updates in (4, 13):  # before the first checkpoint, and after it
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, tmp_path / "parts", **power_cut_after(updates))
    assert run(config, tmp_path / "parts").status == "finished"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_keeps_its_micro_batch_whatever_memory_is_free(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another micro-batch would add up the gradients in another order."""
    run(tiny(), tmp_path / "whole")
    run(tiny(), tmp_path / "parts", **stop_after(12))
    monkeypatch.setattr(memory, "_activation_memory", lambda device: 1)
    run(tiny(), tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_starts_a_directory_of_its_own(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "a")
    checkpoint = str(tmp_path / "a/checkpoints/step-00000010")
    result = run(tiny(), tmp_path / "b", resume=checkpoint)
    assert (result.status, result.step) == ("finished", 20)
    assert tensors(tmp_path / "a").keys() == tensors(tmp_path / "b").keys()
    for name, tensor in tensors(tmp_path / "a").items():
        assert torch.equal(tensor, tensors(tmp_path / "b")[name])
    assert [line["step"] for line in records(tmp_path / "b") if "loss" in line] == list(
        range(11, 21)
    )
    with pytest.raises(InputError, match=r"another model, optimizer or data: model\.width"):
        run(tiny(model={"width": 32}), tmp_path / "c", resume=checkpoint)
    with pytest.raises(InputError, match="neither auto, never nor"):
        run(tiny(), tmp_path / "c", resume="always")
    with pytest.raises(InputError, match="nothing is left to train"):
        run(tiny(training={"steps": 5}), tmp_path / "c", resume=checkpoint)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "name",
    [
        "{run}/checkpoints/step-00000010",
        "{run}/checkpoints/latest",
        "latest",
        "10",
        "step-00000010",
    ],
)
def test_the_command_that_starts_from_a_checkpoint_is_repeated(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """As batch queues do: it resumes what was interrupted, and ends with the result."""
    monkeypatch.chdir(tmp_path)
    config = tiny(name="first", checkpoint={"every": 10})
    run(config, None, **stop_after(10))
    resume = name.format(run=tmp_path / "runs/first")
    assert run(config, tmp_path / "b", resume=resume, **stop_after(3)).step == 13
    shutil.rmtree(tmp_path / "runs/first/checkpoints")  # is not needed again
    result = run(config, tmp_path / "b", resume=resume)
    assert (result.status, result.step) == ("finished", 20)
    assert run(config, tmp_path / "b", resume=resume) == result
    for other in ("never", str(tmp_path / "c/checkpoints/step-00000010")):
        with pytest.raises(InputError, match="holds a run, which resume"):
            run(config, tmp_path / "b", resume=other)


def test_a_name_without_a_checkpoint_is_described(
    tiny: Make, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name, words in (
        (
            str(tiny_run),
            f"is a run; to start from its newest checkpoint: resume {tiny_run}/check",
        ),
        (
            "step-00000250",
            "runs/NAME/checkpoints/step-00001000;\nruns/tiny/checkpoints holds no ch",
        ),
        ("runs/no/checkpoints/latest", "is neither auto, never nor a checkpoint folder, such as"),
        ("lastest", "perhaps you meant latest"),
    ):
        with pytest.raises(InputError) as error:
            run(tiny(name="tiny"), tmp_path / "out", resume=name)
        assert words in str(error.value)
        assert not (tmp_path / "out").exists()


def test_a_fork_may_change_its_batch_and_survives_a_crash(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "a")
    checkpoint = str(tmp_path / "a/checkpoints/step-00000010")
    forked = tiny(training={"batch_sequences": 6})
    run(forked, tmp_path / "whole", resume=checkpoint)
    first = next(r["loss"] for r in records(tmp_path / "whole") if r["step"] == 11)
    near = next(r["loss"] for r in records(tmp_path / "a") if r.get("loss") and r["step"] == 11)
    assert first == pytest.approx(near, rel=0.1)

    with pytest.raises(RuntimeError, match="power cut"):
        run(forked, tmp_path / "parts", resume=checkpoint, **power_cut_after(1))
    run(forked, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("pointer", [None, b"\xff", b"step-00000099\n"])
def test_without_a_good_pointer_the_newest_checkpoint_is_taken(
    tiny: Make, tmp_path: Path, pointer: bytes | None
):
    run(tiny(), tmp_path / "whole")
    out = tmp_path / "parts"
    run(tiny(), out, **stop_after(12))
    (out / "checkpoints/latest").unlink()
    if pointer is not None:
        (out / "checkpoints/latest").write_bytes(pointer)
    run(tiny(), out)
    assert_same_run(tmp_path / "whole", out)

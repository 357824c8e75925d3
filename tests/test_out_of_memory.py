"""A device without room: smaller micro-batches, or an error that names what would fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_recovery import later, power_cut
from test_training import assert_same_run, run, stop_after

from gpt import metrics
from gpt.config import Config
from gpt.errors import OutOfMemoryError
from gpt.hardware.memory import smaller
from gpt.model.gpt2 import GPT
from gpt.trainer import Trainer

Make = Callable[..., Config]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that can train on two sequences at a time."""
    loss_fn = GPT.loss_fn

    def limited(self: GPT, x: torch.Tensor, *rest: Any) -> Any:
        if self.training and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return loss_fn(self, x, *rest)

    monkeypatch.setattr(GPT, "loss_fn", limited)


@pytest.mark.usefixtures("small_memory")
def test_out_of_memory_names_what_would_fit(tiny: Make, tmp_path: Path):
    config = tiny(training={"micro_batch": 4})
    with pytest.raises(OutOfMemoryError) as raised:
        run(config, tmp_path / "run")
    assert "out of memory with 4 sequences at a time; 2 would fit" in str(raised.value)
    assert "training.micro_batch 2, or auto" in str(raised.value)
    opened = {Path(file.path).name for file in psutil.Process().open_files()}
    assert "metrics.jsonl" not in opened  # though `raised` still holds the frames that wrote it
    assert run(tiny(training={"micro_batch": "auto"}), tmp_path / "run").status == "finished"


def test_auto_finds_what_fits(
    tiny: Make, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    from gpt.training import train

    run(tiny(training={"micro_batch": 2}, model={"dropout": 0.1}), tmp_path / "two")
    request.getfixturevalue("small_memory")
    train(tiny(model={"dropout": 0.1}), tmp_path / "auto")
    assert "out of memory with micro-batches of 4 sequences; continuing with 2" in (
        capsys.readouterr().err
    )
    assert_same_run(tmp_path / "two", tmp_path / "auto")


def test_nothing_fits(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none(self: GPT, x: torch.Tensor, *rest: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GPT, "loss_fn", none)
    with pytest.raises(OutOfMemoryError, match="with a single sequence at a time"):
        run(tiny(), tmp_path / "run")


@pytest.mark.parametrize(
    ("now", "batch", "then"), [(12, 12, 6), (6, 12, 3), (4, 6, 2), (1, 6, None)]
)
def test_smaller_micro_batches_divide_the_batch(now: int, batch: int, then: int | None):
    assert smaller(now, batch) == then


def test_a_micro_batch_that_was_named_stays(tiny: Make, tmp_path: Path):
    out = tmp_path / "run"
    run(tiny(training={"micro_batch": 4}), out, **stop_after(12))
    one = tiny(training={"micro_batch": 1})
    with pytest.raises(RuntimeError, match="power cut"):
        run(one, out, **later(2, power_cut))
    run(one, out)
    state = json.loads((out / "checkpoints/step-00000020/state.json").read_text())
    assert state["micro_batch"] == 1


def test_auto_finds_what_fits_of_an_evaluation(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loss_fn = GPT.loss_fn

    def limited(self: GPT, x: torch.Tensor, *rest: Any) -> Any:
        if not self.training and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_fn(self, x, *rest)

    monkeypatch.setattr(GPT, "loss_fn", limited)
    assert run(tiny(), tmp_path / "run").status == "finished"


def test_a_measurement_that_does_not_fit_is_left_out(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Training is as without it, and one message says so."""
    from gpt.training import train

    train(tiny(), tmp_path / "without", quiet=True)

    def none(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for name in ("loss_hessian", "measure_noise_scale"):
        monkeypatch.setattr(f"gpt.run.run.{name}", lambda *_, **__: none())
    monkeypatch.setattr("gpt.diagnostics.layers._attention", none)
    diagnostics = {"every": 5, "sharpness": 4, "noise_scale": True}
    train(tiny(diagnostics=diagnostics), tmp_path / "with")
    said = capsys.readouterr().err
    for name in ("activations", "sharpness", "noise_scale"):
        assert said.count(f"not enough memory to measure {name};") == 1
    records = metrics.read(tmp_path / "with/metrics.jsonl")
    of_model = [r for r in records if "sharpness" in r]
    assert [r["step"] for r in of_model] == [1, 5, 10, 15, 20]
    assert all(r["sharpness"] is None and r["noise_scale"] is None for r in of_model)
    assert all("grad_norm" in r for r in records if r.get("layer") == 1)
    losses, wanted = (
        [r["loss"] for r in metrics.read(tmp_path / run / "metrics.jsonl") if "loss" in r]
        for run in ("with", "without")
    )
    assert losses == wanted


def test_fp16_retries_after_its_gradients_were_unscaled(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(training={"precision": "fp16"})
    inputs, targets = torch.randint(256, (2, 4, 16), generator=torch.Generator().manual_seed(0))

    def trained(shortages: int) -> Trainer:
        trainer = Trainer(config, 257, torch.device("cpu"))
        trainer.reset()
        trainer.micro_batch = 4 if shortages else 2
        norm = torch.nn.utils.get_total_norm

        def limited(*arguments: Any) -> torch.Tensor:
            nonlocal shortages
            shortages -= 1
            if shortages >= 0:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return norm(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "get_total_norm", limited)
            trainer.update(1.0, *trainer.backward(1, inputs, targets))
        return trainer

    found, wanted = trained(1), trained(0)
    assert found.micro_batch == wanted.micro_batch == 2
    assert found.scaler.state_dict() == wanted.scaler.state_dict()
    for one, other in zip(found.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(one, other)

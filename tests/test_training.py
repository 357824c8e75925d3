from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rendering
from safetensors.torch import load_file

from gpt import metrics
from gpt.config import Config
from gpt.data.preparation import prepare
from gpt.data.prepared import Dataset
from gpt.data.sequences import TrainingSequences, ValidationSequences
from gpt.errors import InputError
from gpt.hardware import memory
from gpt.hardware.device import peak_flops
from gpt.model import dropout
from gpt.model.gpt2 import GPT
from gpt.model.init import fingerprints, initialize
from gpt.run.directory import RunResult
from gpt.run.loading import load_run
from gpt.trainer import Trainer
from gpt.training import train

Make = Callable[..., Config]
TIMES = {"tokens_per_second", "step_seconds"}


def run(config: Config, out: Path, **options: Any) -> RunResult:
    return train(config, out, quiet=True, **options)


def stop_after(updates: int) -> dict[str, Callable[..., Any]]:
    """Options of `train` that ask it to stop after so many updates."""
    made: list[None] = []
    return {"on_update": lambda: made.append(None), "stop": lambda: len(made) >= updates}


def power_cut_after(updates: int) -> dict[str, Callable[..., Any]]:
    """Options of `train` that end it without warning after so many updates."""
    asked = stop_after(updates)

    def made() -> None:
        asked["on_update"]()
        if asked["stop"]():
            raise RuntimeError("power cut")

    return {"on_update": made}


def records(out: Path) -> list[dict[str, Any]]:
    """The metrics without the times, which no two runs share."""
    lines = metrics.read(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def tensors(out: Path, step: int = 20) -> dict[str, torch.Tensor]:
    folder = out / f"checkpoints/step-{step:08d}"
    found = load_file(folder / "optimizer.safetensors")
    return {**load_file(folder / "model.safetensors"), **found}


def assert_same_run(a: Path, b: Path, step: int = 20) -> None:
    """Weights, optimizer state and metrics agree to the last bit."""
    one, two = tensors(a, step), tensors(b, step)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert records(a) == records(b)


# -- The run directory -------------------------------------------------------------------------


def test_what_a_run_leaves(tiny: Make, tmp_path: Path):
    out = tmp_path / "run"
    with rendering():
        result = run(tiny(optimizer={"clip": 0.5}), out)
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "environment.json",
        "tokenizer.json",
        "metrics.jsonl",
        "result.json",
        "loss.png",
        "samples",
        "checkpoints",
    }
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in sorted((out / "samples").iterdir())] == [
        "step-00000010.txt",
        "step-00000020.txt",
    ]
    written = json.loads((out / "result.json").read_text())
    contract = {
        "status", "step", "tokens", "train_loss", "val_loss", "best_val_loss", "seconds",
        "tokens_per_second", "reason",
    }  # fmt: skip
    assert contract <= written.keys()
    assert (written["status"], written["step"], written["tokens"]) == ("finished", 20, 20 * 64)
    assert written["val_loss"] == result.val_loss
    environment = json.loads((out / "environment.json").read_text())
    assert {"versions", "device", "git_commit", "data_fingerprint", "argv"} <= environment.keys()

    lines = metrics.read(out / "metrics.jsonl")
    updates = [line for line in lines if "loss" in line]
    assert [line["step"] for line in updates] == list(range(1, 21))
    assert set(updates[0]) == {
        "step", "tokens", "loss", "learning_rate", "grad_norm", "batches",
        "tokens_per_second",
        "step_seconds",
    }  # fmt: skip
    assert updates[0]["learning_rate"] == pytest.approx(1e-3 / 5)
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 10, 20]
    assert max(line["grad_norm"] for line in updates) > 0.5  # logged before clipping


def test_a_finished_run_is_read_not_repeated(tiny: Make, tmp_path: Path):
    first = run(tiny(), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert run(tiny(), tmp_path / "run") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("overrides", "resume", "message"),
    [
        ({"model": {"width": 32}}, "auto", r"model.width: 16 -> 32"),
        ({"seed": 5}, "auto", r"seed: 0 -> 5"),
        ({}, "never", "resume never would overwrite"),
    ],
)
def test_a_run_is_never_overwritten(
    tiny: Make, tmp_path: Path, overrides: dict[str, Any], resume: str, message: str
):
    out = tmp_path / "run"
    run(tiny(), out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(InputError, match=message):
        run(tiny(**overrides), out, resume=resume)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_folder_with_other_things_is_left_alone(tiny: Make, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="exists and is not a run"):
        run(tiny(), tmp_path)


def test_changed_data_is_noticed_on_resume(tiny: Make, tmp_path: Path):
    source = tmp_path / "text.txt"
    source.write_text("first text " * 100)
    config = tiny(data={"path": [str(source)], "holdout": "tail"})
    run(config, tmp_path / "run", **stop_after(3))
    source.write_text("other text " * 100)
    with pytest.raises(InputError, match="was trained on tokens other than the config's"):
        run(config, tmp_path / "run")


def test_a_run_can_be_read_back(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "run")
    model, encoding, step = load_run(tmp_path / "run", "latest")
    assert step == 20
    assert encoding.n_vocab == model.vocab_size == 257
    saved = load_file(tmp_path / "run/checkpoints/step-00000020/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert load_run(tmp_path / "run", "10")[2] == 10
    with pytest.raises(InputError, match="has best, latest, 10, 20"):
        load_run(tmp_path / "run", "11")


# -- Learning ----------------------------------------------------------------------------------


def test_evaluation_sampling_and_checkpoints_never_disturb_training(tiny: Make, tmp_path: Path):
    busy = tiny(model={"dropout": 0.1}, evaluation={"every": 1}, checkpoint={"keep": 30})
    idle = tiny(model={"dropout": 0.1}, evaluation={"every": 1000}, sampling={"tokens": 0})
    run(busy, tmp_path / "busy")
    run(idle, tmp_path / "idle")
    one, two = tensors(tmp_path / "busy"), tensors(tmp_path / "idle")
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_training_leaves_the_callers_random_numbers_alone(tiny: Make, tmp_path: Path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run(tiny(model={"dropout": 0.1}, training={"steps": 2}), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


def test_micro_batches_add_up_to_the_batch(tiny: Make, tmp_path: Path):
    for size in (1, 2, 4):
        options = {"training": {"micro_batch": size}, "model": {"dropout": 0.2}}
        run(tiny(**options), tmp_path / str(size))
    whole = records(tmp_path / "4")
    for size in ("1", "2"):
        for mine, theirs in zip(records(tmp_path / size), whole, strict=True):
            assert mine.pop("batches", None) == theirs.get("batches")
            assert mine == pytest.approx(
                {key: value for key, value in theirs.items() if key != "batches"}, rel=1e-3
            )


def test_dropout_draws_another_mask_for_each_seed_step_and_sequence(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the micro-batch: each mask is of one sequence, at one place in the network."""
    masks: list[str] = []  # digests
    draw = dropout._kept

    def kept(x: torch.Tensor, probability: float) -> torch.Tensor:
        drawn = draw(x, probability)
        masks.extend(hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in drawn)
        return drawn

    def masks_of(name: str, seed: int, micro_batch: int) -> list[str]:
        masks.clear()
        training = {"steps": 2, "batch_sequences": 4, "micro_batch": micro_batch}
        shape = {"dropout": 0.3, "layers": 2}
        run(
            tiny(seed=seed, model=shape, training=training, sampling={"tokens": 0}), tmp_path / name
        )
        return sorted(masks)

    monkeypatch.setattr(dropout, "_kept", kept)
    first = masks_of("first", seed=0, micro_batch=2)
    assert len(first) == 2 * 4 * (1 + 2 * 3)  # steps, sequences; embeddings, and three in a block
    assert len(set(first)) == len(first)
    for micro_batch in (1, 2, 4):
        assert masks_of(f"again-{micro_batch}", seed=0, micro_batch=micro_batch) == first
    assert not set(masks_of("other", seed=1, micro_batch=2)) & set(first)


def test_a_batch_in_tokens_is_the_same_batch(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "sequences")
    run(tiny(training={"batch_sequences": None, "batch_tokens": 64}), tmp_path / "tokens")
    assert records(tmp_path / "sequences") == records(tmp_path / "tokens")


def test_clipping_bounds_the_step_and_logs_the_norm_before(tiny: Make, tmp_path: Path):
    sgd = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0}
    one_step = {"steps": 1, "batch_sequences": 4}
    norms, moves = [], []
    for clip in (None, 0.01):
        config = tiny(
            optimizer={**sgd, "clip": clip}, training=one_step, schedule={"warmup": "none"}
        )
        run(config, tmp_path / str(clip))
        norms.append(next(r["grad_norm"] for r in records(tmp_path / str(clip)) if "loss" in r))
        start = GPT(config.model, 257)
        initialize(start, start.config, seed=config.seed)
        end = load_file(tmp_path / f"{clip}/checkpoints/step-00000001/model.safetensors")
        changes = [(end[n] - p).flatten() for n, p in start.state_dict().items()]
        moves.append(torch.cat(changes).norm().item())
    assert norms[0] == norms[1] > 0.01
    assert moves == pytest.approx([norms[0], 0.01], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_nearly_the_same(tiny: Make, tmp_path: Path, precision: str):
    fp32 = run(tiny(), tmp_path / "fp32")
    low = run(tiny(training={"precision": precision}), tmp_path / precision)
    assert low.status == "finished"
    assert low.val_loss != fp32.val_loss
    assert low.val_loss == pytest.approx(fp32.val_loss, rel=0.02)


def test_fp16_resumes_with_its_loss_scale(tiny: Make, tmp_path: Path):
    config = tiny(training={"precision": "fp16"})
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", **stop_after(9))
    run(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_divergence_is_a_result(tiny: Make, tmp_path: Path):
    config = tiny(
        schedule={"warmup": "none"},
        optimizer={"name": "sgd", "learning_rate": 1e30, "clip": None},
        evaluation={"every": 1},
    )
    with rendering():
        result = run(config, tmp_path / "run")
    assert result.status == "diverged"
    assert result.step <= 3
    assert "non-finite" in result.reason or "became" in result.reason
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "diverged"
    assert run(config, tmp_path / "run") == result  # final, not tried again
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for folder in (tmp_path / "run/checkpoints").glob("step-*"):
        assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())


def test_what_is_recorded_is_true_of_the_saved_weights(tiny: Make, tmp_path: Path):
    """Validation loss and bits per byte, worked out again from the checkpoint and the text."""
    config = tiny(model={"dropout": 0.3}, evaluation={"sequences": 5})
    result = run(config, tmp_path / "run")
    model, encoding, _ = load_run(tmp_path / "run", "latest")
    dataset = prepare(config.data)
    (batch,) = ValidationSequences(dataset.val, 16, 5).batches(5)
    inputs, targets = map(torch.from_numpy, batch)
    with torch.no_grad():
        logs = model(inputs).log_softmax(-1).gather(-1, targets[..., None])
    assert result.val_loss == pytest.approx(-logs.mean().item(), rel=1e-5)
    size = sum(len(encoding.decode_bytes([t])) for t in targets.flatten().tolist() if t != 256)
    bits = -logs.double().sum().item() / math.log(2) / size
    assert result.val_bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_updates_are_plain_gradient_descent_at_the_schedules_rate(tiny: Make, tmp_path: Path):
    """Three updates of SGD, worked out again by hand."""
    config = tiny(
        optimizer={"name": "sgd", "momentum": 0, "weight_decay": 0, "clip": None},
        schedule={"warmup_steps": 2, "body": "linear", "final_ratio": 0},
        training={"steps": 3, "micro_batch": 2},
    )
    run(config, tmp_path / "run")
    model = GPT(config.model, 257)
    initialize(model, model.config, seed=config.seed)
    sequences = TrainingSequences(prepare(config.data).train, 16, config.seed)
    for step, share in ((1, 0.5), (2, 1.0), (3, 1.0)):
        model.zero_grad()
        model.loss(*map(torch.from_numpy, sequences.batch(step, 4))).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * share * parameter.grad
    saved = load_run(tmp_path / "run", "latest")[0].state_dict()
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(saved[name], parameter, rtol=1e-5, atol=1e-7)


def test_fp16_unscales_before_it_clips(tiny: Make, tmp_path: Path):
    sgd = {"name": "sgd", "momentum": 0, "learning_rate": 0.1, "clip": 0.5}
    for precision in ("fp32", "fp16"):
        run(tiny(optimizer=sgd, training={"precision": precision}), tmp_path / precision)
    one, two = (load_run(tmp_path / p, "latest")[0].state_dict() for p in ("fp32", "fp16"))
    start = GPT(tiny().model, 257)
    initialize(start, start.config, seed=0)
    name = "blocks.0.mlp.up.weight"
    moved = one[name] - start.state_dict()[name]
    assert (two[name] - one[name]).norm() < 0.05 * moved.norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_fp16_overflow_skips_the_whole_update(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    """An infinite gradient in the embedding must not move the matrices either."""
    config = tiny(optimizer={"name": optimizer}, training={"precision": "fp16", "steps": 1})
    loss_fn = GPT.loss_fn

    def overflowing(self: GPT, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        bad = self.token_embedding.weight[0, 0] * 1e30
        total_loss, loss = loss_fn(self, *arguments)
        return total_loss + (bad - bad.detach()) * 1e30, loss

    monkeypatch.setattr(GPT, "loss_fn", overflowing)
    run(config, tmp_path / "run")
    start = GPT(config.model, 257)
    initialize(start, start.config, seed=0)
    saved = load_run(tmp_path / "run", "latest")[0].state_dict()
    assert all(torch.equal(saved[name], p) for name, p in start.state_dict().items())


def test_a_non_finite_validation_loss_is_divergence(tiny: Make, tmp_path: Path):
    config = tiny(
        schedule={"warmup": "none"},
        optimizer={"name": "sgd", "learning_rate": 1e25, "clip": None},
        training={"steps": 1},
    )
    result = run(config, tmp_path / "run")
    assert (result.status, result.val_loss) == ("diverged", None)
    assert not (tmp_path / "run/checkpoints").exists()


def test_best_is_the_lowest_of_those_saved_and_old_ones_go(tiny: Make, tmp_path: Path):
    config = tiny(
        schedule={"warmup_steps": 18},  # the rate grows until the loss does too
        optimizer={"learning_rate": 1.0},
        evaluation={"every": 1},
        checkpoint={"every": 3, "keep": 1},
    )
    out = tmp_path / "run"
    result = run(config, out)
    losses = {r["step"]: r["val_loss"] for r in records(out) if "val_loss" in r}
    saved = [3, 6, 9, 12, 15, 18, 20]
    best = min(saved, key=lambda step: losses[step])
    assert (out / "checkpoints/best").read_text() == f"step-{best:08d}\n"
    assert {int(p.name[5:]) for p in (out / "checkpoints").glob("step-*")} == {best, 20}
    assert result.best_val_loss == min(losses.values())
    assert load_run(out, "best")[2] == best != 20


def test_metrics_read_late_are_the_same(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(tiny(), tmp_path / "at once")
    monkeypatch.setattr("gpt.run.log.READ_EVERY", {})
    config = tiny(training={"log_every": 7})
    run(config, tmp_path / "late")
    assert_same_run(tmp_path / "at once", tmp_path / "late")


def test_slow_steps_show_progress_before_their_number_is_reached(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    config = tiny(training={"steps": 4, "log_every": 100})
    for seconds, lines in ((3600.0, 1), (0.0, 4)):
        monkeypatch.setattr("gpt.run.log.SHOW_EVERY", seconds)
        train(config, tmp_path / str(seconds))
        assert capsys.readouterr().err.count(" tokens/s") == lines


def test_divergence_that_is_read_late_ends_at_its_own_step(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gpt.run.log.READ_EVERY", {})
    config = tiny(
        schedule={"warmup": "none"},
        optimizer={"name": "sgd", "learning_rate": 1e30, "clip": None},
    )
    result = run(config, tmp_path / "run")
    assert (result.status, result.step) == ("diverged", records(tmp_path / "run")[-1]["step"])
    assert result.step < 5


def test_flops_and_peak():
    config = Config.model_validate(
        {"model": {"layers": 12, "heads": 12, "width": 768, "context": 1024}}
    )
    with torch.device("meta"):
        model = GPT(config.model, 50257)
    assert model.flops_per_token() == pytest.approx(0.855e9, rel=0.01)
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H200", "fp32") is None
    assert peak_flops("NVIDIA A100-SXM4-40GB", "bf16") == 312e12
    for other in ("NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA T400"):  # not L4, A100 and T4
        assert peak_flops(other, "bf16") is None
    assert peak_flops("cpu", "bf16") is None


def test_the_automatic_micro_batch_divides_the_batch_and_fits(tiny: Make, monkeypatch: Any):
    config = tiny(training={"batch_sequences": 12})
    for held, expected in ((2**40, 12), (1, 1)):
        monkeypatch.setattr(memory, "_activation_memory", lambda device, held=held: held)
        assert memory.micro_batch(config, 257, torch.device("cpu")) == expected
    numbers = 17 * 16 * 2 + 3 * 257
    monkeypatch.setattr(memory, "_activation_memory", lambda device: 5 * 4 * 16 * numbers)
    assert memory.micro_batch(config, 257, torch.device("cpu")) == 4


def test_chunks_of_the_loss_make_the_automatic_micro_batch_larger(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
):
    numbers, logits = 17 * 16 * 2, 3 * 257  # of one token
    monkeypatch.setattr(
        memory, "_activation_memory", lambda device: 4 * (6 * 16 * numbers + 16 * logits)
    )
    sizes = [
        memory.micro_batch(
            tiny(training={"batch_sequences": 12, "loss_chunk": chunk}), 257, torch.device("cpu")
        )
        for chunk in (None, 16, 10**6)
    ]
    assert sizes == [3, 6, 3]  # a chunk of more than the batch is no reason for less


def assert_near(a: Path, b: Path) -> None:
    """Losses and gradients agree to what another order of sums leaves of them."""
    for one, two in zip(records(a), records(b), strict=True):
        numbers = {key for key in one if key in ("loss", "val_loss", "grad_norm")}
        assert numbers
        for key in numbers:
            assert one[key] == pytest.approx(two[key], rel=1e-4)


def test_a_run_with_chunks_of_the_loss_is_the_plain_run(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """To what rounding leaves equal, evaluations included; and one may go on as the other."""
    run(tiny(training={"z_loss": 1e-3}), tmp_path / "plain")
    chunked = tiny(training={"z_loss": 1e-3, "loss_chunk": 24})
    lengths: list[int] = []
    apply_head = GPT.apply_head

    def spy(self: GPT, x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        lengths.append(len(x))
        return apply_head(self, x, head)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "apply_head", spy)
        run(chunked, tmp_path / "chunks", **stop_after(13))
    assert set(lengths) == {24, 16} | {1}  # 64 tokens; and generation
    run(tiny(training={"z_loss": 1e-3}), tmp_path / "chunks")
    assert_near(tmp_path / "plain", tmp_path / "chunks")


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_run_and_no_shape_is_left_open(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Here without generating code, which takes minutes; validation has a smaller last part."""
    options: dict[str, Any] = {
        "evaluation": {"every": 3, "sequences": 6},
        "sampling": {"tokens": 0},
    }
    run(tiny(**options, training={"steps": 3}), tmp_path / "plain")
    monkeypatch.setattr("gpt.model.gpt2.VOCABULARY_MULTIPLE", {"cpu": 64})
    graphs: list[bool] = []
    torch_compile = torch.compile

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(any(isinstance(each, torch.SymInt) for each in inputs))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(
        torch, "compile", lambda f, **rest: torch_compile(f, backend=backend, **rest)
    )
    torch._dynamo.reset()
    run(tiny(**options, training={"steps": 3, "compile": True}), tmp_path / "compiled")
    torch._dynamo.reset()
    assert graphs == [False] * 3  # validation's two shapes, and training's
    assert_near(tmp_path / "plain", tmp_path / "compiled")


def test_what_a_gpu_copies_from_lies_in_one_piece(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rows with gaps are packed into ordinary memory first, which a copy must wait for."""
    copied: list[bool] = []
    to_device = Trainer.to_device

    def spy(self: Trainer, tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.is_contiguous())
        return to_device(self, tensor)

    monkeypatch.setattr(Trainer, "to_device", spy)
    run(tiny(training={"steps": 1}), tmp_path / "run")
    assert len(copied) > 4
    assert all(copied)


def test_a_device_that_is_not_there_is_named(tiny: Make, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(InputError, match="cuda is not available here; usable: auto, cpu"):
        run(tiny(training={"device": "cuda"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sequences_are_drawn_as_the_options_say(tiny: Make, corpus: Path, tmp_path: Path):
    """Where they start, and from which source, by the loss of the first update."""
    mix = [{"path": str(corpus / "0*.txt")}, {"path": str(corpus / "3*.txt")}]

    def first_loss(name: str, **data: Any) -> float:
        config = tiny(data=data, training={"steps": 1}, sampling={"tokens": 0})
        loss = run(config, tmp_path / name).train_loss
        assert loss is not None
        return loss

    losses = [
        first_loss("epochs"),
        first_loss("random", windows="random"),
        first_loss("first", path=[], mix=[{**mix[0], "weight": 999}, mix[1]]),
        first_loss("second", path=[], mix=[mix[0], {**mix[1], "weight": 999}]),
    ]
    assert len(set(losses)) == 4


def test_a_checkpoint_holds_the_tokenizer(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "run")
    (tmp_path / "run/tokenizer.json").unlink()
    _, encoding, _ = load_run(tmp_path / "run")
    assert encoding.n_vocab == 257


def test_z_loss_is_minimized_but_not_reported(tiny: Make, tmp_path: Path):
    plain = tiny(sampling={"tokens": 0})
    pressed = tiny(sampling={"tokens": 0}, training={"z_loss": 1.0})
    losses = []
    for name, config in (("plain", plain), ("pressed", pressed)):
        run(config, tmp_path / name)
        losses.append([line["loss"] for line in records(tmp_path / name) if "loss" in line])
    assert losses[0][0] == losses[1][0]  # the same cross-entropy before the first update
    before = [records(tmp_path / name)[0]["val_loss"] for name in ("plain", "pressed")]
    assert before[0] == before[1]
    assert losses[0][-1] != losses[1][-1]
    models = [load_run(tmp_path / name, "latest")[0] for name in ("plain", "pressed")]
    x = torch.arange(16)[None] + 97
    log_z = [model(x).logsumexp(-1).square().mean().item() for model in models]
    assert log_z[1] < log_z[0] - 0.2


def test_admin_starts_from_a_profile_of_the_first_batch(tiny: Make, tmp_path: Path):
    config = tiny(
        model={"norm": {"placement": "admin"}, "init": {"regime": "xavier"}, "dropout": 0.1},
        optimizer={"learning_rate": 1e-12},
        training={"steps": 1},
    )
    run(config, tmp_path / "run")
    model = load_run(tmp_path / "run", "latest")[0]
    omegas = [p.unique().tolist() for n, p in model.named_parameters() if n.endswith("omega")]
    assert all(len(omega) == 1 for omega in omegas)
    values = [omega[0] for omega in omegas]
    assert values[0] == 1.0
    assert values == sorted(values)
    assert values[-1] > 1.1


def test_a_soft_cap_takes_memory_and_so_makes_micro_batches_smaller(tiny: Make):
    sizes = []
    for cap in (None, 50.0):
        model = {"width": 64, "heads": 8, "context": 512, "attention": {"soft_cap": cap}}
        config = tiny(model=model, training={"batch_sequences": 64})
        sizes.append(memory.micro_batch(config, 257, torch.device("cpu")))
    assert sizes[0] > sizes[1] >= 1


def test_admins_profile_depends_on_the_seed_alone(tiny: Make, tmp_path: Path):
    """With dropout as well, whatever was drawn before."""
    config = tiny(model={"norm": {"placement": "admin"}, "dropout": 0.5}, training={"steps": 1})
    for number in (1, 2):
        torch.manual_seed(number)
        run(config, tmp_path / str(number))
    assert_same_run(tmp_path / "1", tmp_path / "2", step=1)


def test_fp16s_scale_is_kept_over_a_stop(tiny: Make, tmp_path: Path):
    config = tiny(training={"precision": "fp16", "steps": 3}, optimizer={"learning_rate": 1e-12})
    run(config, tmp_path / "run", **stop_after(1))
    (folder,) = (tmp_path / "run/checkpoints").glob("step-*")
    path = folder / "state.json"
    state = json.loads(path.read_text())
    assert state["scaler"]["_growth_tracker"] == 1
    run(config, tmp_path / "run")
    folder = max((tmp_path / "run/checkpoints").glob("step-*"))
    assert json.loads((folder / "state.json").read_text())["scaler"]["_growth_tracker"] == 3


# ---------------------------------------------------------------------------------------------
# What tells that two runs are matched


def batches(out: Path) -> list[str]:
    return [line["batches"] for line in metrics.read(out / "metrics.jsonl") if "loss" in line]


def test_the_digest_of_batches_is_of_all_inputs_so_far(tiny: Make, tmp_path: Path):
    """Equal for equal seeds whatever the model, until the first batch that is another."""
    run(tiny(), tmp_path / "a")
    run(tiny(model={"norm": {"placement": "post"}}, optimizer={"name": "sgd"}), tmp_path / "b")
    run(tiny(data={"seed": 1}), tmp_path / "c")
    larger = {"batch_sequences": 2 * tiny().batch_sequences, "steps": 10}
    run(tiny(training=larger), tmp_path / "d")
    a, b, c, d = (batches(tmp_path / name) for name in "abcd")
    assert a == b
    assert a[1::2] == d  # after equally many sequences, whatever the batch size
    assert len(set(a)) == len(a) == 20
    assert not set(a) & set(c)

    dataset = prepare(tiny().data)
    sequences = TrainingSequences(dataset.train, tiny().model.context, tiny().data_seed)
    seen = ""
    for step, digest in enumerate(a, 1):
        inputs, _ = sequences.batch(step, tiny().batch_sequences)
        for sequence in inputs:
            seen = hashlib.sha256(seen.encode() + sequence.tobytes()).hexdigest()
        assert seen.startswith(digest)


def test_first_weights_and_h1_are_on_record(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "run")
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    model = GPT(tiny().model, prepare(tiny().data).encoding.n_vocab)
    initialize(model, tiny().model, tiny().seed)
    assert environment["initial_weights"] == fingerprints(model)


def test_h1_is_the_loss_of_a_guesser_on_the_sequences_that_are_evaluated(
    tiny: Make, tmp_path: Path
):
    """The guesser is a GPT whose output is b, whatever its input, and whose logits are log p."""
    config = tiny(evaluation={"sequences": 3})
    run(config, tmp_path / "run")
    h1 = json.loads((tmp_path / "run/environment.json").read_text())["unigram_entropy"]
    dataset = prepare(config.data)
    trainer = Trainer(config, dataset.encoding.n_vocab, torch.device("cpu"))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
        norm = trainer.model.final_norm
        assert isinstance(norm.bias, torch.nn.Parameter)
        norm.bias[0] = 1.0
        distribution = torch.from_numpy(dataset.unigram_distribution())
        trainer.model.token_embedding.weight[:, 0] = distribution.log()
    loss = trainer.evaluate(ValidationSequences(dataset.val, config.model.context, 3))
    assert loss == pytest.approx(h1, rel=1e-6)
    assert abs(h1 - dataset.unigram_entropy()) > 1e-3  # of the whole validation text


def test_a_run_that_learns_nothing_may_be_given_up(tiny: Make, tmp_path: Path):
    still = {"optimizer": {"learning_rate": 1e-9}, "evaluation": {"every": 4, "give_up_after": 2}}
    result = run(tiny(**still), tmp_path / "still")
    assert (result.status, result.step) == ("finished", 8)
    assert result.gave_up
    assert "given up at step 8" in result.reason
    assert (tmp_path / "still/checkpoints/step-00000008").is_dir()
    again = run(tiny(**still), tmp_path / "still")
    assert again.step == 8

    learning = run(
        tiny(optimizer={"learning_rate": 0.01}, evaluation={"every": 4, "give_up_after": 5}),
        tmp_path / "learning",
    )
    assert learning.step == 20


def test_a_run_that_has_learned_is_not_given_up(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Any loss is well below a unigram entropy of 100 nats."""
    monkeypatch.setattr(Dataset, "unigram_entropy", lambda self, targets: 100.0)
    config = tiny(optimizer={"learning_rate": 1e-9}, evaluation={"every": 4, "give_up_after": 2})
    assert run(config, tmp_path / "run").step == 20


def test_the_log_counts_tokens(tiny: Make, tmp_path: Path):
    config = tiny()
    run(config, tmp_path / "run")
    a_step = config.batch_sequences * config.model.context
    updates = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [record["tokens"] for record in updates] == [n * a_step for n in range(1, 21)]


def test_a_run_killed_before_its_result_has_finished_not_given_up(tiny: Make, tmp_path: Path):
    """At its last step it has learned nothing for long enough, but all steps are made."""
    config = tiny(optimizer={"learning_rate": 1e-9}, evaluation={"every": 10, "give_up_after": 2})
    whole = run(config, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    again = run(config, tmp_path / "run")
    assert (
        (whole.step, whole.reason) == (again.step, again.reason) == (20, "completed all 20 steps")
    )


def test_giving_up_counts_on_over_a_stop(tiny: Make, tmp_path: Path):
    config = tiny(optimizer={"learning_rate": 1e-9}, evaluation={"every": 4, "give_up_after": 3})
    assert run(config, tmp_path / "run", **stop_after(9)).status == "interrupted"
    assert run(config, tmp_path / "run").step == 12

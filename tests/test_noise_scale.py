"""The gradient noise scale: unbiased, exactly and in simulation; and in a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt import metrics
from gpt.config import Config, ModelConfig
from gpt.diagnostics.noise_scale import measure_noise_scale, part_size, signal_and_noise
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.training import train

Make = Callable[..., Config]
VOCAB, CONTEXT = 7, 4


def test_known_covariance_is_recovered_on_average():
    """Gradients N(G, Σ) in five dimensions, |G|² = 2, tr Σ = 30: far more noise than signal."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    spread = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0], dtype=torch.float64)
    draws = torch.randn(20_000, 4, 3, 5, generator=generator, dtype=torch.float64)  # 4 parts of 3
    parts = (mean + spread * draws).mean(2)
    part_squares = parts.square().sum(-1).mean(-1).tolist()
    batch_squares = parts.mean(1).square().sum(-1).tolist()
    found = torch.tensor(
        [signal_and_noise(a, b, 3, 12) for a, b in zip(part_squares, batch_squares, strict=True)]
    ).double()
    errors = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - torch.tensor([2.0, 30.0])).abs() < 3 * errors).all()
    assert (errors / torch.tensor([2.0, 30.0]) < 0.02).all()
    assert (found[:, 0] < 0).any()  # of a single batch


def make() -> tuple[GPT, Tensor, Tensor]:
    """A model, and (3, T) inputs and targets: the population that batches are drawn from."""
    shape = {"layers": 1, "heads": 2, "width": 4, "context": CONTEXT, "dropout": 0.5}
    config = ModelConfig.model_validate(shape)
    model = GPT(config, VOCAB).double()
    initialize(model, config, seed=1)
    x, y = torch.randint(VOCAB, (2, 3, CONTEXT), generator=torch.Generator().manual_seed(2))
    return model, x, y


def gradients(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each sequence, (B, n), without dropout."""
    model.eval()
    rows = []
    for i in range(len(x)):
        found = torch.autograd.grad(model.loss(x[i : i + 1], y[i : i + 1]), model.parameters())
        rows.append(torch.cat([each.flatten() for each in found]))
    model.train()
    return torch.stack(rows)


@pytest.mark.parametrize(("part", "batch"), [(1, 2), (1, 3), (2, 4)])
def test_signal_and_noise_are_unbiased_over_all_batches(part: int, batch: int):
    """All batches that can be drawn with replacement from three sequences, once each."""
    model, x, y = make()
    rows = gradients(model, x, y)
    found = []
    for chosen in itertools.product(range(3), repeat=batch):
        measured = measure_noise_scale(model, x[[*chosen]], y[[*chosen]], 0.0, part)
        signal, noise = measured["gradient_signal"], measured["gradient_noise"]
        found.append([signal, noise])
        if signal > 0:
            assert measured["noise_scale"] == noise / signal
        else:
            assert math.isnan(measured["noise_scale"])
    mean = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    covariance_trace = (rows - rows.mean(0)).square().sum(1).mean().item()
    assert mean == pytest.approx([rows.mean(0).square().sum().item(), covariance_trace])


def test_the_z_loss_counts_and_the_model_is_as_before():
    model, x, y = make()
    state = torch.get_rng_state()
    plain = measure_noise_scale(model, x, y, 0.0, 1)
    assert measure_noise_scale(model, x, y, 1.0, 1)["gradient_signal"] > plain["gradient_signal"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("batch", "micro_batch", "part"),
    [(2, 2, 1), (16, 16, 1), (17, 17, 1), (64, 64, 4), (64, 2, 2), (100, 100, 5), (34, 34, 2)],
)
def test_a_batch_has_sixteen_equal_parts_or_more(batch: int, micro_batch: int, part: int):
    assert part_size(batch, micro_batch) == part


def test_measuring_does_not_change_training(tiny: Make, tmp_path: Path):
    for name, measured in (("off", False), ("on", True)):
        diagnostics = {"every": 8, "noise_scale": measured}
        config = tiny(model={"dropout": 0.2}, diagnostics=diagnostics)
        train(config, tmp_path / name, quiet=True)
    off, on = (
        [
            {k: v for k, v in record.items() if k not in ("tokens_per_second", "step_seconds")}
            for record in metrics.read(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("off", "on")
    )
    measured = [record for record in on if "noise_scale" in record]
    assert [record for record in on if "noise_scale" not in record] == off
    assert [record["step"] for record in measured] == [1, 8, 16]
    assert all(record["gradient_noise"] > 0 for record in measured)
    assert measured[0]["noise_scale"] > 0

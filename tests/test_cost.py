"""`benchmarks/cost.py`: its fits recover what made the numbers, and it runs at small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import cost
from gpt.config import Config, validate
from gpt.hardware import memory
from gpt.model.gpt2 import GPT

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("power", [0.5, 1.0, 1.9])
def test_a_power_law_is_recovered(power: float):
    sizes = np.array([64, 128, 256, 768])
    exact = cost.exponent(sizes, 3e-6 * sizes**power)
    assert exact["exponent"] == pytest.approx(power)
    assert exact["error"] == pytest.approx(0, abs=1e-6)


def test_its_standard_error_is_that_of_repeated_draws():
    generator, sizes = np.random.default_rng(0), 2.0 ** np.arange(6, 13)
    fits = [
        cost.exponent(sizes, sizes * np.exp(0.1 * generator.standard_normal(len(sizes))))
        for _ in range(400)
    ]
    spread = np.std([fit["exponent"] for fit in fits])
    squares = np.mean([fit["error"] ** 2 for fit in fits])
    assert np.sqrt(squares) == pytest.approx(spread, rel=0.15)


def test_the_context_at_which_two_terms_are_equal_is_recovered():
    contexts = np.array(cost.FACTORS["context"])
    exact = cost.crossover(contexts, 2e-5 + 2e-5 / 800 * contexts)
    assert exact["context"] == pytest.approx(800, rel=1e-4)
    generator = np.random.default_rng(0)
    fits = [
        cost.crossover(
            contexts, (1 + contexts / 800) * (1 + 0.05 * generator.standard_normal(len(contexts)))
        )
        for _ in range(400)
    ]
    spread = np.std([fit["context"] for fit in fits])
    assert np.mean([fit["error"] for fit in fits]) == pytest.approx(spread, rel=0.25)


def test_the_arithmetic_crosses_where_attention_costs_six_operations_a_parameter():
    """By FLOPs alone 12 L d T = 6 N, N without the position embedding."""
    contexts = [64, 256, 1024]
    models = [(config, GPT(config.model, cost.VOCABULARY)) for config in map(_config, contexts)]
    flops = [model.flops_per_token() for _, model in models]
    config, model = models[0]
    numbers = model.num_parameters() - model.position_embedding.weight.numel()
    expected = 6 * numbers / (12 * config.model.layers * config.model.width)
    assert cost.crossover(contexts, flops)["context"] == pytest.approx(expected, rel=1e-4)


def _config(context: int) -> Config:
    return validate(Config, {"model": {"layers": 2, "width": 64, "heads": 1, "context": context}})


def test_an_update_moves_the_weights_alike_in_parts_and_at_once():
    after = []
    for held in (64 * 2**20, 1):
        with mock.patch.object(memory, "_activation_memory", lambda device, held=held: held):
            torch.manual_seed(0)
            update, model, config = cost._training(cost.Size(1, 64, 8), torch.device("cpu"), 32)
            assert memory.micro_batch(config, cost.VOCABULARY, torch.device("cpu")) == (
                4 if held > 1 else 1
            )
            before = model.token_embedding.weight.detach().clone()
            update()
        assert not torch.equal(model.token_embedding.weight, before)
        assert all(p.grad is None for p in model.parameters())
        after.append(model.state_dict())
    for name, weight in after[0].items():
        assert torch.allclose(weight, after[1][name], atol=1e-4), name


def test_it_runs_at_small_sizes(tmp_path: Path, environment: dict[str, str]):
    found, picture = tmp_path / "cost.json", tmp_path / "cost.png"
    sizes = ["--context", "32", "64", "128", "--width", "--layers", "--tokens", "256"]
    outputs = ["--json", found, "--figure", picture]
    short = ["--device", "cpu", "--seconds", "0"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/cost.py", *sizes, *outputs, *short],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(found.read_text())
    rows = figures["rows"]["context"]
    assert [row["context"] for row in rows] == [32, 64, 128]
    for row in rows:
        assert row["flops_per_second"] == row["tokens_per_second"] * row["flops_per_token"]
        assert row["peak_bytes"] >= 16 * row["parameters"] * 0.8
        assert 0 < row["share_of_matrix_rate"] < 1.5
    assert set(figures["fits"]) == {"context", "measured T*", "arithmetic T*"}
    assert picture.stat().st_size > 10_000
    assert "| context 128 |" in done.stdout

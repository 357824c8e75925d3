"""Options of cells trained together: those that give what they give alone, and those refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ensemble import CELLS, losses, together

from gpt.config import Config, leaves, merge
from gpt.ensemble import shape, unsupported_reason
from gpt.model.gpt2 import ACTIVATIONS, GPT
from gpt.model.init import initialize
from gpt.model.norm import NORMS
from gpt.optim import OPTIMIZERS, SEPARABLE, Optimizer
from gpt.training import train

Make = Callable[..., Config]


@pytest.mark.parametrize(
    "common",
    [
        {"optimizer": {"name": "radam"}},
        {"optimizer": {"name": "adamw", "beta2": 0.95, "eps": 1e-6}},
        {"training": {"micro_batch": 1, "z_loss": 1e-3}},
        {"training": {"precision": "bf16"}},
        {"data": {"windows": "fixed"}},
        {"model": {"attention": {"soft_cap": 5.0, "qk_norm": True}, "logit_soft_cap": 10.0}},
        {"model": {"tied_head": False, "bias": False, "mlp": {"activation": "swiglu"}}},
        {"model": {"norm": {"embedding": True}, "init": {"regime": "xavier"}}},
        *({"model": {"mlp": {"activation": name}}} for name in ACTIVATIONS),
        *({"model": {"norm": {"type": name}}} for name in NORMS if name != "batch"),
    ],
    ids=str,
)
def test_other_options_give_what_they_give_alone(
    tiny: Make, tmp_path: Path, common: dict[str, Any]
):
    short = merge(common, {"training": {"steps": 10}, "sampling": {"tokens": 0}})
    configs = [tiny(**merge(short, cell)) for cell in CELLS[:2]]
    together(configs, tmp_path / "one")
    tolerance = 0.02 if "bf16" in str(common) else 1e-4
    for i, config in enumerate(configs):
        train(config, tmp_path / f"alone-{i}", quiet=True)
        one, other = losses(tmp_path / f"one/{i}"), losses(tmp_path / f"alone-{i}")
        assert len(one) == len(other) == 10
        assert (one - other).abs().max() < tolerance


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_separable_if_its_steps_do_not_depend_on_the_weights(tiny: Make, name: str):
    """Ten times the rate moves by ten times as much, from other weights too; else it is refused."""
    config = tiny(optimizer={"name": name, "weight_decay": 0.0})
    moved = []
    for scale, rate in ((1.0, 1e-3), (3.0, 1e-2)):
        model = GPT(config.model, 257)
        initialize(model, config.model, 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= scale
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        options = config.optimizer.model_copy(update={"learning_rate": rate})
        optimizer = Optimizer(model.named_parameters(), options)
        for parameter in model.parameters():
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        moved.append((after - before) / rate)
    separable = torch.allclose(moved[0], moved[1], rtol=1e-3, atol=1e-3)
    assert separable or name not in SEPARABLE
    assert (unsupported_reason(config) is None) == (name in SEPARABLE)


@pytest.mark.parametrize(
    "overrides",
    [
        {"model": {"dropout": 0.1}},
        {"model": {"norm": {"type": "batch"}}},
        {"training": {"precision": "fp16"}},
        {"training": {"loss_chunk": 8}},
        {"training": {"nonfinite": "skip"}},
        {"optimizer": {"name": "muon"}},
    ],
    ids=str,
)
def test_why_a_run_cannot_be_a_cell(tiny: Make, overrides: dict[str, Any]):
    (option,) = [key for key, _ in leaves(overrides)]
    assert str(unsupported_reason(tiny(**overrides))).startswith(f"{option}: ")


def test_shapes_differ_in_all_that_is_not_a_number_of_the_cell(tiny: Make):
    base = shape(tiny())
    same = [
        {"name": "other", "seed": 5},
        {"data": {"seed": 5}},
        {"schedule": {"warmup": "none", "body": "constant", "warmup_steps": 1}},
        {"optimizer": {"learning_rate": 1.0, "weight_decay": 1e-3, "clip": 2.0}},
    ]
    other = [
        {"model": {"width": 32}},
        {"model": {"init": {"regime": "xavier"}}},
        {"optimizer": {"name": "radam"}},
        {"optimizer": {"beta2": 0.9}},
        {"training": {"steps": 21}},
        {"data": {"val_fraction": 0.3}},
    ]
    assert [shape(tiny(**overrides)) == base for overrides in same] == [True] * len(same)
    assert [shape(tiny(**overrides)) == base for overrides in other] == [False] * len(other)

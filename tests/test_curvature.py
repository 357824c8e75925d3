"""Sharpness against dense Hessians and known eigenvalues, in float64; and in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rendering
from matplotlib.figure import Figure
from torch import Tensor

from gpt import metrics
from gpt.cli.diagnose import diagnose
from gpt.config import Config, ModelConfig, OptimizerConfig
from gpt.diagnostics.curvature import (
    hessian_product,
    largest_eigenvalue,
    measure_sharpness,
    preconditioned,
    stability_thresholds,
)
from gpt.ensemble import train_together
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.model.norm import NORMS
from gpt.model.placement import PLACEMENTS
from gpt.optim import Optimizer
from gpt.training import train

Make = Callable[..., Config]
VOCAB, CONTEXT = 5, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(eigenvalues: Tensor) -> Tensor:
    basis = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues))).Q
    return basis @ eigenvalues.diag() @ basis.T


# -- Lanczos ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, -30.0])  # the second has only negative eigenvalues
def test_the_largest_eigenvalue_of_a_quadratic(shift: float):
    """Not the largest absolute value, which is -20's."""
    eigenvalues = torch.linspace(-20, 5, 60, dtype=torch.float64) + shift
    eigenvalues[-1] = 7.0 + shift
    matrix = symmetric(eigenvalues)
    x = random(60, seed=1).requires_grad_()
    product = hessian_product(x @ matrix @ x / 2, [x])
    assert torch.allclose(product(x.detach()), matrix @ x.detach())
    found = largest_eigenvalue(product, random(60, seed=2), tolerance=1e-9)
    assert found == pytest.approx(7.0 + shift, rel=1e-9)


def test_the_tolerance_bounds_the_error_and_saves_products():
    eigenvalues = torch.cat([torch.linspace(-1, 1, 199), torch.tensor([1.1])]).double()
    matrix = symmetric(eigenvalues)
    used = []
    for tolerance in (1e-1, 1e-2, 1e-3):
        calls: list[Tensor] = []

        def product(v: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(v)
            return matrix @ v

        found = largest_eigenvalue(product, random(200, seed=3), tolerance=tolerance)
        assert abs(found - 1.1) <= tolerance * 1.1
        used.append(len(calls))
    assert used[0] < used[1] < used[2] < 100


def test_an_eigenvalue_that_has_not_converged_is_unknown():
    matrix = symmetric(torch.linspace(0, 1, 200, dtype=torch.float64))
    start = random(200, seed=3)
    assert math.isnan(largest_eigenvalue(lambda v: matrix @ v, start, max_products=5))
    assert not math.isnan(largest_eigenvalue(lambda v: matrix @ v, start))
    assert math.isnan(largest_eigenvalue(lambda v: v * math.inf, start))


def test_matrices_that_end_the_iteration_at_once():
    start = random(6)
    assert largest_eigenvalue(torch.zeros_like, start) == 0.0
    assert largest_eigenvalue(lambda v: 3 * v, start) == pytest.approx(3.0)
    assert largest_eigenvalue(lambda v: -2 * v, start[:1]) == pytest.approx(-2.0)


def test_preconditioning_with_a_diagonal():
    matrix, diagonal = symmetric(torch.linspace(-1, 4, 30).double()), random(30, seed=4).exp()
    wanted = torch.linalg.eigvals(matrix / diagonal[:, None]).real.max().item()  # of P^-1 A
    product = preconditioned(lambda v: matrix @ v, diagonal)
    assert largest_eigenvalue(product, random(30), tolerance=1e-9) == pytest.approx(wanted)


# -- Of a model -------------------------------------------------------------------------------


def make(placement: str = "pre", layers: int = 1, **options: Any) -> GPT:
    shape = {"layers": layers, "heads": 2, "width": 4, "context": CONTEXT, "mlp": {"multiple": 1}}
    norm = {"placement": placement, **options.pop("norm", {})}
    config = ModelConfig.model_validate({**shape, **options, "norm": norm})
    model = GPT(config, VOCAB).double()
    initialize(model, config, seed=1)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.3 * random(*parameter.shape, seed=index)
    return model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(seed))


def dense_hessian(model: GPT, z_loss: float) -> Tensor:
    """By reverse mode over reverse mode, one row after another, with torch's attention by hand."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sizes = [parameter.numel() for parameter in parameters]

    def loss(flat: Tensor) -> Tensor:
        parts = [w.view_as(p) for w, p in zip(flat.split(sizes), parameters, strict=True)]
        named = dict(zip(names, parts, strict=True))
        logits = torch.func.functional_call(model, named, (tokens(),)).flatten(0, 1)
        log_z = logits.logsumexp(-1)
        right = logits.gather(-1, tokens(1).flatten()[:, None])[:, 0]
        return (log_z - right + z_loss * log_z.square()).mean()

    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    kernels = [attention.kernel for attention in model.attentions()]
    for attention in model.attentions():
        attention.kernel = by_hand
    hessian = torch.autograd.functional.hessian(loss, flat)
    for attention, kernel in zip(model.attentions(), kernels, strict=True):
        attention.kernel = kernel
    return hessian


def by_hand(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.triu(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool), 1)
    return scores.masked_fill(future, -1e9).softmax(-1) @ v


@pytest.mark.parametrize(
    "options",
    [
        {"placement": "pre", "tied_head": False},
        {"placement": "post", "attention": {"qk_norm": True}, "norm": {"type": "rms"}},
        {"placement": "pre", "attention": {"soft_cap": 2.0}, "dropout": 0.5},
    ],
    ids=["pre", "post", "dropout"],
)
def test_both_eigenvalues_agree_with_the_dense_hessian(options: dict[str, Any]):
    model = make(**options)
    model.eval()
    config = OptimizerConfig(beta2=0.9, eps=1e-4)
    optimizer = Optimizer(model.named_parameters(), config)
    squares = []
    for seed in (3, 4):
        model.loss(tokens(seed), tokens(1)).backward()
        squares.append(torch.cat([p.grad.square().flatten() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    hessian = dense_hessian(model, z_loss=0.1)
    v = (0.9 * 0.1 * squares[0] + 0.1 * squares[1]) / (1 - 0.9**2)
    p = v.sqrt() + 1e-4
    model.train()
    model.loss_chunk = 2
    found = measure_sharpness(model, tokens(), tokens(1), 0.1, optimizer)
    assert found["sharpness"] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)
    wanted = torch.linalg.eigvalsh(hessian / (p[:, None] * p).sqrt())[-1].item()
    assert found["preconditioned_sharpness"] == pytest.approx(wanted, rel=1e-3)
    assert abs(wanted / found["sharpness"] - 1) > 0.5


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_placement_and_norm_can_be_differentiated_twice(placement: str, norm: str):
    kind = PLACEMENTS[placement]
    if not kind.has_norms or (norm == "none" and kind.needs_norms):
        norm = "layer" if kind.has_norms else "none"
    model = make(placement, layers=max(2, kind.min_layers), norm={"type": norm})
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernels, state = [a.kernel for a in model.attentions()], torch.get_rng_state()
    found = measure_sharpness(model, tokens(), tokens(1), 0.0, optimizer)
    assert found["sharpness"] > 0
    assert found["preconditioned_sharpness"] is None  # before Adam's first update
    assert model.training
    assert [a.kernel for a in model.attentions()] == kernels
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["sgd", "adafactor", "muon"])
def test_without_adams_moments_for_all_parameters_only_the_sharpness(name: str):
    model = make()
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(name=name))
    model.loss(tokens(), tokens(1)).backward()
    optimizer.step()
    found = measure_sharpness(model, tokens(), tokens(1), 0.0, optimizer)
    assert found["preconditioned_sharpness"] is None
    assert found["sharpness"] > 0


# -- Thresholds -------------------------------------------------------------------------------


def growth(curvature: float, config: OptimizerConfig, rate: float) -> float:
    """|x| after 2,000 updates of torch's optimizer on curvature/2 x², from 1."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    settings = {"lr": rate, "momentum": config.momentum, "nesterov": config.momentum > 0}
    optimizer = torch.optim.SGD([x], **settings)
    for _ in range(2000):
        x.grad = curvature * x.detach()
        optimizer.step()
    return abs(x.item())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_sgd_diverges_above_its_threshold(momentum: float):
    config = OptimizerConfig(name="sgd", momentum=momentum)
    threshold = stability_thresholds(config, 0.1)["sharpness_threshold"]
    assert growth(0.98 * threshold, config, 0.1) < 1e-6
    assert growth(1.02 * threshold, config, 0.1) > 1e6


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_adam_with_its_preconditioner_held_fixed_diverges_above_its_threshold(beta1: float):
    """x <- x - η P^-1 m, m an average with decay β1: |eigenvalues| of one step, P = 1."""
    threshold = stability_thresholds(OptimizerConfig(beta1=beta1), 0.01)["preconditioned_threshold"]
    for factor, stable in ((0.99, True), (1.01, False)):
        h = factor * threshold
        step = torch.tensor([[1 - 0.01 * (1 - beta1) * h, -0.01 * beta1], [(1 - beta1) * h, beta1]])
        assert (torch.linalg.eigvals(step.double()).abs().max().item() < 1) == stable
    if beta1 == 0.9:
        assert threshold == pytest.approx(38 / 0.01)


def test_thresholds_at_rate_0_are_infinite():
    assert set(stability_thresholds(OptimizerConfig(), 0.0).values()) == {math.inf}


# -- In a run ---------------------------------------------------------------------------------


def lines(out: Path) -> tuple[list[metrics.Record], list[metrics.Record]]:
    """The records of the whole model, and all others."""
    timing = {"tokens_per_second", "step_seconds"}
    every = [
        {key: value for key, value in record.items() if key not in timing}
        for record in metrics.read(out / "metrics.jsonl")
    ]
    return [r for r in every if "sharpness" in r], [r for r in every if "sharpness" not in r]


@pytest.mark.parametrize("norm_type", ["layer", "batch"])
def test_measuring_does_not_change_training(tiny: Make, tmp_path: Path, norm_type: str):
    options: dict[str, Any] = {"model": {"dropout": 0.2, "norm": {"type": norm_type}}}
    train(tiny(**options, diagnostics={"every": 8}), tmp_path / "off", quiet=True)
    both = {"every": 8, "sharpness": 2}
    train(tiny(**options, diagnostics=both), tmp_path / "on", quiet=True)
    none, off = lines(tmp_path / "off")
    measured, on = lines(tmp_path / "on")
    assert none == []
    assert on == off
    assert [record["step"] for record in measured] == [1, 8, 16]
    rates = {record["step"]: record["learning_rate"] for record in on if "loss" in record}
    for record in measured:
        assert record["sharpness"] > 0
        assert record["sharpness_threshold"] == pytest.approx(2 / rates[record["step"]])
        assert record["preconditioned_threshold"] == pytest.approx(38 / rates[record["step"]])
    assert [r["preconditioned_sharpness"] is None for r in measured] == [True, False, False]


def test_a_batch_of_cells_measures_what_each_alone_measures(tiny: Make, tmp_path: Path):
    options = {"training": {"steps": 4}, "diagnostics": {"every": 3, "sharpness": 4}}
    configs = [tiny(**options, seed=seed) for seed in (1, 2)]
    together = [tmp_path / "a", tmp_path / "b"]
    results = train_together(
        configs,
        together,
        stop=lambda: False,
        on_update=lambda index: None,
        save_checkpoints=False,
    )
    assert not any(isinstance(result, Exception) for result in results)
    for config, out in zip(configs, together, strict=True):
        train(config, tmp_path / "alone", resume="never", quiet=True)
        first, later = lines(out)[0]
        alone = lines(tmp_path / "alone")[0]
        assert first == alone[0]
        assert later == pytest.approx(alone[1], rel=0.01)
        (tmp_path / "alone").rename(tmp_path / f"alone-{config.seed}")


def test_the_plot_has_sharpness_and_threshold(tiny: Make, tmp_path: Path, monkeypatch):
    train(tiny(diagnostics={"every": 5, "sharpness": 2}), tmp_path / "run", quiet=True)
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    diagnose(tmp_path / "run")
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    records = lines(tmp_path / "run")[0]
    for start, key in (("sharpness, the", "sharpness"), ("sharpness, pre", "preconditioned")):
        (axes,) = (axes for title, axes in panels.items() if title.startswith(start))
        drawn = [list(line.get_ydata()) for line in axes.lines]
        assert drawn[1] == [record[f"{key}_threshold"] for record in records]
        assert (
            drawn[0][-1] == records[-1][key if key == "sharpness" else "preconditioned_sharpness"]
        )
        assert list(axes.lines[0].get_xdata()) == [1, 5, 10, 15, 20]


def test_the_plot_can_be_rendered(tiny: Make, tmp_path: Path):
    options = {"training": {"steps": 2}, "optimizer": {"name": "sgd"}}
    train(tiny(**options, diagnostics={"every": 1, "sharpness": 2}), tmp_path / "run", quiet=True)
    with rendering():
        assert diagnose(tmp_path / "run").stat().st_size > 10_000

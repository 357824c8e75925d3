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
from gpt.diagnostics import curvature
from gpt.diagnostics.curvature import (
    adam_preconditioner,
    hessian_product,
    largest_eigenvalue,
    loss_hessian,
    measure_sharpness,
    preconditioned,
    stability_threshold,
)
from gpt.ensemble import train_together
from gpt.errors import InputError, StepInterruptedError
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.model.norm import NORMS
from gpt.model.placement import PLACEMENTS
from gpt.optim import OPTIMIZERS, Optimizer
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
        {"placement": "pre", "parametrization": "mup", "mup_base_width": 2},
    ],
    ids=["pre", "post", "dropout", "mup"],
)
@pytest.mark.parametrize(("clip", "updates"), [(None, 0), (0.1, 2)])
def test_both_eigenvalues_agree_with_the_dense_hessian(
    options: dict[str, Any], clip: float | None, updates: int
):
    """The preconditioner is that of the next update, written once more from Adam's definition."""
    model = make(**options)
    model.eval()
    config = OptimizerConfig(beta2=0.9, eps=1e-4, clip=clip)
    optimizer = Optimizer(model.named_parameters(), config, model.m)
    v = 0
    for seed in range(3, 4 + updates):
        model.loss(tokens(seed), tokens(1)).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        if seed == 3 + updates:  # not yet clipped
            assert gradient.norm() > 0.2
            gradient *= 1 if clip is None else clip / gradient.norm()
        v = 0.9 * v + 0.1 * gradient.square()
        if seed < 3 + updates:
            optimizer.step()
            optimizer.zero_grad()
    p = (v / (1 - 0.9 ** (updates + 1))).sqrt() + 1e-4
    if model.m != 1:  # muP divides the rates of the blocks' matrices by m
        factors = [
            torch.full((w.numel(),), 0.5 if name.startswith("blocks") and w.ndim == 2 else 1.0)
            for name, w in model.named_parameters()
        ]
        p = p / torch.cat(factors)
    hessian = dense_hessian(model, z_loss=0.1)
    model.train()
    model.loss_chunk = 2
    product = loss_hessian(model, tokens(), tokens(1), 0.1, micro_batch=2)  # of three sequences
    found = measure_sharpness(model, product, optimizer, *optimizer.second_moments())
    assert found["sharpness"] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)
    wanted = torch.linalg.eigvalsh(hessian / (p[:, None] * p).sqrt())[-1].item()
    assert found["preconditioned_sharpness"] == pytest.approx(wanted, rel=1e-3)
    assert abs(wanted / found["sharpness"] - 1) > 0.5


def test_a_row_without_earlier_gradients_is_preconditioned_by_its_own():
    """Of a token that was in no batch so far: P is not ε but what the update divides by."""
    model = make(tied_head=False)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(clip=None))
    old, new = torch.zeros(3, CONTEXT, dtype=torch.long), torch.ones(3, CONTEXT, dtype=torch.long)
    model.loss(old, tokens(1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.loss(new, tokens(1)).backward()
    moments, made = optimizer.second_moments()
    found = adam_preconditioner(model, optimizer, moments, made)[4:8]  # of token 1
    gradient = model.token_embedding.weight.grad[1]
    assert (moments["token_embedding.weight"][1] == 0).all()
    torch.testing.assert_close(found, gradient.abs() * (0.01 / (1 - 0.99**2)) ** 0.5 + 1e-8)


def test_micro_batches_bound_the_memory_and_a_stop_ends_a_product():
    model = make()
    sizes: list[int] = []
    loss_fn = model.loss_fn
    model.loss_fn = lambda x, *rest: sizes.append(len(x)) or loss_fn(x, *rest)
    v = random(model.num_parameters())
    whole = loss_hessian(model, tokens(), tokens(1))
    parts = loss_hessian(model, tokens(), tokens(1), micro_batch=2)
    torch.testing.assert_close(whole(v), parts(v))
    assert sizes == [3, 2, 1]
    whole(v)
    assert sizes == [3, 2, 1]  # the graph is kept

    def stop() -> None:
        raise StepInterruptedError

    with pytest.raises(StepInterruptedError):
        loss_hessian(model, tokens(), tokens(1), check=stop)(v)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_placement_and_norm_can_be_differentiated_twice(placement: str, norm: str):
    kind = PLACEMENTS[placement]
    if not kind.has_norms or (norm == "none" and kind.needs_norms):
        norm = "layer" if kind.has_norms else "none"
    model = make(placement, layers=max(2, kind.min_layers), norm={"type": norm})
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig())
    model.loss(tokens(), tokens(1)).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    kernels, state = [a.kernel for a in model.attentions()], torch.get_rng_state()
    found = measure_sharpness(model, loss_hessian(model, tokens(), tokens(1)), optimizer, {}, 0)
    assert found["sharpness"] > 0
    assert found["preconditioned_sharpness"] > 0  # also before Adam's first update
    assert model.training
    assert [a.kernel for a in model.attentions()] == kernels
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


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
    threshold = stability_threshold(config, 0.1, 1)["sharpness_threshold"]
    assert growth(0.98 * threshold, config, 0.1) < 1e-6
    assert growth(1.02 * threshold, config, 0.1) > 1e6


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("updates", [1, 5, 10_000])
def test_adam_as_it_is_at_one_update_diverges_above_its_threshold(beta1: float, updates: int):
    """x <- x - η P^-1 m/(1 - β1^t), m an average with decay β1: |eigenvalues| of a step, P = 1."""
    config = OptimizerConfig(beta1=beta1)
    threshold = stability_threshold(config, 0.01, updates)["preconditioned_threshold"]
    rate = 0.01 / (1 - beta1**updates)
    for factor, stable in ((0.99, True), (1.01, False)):
        h = factor * threshold
        step = torch.tensor([[1 - rate * (1 - beta1) * h, -rate * beta1], [(1 - beta1) * h, beta1]])
        assert (torch.linalg.eigvals(step.double()).abs().max().item() < 1) == stable
    if beta1 == 0.9 and updates == 10_000:
        assert threshold == pytest.approx(38 / 0.01)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_thresholds_at_rate_0_are_infinite(name: str):
    thresholds = stability_threshold(OptimizerConfig(name=name), 0.0, 1)
    assert set(thresholds.values()) == {math.inf}


# -- In a run ---------------------------------------------------------------------------------


def lines(out: Path) -> tuple[list[metrics.Record], list[metrics.Record]]:
    """The records of the whole model, and all others."""
    timing = {"tokens_per_second", "step_seconds"}
    every = [
        {key: value for key, value in record.items() if key not in timing}
        for record in metrics.read(out / "metrics.jsonl")
    ]
    return [r for r in every if "sharpness" in r], [r for r in every if "sharpness" not in r]


def test_measuring_does_not_change_training(tiny: Make, tmp_path: Path):
    options: dict[str, Any] = {"model": {"dropout": 0.2}}
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
        step = record["step"]
        assert record["sharpness"] > 0
        assert record["preconditioned_sharpness"] > 0
        wanted = (1 - 0.9**step) * 38 / rates[step]
        assert record["preconditioned_threshold"] == pytest.approx(wanted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_where_theory_has_a_threshold_is_one_recorded(tiny: Make, tmp_path: Path, name: str):
    """RAdam's first updates are those of SGD; for the others no threshold is known."""
    config = tiny(
        optimizer={"name": name},
        training={"steps": 2},
        diagnostics={"every": 1, "sharpness": 4},
    )
    train(config, tmp_path, quiet=True)
    known = {
        "adamw": {"preconditioned_sharpness", "preconditioned_threshold"},
        "sgd": {"sharpness_threshold"},
    }
    for record in lines(tmp_path)[0]:
        assert record.keys() == {"step", "sharpness"} | known.get(name, set())


def test_a_stop_during_a_measurement_leaves_the_digest_of_the_last_update(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(diagnostics={"every": 8, "sharpness": 2})
    train(config, tmp_path / "whole", quiet=True)
    stopping: list[bool] = []
    original = curvature.largest_eigenvalue

    def measure(*arguments: Any) -> float:
        measured.append(True)
        if len(measured) == 3:  # at the second snapshot
            stopping.append(True)
        return original(*arguments)

    measured: list[bool] = []
    monkeypatch.setattr(curvature, "largest_eigenvalue", measure)
    stopped = train(config, tmp_path / "cut", quiet=True, stop=lambda: bool(stopping))
    assert (stopped.status, stopped.step) == ("interrupted", 7)
    stopping.clear()
    assert train(config, tmp_path / "cut", quiet=True).status == "finished"
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": None, "sharpness": 4}, "sharpness: has no effect without diagnostics.every"),
        ({"every": None, "noise_scale": True}, "noise_scale: has no effect without"),
        ({"sharpness": 5}, "sharpness: 5 is more than the batch of 4"),
        ({"sharpness": 4, "norm": "batch"}, "sharpness: conflicts with model.norm.type batch"),
        ({"noise_scale": True, "norm": "batch"}, "noise_scale: conflicts with model.norm.type"),
        ({"noise_scale": True, "windows": "fixed"}, "noise_scale: conflicts with data.windows"),
        ({"noise_scale": True, "batch": 1}, "noise_scale: needs a batch of at least 2"),
    ],
)
def test_measures_that_do_not_apply_are_refused(tiny: Make, options: dict[str, Any], message: str):
    other = {
        "data": {"windows": options.pop("windows", "epochs")},
        "model": {"norm": {"type": options.pop("norm", "layer")}},
        "training": {"batch_sequences": options.pop("batch", 4)},
    }
    with pytest.raises(InputError, match=rf"diagnostics\.{message}"):
        tiny(**other, diagnostics={"every": 8, **options})


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
        for record, wanted in zip(lines(out)[0], lines(tmp_path / "alone")[0], strict=True):
            assert record == pytest.approx(wanted, rel=0.01)
        (tmp_path / "alone").rename(tmp_path / f"alone-{config.seed}")


def test_the_plot_has_sharpness_and_threshold(tiny: Make, tmp_path: Path, monkeypatch):
    train(tiny(diagnostics={"every": 5, "sharpness": 2}), tmp_path / "run", quiet=True)
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    diagnose(tmp_path / "run")
    drawn = {
        axes.get_title(): [list(line.get_ydata()) for line in axes.lines]
        for axes in figures[0].axes
        if axes.get_title().startswith("sharpness")
    }
    records = lines(tmp_path / "run")[0]
    assert [record["step"] for record in records] == [1, 5, 10, 15, 20]
    assert drawn == {
        "sharpness, the Hessian's largest eigenvalue": [[r["sharpness"] for r in records]],
        "sharpness, preconditioned by Adam (dashed: unstable above)": [
            [r["preconditioned_sharpness"] for r in records],
            [r["preconditioned_threshold"] for r in records],
        ],
    }


def test_the_plot_can_be_rendered(tiny: Make, tmp_path: Path):
    options = {"training": {"steps": 2}, "optimizer": {"name": "sgd"}}
    train(tiny(**options, diagnostics={"every": 1, "sharpness": 2}), tmp_path / "run", quiet=True)
    with rendering():
        assert diagnose(tmp_path / "run").stat().st_size > 10_000

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt.config import ModelConfig, OptimizerConfig
from gpt.init import initialize
from gpt.model import GPT
from gpt.optim import OPTIMIZERS, AdamW, Muon, Optimizer, orthogonal
from gpt.placement import PLACEMENTS


def make(name: str, **options: object) -> tuple[GPT, Optimizer]:
    model = GPT(ModelConfig(layers=2, heads=2, width=8, context=8), 17)
    initialize(model, model.config, seed=0)
    config = OptimizerConfig.model_validate({"name": name, **options})
    return model, Optimizer(model.named_parameters(), config)


def update(model: GPT, optimizer: Optimizer, share: float = 1.0) -> None:
    x = torch.arange(16).view(2, 8)
    model.loss(x, x).backward()
    optimizer.step(share)
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_stands_in_exactly_one_group(name: str):
    model, optimizer = make(name)
    grouped = [p for group in optimizer.groups for p in group.parameters.values()]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert {n: id(p) for group in optimizer.groups for n, p in group.parameters.items()} == {
        n: id(p) for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_and_embeddings_decay_and_nothing_else(name: str):
    model, optimizer = make(name, weight_decay=0.3)
    expected = {n: 0.3 if p.ndim == 2 else 0.0 for n, p in model.named_parameters()}
    assert optimizer.decays() == expected


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_independent_decay_does_not_depend_on_the_rate(name: str, rate: float):
    """Where the gradient is zero, only decay moves a weight: by itself, times the schedule."""
    model, optimizer = make(
        name, learning_rate=rate, weight_decay=0.01, independent_decay=True, momentum=0.0
    )
    matrix = model.blocks[0].mlp.up.weight
    before = matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.5 * 0.01))


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model, optimizer = make("muon")
    rules = {n: type(group.rule) for group in optimizer.groups for n in group.parameters}
    assert rules == {
        n: Muon if n.startswith("blocks.") and p.ndim == 2 else AdamW
        for n, p in model.named_parameters()
    }


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TORCHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-6, fused=True),
    "radam": partial(torch.optim.RAdam, betas=(0.9, 0.95), eps=1e-6, decoupled_weight_decay=True),
    "adafactor": torch.optim.Adafactor,
    "sgd": partial(torch.optim.SGD, momentum=0.8, nesterov=True),
    "sgd, no momentum": torch.optim.SGD,
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("way", TORCHS)
def test_an_update_is_that_of_torchs_class(way: str, device: str):
    """And what is remembered has torch's names, values and places, bit for bit."""
    name, _, plain = way.partition(",")
    options = {"momentum": 0.0 if plain else 0.8, "eps": 1e-6, "beta2": 0.95}
    model, optimizer = make(name, learning_rate=0.02, weight_decay=0.1, **options)
    other, _ = make(name)
    model.to(device)
    other.to(device)
    named = list(other.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    torchs = TORCHS[way](groups, lr=0.02)
    for step in range(8):  # over the sixth of which RAdam's variance has an estimate
        for group in torchs.param_groups:
            group["lr"] = 0.02 * (0.5 if step == 3 else 1.0)
        x = torch.arange(16, device=device).view(2, 8) + step % 2
        other.loss(x, x).backward()
        torchs.step()
        torchs.zero_grad()
        model.loss(x, x).backward()
        optimizer.step(0.5 if step == 3 else 1.0)
        optimizer.zero_grad()
    for (label, mine), (_, theirs) in zip(model.named_parameters(), named, strict=True):
        assert torch.equal(mine, theirs), label
        remembered = {k: v for k, v in torchs.state[theirs].items() if v is not None}
        assert optimizer.memory[label].keys() == remembered.keys()
        for quantity, value in optimizer.memory[label].items():
            assert torch.equal(value, remembered[quantity]), f"{label}|{quantity}"
            same = remembered[quantity]
            assert (value.dtype, value.device) == (same.dtype, same.device)


def test_muon_steps_as_torchs_does():
    """Theirs is rounded to bf16; over updates with decay the weights stay within that."""
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 16), (48, 16), (16, 48), (16, 16)]  # the last one has no gradient
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    config = OptimizerConfig(name="muon", learning_rate=0.02, momentum=0.9, weight_decay=0.1)
    mine = Optimizer([(f"blocks.{i}", w) for i, w in enumerate(ours)], config)
    torchs = torch.optim.Muon(
        theirs, 0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        gradients = [torch.randn(shape) for shape in shapes[:-1]]
        for weights in (ours, theirs):
            for weight, gradient in zip(weights, gradients, strict=False):
                weight.grad = gradient.clone()
        mine.step()
        torchs.step()
    assert ours[-1].eq(1).all()
    assert len(mine.memory) == len(gradients)
    for own, other in zip(ours[:-1], theirs, strict=False):
        moved = (1 - own).norm()
        assert moved > 0.2
        assert (own - other).norm() < 0.02 * moved
    for momentum, other in zip(mine.memory.values(), torchs.state.values(), strict=True):
        torch.testing.assert_close(momentum, dict(other))


def test_muon_leaves_a_matrix_without_gradients_but_for_decay():
    weight = nn.Parameter(torch.ones(4, 4))
    config = OptimizerConfig(name="muon", learning_rate=0.1, weight_decay=0.5)
    optimizer = Optimizer([("blocks.0", weight)], config)
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.95))


def test_orthogonal_brings_singular_values_near_one():
    torch.manual_seed(0)
    sizes = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]  # each matrix has a norm of its own
    tall = sizes * torch.randn(3, 64, 16) @ torch.diag(torch.logspace(0, 1, 16))
    for before in (tall, tall.mT):
        after = orthogonal(before)
        assert after.shape == before.shape
        values = torch.linalg.svdvals(after)
        assert 0.6 < values.min() < values.max() < 1.3
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        for mine, exact in zip(after, u @ v, strict=True):
            assert F.cosine_similarity(mine.flatten(), exact.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_moves_and_the_rate_scales_the_step(name: str):
    moved = []
    for share in (1.0, 0.5):
        model, optimizer = make(name, weight_decay=0.0, learning_rate=1e-3)
        model.double()  # in which 1 - 1e-9 is not 1
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        update(model, optimizer, share)
        changes = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        assert [n for n, change in changes.items() if not change.any()] == []
        moved.append(changes)
    for name_, change in moved[0].items():
        torch.testing.assert_close(moved[1][name_], 0.5 * change, rtol=1e-2, atol=1e-6)


def test_radam_starts_without_the_adaptive_rate():
    """Its first updates are momentum steps in the gradient's direction, not its sign's."""
    model, optimizer = make("radam", weight_decay=0.0)
    before = model.blocks[0].mlp.up.weight.detach().clone()
    x = torch.arange(16).view(2, 8)
    model.loss(x, x).backward()
    gradient = model.blocks[0].mlp.up.weight.grad.clone()
    optimizer.step()
    step = model.blocks[0].mlp.up.weight.detach() - before
    torch.testing.assert_close(step, -1e-3 * gradient, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_gradients_nothing_changes(name: str):
    model, optimizer = make(name)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.state() == {}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_moves_to_a_fresh_optimizer(name: str, momentum: float):
    model, optimizer = make(name, momentum=momentum)
    for _ in range(7):
        update(model, optimizer)
    copy, fresh = make(name, momentum=momentum)
    copy.load_state_dict(model.state_dict())
    fresh.load_state(optimizer.state())
    for _ in range(3):
        update(model, optimizer)
        update(copy, fresh)
    for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    state = optimizer.state()
    assert all(torch.equal(state[key], value) for key, value in fresh.state().items())


@pytest.mark.parametrize(
    ("name", "placement"), [("muon", "pre"), *(("adamw", placement) for placement in PLACEMENTS)]
)
def test_one_batch_is_learnt_by_heart(name: str, placement: str):
    shape = {"layers": 4, "heads": 2, "width": 32, "context": 16, "norm": {"placement": placement}}
    config = ModelConfig.model_validate({**shape, "init": {"regime": "xavier"}})
    model = GPT(config, 29)
    initialize(model, config, seed=0)
    rate = 1e-3 if placement == "none" else 5e-3  # without norms it is at the edge of stability
    options = OptimizerConfig(name=name, learning_rate=rate, weight_decay=0)
    optimizer = Optimizer(model.named_parameters(), options)
    x = torch.randint(29, (4, 17), generator=torch.Generator().manual_seed(0))
    model.calibrate(x[:, :-1])
    for step in range(150):
        loss = model.loss(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step(min(1.0, (step + 1) / 30))
        optimizer.zero_grad()
    assert loss.item() < 0.2

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt.config import ModelConfig, OptimizerConfig
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.model.placement import PLACEMENTS
from gpt.optim import OPTIMIZERS, SEPARABLE, Muon, Optimizer, orthogonalize, stack


def make(name: str, **options: object) -> tuple[GPT, Optimizer]:
    model = GPT(ModelConfig(layers=2, heads=2, width=8, context=8), 17)
    initialize(model, model.config, seed=0)
    config = OptimizerConfig.model_validate({"name": name, **options})
    return model, Optimizer(model.named_parameters(), config)


def update(model: GPT, optimizer: Optimizer, lr_scale: float = 1.0) -> None:
    x = torch.arange(16).view(2, 8)
    model.loss(x, x).backward()
    optimizer.step(lr_scale)
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_in_exactly_one_group(name: str):
    model, optimizer = make(name)
    grouped = [
        (name, id(parameter))
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]
    assert sorted(grouped) == sorted((name, id(p)) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_and_embeddings_decay(name: str):
    model, optimizer = make(name, weight_decay=0.3)
    expected = {n: 0.3 if p.ndim == 2 else 0.0 for n, p in model.named_parameters()}
    assert optimizer.by_parameter("weight_decay") == expected


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
@pytest.mark.parametrize("learning_rate", [1e-2, 1e-3])
def test_independent_decay_does_not_depend_on_the_learning_rate(name: str, learning_rate: float):
    """Where the gradient is zero, a weight decays by weight_decay times the schedule."""
    model, optimizer = make(
        name, learning_rate=learning_rate, weight_decay=0.01, independent_decay=True, momentum=0.0
    )
    matrix = model.blocks[0].mlp.up.weight
    before = matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.5 * 0.01))


def test_muon_updates_the_blocks_matrices_and_adamw_the_rest():
    model, optimizer = make("muon")
    kinds = {
        name: type(each)
        for each in optimizer.torch_optimizers
        for group in each.param_groups
        for name in group["param_names"]
    }
    assert kinds == {
        n: Muon if n.startswith("blocks.") and p.ndim == 2 else torch.optim.AdamW
        for n, p in model.named_parameters()
    }
    assert optimizer.by_parameter("betas").keys() == {
        n for n, kind in kinds.items() if kind is not Muon
    }


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_scaler_unscales_every_gradient_once(name: str, overflow: bool):
    model, optimizer = make(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # creates its state
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 8.0)
    if overflow:
        model.token_embedding.weight.grad.fill_(torch.inf)
    for each in optimizer.torch_optimizers:
        scaler.unscale_(each)
    expected = {p: torch.ones_like(p) for p in model.parameters()}
    if overflow:
        expected[model.token_embedding.weight].fill_(torch.inf)
    assert all(torch.equal(p.grad, gradient) for p, gradient in expected.items())
    scaler.update()
    assert scaler.get_scale() == (4.0 if overflow else 8.0)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TORCHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-6, fused=True),
    "radam": partial(torch.optim.RAdam, betas=(0.9, 0.95), eps=1e-6, decoupled_weight_decay=True),
    "adafactor": torch.optim.Adafactor,
    "sgd": partial(torch.optim.SGD, momentum=0.8, nesterov=True),
    "sgd, no momentum": torch.optim.SGD,
}


def test_every_optimizer_is_compared_with_another_implementation():
    compared = {way.partition(",")[0] for way in TORCHS}
    own = {"muon"}  # compared with its formula below
    assert compared | own == set(OPTIMIZERS), "add torch's class to TORCHS, or a test and a name"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("way", TORCHS)
def test_an_update_is_that_of_torchs_class(way: str, device: str):
    """Its state too: names, values and devices agree, bit for bit."""
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
    state = optimizer.state_tensors()
    expected = {f"{n}|{key}": t for n, p in named for key, t in torchs.state[p].items()}
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, expected[key]), key
        assert (tensor.dtype, tensor.device) == (expected[key].dtype, expected[key].device)


def test_muon_steps_as_torchs_does():
    """torch's class rounds to bf16; over updates with decay the weights differ by no more."""
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
    state = mine.state_tensors()
    assert len(state) == len(gradients)
    for own, other in zip(ours[:-1], theirs, strict=False):
        moved = (1 - own).norm()
        assert moved > 0.2
        assert (own - other).norm() < 0.02 * moved
    for buffer, other in zip(state.values(), torchs.state.values(), strict=True):
        torch.testing.assert_close(buffer, other["momentum_buffer"])


def test_muon_only_decays_a_matrix_with_zero_gradients():
    weight = nn.Parameter(torch.ones(4, 4))
    config = OptimizerConfig(name="muon", learning_rate=0.1, weight_decay=0.5)
    optimizer = Optimizer([("blocks.0", weight)], config)
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.95))


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    sizes = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]  # each matrix has a norm of its own
    tall = sizes * torch.randn(3, 64, 16) @ torch.diag(torch.logspace(0, 1, 16))
    for before in (tall, tall.mT):
        after = orthogonalize(before)
        assert after.shape == before.shape
        values = torch.linalg.svdvals(after)
        assert 0.6 < values.min() < values.max() < 1.3
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        for mine, exact in zip(after, u @ v, strict=True):
            assert F.cosine_similarity(mine.flatten(), exact.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_moves_and_lr_scale_scales_the_update(name: str):
    moved = []
    for lr_scale in (1.0, 0.5):
        model, optimizer = make(name, weight_decay=0.0, learning_rate=1e-3)
        model.double()  # in which 1 - 1e-9 is not 1
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        update(model, optimizer, lr_scale)
        changes = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        assert [n for n, change in changes.items() if not change.any()] == []
        moved.append(changes)
    for name_, change in moved[0].items():
        torch.testing.assert_close(moved[1][name_], 0.5 * change, rtol=1e-2, atol=1e-6)


def test_radam_starts_without_the_adaptive_learning_rate():
    """Its first updates are those of SGD with momentum: along the gradient, not its sign."""
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
    assert optimizer.state_tensors() == {}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_optimizer_continues_from_loaded_state(name: str, momentum: float):
    model, optimizer = make(name, momentum=momentum)
    for _ in range(7):
        update(model, optimizer)
    copy, fresh = make(name, momentum=momentum)
    copy.load_state_dict(model.state_dict())
    fresh.load_state_tensors(optimizer.state_tensors())
    for _ in range(3):
        update(model, optimizer)
        update(copy, fresh)
    for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    state = optimizer.state_tensors()
    assert state.keys() == fresh.state_tensors().keys()
    assert all(torch.equal(state[key], value) for key, value in fresh.state_tensors().items())


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_has_state_says_whether_updates_leave_state(name: str, momentum: float):
    model, optimizer = make(name, momentum=momentum)
    update(model, optimizer)
    assert optimizer.has_state == bool(optimizer.state_tensors())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loading_state_changes_neither_weights_nor_gradients(name: str):
    model, optimizer = make(name)
    update(model, optimizer)
    state = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    weights = [p.detach().clone() for p in model.parameters()]
    gradients = [torch.full_like(p, i) for i, p in enumerate(model.parameters())]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.load_state_tensors(state)
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))
    loaded = optimizer.state_tensors()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())
    optimizer.load_state_tensors({})
    assert optimizer.state_tensors() == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_another_model_is_refused(name: str):
    model, optimizer = make(name)
    update(model, optimizer)
    state = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    key = next(key for key, tensor in state.items() if tensor.ndim == 2)
    others = [
        {**state, "other.weight|step": torch.zeros(())},
        {other: tensor for other, tensor in state.items() if other != key},
        {**state, key: state[key].T},
        {**state, key: state[key].double()},
        {**state, key: state[key][..., None]},
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"optimizer state of another model: .*\|"):
            optimizer.load_state_tensors(other)


@pytest.mark.parametrize("updated", [0, 2])
@pytest.mark.parametrize("name", sorted(SEPARABLE))
def test_stacked_optimizers_update_each_model_as_its_own_does(name: str, updated: int):
    """At learning rate 1 and without decay; the state of each is a view of the stack's."""
    torch.manual_seed(0)
    shapes = {"blocks.0": (3, 4), "bias": (4,), "scale": ()}
    options = {"name": name, "learning_rate": 1.0, "weight_decay": 0.0}
    config = OptimizerConfig.model_validate(options)

    def optimize() -> tuple[dict[str, nn.Parameter], Optimizer]:
        weights = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        return weights, Optimizer(weights.items(), config)

    alone, stacked = [optimize() for _ in range(2)], [optimize() for _ in range(2)]
    gradients = [[torch.randn(2, *shape) for shape in shapes.values()] for _ in range(5)]

    def step(index: int, weights: dict[str, nn.Parameter], at: int) -> None:
        for weight, gradient in zip(weights.values(), gradients[at], strict=True):
            weight.grad = gradient[index].clone()

    for index, (weights, optimizer) in [*enumerate(alone), *enumerate(stacked)]:
        for at in range(updated):
            step(index, weights, at)
            optimizer.step()
    steps = {
        name: nn.Parameter(torch.stack([weights[name].detach() for weights, _ in stacked]))
        for name in shapes
    }
    other = config.model_copy(update={"learning_rate": 3.0, "weight_decay": 0.1})
    whole = stack([optimizer for _, optimizer in stacked], steps, other)
    for at in range(updated, 5):
        for index, (weights, optimizer) in enumerate(alone):
            step(index, weights, at)
            optimizer.step()
        for parameter, gradient in zip(steps.values(), gradients[at], strict=True):
            parameter.grad = gradient.clone()
        whole.step()
    for index, (weights, optimizer) in enumerate(alone):
        for name_, weight in weights.items():
            torch.testing.assert_close(steps[name_].detach()[index], weight.detach())
        torch.testing.assert_close(stacked[index][1].state_tensors(), optimizer.state_tensors())


@pytest.mark.parametrize(
    ("name", "placement"), [("muon", "pre"), *(("adamw", placement) for placement in PLACEMENTS)]
)
def test_one_batch_can_be_overfitted(name: str, placement: str):
    shape = {"layers": 4, "heads": 2, "width": 32, "context": 16, "norm": {"placement": placement}}
    config = ModelConfig.model_validate({**shape, "init": {"regime": "xavier"}})
    model = GPT(config, 29)
    initialize(model, config, seed=0)
    # without norms, 5e-3 is at the edge of stability
    learning_rate = 1e-3 if placement == "none" else 5e-3
    options = OptimizerConfig(name=name, learning_rate=learning_rate, weight_decay=0)
    optimizer = Optimizer(model.named_parameters(), options)
    x = torch.randint(29, (4, 17), generator=torch.Generator().manual_seed(0))
    model.calibrate(x[:, :-1])
    for step in range(150):
        loss = model.loss(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step(min(1.0, (step + 1) / 30))
        optimizer.zero_grad()
    assert loss.item() < 0.2

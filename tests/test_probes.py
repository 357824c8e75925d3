"""Networks at initialization against independently written formulas, and against theory."""

from __future__ import annotations

import math
from dataclasses import astuple
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from gpt.compare.analysis.statistics import loglog_slope
from gpt.compare.init_probes import InitProbe, read_init_probes, write_init_probes
from gpt.compare.probes import (
    ADAM_RATE,
    DEPTHS,
    Probe,
    probe,
    probe_depths,
)
from gpt.config import ModelConfig
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.model.placement import PLACEMENTS

VOCAB, WIDTH, CONTEXT = 19, 8, 5
MATRICES = ("attention.qkv", "attention.out", "mlp.up", "mlp.out")


def shaped(placement: str = "pre", layers: int = 1, **options: Any) -> ModelConfig:
    tree = {"layers": layers, "heads": 1, "width": WIDTH, "context": CONTEXT}
    norm = {"placement": placement, **options.pop("norm", {})}
    return ModelConfig.model_validate(
        {"init": {"regime": "xavier"}, **tree, **options, "norm": norm}
    )


def batch(seed: int, sequences: int = 3, length: int = CONTEXT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(VOCAB, (2, sequences, length), generator=generator)
    return inputs, targets


def initialized(config: ModelConfig, seed: int) -> GPT:
    model = GPT(config, VOCAB)
    initialize(model, config, seed)
    return model


def numbers(found: Probe) -> list[float]:
    """All of them in one list, the number of layers first."""
    values = [value for value in astuple(found) if value is not None]
    return torch.cat([torch.tensor(value).flatten() for value in values]).tolist()


def means(found: Probe) -> list[float]:
    """Those that are means over seeds, in one list."""
    values = (found.initial_loss, found.gradient_norms, found.betas, found.stream_rms)
    return torch.cat([torch.tensor(value).flatten() for value in values]).tolist()


def one_block(
    placement: str, w: dict[str, Tensor], inputs: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The output, each β and the stream of a one-block model, from its weights `w` (in float64).

    ReLU, one head, no biases but those that are 0.
    """

    def norm(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def attention(x: Tensor) -> Tensor:
        q, k, v = (x @ w["attention.qkv"].T).chunk(3, -1)
        T = inputs.shape[1]
        future = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
        scores = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(future, -torch.inf)
        return scores.softmax(-1) @ v @ w["attention.out"].T

    def mlp(x: Tensor) -> Tensor:
        return (x @ w["mlp.up"].T).relu() @ w["mlp.out"].T

    x = w["token_embedding"][inputs] + w["position_embedding"][: inputs.shape[1]]
    betas = []
    for sublayer in (attention, mlp):
        f = sublayer(norm(x) if placement == "pre" else x)
        betas.append(f.var() / (x + f).var())
        x = x + f if placement == "pre" else norm(x + f)
    return norm(x) if placement == "pre" else x, betas, x


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_one_block_by_hand(placement: str):
    config = shaped(placement, tied_head=False, mlp={"activation": "relu"})
    inputs, targets = batch(0)
    found = probe(config, VOCAB, {7: [(inputs, targets)]})

    named = initialized(config, 7).named_parameters()
    w = {
        name.removeprefix("blocks.0.").removesuffix(".weight"): p.detach().double()
        for name, p in named
    }
    matrices = [w[name].requires_grad_() for name in MATRICES]
    out, betas, stream = one_block(placement, w, inputs)
    chances = (out @ w["head"].T).softmax(-1)
    loss = -chances.gather(-1, targets[..., None]).log().mean()
    gradients = torch.autograd.grad(loss, matrices)

    assert found.layers == 1
    assert found.initial_loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.gradient_norms == pytest.approx([gradients[-1].square().sum().sqrt().item()])
    assert found.last_gradients == found.gradient_norms
    assert found.betas is not None
    assert found.betas[0] == pytest.approx([beta.item() for beta in betas], rel=1e-5)
    assert found.stream_rms == pytest.approx([stream.square().mean().sqrt().item()])

    # Adam's first update is the rate times the gradient's sign.
    for name, gradient in zip(MATRICES, gradients, strict=True):
        w[name] = w[name] - ADAM_RATE * gradient.sign()
    moved = (one_block(placement, w, inputs)[0] - out).square().mean().item()
    assert found.adam_amplifications == pytest.approx([moved], rel=0.01)


def expected_amplification(model: GPT, inputs: Tensor) -> float:
    """To first order E|J δ|² is the sum over weights w of Var[w's matrix] |∂out/∂w|²."""
    matrices = {
        name: p for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2
    }
    model.forward = model.hidden  # type: ignore[method-assign]

    def out(*weights: Tensor) -> Tensor:
        named = dict(zip(matrices, weights, strict=True))
        return torch.func.functional_call(model, named, (inputs,))

    total = 0.0
    jacobians = torch.autograd.functional.jacobian(out, tuple(matrices.values()))
    for (name, matrix), jacobian in zip(matrices.items(), jacobians, strict=True):
        parts = 3 if "qkv" in name else 1
        for part, slopes in zip(matrix.chunk(parts), jacobian.chunk(parts, dim=3), strict=True):
            total += (part.var() * slopes.square().sum()).item()
    return total / (inputs.numel() * WIDTH)


def test_amplification_agrees_with_the_jacobian():
    """In DeepNorm v starts smaller than q and k: each is perturbed in proportion to itself."""
    config, (inputs, targets), seeds = shaped("deepnorm", 2), batch(0, 1, 3), range(20)
    expected = sum(expected_amplification(initialized(config, seed), inputs) for seed in seeds) / 20
    found = probe(config, VOCAB, {seed: [(inputs, targets)] for seed in seeds})
    assert fmean(found.amplifications) == pytest.approx(expected, rel=0.1)


def test_gradients_are_averaged_over_batches_before_the_norm():
    config, batches = shaped(layers=2), [batch(1), batch(2)]
    model = initialized(config, 0)
    w2 = [block.mlp.out.weight for block in model.blocks]
    first, second = (torch.autograd.grad(model.loss(*pair), w2) for pair in batches)
    of_mean = [((a + b) / 2).norm().item() for a, b in zip(first, second, strict=True)]
    mean_of = [(a.norm() + b.norm()).item() / 2 for a, b in zip(first, second, strict=True)]
    assert probe(config, VOCAB, {0: batches}).gradient_norms == pytest.approx(of_mean, rel=1e-4)
    assert all(b > 1.1 * a for a, b in zip(of_mean, mean_of, strict=True))


def test_batches_of_one_size_count_as_one_large_batch():
    config, ((x1, y1), (x2, y2)) = shaped(layers=2), (batch(1), batch(2))
    two = probe(config, VOCAB, {0: [(x1, y1), (x2, y2)]})
    one = probe(config, VOCAB, {0: [(torch.cat([x1, x2]), torch.cat([y1, y2]))]})
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-3)


def test_numbers_are_means_over_seeds_or_one_for_each_seed():
    """Each seed with its own weights and its own tokens."""
    config, own = shaped(layers=2), {3: [batch(1)], 4: [batch(2)]}
    a, b = (probe(config, VOCAB, {seed: own[seed]}, with_sharpness=True) for seed in own)
    both = probe(config, VOCAB, own, with_sharpness=True)
    assert both.last_gradients == a.last_gradients + b.last_gradients
    assert both.amplifications == a.amplifications + b.amplifications
    assert both.adam_amplifications == a.adam_amplifications + b.adam_amplifications
    assert a.sharpness is not None
    assert b.sharpness is not None
    assert both.sharpness == a.sharpness + b.sharpness
    for x, y, mean in zip(*map(means, (a, b, both)), strict=True):
        assert x != y
        assert mean == pytest.approx((x + y) / 2)
    assert a != probe(config, VOCAB, {3: own[4]}, with_sharpness=True)


def test_adams_update_is_at_the_rate_of_the_parametrization(monkeypatch: pytest.MonkeyPatch):
    """In muP, a network of twice the base width updates its blocks' matrices at half the rate."""
    config = shaped(layers=1, parametrization="mup", mup_base_width=WIDTH // 2)
    (found,) = probe(config, VOCAB, {0: [batch(0)]}).adam_amplifications
    monkeypatch.setattr("gpt.compare.probes.lr_factor", lambda *_: 1.0)
    (standard,) = probe(config, VOCAB, {0: [batch(0)]}).adam_amplifications
    assert found == pytest.approx(standard / 4, rel=0.01)


def test_the_sharpness_is_that_of_the_first_sequences_up_to_a_depth():
    config, (x, y) = shaped(layers=1, mlp={"multiple": 1}), batch(1)
    model = initialized(config, 3)
    sizes = [p.numel() for p in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        pairs = zip(model.named_parameters(), flat.split(sizes), strict=True)
        named = {name: part.view_as(p) for (name, p), part in pairs}
        with sdpa_kernel(SDPBackend.MATH):
            logits = torch.func.functional_call(model, named, (x[:2],))
            return cross_entropy(logits.flatten(0, 1), y[:2].flatten())

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    found = probe(config, VOCAB, {3: [(x, y)]}, with_sharpness=True).sharpness
    assert found == pytest.approx([torch.linalg.eigvalsh(hessian)[-1].item()], rel=2e-3)
    assert probe(config, VOCAB, {3: [(x, y)]}).sharpness is None
    deep = probe_depths(config, VOCAB, {3: [(x, y)]}, (6, 7), with_sharpness=True)
    assert [each.sharpness is None for each in deep] == [False, True]


@pytest.mark.parametrize(
    ("placement", "least", "most"),
    [
        ("post", 0.75, 1.35),  # as the number of sublayers
        ("pre", 0.25, 0.65),
        ("admin", 0.25, 0.65),
        ("deepnorm", -0.65, -0.35),  # 2L sublayers, each by 2 β⁴ / α² ~ L^-3/2
    ],
)
def test_amplification_grows_with_depth_as_in_theory(placement: str, least: float, most: float):
    """Sequences of one token, ReLU, one head, as wide inside as outside; Liu et al. 2020."""
    mlp = {"activation": "relu", "multiple": 1}
    config = shaped(placement, width=64, context=1, tied_head=False, mlp=mlp)
    found = probe_depths(config, VOCAB, {seed: [batch(0, 16, 1)] for seed in range(4)}, (2, 12))
    sublayers = [2 * each.layers for each in found]
    assert least < loglog_slope(sublayers, [fmean(each.amplifications) for each in found]) < most


def test_closed_branches_have_no_gradient_and_amplify_nothing():
    """ReZero's start: a = 0."""
    for each in probe_depths(shaped("rezero"), VOCAB, {0: [batch(0)]}, (2, 4)):
        assert set(each.gradient_norms) == {0.0}
        assert each.amplifications == each.adam_amplifications == (0.0,)


def test_depths_that_a_placement_does_not_allow_are_left_out():
    found = probe_depths(shaped("mix", 4), VOCAB, {0: [batch(0)]}, (2, 3, 4, 6))
    assert [p.layers for p in found] == [4, 6]
    assert [len(p.gradient_norms) for p in found] == [4, 6]


def test_probes_of_a_placement_without_small_depths_can_be_read_again(tmp_path: Path):
    probes = tuple(probe_depths(shaped("mix", 4), VOCAB, {0: [batch(0, 1, 1)]}))
    write_init_probes(tmp_path, [InitProbe(("mix",), "gpt2", probes, probes)])
    (found,) = read_init_probes(tmp_path, ["mix"])
    assert [p.layers for p in found.text] == [4, 6, 12, 24]


def test_by_default_the_depths_are_2_to_24():
    found = probe_depths(shaped(), VOCAB, {0: [batch(0, 1, 1)]})
    assert [p.layers for p in found] == list(DEPTHS) == [2, 4, 6, 12, 24]


def test_a_probe_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = probe(shaped("admin"), VOCAB, {0: [batch(0)]})
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert probe(shaped("admin"), VOCAB, {0: [batch(0)]}) == first


def test_dropout_is_off():
    plain, dropping = (shaped("admin", 2, dropout=p) for p in (0.0, 0.5))
    assert probe(dropping, VOCAB, {0: [batch(0)]}) == probe(plain, VOCAB, {0: [batch(0)]})


def test_batch_norm_uses_the_batch():
    """Its running averages, 0 and 1, would leave the stream of post-norm unnormalized."""
    found = probe(shaped("post", 3, norm={"type": "batch"}), VOCAB, {0: [batch(0)]})
    assert found.stream_rms == pytest.approx([1, 1, 1], rel=1e-3)


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "rezero"])
def test_every_branch_contributes_to_its_sum(placement: str):
    """Not in ReZero, whose branches are closed at the start."""
    found = probe(shaped(placement, 4), VOCAB, {0: [batch(0)]})
    assert found.betas is not None
    assert len(found.betas) == 4
    assert all(0 < beta < 1 for block in found.betas for beta in block)


def test_a_placement_that_adds_in_another_way_has_no_betas(monkeypatch: pytest.MonkeyPatch):
    class Plain(PLACEMENTS["none"]):
        def forward(self, x: Tensor) -> Tensor:
            return self.add(x, self.attention(x) + self.mlp(x))

    monkeypatch.setitem(PLACEMENTS, "plain", Plain)
    assert probe(shaped("plain"), VOCAB, {0: [batch(0)]}).betas is None

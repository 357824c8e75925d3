"""Results that papers prove about networks at initialisation, checked on ours.

All with `xavier` weights, ReLU, one head and a feed-forward network as wide as the stream, the
setting of Xiong et al. 2020 (On Layer Normalization in the Transformer Architecture).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gpt.config import ModelConfig
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize

VOCAB = 64


def make(
    placement: str, layers: int, seed: int, *, width: int = 64, context: int = 32, uniform: bool
) -> GPT:
    """A model at initialisation; with `uniform`, Q = K = 0, so that attention is a mean."""
    config = ModelConfig.model_validate(
        {
            "layers": layers,
            "heads": 1,
            "width": width,
            "context": context,
            "tied_head": False,
            "norm": {"placement": placement},
            "init": {"regime": "xavier"},
            "mlp": {"activation": "relu", "multiple": 1},
        }
    )
    model = GPT(config, VOCAB)
    initialize(model, config, seed)
    if uniform:
        with torch.no_grad():
            for block in model.blocks:
                block.attention.qkv.weight[: 2 * width] = 0
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def slope(xs: list[int], ys: list[float]) -> float:
    """Slope of log y against log x, by least squares."""
    u, v = (torch.tensor(z, dtype=torch.float64).log() for z in (xs, ys))
    u = u - u.mean()
    return ((u * v).sum() / (u * u).sum()).item()


def mean_square(x: Tensor) -> float:
    return x.square().sum(-1).mean().item() / x.shape[-1]


@torch.no_grad()
def test_the_pre_norm_stream_grows_between_lemma_2s_bounds():
    """(1 + l/2) d <= E|x|^2 <= (1 + 3l/2) d after block l."""
    x = tokens(32, 32)
    layers = 12
    norms = torch.zeros(layers)
    for seed in range(3):
        model = make("pre", layers, seed, width=256, uniform=True)
        stream = model.embed(x)
        for index, block in enumerate(model.blocks):
            stream = block(stream)
            norms[index] += mean_square(stream) / 3
    for number, norm in enumerate(norms.tolist(), 1):
        assert 1 + number / 2 <= norm <= 1 + 3 * number / 2


@torch.no_grad()
def test_the_post_norm_stream_has_variance_one_and_a_half_before_the_second_norm():
    """E|x|^2 = 1.5 d before the norm that follows the feed-forward network."""
    model = make("post", 6, seed=0, width=256, uniform=True)
    sums: list[float] = []
    for block in model.blocks:
        block.add.register_forward_hook(lambda module, inputs, out: sums.append(mean_square(out)))
    model(tokens(32, 32))
    assert sums[1::2] == pytest.approx([1.5] * 6, rel=0.1)


LAYERS = [2, 4, 6, 12, 24]


def last_matrix_gradients(placement: str) -> list[float]:
    """E|dL/dW2| of the last block for one token, by depth; Theorem 1's quantity."""
    norms = []
    for layers in LAYERS:
        total = 0.0
        for seed in range(40):
            model = make(placement, layers, seed, context=1, uniform=True)
            x, y = tokens(1, 1, seed), tokens(1, 1, seed + 1000)
            model.loss(x, y).backward()
            total += model.blocks[-1].mlp.out.weight.grad.norm().item()
        norms.append(total / 40)
    return norms


@pytest.mark.slow
def test_the_last_gradient_of_post_norm_does_not_depend_on_depth():
    assert abs(slope(LAYERS, last_matrix_gradients("post"))) < 0.06


@pytest.mark.slow
def test_the_last_gradient_of_pre_norm_falls_with_depth():
    """As 1/sqrt(1 + L/2), by Lemma 2: a slope near -0.45 here, and sqrt(13/4) from 24 to 6."""
    norms = last_matrix_gradients("pre")
    assert slope(LAYERS, norms) == pytest.approx(-0.45, abs=0.06)
    assert norms[2] / norms[4] == pytest.approx(math.sqrt(13 / 4), rel=0.12)


@torch.no_grad()
def amplification(placement: str, layers: int) -> float:
    """E|out(W) - out(W + δ)|² / d over δ's variance, δ one percent of each block matrix."""
    x, share, total = tokens(16, 32), 0.01, 0.0
    for seed in range(4):
        model = make(placement, layers, seed, uniform=False)
        model.calibrate(x)
        before = model.hidden(x)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.blocks.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += share * parameter.std() * noise
        total += mean_square(model.hidden(x) - before) / share**2
    return total / 4


@pytest.mark.parametrize(
    ("placement", "least", "most"),
    [("post", 0.85, 1.35), ("pre", 0.2, 0.75), ("admin", 0.2, 0.75), ("deepnorm", -0.5, 0.2)],
)
def test_depth_amplifies_a_change_of_the_weights(placement: str, least: float, most: float):
    """Liu et al. 2020: linearly in the number of sublayers in post-norm, less in others."""
    depths = [2, 4, 8, 16]
    assert least < slope(depths, [amplification(placement, n) for n in depths]) < most

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.norm import BIASED, NORMS, BatchNorm, layer_norm, make_norm

WIDTH = 16


def make(norm_type: str, **options: Any) -> nn.Module:
    tree = {"heads": 2, "width": WIDTH, "norm": {"type": norm_type}, **options}
    return make_norm(ModelConfig.model_validate(tree))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 1


def test_the_formula_equals_torchs_layer_norm():
    x, gamma, beta = numbers(4, 5, WIDTH), numbers(WIDTH, seed=1), numbers(WIDTH, seed=2)
    ours = layer_norm(x, gamma, beta, eps=1e-5)
    theirs = nn.functional.layer_norm(x, (WIDTH,), gamma, beta, 1e-5)
    torch.testing.assert_close(ours, theirs)


def test_the_formula_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, biased variance 14/4
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(3.5)
    torch.testing.assert_close(layer_norm(x, 1.0, 0.0, eps=0.0), expected)


def test_layer_norm_gives_mean_0_and_biased_variance_1():
    y = make("layer")(numbers(4, 5, WIDTH))
    torch.testing.assert_close(y.mean(-1), torch.zeros(4, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(4, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm_type", ["rms", "scale"])
def test_rms_and_scale_norm_give_vectors_of_length_sqrt_d(norm_type: str):
    y = make(norm_type)(numbers(4, 5, WIDTH))
    torch.testing.assert_close(y.norm(dim=-1), torch.full((4, 5), 4.0), atol=1e-4, rtol=0)


def test_batch_norm_gives_each_channel_mean_0_and_variance_1_over_batch_and_time():
    y = make("batch")(numbers(4, 5, WIDTH))
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(WIDTH), atol=1e-6, rtol=0)
    variance = y.var((0, 1), correction=0)
    torch.testing.assert_close(variance, torch.ones(WIDTH), atol=1e-4, rtol=0)


def test_dynamic_tanh_by_hand():
    norm = make("dyt")
    x = numbers(2, WIDTH)
    torch.testing.assert_close(norm(x), torch.tanh(x / 2))
    with torch.no_grad():
        norm.alpha.fill_(2.0)
        norm.weight.fill_(3.0)
        norm.bias.fill_(1.0)
    torch.testing.assert_close(norm(x), 3 * torch.tanh(2 * x) + 1)


@pytest.mark.parametrize("kind", ["dyt", "none"])
def test_an_epsilon_without_effect_is_refused(kind: str):
    norm = {"type": kind, "eps": 1e-6}
    with pytest.raises(ValidationError, match=f"1e-06 conflicts with norm.type {kind};"):
        ModelConfig.model_validate({"norm": norm})


def test_dynamic_tanh_starts_at_its_alpha0():
    norm = make_norm(ModelConfig.model_validate({"norm": {"type": "dyt", "alpha0": 1.5}}), WIDTH)
    x = numbers(2, WIDTH)
    torch.testing.assert_close(norm(x), torch.tanh(1.5 * x))


def test_norm_none_is_the_identity():
    x = numbers(2, 3, WIDTH)
    assert torch.equal(make("none")(x), x)


PARAMETERS = {
    "layer": {"weight", "bias"},
    "rms": {"weight"},
    "batch": {"weight", "bias"},
    "dyt": {"alpha", "weight", "bias"},
    "scale": {"g"},
    "none": set(),
}


def test_the_parameters_of_every_norm_are_listed():
    assert list(PARAMETERS) == list(NORMS), "add its parameters to PARAMETERS"


@pytest.mark.parametrize("norm_type", PARAMETERS)
@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({}, True),
        ({"bias": False}, False),
        ({"norm": {"bias": False}}, False),
        ({"bias": False, "norm": {"bias": True}}, True),
    ],
)
def test_a_norms_bias_can_be_switched(norm_type: str, options: dict[str, Any], bias: bool):
    own = {**options.get("norm", {}), "type": norm_type}
    if own.get("bias") and norm_type not in BIASED:
        with pytest.raises(ValueError, match=f"norm.type {norm_type}, which has no bias"):
            make(norm_type, **{**options, "norm": own})
        return
    norm = make(norm_type, **{**options, "norm": own})
    names = {name for name, _ in norm.named_parameters()}
    assert names == PARAMETERS[norm_type] - (set() if bias else {"bias"})
    assert norm(numbers(2, 3, WIDTH)).isfinite().all()


@pytest.mark.parametrize("norm_type", ["layer", "rms", "batch"])
def test_epsilon_is_inside_the_root(norm_type: str):
    norm = make(norm_type, norm={"type": norm_type, "eps": 3.0})
    x = torch.ones(2, 4, WIDTH)
    x[..., ::2] = -1  # variance 1 and mean 0 over channels, but constant in each
    if norm_type == "batch":
        x[0], x[1] = 1, -1
    torch.testing.assert_close(norm(x), x / 2)


@pytest.mark.parametrize("norm_type", ["layer", "scale"])
def test_epsilon_keeps_zeros_finite(norm_type: str):
    x = torch.zeros(2, WIDTH, requires_grad=True)
    make(norm_type)(x).sum().backward()
    assert x.grad.isfinite().all()


def padded(x: Tensor, length: int) -> Tensor:
    """Two sequences in one batch, the second one padded with zeros to `length` tokens."""
    batch = torch.zeros(2, length, x.shape[-1])
    batch[0, : x.shape[1]] = x[0]
    batch[1, : x.shape[1]] = x[1]
    return batch


def test_padding_changes_the_output_of_batch_norm_but_not_of_layer_norm():
    """This is why language models normalize over channels."""
    x = numbers(2, 10, WIDTH)
    for norm_type, moves in (("batch", True), ("layer", False), ("rms", False)):
        norm = make(norm_type)
        alone = norm(x)
        with_padding = norm(padded(x, 20))[:, :10]
        assert torch.allclose(alone, with_padding, atol=1e-5) != moves, norm_type
    # Half of the positions are zeros now, so the mean is half of what it was.
    batch, plain = BatchNorm(WIDTH, 1e-5, bias=True), BatchNorm(WIDTH, 1e-5, bias=True)
    plain(x)
    batch(padded(x, 20))
    torch.testing.assert_close(batch.running_mean, plain.running_mean / 2)


def test_batch_norm_uses_its_running_averages_in_evaluation():
    norm = make("batch")
    for seed in range(200):
        norm(numbers(8, 16, WIDTH, seed=seed))
    norm.eval()
    alone = norm(numbers(1, 1, WIDTH))
    torch.testing.assert_close(alone, (numbers(1, 1, WIDTH) - 1) / 3, atol=0.1, rtol=0.1)


def test_rms_norm_under_bf16_autocast_is_in_fp32_without_a_warning(recwarn):
    with torch.autocast("cpu", torch.bfloat16):
        y = make("rms")(numbers(2, 3, WIDTH).bfloat16())
    assert y.dtype == torch.float32
    assert [str(warning.message) for warning in recwarn.list] == []

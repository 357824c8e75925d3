"""Normalization layers, a few lines each: which statistics they use, and over which numbers.

Where a block applies them is its placement: placement.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig, NormConfig


def layer_norm(x: Tensor, gamma: Tensor | float, beta: Tensor | float, eps: float) -> Tensor:
    """Layer norm written out: γ (x - mean) / sqrt(variance + ε) + β; Ba et al. 2016.

    Mean and variance are taken over one token's channels, so they depend neither on other tokens
    nor on padding. The variance is biased: divided by d, not d - 1. This function is for reading;
    the model uses torch's layer norm, which computes the same in one pass over memory.

    Args:
        x: (..., d).
        gamma, beta: (d,), or one number.

    Returns:
        (..., d).
    """
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return gamma * (x - mean) / torch.sqrt(variance + eps) + beta


class BatchNorm(nn.BatchNorm1d):
    """Normalizes each channel over batch and time; Ioffe and Szegedy 2015.

    Included to show why layer norm won. In training, every token depends on all others, later ones
    and padding included, so the model sees the tokens that it should predict. In evaluation it uses
    running averages, which differ from the statistics of training; before the first update there
    are none, so evaluation is meaningless.
    """

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__(width, eps=eps)
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, and no running averages."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DynamicTanh(nn.Module):
    """γ tanh(α x) + β, without any statistics; α is trained from α₀. Zhu et al. 2025."""

    def __init__(self, width: int, alpha0: float, bias: bool) -> None:
        super().__init__()
        self.alpha0, self.alpha = alpha0, nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """α = α₀, γ = 1, β = 0."""
        nn.init.constant_(self.alpha, self.alpha0)
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        y = self.weight * torch.tanh(self.alpha * x)
        return y if self.bias is None else y + self.bias


class ScaleNorm(nn.Module):
    """g x / ||x|| with one trained number g, initially sqrt(d); Nguyen and Salazar 2019."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.g = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set g = sqrt(d), so that the RMS of the output is 1."""
        nn.init.constant_(self.g, math.sqrt(self.width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.g * x / x.norm(dim=-1, keepdim=True).clamp(min=self.eps)


class RMSNorm(nn.RMSNorm):
    """γ x / sqrt(mean(x²) + ε): no mean is subtracted, no bias added; Zhang and Sennrich 2019."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), in the precision of γ, also under autocast."""
        return super().forward(x.to(self.weight.dtype))


# Each takes the channels to normalize over, the constants, and whether to have a bias β.
NORMS: dict[str, Callable[[int, NormConfig, bool], nn.Module]] = {
    "layer": lambda width, norm, bias: nn.LayerNorm(width, eps=norm.eps, bias=bias),  # GPT-2's
    "rms": lambda width, norm, bias: RMSNorm(width, eps=norm.eps),
    "batch": lambda width, norm, bias: BatchNorm(width, norm.eps, bias),
    "dyt": lambda width, norm, bias: DynamicTanh(width, norm.alpha0, bias),
    "scale": lambda width, norm, bias: ScaleNorm(width, norm.eps),
    "none": lambda width, norm, bias: nn.Identity(),
}
BIASED: set[str] = {"layer", "batch", "dyt"}  # those that can have a bias β
ACROSS_TOKENS: set[str] = {"batch"}  # those whose statistics are over several tokens


def make_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """The norm that the config names: (..., width) -> (..., width).

    Args:
        width: channels; by default the model's width.
    """
    norm = config.norm
    bias = config.bias if norm.bias is None else norm.bias
    return NORMS[norm.type or "layer"](width or config.width, norm, bias)

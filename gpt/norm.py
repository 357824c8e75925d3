"""Normalisation: where it stands around a sublayer.

A placement is one small module round one sublayer (attention or feed-forward): it owns the norm,
and its `forward` is its equation. A new one is a class and one entry in `PLACEMENTS`. The model
reads from the class whether a final norm follows the last block, once.

Layer norm itself is torch's: y = gamma * (x - mean) / sqrt(var + eps) + beta over the channels of
one token, with the biased variance (Ba et al. 2016).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gpt.config import ModelConfig


def make_norm(config: ModelConfig) -> nn.Module:
    """A layer norm over the last axis, (..., d) -> (..., d); gamma starts at 1 and beta at 0."""
    return nn.LayerNorm(config.width, eps=config.norm.eps, bias=config.bias)


class Placement(nn.Module):
    """A residual connection round `sublayer`, f; `forward` says where its norm stands.

    (B, T, d) -> (B, T, d).
    """

    final_norm: ClassVar[bool]  # whether a norm follows the last block

    def __init__(self, config: ModelConfig, sublayer: nn.Module) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.sublayer = sublayer


class PreNorm(Placement):
    """x + f(norm(x)); GPT-2, Xiong et al. 2020. Needs the final norm: the stream grows with L."""

    final_norm = True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sublayer(self.norm(x))


class PostNorm(Placement):
    """norm(x + f(x)); Vaswani et al. 2017, GPT-1. Its output is normalised: no final norm."""

    final_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.sublayer(x))


PLACEMENTS: dict[str, type[Placement]] = {
    "pre": PreNorm,
    "post": PostNorm,
}

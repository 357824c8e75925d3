"""Initial weights, by parameter name.

GPT-2's regime: every matrix and embedding is normal with sigma = 0.02, the two projections into the
residual stream of each block have sigma = 0.02 / sqrt(2 L) (there are 2 L of them), biases are 0,
norms start as the identity.

Each parameter is drawn by a generator of its own, seeded from (seed, name). So two models that
share a parameter's name and shape start with the same numbers there, whatever else differs between
them; that is what lets pre-norm and post-norm be compared from one starting point.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from gpt.model import GPT
from gpt.rng import generator

SIGMA = 0.02


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Set every parameter of `model` in place. The numbers do not depend on the device."""
    residual_sigma = SIGMA / math.sqrt(2 * model.config.layers)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            sigma = residual_sigma if name.endswith(".out") else SIGMA
            values = torch.empty(module.weight.shape)
            values.normal_(0.0, sigma, generator=generator(seed, "init", f"{name}.weight"))
            module.weight.copy_(values)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()

"""Initial weights: a controlled factor of a comparison, chosen by `model.init.regime`.

Every matrix is drawn from a normal distribution with mean 0; a regime sets the standard deviations.
Biases start at 0 and norms at unit scale. Two more factors apply: 1/sqrt(2L) on the 2L matrices
that write into the residual stream, if `depth_scaled`, and the placement's `gain`.

Each parameter has its own generator, seeded from (seed, name). Two models that share a parameter's
name and shape therefore share its draw, whatever else differs between them; so pre-norm and
post-norm can be compared from the same starting point.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.parametrization import base_width, initial_sigma, logit_factor
from gpt.model.placement import PLACEMENTS
from gpt.rng import generator

Sigma = Callable[[float, float], float]  # (n_in, n_out) of a matrix -> its standard deviation


def constant(n_in: float, n_out: float) -> float:
    """0.02 for every shape; GPT-2, Radford et al. 2019."""
    return 0.02


def xavier(n_in: float, n_out: float) -> float:
    """sqrt(2 / (n_in + n_out)); Glorot and Bengio 2010."""
    return math.sqrt(2 / (n_in + n_out))


def small(n_in: float, n_out: float) -> float:
    """sqrt(2 / 5d), Xavier's for a matrix of d x 4d; SmallInit, Nguyen and Salazar 2019."""
    return math.sqrt(2 / (5 * n_in))


@dataclass(frozen=True)
class Regime:
    """Standard deviations of the initial weights.

    Attributes:
        attention, other: for the matrices of attention, and for all others.
        embedding: for the token and position embeddings, whose sum enters the first block.
        unit_stream: whether that sum has variance 1; a tied head then divides logits by sqrt(d).
        depth_scaled: whether "auto" applies the factor 1/sqrt(2L).
    """

    attention: Sigma
    other: Sigma
    embedding: float
    unit_stream: bool
    depth_scaled: bool


REGIMES: dict[str, Regime] = {
    "gpt2": Regime(constant, constant, 0.02, unit_stream=False, depth_scaled=True),
    "xavier": Regime(xavier, xavier, math.sqrt(0.5), unit_stream=True, depth_scaled=False),
    "small": Regime(small, xavier, math.sqrt(0.5), unit_stream=True, depth_scaled=False),
}


def logit_scale(config: ModelConfig) -> float:
    """1/sqrt(d) for a tied head with row norms of order sqrt(d), so that logits are of order 1."""
    unit = config.tied_head and REGIMES[config.init.regime].unit_stream
    return (base_width(config) ** -0.5 if unit else 1.0) * logit_factor(config, "output")


def depth_scaled(config: ModelConfig) -> bool:
    """Whether matrices that write into the residual stream are scaled by 1/sqrt(2L)."""
    if config.init.depth_scaled != "auto":
        return config.init.depth_scaled == "on"
    by_placement = PLACEMENTS[config.norm.placement].scales_depth
    return REGIMES[config.init.regime].depth_scaled and not by_placement


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of the GPT `model` in place, to the same numbers on every device.

    A linear layer with `parts`, the names of several fused matrices, is initialized part by part.
    """
    regime = REGIMES[config.init.regime]
    placement = PLACEMENTS[config.norm.placement]
    depth = 1 / math.sqrt(2 * config.layers) if depth_scaled(config) else 1.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            sigma = initial_sigma(config, name, lambda *_: regime.embedding, *module.weight.shape)
            module.weight.copy_(_draw(module.weight, seed, name) * sigma)
        elif isinstance(module, nn.Linear):
            path = name.split(".")  # blocks, 0, attention, qkv
            parts = getattr(module, "parts", path[-1:])
            base_sigma = regime.attention if "attention" in path else regime.other
            values = _draw(module.weight, seed, name)
            for matrix, part in zip(values.chunk(len(parts)), parts, strict=True):
                matrix *= initial_sigma(config, name, base_sigma, *matrix.shape)
                if "blocks" in path:
                    matrix *= placement.gain(config.layers, part)
                if part == "out":
                    matrix *= depth
            module.weight.copy_(values)
            if module.bias is not None:
                module.bias.zero_()
        elif hasattr(module, "reset_parameters"):  # norms, and placements with weights
            module.reset_parameters()
        elif list(module.parameters(recurse=False)):
            raise TypeError(f"{name}: {type(module).__name__} has weights but no reset_parameters")


@torch.no_grad()
def fingerprints(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape, digests and RMS of each parameter, to compare the initial weights of two models.

    `sha256` is a digest of the numbers, `signs` of their signs. Equal signs with unequal numbers
    are the same draw at another scale, which `rms` gives; a placement's gain has this effect.
    """
    return {
        name: {
            "shape": list(parameter.shape),
            "sha256": _digest(parameter),
            "signs": _digest(parameter.sign().to(torch.int8)),
            "rms": parameter.square().mean().sqrt().item(),
        }
        for name, parameter in model.named_parameters()
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _draw(weight: Tensor, seed: int, name: str) -> Tensor:
    """Standard normal numbers in the shape of `weight`, on the CPU, seeded for module `name`."""
    values = torch.empty(weight.shape)
    return values.normal_(generator=generator(seed, "init", f"{name}.weight"))

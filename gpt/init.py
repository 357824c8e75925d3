"""Initial weights: a controlled factor of the comparison, named by `model.init.regime`.

Every matrix is normal with mean 0; a regime is the standard deviations. Biases start at 0 and norms
as the identity. On top come two factors: 1/sqrt(2L) on the two matrices of a block that write into
the residual stream (there are 2L of them), if `depth_scaled`; and the placement's own gain.

Each parameter is drawn by a generator of its own, seeded from (seed, name). So two models that
share a parameter's name and shape start from the same draw there, whatever else differs between
them; that is what lets pre-norm and post-norm be compared from one starting point.
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
from gpt.placement import PLACEMENTS
from gpt.rng import generator

Sigma = Callable[[int, int], float]  # of one matrix: (n_in, n_out) -> standard deviation


def constant(n_in: int, n_out: int) -> float:
    """GPT-2's, whatever the size (Radford et al. 2019)."""
    return 0.02


def xavier(n_in: int, n_out: int) -> float:
    """sqrt(2 / (n_in + n_out)); Glorot and Bengio 2010."""
    return math.sqrt(2 / (n_in + n_out))


def small(n_in: int, n_out: int) -> float:
    """sqrt(2 / 5d): attention's matrices as if 4d wide; Nguyen and Salazar 2019, SmallInit."""
    return math.sqrt(2 / (5 * n_in))


@dataclass(frozen=True)
class Regime:
    """Standard deviations at the start.

    Attributes:
        attention, other: of the matrices of attention, and of all others.
        embedding: of token and position embeddings; their sum is the stream's first value.
        unit_stream: that sum has variance 1, so a tied head divides its logits by sqrt(d).
        depth_scaled: whether 1/sqrt(2L) belongs to it, where the config says "auto".
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
    """1/sqrt(d) for a tied head whose rows have a norm near sqrt(d), so that logits are near 1."""
    unit = config.tied_head and REGIMES[config.init.regime].unit_stream
    return config.width**-0.5 if unit else 1.0


def depth_scaled(config: ModelConfig) -> bool:
    """Whether the matrices that write into the stream start at 1/sqrt(2L) of the regime's sigma."""
    if config.init.depth_scaled != "auto":
        return config.init.depth_scaled == "on"
    own_answer = PLACEMENTS[config.norm.placement].scales_depth
    return REGIMES[config.init.regime].depth_scaled and not own_answer


class Stacked(nn.Linear):
    """Several matrices that read the same input, as one product; each starts as if it were alone.

    Args:
        n_in, n_out: channels of one of them.
        parts: their names, in the order in which their outputs stand.
    """

    def __init__(self, n_in: int, n_out: int, parts: tuple[str, ...], bias: bool) -> None:
        super().__init__(n_in, n_out * len(parts), bias)
        self.parts = parts


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of the GPT `model` in place. The numbers do not depend on the device."""
    regime = REGIMES[config.init.regime]
    placement = PLACEMENTS[config.norm.placement]
    depth = 1 / math.sqrt(2 * config.layers) if depth_scaled(config) else 1.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            values = _draw(module.weight, seed, name) * regime.embedding
            module.weight.copy_(values)
        elif isinstance(module, nn.Linear):
            path = name.split(".")  # blocks, 0, attention, qkv
            parts = module.parts if isinstance(module, Stacked) else path[-1:]
            sigma = regime.attention if "attention" in path else regime.other
            values = _draw(module.weight, seed, name)
            for matrix, part in zip(values.chunk(len(parts)), parts, strict=True):
                matrix *= sigma(matrix.shape[1], matrix.shape[0])
                if "blocks" in path:
                    matrix *= placement.gain(config.layers, part)
                if part == "out":
                    matrix *= depth
            module.weight.copy_(values)
            if module.bias is not None:
                module.bias.zero_()
        elif hasattr(module, "reset_parameters"):  # norms, and placements with weights
            module.reset_parameters()


@torch.no_grad()
def fingerprints(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What tells whether two models start alike, parameter by parameter.

    `sha256` is of the numbers, `signs` of their signs alone: equal signs under unequal numbers are
    one draw at two scales, such as a placement's gain makes; `rms` is the scale.
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
    """Standard normal numbers in the shape of `weight`, on the CPU, for the module `name`."""
    values = torch.empty(weight.shape)
    return values.normal_(generator=generator(seed, "init", f"{name}.weight"))

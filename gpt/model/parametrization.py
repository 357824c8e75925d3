"""How initial weights, learning rates and logits change with the width: `model.parametrization`.

In the standard parametrization, one learning rate applies to all weights. The same rate then
changes the activations of a wide network more than those of a narrow one. The maximal update
parametrization, muP, makes these changes independent of the width, so that the best learning rate
of a narrow network is also that of a wide one (Yang et al. 2022, "Tensor Programs V").

Every factor is a power of m = width / `model.mup_base_width`, and a network of the base width is
the standard one, bit for bit. The exponents are those of the paper's table 8, which allows a tied
head. Adam's ε is not scaled, as it is negligible at the widths that this code is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from gpt.config import ModelConfig

# Exponents of m in the learning rate of hidden matrices, by optimizer; muP excludes all others.
# Adam's update has entries of size 1, and a spectral norm that grows as m. Muon's, with its factor
# sqrt(max(rows, columns)), grows as sqrt(m) (see Yang, Simon and Bernstein 2023).
# RAdam's first few updates are those of SGD, which these exponents make smaller than needed.
HIDDEN_RATES = {"adamw": -1.0, "radam": -1.0, "muon": -0.5}


class Rule(NamedTuple):
    """Exponents of m for one kind of parameter.

    Attributes:
        sigma: in the initial standard deviation, relative to that at the base width.
        rate: in the learning rate, by optimizer; 0 for those not listed. Weight decay is divided by
            this factor, so that each step takes the same fraction of a weight at every width.
    """

    sigma: float
    rate: Mapping[str, float]


RULES: dict[str, Rule] = {
    "embedding": Rule(sigma=0.0, rate={}),  # of tokens, tied to the head or not, and of positions
    "hidden": Rule(sigma=-0.5, rate=HIDDEN_RATES),  # the blocks' matrices, from width to width
    "head": Rule(sigma=0.0, rate={}),  # from width to vocabulary, with the exponent of its logits
    "vector": Rule(sigma=0.0, rate={}),  # biases, norms, and a placement's own weights
}
# Exponents of m in the attention logits, which become q k^T / (d/h) up to a constant, and in the
# output logits.
LOGITS = {"attention": -0.5, "output": -1.0}


def base_width(config: ModelConfig) -> int:
    """The width at which both parametrizations are equal; the width itself unless in muP."""
    return config.mup_base_width or config.width


def width_ratio(config: ModelConfig) -> float:
    """The ratio m = width / base width; 1 in the standard parametrization."""
    return config.width / base_width(config)


def logit_factor(config: ModelConfig, logits: str) -> float:
    """The factor on "attention" or "output" logits."""
    return float(width_ratio(config) ** LOGITS[logits])


def kind_of(name: str, dimensions: int) -> str:
    """The key in RULES of a model's parameter, by its name and its number of dimensions."""
    kinds = {"blocks": "hidden", "head": "head"}
    return kinds.get(name.split(".")[0], "embedding") if dimensions > 1 else "vector"


def initial_sigma(
    config: ModelConfig, name: str, sigma: Callable[[float, float], float], n_out: int, n_in: int
) -> float:
    """Initial standard deviation of a matrix (n_out, n_in) of the parameter `name`.

    Args:
        sigma: (n_in, n_out) of the same matrix at the base width -> its standard deviation.
    """
    m, kind = width_ratio(config), kind_of(name, 2)
    at_base = sigma(n_in / m, n_out / m if kind == "hidden" else n_out)
    return float(at_base * m ** RULES[kind].sigma)


def lr_factor(kind: str, optimizer: str, m: float) -> float:
    """The factor on the learning rate of a parameter of one kind that `optimizer` updates."""
    return float(m ** RULES[kind].rate.get(optimizer, 0.0))

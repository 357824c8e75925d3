"""Published models whose shapes the planner reproduces, within 1% of their parameters.

docs/planning.md prints this table, and says where the counts differ from what papers call them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gpt.config import ModelConfig, validate
from gpt.plan.size import build, parameters


class Published(NamedTuple):
    """A published model.

    Attributes:
        millions: of parameters, as published.
        shape: layers, heads, width.
        context, vocab_size: in tokens.
        relative: whether positions are relative, as in Transformer-XL (Dai et al. 2019): a d x d
            matrix in each block in place of the position embedding.
        options: of the model, where it is not GPT-2's.
    """

    millions: float
    shape: tuple[int, int, int]
    context: int
    vocab_size: int
    relative: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012

    def config(self) -> ModelConfig:
        """Its shape as options of this code."""
        layers, heads, width = self.shape
        tree = {"layers": layers, "heads": heads, "width": width, "context": self.context}
        return validate(ModelConfig, {**tree, **self.options})

    def parameters(self) -> dict[str, int]:
        """By part, as the planner counts them."""
        counts = parameters(build(self.config(), self.vocab_size))
        if self.relative:
            layers, _, width = self.shape
            counts["position embedding"] = layers * width**2
        return counts


def _gpt2(millions: float, *shape: int) -> Published:
    return Published(millions, (shape[0], shape[1], shape[2]), 1024, 50_257)


def _gpt3(millions: float, *shape: int) -> Published:
    return Published(millions, (shape[0], shape[1], shape[2]), 2048, 50_257)


def _hoffmann(millions: float, *shape: int) -> Published:
    plain = {"bias": False, "norm": {"type": "rms"}}
    return Published(millions, (shape[0], shape[1], shape[2]), 2048, 32_000, True, plain)


PUBLISHED: dict[str, Published] = {
    # Radford et al. 2018; the count is in the table of Radford et al. 2019
    "GPT-1": Published(117, (12, 12, 768), 512, 40_478, options={"norm": {"placement": "post"}}),
    # Radford et al. 2019; counts as corrected in the README of github.com/openai/gpt-2
    "GPT-2 small": _gpt2(124, 12, 12, 768),
    "GPT-2 medium": _gpt2(355, 24, 16, 1024),
    "GPT-2 large": _gpt2(774, 36, 20, 1280),
    "GPT-2 XL": _gpt2(1558, 48, 25, 1600),
    # Brown et al. 2020, table 2.1, and the more precise counts of table D.1
    "GPT-3 small": _gpt3(125, 12, 12, 768),
    "GPT-3 medium": _gpt3(356, 24, 16, 1024),
    "GPT-3 large": _gpt3(760, 24, 16, 1536),
    "GPT-3 XL": _gpt3(1320, 24, 16, 2048),
    "GPT-3 2.7B": _gpt3(2650, 32, 32, 2560),
    "GPT-3 6.7B": _gpt3(6660, 32, 32, 4096),
    "GPT-3 13B": _gpt3(12_850, 40, 40, 5120),
    "GPT-3 175B": _gpt3(174_600, 96, 96, 12_288),
    # Hoffmann et al. 2022, table A9
    "Hoffmann 44M": _hoffmann(44, 8, 8, 512),
    "Hoffmann 117M": _hoffmann(117, 12, 12, 768),
    "Hoffmann 251M": _hoffmann(251, 16, 16, 1024),
    "Hoffmann 1018M": _hoffmann(1018, 23, 14, 1792),
    "Hoffmann 6796M": _hoffmann(6796, 40, 28, 3584),
    "Hoffmann 16183M": _hoffmann(16_183, 47, 40, 5120),
    # table 4: two of the same training budget
    "Gopher": _hoffmann(280_000, 80, 128, 16_384),
    "Chinchilla": _hoffmann(70_000, 80, 64, 8192),
}

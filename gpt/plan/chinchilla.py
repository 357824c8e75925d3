"""Which model a budget deserves, and how many tokens a model deserves: about 20 per parameter.

Hoffmann et al. 2022 ("Chinchilla") found the lowest loss at a given number of FLOPs where
parameters and tokens grow in proportion. The ratio in their study, where N counts embeddings, is
about 20 (tables 3 and A3). docs/planning.md says what it assumes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import get_args

from gpt.config import ModelConfig, merge, validate
from gpt.config.values import Channels, Layers
from gpt.errors import InputError
from gpt.model.placement import PLACEMENTS
from gpt.plan import TOKENS_PER_PARAMETER
from gpt.plan.size import build

MOST_LAYERS, MOST_CHANNELS = (get_args(kind)[1].maximum for kind in (Layers, Channels))

Fits = Callable[[float, float], bool]  # of (parameters, FLOPs of a token): whether within budget


def largest_model(model: ModelConfig, vocab_size: int, fits: Fits, refusal: str) -> ModelConfig:
    """The largest model that fits, of about the same ratio of width to depth.

    Heads keep their width; in muP, their number. Of each width, the deepest network that fits is
    considered, and of these the one whose ratio is nearest to that of `model`.

    Args:
        fits: true up to some size.
        refusal: the start of the message if nothing fits.

    Raises:
        InputError: not even the smallest model fits.
    """
    mup = model.parametrization == "mup"
    unit = model.heads if mup else model.width // model.heads
    least = PLACEMENTS[model.norm.placement].min_layers

    def shaped(units: int, layers: int) -> ModelConfig:
        shape = {"layers": layers, "width": units * unit, "heads": unit if mup else units}
        return validate(ModelConfig, merge(model.model_dump(), shape))

    def cost(units: int, layers: int) -> tuple[float, float]:
        built = build(shaped(units, layers), vocab_size)
        return built.num_parameters(), built.flops_per_token()

    @cache
    def depth(units: int) -> int:
        """The largest number of equally costly layers that fits; `least - 1` if none fits."""
        one, two = cost(units, least), cost(units, least + 1)

        def too_large(layers: int) -> bool:
            return not fits(
                *(a + (b - a) * (layers - least) for a, b in zip(one, two, strict=True))
            )

        return least - 1 + bisect_left(range(least, MOST_LAYERS + 1), True, key=too_large)

    def ratio(units: int) -> float:
        return units * unit / depth(units) if depth(units) >= least else math.inf

    target, sizes = model.width / model.layers, range(1, MOST_CHANNELS // unit + 1)
    wider = bisect_left(sizes, target, key=ratio)
    candidates = [n for n in sizes[max(0, wider - 1) : wider + 1] if ratio(n) < math.inf]
    if not candidates:
        n, flops = cost(1, least)
        raise InputError(
            f"{refusal}: too small for any model like this; the smallest, model.layers: {least} "
            f"and model.width: {unit}, has {n:,} parameters and deserves "
            f"{TOKENS_PER_PARAMETER * n:,} tokens, {TOKENS_PER_PARAMETER * n * flops:.2g} FLOPs"
        )
    units = min(candidates, key=lambda units: abs(math.log(ratio(units) / target)))
    return shaped(units, depth(units))

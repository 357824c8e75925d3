"""The coordinate check: how far a few updates move the activations of networks of several widths.

In muP the changes do not depend on the width; in the standard parametrization those of the logits
grow with it. Yang et al. 2022 ("Tensor Programs V") test implementations of muP in this way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from gpt.config import Config, merge, validate
from gpt.data.prepared import Dataset
from gpt.data.sequences import TrainingSequences
from gpt.errors import InputError
from gpt.hardware.device import host_tensor, pick_device
from gpt.model.gpt2 import GPT, CausalSelfAttention, causal_mask
from gpt.model.placement import Block
from gpt.run.plot import label, literal_text, save
from gpt.trainer import Trainer

# Log-log slopes up to this are nearer to muP's 0 than to the 1 of Adam's standard rates.
FLAT = 0.5
# Slopes down to this may be muP's: the random part of its attention logits declines as m^-0.5.
FALLING = -0.75
SEQUENCES = 16  # of the first batch, at most, on which activations are compared
RADAM_STEPS = 6  # with fewer, all updates are those of SGD with momentum (Liu et al. 2020)


@dataclass(frozen=True)
class Change:
    """How far updates move one activation.

    Attributes:
        name: such as "stream after block 1".
        rms: of the difference from its value before the first update, at each width.
        slope: of log rms over log width, by least squares.
    """

    name: str
    rms: tuple[float, ...]
    slope: float


def check(
    config: Config, dataset: Dataset, widths: Sequence[int], steps: int, seeds: int
) -> list[Change]:
    """Train networks of several widths for a few steps, without warm-up.

    Args:
        config: of every network except for the width; the number of heads stays.
        widths: at least two.
        steps: updates before the measurement, at the full learning rate.
        seeds: networks of each width, each with its own weights and, unless `data.seed` is set,
            its own batches.

    Raises:
        InputError: a width does not fit the config or the memory, a change is 0 or not finite, or
            the steps are too few for the optimizer.
    """
    if config.optimizer.name == "radam" and steps < RADAM_STEPS:
        raise InputError(
            f"--steps: radam's first {RADAM_STEPS - 1} updates are those of SGD; "
            f"use at least {RADAM_STEPS}"
        )
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(widths))
    for column, width in enumerate(widths):
        for seed in range(config.seed, config.seed + seeds):
            options = {"seed": seed, "model": {"width": width}}
            cell = validate(Config, merge(config.model_dump(), options))
            for name, square in _changes(cell, dataset, steps).items():
                squares[name][column] += square / seeds
    return [_change(name, widths, own) for name, own in squares.items()]


def _change(name: str, widths: Sequence[int], squares: Sequence[float]) -> Change:
    for width, square in zip(widths, squares, strict=True):
        if not 0 < square < math.inf:
            raise InputError(
                f"the mean square of the change of {name} is {square:g} at width {width} and has "
                "no slope; use another --optimizer.learning-rate or --steps"
            )
    rms = np.sqrt(squares)
    slope = float(np.polyfit(np.log(widths), np.log(rms), 1)[0])
    return Change(name, tuple(rms.tolist()), slope)


def verdict(changes: Sequence[Change]) -> str:
    """What the slopes say about the width, in one line that names the worst one.

    Growth above FLAT is worse than any decline; a slope down to FALLING is not a decline.
    """
    highest = max(changes, key=lambda change: change.slope)
    lowest = min(changes, key=lambda change: change.slope)
    worst = lowest if highest.slope < min(FLAT, -lowest.slope) else highest
    words = "looks independent of the width"
    if worst.slope > FLAT:
        words = "grows with the width"
    elif worst.slope < FALLING:
        words = "declines with the width"
    return f"{words}; worst slope {worst.slope:+.2f} ({worst.name})"


def _changes(config: Config, dataset: Dataset, steps: int) -> dict[str, float]:
    """Mean square of each activation's change over `steps` updates, on the first batch."""
    device = pick_device(config.training.device)
    trainer = Trainer(config, dataset.encoding.n_vocab, device)
    sequences = TrainingSequences(
        dataset.train,
        config.model.context,
        config.data_seed,
        weights=config.data.weights,
        windows=config.data.windows,
    )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x, y = sequences.batch(step, config.batch_sequences)
        return host_tensor(x, device), host_tensor(y, device)

    trainer.reset()
    first = batch(1)[0][:SEQUENCES]
    trainer.calibrate(first)
    before = activations(trainer.model, trainer.to_device(first))
    for step in range(1, steps + 1):
        loss, grad_norm = trainer.backward(step, *batch(step))
        trainer.update(config.schedule.scale, loss, grad_norm)
    after = activations(trainer.model, trainer.to_device(first))
    return {name: (after[name] - x).float().square().mean().item() for name, x in before.items()}


@torch.no_grad()
def activations(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """The stream after each layer, the attention logits and the output logits of (B, T) tokens."""
    found: dict[str, Tensor] = {}
    hooks = []
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    for number, block in enumerate(blocks, 1):

        def attention(module: CausalSelfAttention, inputs: Any, number: int = number) -> None:
            q, k, _ = module.project(inputs[0])
            scores = module.scores(q, k)
            T, S = scores.shape[-2:]
            attended = causal_mask(T, S, scores.device)
            found[f"attention logits of block {number}"] = scores[..., attended]

        def stream(module: Any, inputs: Any, out: Any, number: int = number) -> None:
            found[f"stream after block {number}"] = out[0] if isinstance(out, tuple) else out

        hooks += [
            block.attention.register_forward_pre_hook(attention),
            block.register_forward_hook(stream),
        ]
    model.eval()
    try:
        found["embeddings"] = model.embed(tokens)
        found["output logits"] = model(tokens)
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    return found


@literal_text()
def plot(changes: Sequence[Change], widths: Sequence[int], path: Path, title: str) -> None:
    """Plot the changes against the width, with their slopes, as a PNG."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(label(title))
    attention = [change for change in changes if change.name.startswith("attention")]
    others = [change for change in changes if change not in attention]
    for axes, panel in zip(figure.subplots(1, 2), (others, attention), strict=True):
        colors = colormaps["viridis"](np.linspace(0, 0.9, len(panel)))
        for change, color in zip(panel, colors, strict=True):
            text = f"{change.name}: slope {change.slope:+.2f}"
            axes.plot(widths, change.rms, color=color, marker="o", ms=4, label=text)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(widths, [str(width) for width in widths], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("width")
        axes.set_ylabel("RMS of the change")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    save(figure, path)

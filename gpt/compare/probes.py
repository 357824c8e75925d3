"""Networks at initialization, measured without training: the quantities of the theory.

Gradient norms by layer and depth (Xiong et al. 2020), residual dependency and amplification (Liu et
al. 2020), the residual stream, and the sharpness (Gilmer et al. 2021), from a few forward and
backward passes on the CPU. Each seed has weights, and may have tokens, of its own. Dropout is off.
Batch norm uses the statistics of the current batch, as in the first update, because its
running averages are still empty.

The theory of the gradients is about a single token. Mean gradients over many tokens of real text
are a different quantity with different slopes; to reproduce the theory, pass batches of one token.

Measures of a training run are in gpt/diagnostics/layers.py, whose `LayerStats` is used here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.diagnostics.curvature import loss_hessian, sharpness
from gpt.diagnostics.layers import LayerStats
from gpt.model.gpt2 import GPT, FusedLinear
from gpt.model.init import initialize
from gpt.model.parametrization import lr_factor
from gpt.model.placement import PLACEMENTS
from gpt.rng import generator, global_generators_restored

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (B, T) integers

DEPTHS = (2, 4, 6, 12, 24)  # numbers of blocks, L
NOISE = 0.01  # standard deviation of the random change of a matrix, relative to the matrix's own
ADAM_RATE = 1e-5  # of the single update: so small that outputs change linearly at any depth
ADAM_EPS = 1e-8
SHARPNESS_DEPTH, SHARPNESS_SEQUENCES = 6, 2  # at most: a Hessian's eigenvalue is expensive


@dataclass(frozen=True)
class Probe:
    """One model at initialization.

    Means over seeds, in tuples with one value per block, in order:

    Attributes:
        layers: L.
        initial_loss: nats per token.
        gradient_norms: Frobenius norm of d mean loss / d W2, the feed-forward's last matrix, with
            gradients averaged over the batches before the norm is taken.
        betas: residual dependency Var[f] / Var[x + f] of attention and of the feed-forward, with x
            as the placement weights it; None if the placement does not use its `add` module.
        stream_rms: RMS of the residual stream after the block.

    Values of each seed, in the same order at every depth:

    Attributes:
        last_gradients: the gradient norm of the last block.
        amplifications: E|out(W) - out(W + δ)|² per channel, divided by NOISE². `out`
            is the stream after the final norm; δ is normal with a standard deviation of NOISE times
            that of the matrix, for each of a block's matrices (q, k and v count as three).
        adam_amplifications: E|out(W) - out(W')|² per channel, W' after Adam's first update of the
            blocks' matrices on the batches, at ADAM_RATE times the parametrization's factor.
        sharpness: largest eigenvalue of the Hessian of the loss on the first SHARPNESS_SEQUENCES
            sequences; None if it was not measured at this depth, or not found for a seed.
    """

    layers: int
    initial_loss: float
    gradient_norms: tuple[float, ...]
    betas: tuple[tuple[float, float], ...] | None
    stream_rms: tuple[float, ...]
    last_gradients: tuple[float, ...]
    amplifications: tuple[float, ...]
    adam_amplifications: tuple[float, ...]
    sharpness: tuple[float, ...] | None


def probe(
    config: ModelConfig,
    vocab_size: int,
    batches: Mapping[int, Sequence[Batch]],
    *,
    with_sharpness: bool = False,
) -> Probe:
    """Measure a model at initialization; deterministic.

    Args:
        vocab_size: V, from the tokenizer.
        batches: by the seed of the initial weights; at least one each, all of the same T. Gradients
            are averaged over them with equal weights, activations are measured on all at once, and
            the first calibrates placements that need a batch (Admin's ω).
        with_sharpness: whether to measure the sharpness, up to SHARPNESS_DEPTH blocks.
    """
    with_sharpness = with_sharpness and config.layers <= SHARPNESS_DEPTH
    measured = [
        _measure(config, vocab_size, own, seed, with_sharpness=with_sharpness)
        for seed, own in batches.items()
    ]

    def of_seeds(key: str) -> tuple[float, ...]:
        return tuple(each[key] for each in measured)

    def mean(key: str) -> Any:
        return torch.tensor(of_seeds(key), dtype=torch.float64).mean(0).tolist()

    found = with_sharpness and all(map(math.isfinite, of_seeds("sharpness")))
    return Probe(
        layers=config.layers,
        initial_loss=mean("initial_loss"),
        gradient_norms=tuple(mean("gradient_norms")),
        betas=tuple(map(tuple, mean("betas"))) if "betas" in measured[0] else None,
        stream_rms=tuple(mean("stream_rms")),
        last_gradients=tuple(norms[-1] for norms in (each["gradient_norms"] for each in measured)),
        amplifications=of_seeds("amplification"),
        adam_amplifications=of_seeds("adam_amplification"),
        sharpness=of_seeds("sharpness") if found else None,
    )


def probe_depths(
    config: ModelConfig,
    vocab_size: int,
    batches: Mapping[int, Sequence[Batch]],
    depths: Sequence[int] = DEPTHS,
    *,
    with_sharpness: bool = False,
    on_depth: Callable[[int], None] = lambda layers: None,
) -> list[Probe]:
    """`probe` at each of `depths` that the placement allows; `on_depth` is called after each."""
    least = PLACEMENTS[config.norm.placement].min_layers
    probes = []
    for layers in depths:
        if layers >= least:
            shape = config.model_copy(update={"layers": layers})
            probes.append(probe(shape, vocab_size, batches, with_sharpness=with_sharpness))
        on_depth(layers)
    return probes


def _measure(
    config: ModelConfig,
    vocab_size: int,
    batches: Sequence[Batch],
    seed: int,
    *,
    with_sharpness: bool,
) -> dict[str, Any]:
    """What `Probe` is made of, for one seed."""
    tokens = torch.cat([inputs for inputs, _ in batches])
    model = _initialized(config, vocab_size, batches[0][0], seed)
    losses = torch.stack([model.loss(inputs, targets) for inputs, targets in batches])
    losses.mean().backward()
    look = LayerStats(model)
    look.measure_activations(tokens)
    blocks = look.to_records(step=0)[1:-1]
    measures = {
        "initial_loss": losses.mean().item(),
        "gradient_norms": [block["w2_grad_norm"] for block in blocks],
        "stream_rms": [block["stream_rms"] for block in blocks],
    }
    if all("mlp_beta" in block for block in blocks):
        measures["betas"] = [(block["attention_beta"], block["mlp_beta"]) for block in blocks]
    if with_sharpness:
        inputs, targets = batches[0]
        few = slice(SHARPNESS_SEQUENCES)
        measures["sharpness"] = sharpness(model, loss_hessian(model, inputs[few], targets[few]))

    with torch.no_grad():
        before = model.hidden(tokens)
        with _perturbed(model, seed):
            change = model.hidden(tokens) - before
        measures["amplification"] = change.square().mean().item() / NOISE**2
        rate = ADAM_RATE * lr_factor("hidden", "adamw", model.m)
        for _, linear in _linears(model):
            gradient = linear.weight.grad
            assert gradient is not None
            linear.weight -= rate * gradient / (gradient.abs() + ADAM_EPS)
        measures["adam_amplification"] = (model.hidden(tokens) - before).square().mean().item()
    return measures


def _initialized(config: ModelConfig, vocab_size: int, inputs: Tensor, seed: int) -> GPT:
    """A model before its first update, in evaluation mode."""
    with global_generators_restored(
        inputs.device
    ):  # torch draws its own weights, which are then replaced
        model = GPT(config, vocab_size).eval()
    initialize(model, config, seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # without averages, it uses the batch in any mode
            module.running_mean = module.running_var = None
    model.calibrate(inputs)
    return model


def _linears(model: GPT) -> list[tuple[str, nn.Linear]]:
    """The blocks' linear layers, by name."""
    named = model.blocks.named_modules()
    return [(name, module) for name, module in named if isinstance(module, nn.Linear)]


@contextlib.contextmanager
def _perturbed(model: GPT, seed: int) -> Iterator[None]:
    """A context with noise in the blocks' matrices, NOISE times their own standard deviation."""
    before = [linear.weight.clone() for _, linear in _linears(model)]
    for name, linear in _linears(model):
        parts = len(linear.parts) if isinstance(linear, FusedLinear) else 1
        noise = torch.randn(linear.weight.shape, generator=generator(seed, "probe", name))
        for matrix, change in zip(linear.weight.chunk(parts), noise.chunk(parts), strict=True):
            matrix += NOISE * matrix.std() * change
    try:
        yield
    finally:
        for (_, linear), weight in zip(_linears(model), before, strict=True):
            linear.weight.copy_(weight)

"""Networks at initialization, measured without training: the quantities of the theory.

Gradient norms by layer and depth (Xiong et al. 2020), residual dependency and amplification (Liu et
al. 2020), and the residual stream, from a few forward and backward passes on the CPU. Dropout is
off. Batch norm uses the statistics of the current batch, as in the first update, because its
running averages are still empty.

The theory of the gradients is about a single token. Mean gradients over many tokens of real text
are a different quantity with different slopes; to reproduce the theory, pass batches of one token.

Measures of a training run are in gpt/diagnostics/layers.py, whose `LayerStats` is used here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.diagnostics.layers import LayerStats
from gpt.init import initialize
from gpt.model import GPT, FusedLinear
from gpt.placement import PLACEMENTS
from gpt.rng import generator, global_generator

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (B, T) integers

DEPTHS = (2, 4, 6, 12, 24)  # numbers of blocks, L
NOISE = 0.01  # standard deviation of the random change of a matrix, relative to the matrix's own
ADAM_RATE = 1e-5  # of the single update: so small that outputs change linearly at any depth
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Probe:
    """One model at initialization; means over seeds. Tuples hold one value per block, in order.

    Attributes:
        layers: L.
        initial_loss: nats per token.
        gradient_norms: Frobenius norm of d mean loss / d W2, the feed-forward's last matrix, with
            gradients averaged over the batches before the norm is taken.
        betas: residual dependency Var[f] / Var[x + f] of attention and of the feed-forward, with x
            as the placement weights it; None if the placement adds without its `add` module.
        stream_rms: RMS of the residual stream after the block.
        amplification: E|out(W) - out(W + δ)|² per channel, divided by NOISE². `out`
            is the stream after the final norm; δ is normal with a standard deviation of NOISE times
            that of the matrix, for each of a block's matrices (q, k and v count as three).
        adam_amplification: E|out(W) - out(W')|² per channel, W' after Adam's first update of the
            blocks' matrices on the batches, at ADAM_RATE.
    """

    layers: int
    initial_loss: float
    gradient_norms: tuple[float, ...]
    betas: tuple[tuple[float, float], ...] | None
    stream_rms: tuple[float, ...]
    amplification: float
    adam_amplification: float

    @property
    def last_gradient(self) -> float:
        """The gradient norm of the last block."""
        return self.gradient_norms[-1]


def probe(
    config: ModelConfig, vocab_size: int, batches: Sequence[Batch], seeds: Sequence[int]
) -> Probe:
    """Measure a model at initialization; deterministic.

    Args:
        vocab_size: V, from the tokenizer.
        batches: at least one; all of the same T. Gradients are averaged over them with equal
            weights, activations are measured on all at once, and the first calibrates placements
            that need a batch (Admin's ω).
        seeds: of initial weights; at least one.
    """
    measured = [_measure(config, vocab_size, batches, seed) for seed in seeds]

    def mean(key: str) -> Any:
        return torch.tensor([each[key] for each in measured], dtype=torch.float64).mean(0).tolist()

    return Probe(
        layers=config.layers,
        initial_loss=mean("initial_loss"),
        gradient_norms=tuple(mean("gradient_norms")),
        betas=tuple(map(tuple, mean("betas"))) if "betas" in measured[0] else None,
        stream_rms=tuple(mean("stream_rms")),
        amplification=mean("amplification"),
        adam_amplification=mean("adam_amplification"),
    )


def probe_depths(
    config: ModelConfig,
    vocab_size: int,
    batches: Sequence[Batch],
    seeds: Sequence[int],
    depths: Sequence[int] = DEPTHS,
) -> list[Probe]:
    """`probe` at each of `depths` that the placement allows."""
    least = PLACEMENTS[config.norm.placement].min_layers
    return [
        probe(config.model_copy(update={"layers": layers}), vocab_size, batches, seeds)
        for layers in depths
        if layers >= least
    ]


def _measure(
    config: ModelConfig, vocab_size: int, batches: Sequence[Batch], seed: int
) -> dict[str, Any]:
    """The fields of `Probe`, by name, for one seed."""
    tokens = torch.cat([inputs for inputs, _ in batches])
    model = _initialized(config, vocab_size, batches[0][0], seed)
    losses = torch.stack([model.loss(inputs, targets) for inputs, targets in batches])
    losses.mean().backward()
    look = LayerStats(model, {}, {})
    look.measure_activations(tokens)
    blocks = look.to_records(step=0)[1:-1]
    measures = {
        "initial_loss": losses.mean().item(),
        "gradient_norms": [block["w2_grad_norm"] for block in blocks],
        "stream_rms": [block["stream_rms"] for block in blocks],
    }
    if all("mlp_beta" in block for block in blocks):
        measures["betas"] = [(block["attention_beta"], block["mlp_beta"]) for block in blocks]

    with torch.no_grad():
        before = model.hidden(tokens)
        with _perturbed(model, seed):
            change = model.hidden(tokens) - before
        measures["amplification"] = change.square().mean().item() / NOISE**2
        for _, linear in _linears(model):
            gradient = linear.weight.grad
            assert gradient is not None
            linear.weight -= ADAM_RATE * gradient / (gradient.abs() + ADAM_EPS)
        measures["adam_amplification"] = (model.hidden(tokens) - before).square().mean().item()
    return measures


def _initialized(config: ModelConfig, vocab_size: int, inputs: Tensor, seed: int) -> GPT:
    """A model before its first update, in evaluation mode."""
    with global_generator(inputs.device):  # torch draws its own weights, which are then replaced
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
    yield
    for (_, linear), weight in zip(_linears(model), before, strict=True):
        linear.weight.copy_(weight)

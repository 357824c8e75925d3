"""The gradient noise scale tr Σ / |G|²: how many sequences make a batch as much signal as noise.

G is the mean gradient over all training sequences, Σ the covariance of the gradient of one of them.
A batch much smaller than the scale is mostly noise; one much larger gains little (McCandlish et al.
2018, where it is the simple noise scale).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt.model.gpt2 import GPT

PARTS = 16  # of a batch, at least, if it has that many sequences


def part_size(batch: int, micro_batch: int) -> int:
    """Sequences of each part of a batch: a divisor of it, at most a micro-batch."""
    most = min(micro_batch, max(1, batch // PARTS))
    return next(size for size in range(most, 0, -1) if batch % size == 0)


def signal_and_noise(
    part_square: float, batch_square: float, part: int, batch: int
) -> tuple[float, float]:
    """Unbiased estimates of |G|², which may be negative, and tr Σ; McCandlish et al. 2018, A.1.

    They solve E|g|² = |G|² + tr Σ / B at both sizes B.

    Args:
        part_square: mean of |g|² over parts of the batch.
        batch_square: |g|² of the batch.
        part, batch: sequences of a part and of the batch.
    """
    signal = (batch * batch_square - part * part_square) / (batch - part)
    noise = (part_square - batch_square) / (1 / part - 1 / batch)
    return signal, noise


def measure_noise_scale(
    model: GPT, inputs: Tensor, targets: Tensor, z_loss: float, part: int
) -> dict[str, float]:
    """`noise_scale` in sequences, and what it is the ratio of: `gradient_noise`, `gradient_signal`.

    In evaluation mode, from the gradients of parts of a batch. The ratio itself is biased: if a
    single snapshot is too noisy, average both over several first. NaN where the signal is not
    positive. Leaves weights and gradients as they are.

    Args:
        inputs, targets: (B, T) integers, on the model's device.
        z_loss: weight of the z-loss in the training loss.
        part: sequences of a part, a divisor of B less than B.
    """
    parameters, batch = list(model.parameters()), len(inputs)
    mean = [torch.zeros_like(parameter) for parameter in parameters]
    squares: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        for x, y in zip(inputs.split(part), targets.split(part), strict=True):
            loss, _ = model.loss_fn(x, y, z_loss)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            squares.append(_square(gradients))
            for total, gradient in zip(mean, gradients, strict=True):
                total.add_(gradient, alpha=part / batch)
    finally:
        model.train(training)
    part_square = torch.stack(squares).mean().item()
    signal, noise = signal_and_noise(part_square, _square(mean).item(), part, batch)
    scale = noise / signal if signal > 0 else math.nan
    return {"noise_scale": scale, "gradient_noise": noise, "gradient_signal": signal}


def _square(gradients: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(gradients).square()

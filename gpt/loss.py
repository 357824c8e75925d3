"""The loss of the next token: cross-entropy, of all logits at once or of chunks of them.

With a large vocabulary the logits are the largest tensor of training, and they are needed for no
more than one number and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Logits = Callable[[Tensor, Tensor], Tensor]  # of (N, d) and the head's matrix, (V, d): (N, V)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy + z_loss * mean(log² Z), and the mean cross-entropy: (N, V), (N,) -> scalars.

    Z is the softmax's denominator; its term holds logits near where softmax is exact (Chowdhery et
    al. 2022, Wortsman et al. 2023: 1e-4). In float32, or in what is finer.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets)
    if z_loss == 0:
        return loss, loss
    return loss + z_loss * logits.logsumexp(-1).square().mean(), loss


def chunked_cross_entropy(
    logits: Logits, x: Tensor, head: Tensor, targets: Tensor, z_loss: float, size: int
) -> tuple[Tensor, Tensor]:
    """`cross_entropy(logits(x, head), ...)` of `size` tokens at a time, with the same gradients.

    (N, d), (V, d), (N,) -> scalars. What is minimised can be derived once; the second not at all.
    """

    def sums(x: Tensor, head: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        minimised, loss = cross_entropy(logits(x, head), y, z_loss)
        return minimised * len(y), loss * len(y)

    if torch.is_grad_enabled():
        minimised, loss = _Chunks.apply(sums, size, x, head, targets)  # type: ignore[no-untyped-call]
    else:
        parts = zip(x.split(size), targets.split(size), strict=True)
        minimised, loss = map(sum, zip(*(sums(a, head, y) for a, y in parts), strict=True))
    return minimised / len(targets), loss / len(targets)


class _Chunks(torch.autograd.Function):
    """Sums over chunks, whose gradients are made in the forward pass, where their logits are.

    So nothing is computed twice. They are gradients of sums over tokens, not of means, which fp16
    would round to nothing; what comes from above scales them in the backward pass, in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: Any, size: int, x: Tensor, head: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        learn = torch.func.grad_and_value(sums, argnums=(0, 1), has_aux=True)
        minimised = loss = x.new_zeros(())
        of_x, of_head = [], torch.zeros_like(head)
        for part, y in zip(x.split(size), targets.split(size), strict=True):
            (of_part, of_matrix), (more, more_loss) = learn(part, head, y)
            minimised, loss = minimised + more, loss + more_loss
            of_x.append(of_part)
            of_head += of_matrix
        ctx.save_for_backward(torch.cat(of_x), of_head)
        ctx.mark_non_differentiable(loss)
        return minimised, loss

    @staticmethod
    def backward(ctx: Any, above: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_head = ctx.saved_tensors
        return None, None, of_x * above, of_head * above, None

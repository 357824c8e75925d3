"""Next-token loss: cross-entropy and z-loss, of all logits at once or chunk by chunk.

With a large vocabulary the logits are the largest tensor of training, yet only the loss and its
gradients are needed. In chunks, the logits never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ToLogits = Callable[[Tensor, Tensor], Tensor]  # (N, d) and the head's matrix, (V, d) -> (N, V)


def next_token_loss(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """(total loss, cross-entropy), means in nats per token: (N, V), (N,) integers -> two scalars.

    The total is cross-entropy + z_loss * mean(log² Z), where Z is the denominator of the softmax.
    The z-loss keeps logits in a range where the softmax is accurate (Chowdhery et al. 2022,
    Wortsman et al. 2023: 1e-4). Computed in float32, or in float64 for float64 logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cross_entropy = F.cross_entropy(logits, targets)
    if z_loss == 0:
        return cross_entropy, cross_entropy
    return cross_entropy + z_loss * logits.logsumexp(-1).square().mean(), cross_entropy


def chunked_next_token_loss(
    to_logits: ToLogits, x: Tensor, head: Tensor, targets: Tensor, z_loss: float, size: int
) -> tuple[Tensor, Tensor]:
    """`next_token_loss(to_logits(x, head), ...)`, `size` tokens at a time, with equal gradients.

    The total loss is differentiable once; the cross-entropy is not differentiable.

    Args:
        x: (N, d), the residual stream after the final norm.
        head: (V, d).
        targets: (N,) integers.
    """

    def sums(x: Tensor, head: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total_loss, cross_entropy = next_token_loss(to_logits(x, head), y, z_loss)
        return total_loss * len(y), cross_entropy * len(y)

    if torch.is_grad_enabled():
        total_loss, cross_entropy = _ChunkedSum.apply(sums, size, x, head, targets)  # type: ignore[no-untyped-call]
    else:
        chunks = zip(x.split(size), targets.split(size), strict=True)
        pairs = (sums(part, head, y) for part, y in chunks)
        total_loss, cross_entropy = map(sum, zip(*pairs, strict=True))
    return total_loss / len(targets), cross_entropy / len(targets)


class _ChunkedSum(torch.autograd.Function):
    """Sums over chunks. The forward pass also computes the gradients, while it has the logits.

    So nothing is computed twice. The gradients are those of sums over tokens, because fp16 would
    round gradients of means to zero; the backward pass scales them in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: Any, size: int, x: Tensor, head: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad_and_sums = torch.func.grad_and_value(sums, argnums=(0, 1), has_aux=True)
        total_loss = cross_entropy = x.new_zeros(())
        x_grads, head_grad = [], torch.zeros_like(head)
        for part, y in zip(x.split(size), targets.split(size), strict=True):
            (part_grad, part_head_grad), sums_of_part = grad_and_sums(part, head, y)
            total_loss = total_loss + sums_of_part[0]
            cross_entropy = cross_entropy + sums_of_part[1]
            x_grads.append(part_grad)
            head_grad += part_head_grad
        ctx.save_for_backward(torch.cat(x_grads), head_grad)
        ctx.mark_non_differentiable(cross_entropy)
        return total_loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, head_grad = ctx.saved_tensors
        return None, None, x_grad * grad, head_grad * grad, None

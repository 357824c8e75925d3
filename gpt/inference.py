"""Faster linear layers for sampling: other memory layouts, or fewer bits per weight.

Each token reads every matrix once, so sampling is limited by memory bandwidth. On a CPU, torch's
layout reaches half of it and these layouts reach more. Training does not use this module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import Weights
from gpt.errors import InputError, option
from gpt.model.gpt2 import GPT

MIN_SIZE = 2**19  # numbers in a matrix; for smaller ones torch's own layer is faster

# Only this module calls private operators of torch. They hardly check their arguments, so the two
# functions below decide whether they can be used; if not, public operators compute the product.


def can_pack() -> bool:
    """Whether the operators of PackedLinear exist, on a CPU with AVX2 or AVX-512."""
    return (
        _has_vectors()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def can_multiply_int8(weight: Tensor) -> bool:
    """Whether `torch._weight_int8pack_mm` exists and takes this (n_out, n_in) matrix.

    With AVX-512 it loads 16 inputs at a time, reads past the end of rows whose length is not a
    multiple of 16, and needs x aligned to 32 bytes and W to 16; with AVX2 it loads 8. It has no
    vector code for other CPUs, and its offsets are 32-bit.
    """
    return (
        _has_vectors()
        and hasattr(torch, "_weight_int8pack_mm")
        and weight.shape[1] % 16 == 0
        and weight.numel() < 2**31
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


def _has_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class SlicedLinear(nn.Module):
    """x Wᵀ + b in fp32 on a CPU for one row x, W cut into one slice of outputs per thread.

    torch computes one row times one matrix on one thread, but a batch of matrices on all. The
    longer side of a slice is contiguous in memory, which reads fastest.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.outputs, n = outputs, torch.get_num_threads()
        padding = -outputs % n  # makes all slices equal
        slices = F.pad(weight.detach(), (0, 0, 0, padding)).view(n, -1, inputs).transpose(1, 2)
        tall = slices.shape[2] > inputs
        self.slices = slices.contiguous() if tall else slices  # (n, n_in, n_out / n)
        whole = weight.new_zeros(outputs) if bias is None else bias.detach()
        self.bias = F.pad(whole, (0, padding)).view(n, 1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        rows = x.flatten(0, -2).expand(len(self.slices), -1, -1)
        y = torch.baddbmm(self.bias, rows, self.slices)  # (n, rows, n_out / n)
        return y.transpose(0, 1).flatten(1)[:, : self.outputs].unflatten(0, x.shape[:-1])


class PackedLinear(nn.Module):
    """x Wᵀ + b in fp32 on a CPU, W in oneDNN's preferred layout for `rows` rows of x."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """x Wᵀ + b, W stored as 8-bit integers and a scale per output channel; x and x Wᵀ are bf16.

    The scale s is a bf16 number, rounded up, with |W| <= 127 s (absmax quantization, Dettmers et
    al. 2022).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        largest = weight.detach().abs().amax(1).clamp(min=1e-30)
        scale = (largest / 127 * (1 + 2**-8)).bfloat16()  # at least largest / 127 when rounded
        self.weight = (weight.detach() / scale[:, None].float()).round().to(torch.int8)
        self.scale, self.bias = scale, bias
        self.fused = can_multiply_int8(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        rows = x.flatten(0, -2)
        if self.fused and len(rows) * max(self.weight.shape) < 2**31:  # its offsets are 32-bit
            # a copy, because a view may start anywhere; torch aligns allocations to 64 bytes
            rows = rows.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows.bfloat16().float(), self.weight.float()) * self.scale.float()
            y = y.bfloat16()
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def optimize_for_inference(model: GPT, weights: Weights, samples: int) -> None:
    """Replace layers of `model` in place for faster sampling; it can no longer be trained or saved.

    Args:
        weights: fp32 changes only the layout, on a CPU; bf16 rounds all parameters; int8 rounds the
            matrices, but not the embeddings and norms.
        samples: the number of samples in parallel, for which the layout is chosen.

    Raises:
        InputError: int8 weights on a device other than a CPU.
    """
    device = model.token_embedding.weight.device
    make: Callable[[Tensor, Tensor | None], nn.Module]
    if weights == "bf16":
        model.bfloat16()
        return
    if weights == "int8":
        if device.type != "cpu":
            raise InputError(f"{option('weights')} int8: needs a CPU; on {device.type} use bf16")
        make, min_size = Int8Linear, 0
    elif device.type == "cpu" and samples == 1 and torch.backends.mkl.is_available():
        make, min_size = SlicedLinear, MIN_SIZE
    elif device.type == "cpu" and can_pack():
        make, min_size = partial(PackedLinear, rows=samples), MIN_SIZE
    else:
        return
    if model.head is None:  # untie it: the embedding keeps its layout for look-ups
        model.head = nn.Linear(model.config.width, model.vocab_size, bias=False, device="meta")
        model.head.weight = model.token_embedding.weight
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if isinstance(module, nn.Linear) and module.weight.numel() >= min_size:
                setattr(owner, name, make(module.weight, module.bias))

"""Weights as sampling reads them: laid out for few rows at a time, or fewer bits of each.

One token reads every matrix once, so memory sets the pace. A CPU reads the usual layout at half of
memory's speed, and other layouts faster. Training has nothing to do with this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import Weights
from gpt.errors import InputError
from gpt.model import GPT

LAID_OUT_FROM = 2**19  # numbers of a matrix: on smaller ones a call of torch's own is quicker

# Private operators of torch are called in this file alone. They check their arguments badly or not
# at all, so these two functions do; where they return False, public ones give the same product.


def can_pack() -> bool:
    """Whether PackedLinear's operators exist, on a CPU with vector units they are tested on."""
    return (
        _has_vectors()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def can_multiply_int8(weight: Tensor) -> bool:
    """Whether `torch._weight_int8pack_mm` exists and takes this (n_out, n_in) matrix.

    With AVX-512 it loads 16 inputs at a time, from addresses that must be multiples of 32 bytes in
    x and of 16 in W, and reads past the end of rows of another length; with AVX2 it loads 8. It has
    no vector code for less, and its offsets are 32-bit.
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
    """x Wᵀ + b in fp32 on a CPU, W cut into a slice of its outputs for each thread, for one row x.

    torch gives one row times one matrix to one thread, and a batch of matrices to all. A slice's
    longer side is contiguous, along which memory is read best.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.outputs, n = outputs, torch.get_num_threads()
        padding = -outputs % n  # for slices of one size
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
    """x Wᵀ + b in fp32 on a CPU, W in the layout that oneDNN likes for `rows` rows of x."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """x Wᵀ + b with W as 8-bit integers times a scale for each output channel, x and x Wᵀ as bf16.

    The scale s is the smallest bf16 number with |W| <= 127 s; Dettmers et al. 2022 call it absmax.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        largest = weight.detach().abs().amax(1).clamp(min=1e-30)
        scale = (largest / 127 * (1 + 2**-8)).bfloat16()  # rounded, it is not below largest / 127
        self.weight = (weight.detach() / scale[:, None].float()).round().to(torch.int8)
        self.scale, self.bias = scale, bias
        self.fused = can_multiply_int8(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        rows = x.flatten(0, -2)
        if self.fused and len(rows) * max(self.weight.shape) < 2**31:  # its offsets are 32-bit
            # a copy, since torch allocates at multiples of 64 bytes and a view may start anywhere
            rows = rows.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows.bfloat16().float(), self.weight.float()) * self.scale.float()
            y = y.bfloat16()
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def prepare(model: GPT, weights: Weights, samples: int) -> None:
    """Change `model` in place for sampling; it can neither be trained nor saved from then on.

    Args:
        weights: fp32 changes the layout alone, on a CPU; bf16 rounds everything; int8 rounds the
            matrices, but neither embeddings nor norms.
        samples: made side by side, for which the layout is chosen.

    Raises:
        InputError: int8 weights on a GPU.
    """
    device = model.token_embedding.weight.device
    make: Callable[[Tensor, Tensor | None], nn.Module]
    if weights == "bf16":
        model.bfloat16()
        return
    if weights == "int8":
        if device.type != "cpu":
            raise InputError(f"--weights int8: is for a CPU; on {device.type} take bf16")
        make, least = Int8Linear, 0
    elif device.type == "cpu" and samples == 1 and torch.backends.mkl.is_available():
        make, least = SlicedLinear, LAID_OUT_FROM
    elif device.type == "cpu" and can_pack():
        make, least = partial(PackedLinear, rows=samples), LAID_OUT_FROM
    else:
        return
    if model.head is None:  # untie it: the embedding is still looked up as it was
        model.head = nn.Linear(model.config.width, model.vocab_size, bias=False, device="meta")
        model.head.weight = model.token_embedding.weight
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if isinstance(module, nn.Linear) and module.weight.numel() >= least:
                setattr(owner, name, make(module.weight, module.bias))

"""FSDP2: the blocks' weights, gradients and optimizer state are divided among the processes.

torch's `fully_shard` (Zhao et al. 2023; PyTorch's FSDP2) makes every parameter a DTensor, of which
a process holds some rows. A block's weights are gathered just before it computes, and its gradients
are summed and divided again after that. Outside of this module, checkpoints and samples see whole
tensors only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.overrides import TorchFunctionMode

from gpt.errors import InputError, option
from gpt.model.gpt2 import GPT
from gpt.optim import Optimizer


def check_can_shard(model: GPT) -> None:
    """Refuse a model that cannot be divided.

    Raises:
        InputError: names a parameter.
    """
    single = next((name for name, p in model.named_parameters() if p.ndim == 0), None)
    if single is not None:
        raise InputError(
            f"{option('training.parallel')}: fsdp: {single} is a single number, which cannot be "
            "divided; use ddp"
        )


def shard(model: GPT, processes: int, device: torch.device) -> None:
    """Divide the parameters of `model` among all processes, in place."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (processes,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss_fn")


class ShardedOptimizer(Optimizer):
    """An optimizer of parameters that are divided among all processes."""

    def step(self, lr_scale: float = 1.0) -> None:
        """As `Optimizer.step`; all processes must call this."""
        with _WholeNorms():
            super().step(lr_scale)


class _WholeNorms(TorchFunctionMode):
    """A context in which torch.norm is never a partial result of each process.

    torch's Adafactor squares such norms in place, which partial results do not support.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.norm, torch.Tensor.norm) and isinstance(result, DTensor):
            return result.redistribute(placements=[Replicate()])
        return result


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, of which each process may hold a part; all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_whole(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None) -> None:
    """Copy whole tensors of rank 0 into the parts that the processes own; all must call this.

    Args:
        own: in each process, tensors of the same names in the same order.
        tensors: on rank 0, of the same names; None elsewhere.
    """
    for name, part in own.items():
        like = part.to_local() if isinstance(part, DTensor) else part
        full = torch.empty(part.shape, dtype=part.dtype, device=like.device)
        if tensors is not None:
            full.copy_(tensors[name])
        if isinstance(part, DTensor):
            full = distribute_tensor(full, part.device_mesh, part.placements)
        else:
            dist.broadcast(full, 0)
        part.copy_(full)

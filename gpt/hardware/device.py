"""The device to compute on, and the precision to compute in."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt.errors import InputError

DTYPES = {  # of matrix products and attention; weights and accumulated gradients stay fp32
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# Dense bf16 and fp16 FLOP/s as the makers specify them, by a part of the device's name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "T4": 65e12,
}


def pick_device(name: str) -> torch.device:
    """The device that `training.device` names; auto prefers cuda, then mps, then cpu.

    Raises:
        InputError: the device is not available.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        usable = ", ".join(device for device, there in present.items() if there)
        raise InputError(f"device: {name} is not available here; usable: auto, {usable}")
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which matrix products and attention run in `training.precision`."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def host_tensor(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor on the host, in memory from which a GPU copies without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def peak_flops(device_name: str, precision: str) -> float | None:
    """Matrix FLOP/s of a GPU at 16 bits; None for an unknown device, or for fp32."""
    if precision == "fp32":
        return None
    known = (name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name))
    return PEAK_FLOPS.get(next(known, ""))


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Treat denormal numbers as 0 within a block, and restore the previous setting after it.

    Without it, a failing run on a CPU is many times slower.
    """
    before = sys.float_info.min / 2 == 0  # whether they are flushed already
    if not before:
        torch.ones(2**20).add_(1)  # starts torch's other threads now, or they would keep flushing
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)

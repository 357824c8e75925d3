"""Whether a config fits into memory, estimated before anything is built.

All estimates are lower bounds: a config that is rejected could not have run. They count the weight
matrices, and for training the gradients, the optimizer's state, the activations of one forward pass
and a batch of tokens. Norms, biases, libraries and allocators need more; whether that fits turns
out at run time.

This module does not import torch, so that the answer comes at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from gpt.config import Config, ModelConfig
from gpt.errors import InputError, option
from gpt.hardware.processes import launched

FP32 = 4  # bytes per number
# Numbers of optimizer state per parameter, at least; other optimizers may have fewer than one.
OPTIMIZER_STATE = {"adamw": 2, "radam": 2, "muon": 1}
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # one of them exists if Linux has a GPU


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Number of parameters in matrices: without biases, norms and a placement's own."""
    d = model.width
    inner = max(0, int(d * model.mlp.multiple) - 6)  # swiglu rounds it to a multiple of 8
    tables = model.context + vocab_size * (1 if model.tied_head else 2)
    return model.layers * (4 * d * d + 2 * d * inner) + tables * d


def check_training(
    config: Config, vocab_size: int = 1, *, device_memory: int | None, shared: bool
) -> None:
    """Reject a config that cannot be trained on this machine.

    Args:
        vocab_size: the minimum that is known so far.
        device_memory: bytes of the device that holds the model; None if not known.
        shared: whether that is the machine's main memory, which also holds the batch of tokens.

    Raises:
        InputError: it needs more memory than there is; gives both in GB.
    """
    model, training = config.model, config.training
    numbers = parameters(model, vocab_size) * FP32
    kept = 1 + OPTIMIZER_STATE.get(config.optimizer.name, 0)  # copies kept between updates
    size = FP32 if training.precision == "fp32" else 2
    sequences = 1 if training.micro_batch == "auto" else training.micro_batch
    tokens = sequences * model.context
    logits = min(tokens, training.loss_chunk or tokens) * vocab_size
    weights = f"training {_shape(model)}, {numbers // FP32:,} parameters,"
    activations = f"a forward pass over {sequences:,} x {model.context:,} tokens"
    batch = f"a batch of {config.batch_sequences:,} x {model.context:,} tokens"
    batch_needs = {batch: 8 * config.batch_sequences * model.context}  # int64
    shared_needs = batch_needs if shared else {}
    forward = size * (4 * model.layers * model.width * tokens + logits)  # q, k, v and the stream
    parts = launched() if training.parallel == "fsdp" else 1  # made whole, and then divided
    whole, held = max(numbers, (kept + 1) * numbers // parts), kept * numbers // parts
    _check({weights: whole, **shared_needs}, device_memory)  # with the gradients
    _check({weights: held, activations: forward, **shared_needs}, device_memory)
    _check(batch_needs, machine_memory())


def check_cpu_training(config: Config) -> None:
    """`check_training`, if it is certain without torch that training uses the main memory.

    Raises:
        InputError: as `check_training`.
    """
    device = config.training.device
    if device == "cpu" or (device == "auto" and not _may_have_gpu()):
        check_training(config, device_memory=machine_memory(), shared=True)


def check_loading(model: ModelConfig, vocab_size: int, origin: str) -> None:
    """Reject a model whose weights do not fit into the machine's memory.

    Args:
        origin: the file of its config, for the message.

    Raises:
        InputError: gives the memory needed and available in GB.
    """
    needs = {f"{origin}: {_shape(model)}": parameters(model, vocab_size) * FP32}
    _check(needs, machine_memory())


def check_sampling(
    model: ModelConfig, vocab_size: int, *, samples: int, tokens: int, size: int, memory: int | None
) -> None:
    """Reject more samples than fit into the device's memory.

    Args:
        tokens: of one sample, prompt included; at most the context is cached.
        size: bytes per number in the key/value cache.
        memory: bytes of the device; None if not known.

    Raises:
        InputError: gives the memory needed and available in GB.
    """
    cached = min(tokens, model.context)
    what = f"{option('num_samples')} {samples:,}"
    needs = {
        f"{what}: caching the keys and values of {cached:,} tokens each": (
            2 * size * samples * cached * model.width * model.layers
        ),
        f"{what}: computing their logits": FP32 * samples * vocab_size,
    }
    _check(needs, memory)


def check_probing(model: ModelConfig, layers: int) -> None:
    """Reject a network that is too large to be probed with `layers` blocks.

    Raises:
        InputError: gives the memory needed and available in GB.
    """
    probed = model.model_copy(update={"layers": layers})
    what = f"a probe (probes: false turns it off) of {_shape(probed)}"
    _check({what: 2 * parameters(probed, 1) * FP32}, machine_memory())


def _shape(model: ModelConfig) -> str:
    """The options that determine the size of a model."""
    return f"model.layers: {model.layers:,}, model.width: {model.width:,}"


def _check(needs: dict[str, int], memory: int | None) -> None:
    """Reject `needs`, bytes by purpose, whose sum exceeds `memory`; names the largest."""
    total = sum(needs.values())
    if memory is not None and total > memory:
        largest = max(needs, key=lambda what: needs[what])
        raise InputError(
            f"{largest} needs at least {_gigabytes(total)} GB of memory, "
            f"but only {_gigabytes(memory)} GB are available"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f}"


def machine_memory() -> int | None:
    """Bytes available to this process: of the machine or its control group; None if not known."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _group_limits():
        try:
            text = file.read_text("ascii").strip()
        except (OSError, ValueError):
            continue
        if text.isdecimal():  # else "max": no limit
            found.append(int(text))
    return min(found, default=None)


def _group_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[Path]:
    """The files with the memory limits of this process's control groups, version 2 and 1."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top / group.lstrip("/")
        yield from (each / name for each in (folder, *folder.parents) if each.is_relative_to(top))


def _may_have_gpu() -> bool:
    if sys.platform == "darwin":  # its GPU shares the main memory
        return False
    return sys.platform != "linux" or any(map(os.path.exists, GPU_FILES))

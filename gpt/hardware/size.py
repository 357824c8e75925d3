"""Whether a config fits the machine, counted from its numbers before anything is built.

All counts are lower bounds: what is refused could not run. A model has its matrices at least, and
training keeps weights, gradients and the optimizer's memory, the activations of one forward pass
and a batch of tokens. What norms, biases, libraries and allocators take comes on top; whether that
fits shows when it runs.

This module imports no torch, so that a refusal comes at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from gpt.config import Config, ModelConfig
from gpt.errors import InputError

FP32 = 4  # bytes of a number
REMEMBERED = {"adamw": 2, "radam": 2, "muon": 1}  # numbers a parameter, by optimizer; others less
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # one is there where Linux has a GPU


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Numbers in the matrices: all parameters but biases, norms' and a placement's own."""
    d = model.width
    inner = max(0, int(d * model.mlp.multiple) - 6)  # swiglu's is rounded to a multiple of 8
    tables = model.context + vocab_size * (1 if model.tied_head else 2)
    return model.layers * (4 * d * d + 2 * d * inner) + tables * d


def check_training(
    config: Config, vocab_size: int = 1, *, device_memory: int | None, shared: bool
) -> None:
    """Refuse a config that cannot be trained here.

    Args:
        vocab_size: what is known of it: the least.
        device_memory: bytes where the model is; None if that is not known.
        shared: whether that is the machine's own memory, where the batch of tokens is as well.

    Raises:
        InputError: it needs more memory than there is; both in GB.
    """
    model, training = config.model, config.training
    numbers = parameters(model, vocab_size) * FP32
    kept = 1 + REMEMBERED.get(config.optimizer.name, 0)  # from update to update
    size = FP32 if training.precision == "fp32" else 2
    sequences = 1 if training.micro_batch == "auto" else training.micro_batch
    tokens = sequences * model.context
    logits = min(tokens, training.loss_chunk or tokens) * vocab_size
    weights = f"training {_shape(model)}, {numbers // FP32:,} parameters,"
    activations = f"a forward pass over {sequences:,} x {model.context:,} tokens"
    batch = f"a batch of {config.batch_sequences:,} x {model.context:,} tokens"
    in_batch = {batch: 8 * config.batch_sequences * model.context}  # int64
    beside = in_batch if shared else {}
    passing = size * (4 * model.layers * model.width * tokens + logits)  # q, k, v, and the stream
    _check({weights: (kept + 1) * numbers, **beside}, device_memory)  # with the gradients
    _check({weights: kept * numbers, activations: passing, **beside}, device_memory)
    _check(in_batch, machine_memory())


def check_cpu_training(config: Config) -> None:
    """`check_training` where it is plain, without torch, that the CPU is the device.

    Raises:
        InputError: as `check_training`.
    """
    device = config.training.device
    if device == "cpu" or (device == "auto" and not _may_have_gpu()):
        check_training(config, device_memory=machine_memory(), shared=True)


def check_loading(model: ModelConfig, vocab_size: int, origin: str) -> None:
    """Refuse a model whose weights the machine's memory cannot hold.

    Args:
        origin: where its config comes from.

    Raises:
        InputError: both in GB.
    """
    needs = {f"{origin}: {_shape(model)}": parameters(model, vocab_size) * FP32}
    _check(needs, machine_memory())


def check_sampling(
    model: ModelConfig, vocab_size: int, *, samples: int, tokens: int, size: int, memory: int | None
) -> None:
    """Refuse more texts than the memory of the device holds.

    Args:
        tokens: of one text, prompt included; more than the context are never held.
        size: bytes of a number in the key/value cache.

    Raises:
        InputError: both in GB.
    """
    held = min(tokens, model.context)
    needs = {
        f"--num-samples {samples:,}: keys and values of {held:,} tokens each": (
            2 * size * samples * held * model.width * model.layers
        ),
        f"--num-samples {samples:,}: their logits": FP32 * samples * vocab_size,
    }
    _check(needs, memory)


def check_probing(model: ModelConfig, layers: int) -> None:
    """Refuse a network that is too large to be probed at `layers` blocks.

    Raises:
        InputError: both in GB.
    """
    probed = model.model_copy(update={"layers": layers})
    what = f"a probe (probes: false makes none) of {_shape(probed)}"
    _check({what: 2 * parameters(probed, 1) * FP32}, machine_memory())


def _shape(model: ModelConfig) -> str:
    """The options that make a model large."""
    return f"model.layers: {model.layers:,}, model.width: {model.width:,}"


def _check(needs: dict[str, int], memory: int | None) -> None:
    """Refuse `needs`, bytes by what they are for, that come to more than `memory`."""
    total = sum(needs.values())
    if memory is not None and total > memory:
        largest = max(needs, key=lambda what: needs[what])
        raise InputError(
            f"{largest} needs at least {_gigabytes(total)} GB of memory; "
            f"there are {_gigabytes(memory)} GB here"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f}"


def machine_memory() -> int | None:
    """Bytes that this process may have: the machine's, or its control group's; None: not known."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _group_limits():
        try:
            text = file.read_text("ascii").strip()
        except (OSError, ValueError):
            continue
        if text.isdecimal():  # else "max", which is none
            found.append(int(text))
    return min(found, default=None)


def _group_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[Path]:
    """The files that may limit the memory of this process's control groups, version 2 and 1."""
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
    if sys.platform == "darwin":  # which shares its memory
        return False
    return sys.platform != "linux" or any(map(os.path.exists, GPU_FILES))

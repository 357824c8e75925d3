"""What a config amounts to, before anything runs: device, size, batch, epochs.

The banner of a run and `--dry-run` both come from `describe`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from gpt.config import Config, ModelConfig
from gpt.errors import InputError, OutOfMemoryError
from gpt.hardware import size
from gpt.init import depth_scaled
from gpt.model import GPT
from gpt.placement import PLACEMENTS, has_final_norm

Computed = TypeVar("Computed")


def describe(
    config: Config,
    model: GPT,
    *,
    device: torch.device,
    micro_batch: int,
    train_tokens: int | None,
    directory: Path,
    done: int,
) -> str:
    """A few lines on what is about to happen.

    Args:
        model: on any device, "meta" included; only its size counts.
        train_tokens: tokens of the training data, None if it is not prepared yet.
        done: updates that an earlier session has made.
    """
    parameters, embeddings = model.num_parameters(), model.num_embedding_parameters()
    batch_tokens = config.batch_sequences * config.model.context
    total = config.training.steps * batch_tokens
    schedule = config.schedule
    warmup = f"{schedule.warmup} warm-up of {schedule.warmup_steps:,} steps"
    if schedule.warmup_steps >= config.training.steps:
        warmup += " (the whole run, and more)"
    parts = config.batch_sequences // micro_batch
    if train_tokens is None:
        data = "not prepared yet"
    else:
        data = f"{train_tokens:,} training tokens, {total / train_tokens:.2f} epochs"
    rows = {
        "steps": f"{config.training.steps:,}" + (f", of which {done:,} are done" if done else ""),
        "device": f"{device.type}, {config.training.precision}",
        "model": f"{parameters:,} parameters, {parameters - embeddings:,} without embeddings",
        "blocks": _blocks(config.model),
        "batch": f"{batch_tokens:,} tokens a step: {config.batch_sequences} sequences of "
        f"{config.model.context}" + (f", in {parts} micro-batches" if parts > 1 else ""),
        "rate": f"{config.optimizer.name} at {config.optimizer.learning_rate:g}, "
        f"{'no warm-up' if schedule.warmup == 'none' else warmup}, then {schedule.body}",
        "data": f"{data}; {config.data.tokenizer} vocabulary of {model.vocab_size:,}",
        "directory": str(directory),
    }
    return "\n".join([config.name, *(f"  {name:<10} {text}" for name, text in rows.items())])


def _blocks(config: ModelConfig) -> str:
    """The norm lab's choices in one line."""
    kind = (config.norm.type or "layer") if PLACEMENTS[config.norm.placement].has_norms else "none"
    final = "with" if has_final_norm(config) else "without"
    parts = [
        f"{config.layers} x {config.norm.placement}",
        "no norms" if kind == "none" else f"{kind} norm, {final} a final one",
        config.mlp.activation,
        f"{config.init.regime} weights" + (" x 1/sqrt(2L)" if depth_scaled(config) else ""),
    ]
    return "; ".join(parts)


def pick_device(name: str) -> torch.device:
    """The device that `training.device` names; auto takes cuda, then mps, then cpu.

    Raises:
        InputError: it is not there.
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


def micro_batch(config: Config, vocab_size: int, device: torch.device, *, models: int = 1) -> int:
    """Sequences of one forward pass: the largest divisor of the batch that fits the memory.

    A token costs 17 d L numbers of activations (the 34 bytes of Korthikanti et al. 2022 at 16 bits)
    and 3 V fp32 numbers of logits, at most `training.loss_chunk` tokens of them at a time. The
    attention matrix is never formed, but for a soft cap: then scores, their tanh and the weights
    are, h T L numbers each.

    Args:
        models: how many go forward at once, each with so many sequences.
    """
    if config.training.micro_batch != "auto":
        return config.training.micro_batch
    model = config.model
    number = 4 if config.training.precision == "fp32" else 2
    attention = 3 * model.heads * model.context if model.attention.soft_cap is not None else 0
    token, logits = (17 * model.width + attention) * model.layers * number, 3 * vocab_size * 4
    memory, chunk = _memory(device) // models, config.training.loss_chunk
    fitting = max(1, memory // ((token + logits) * model.context))
    if chunk is not None:
        fitting = max(fitting, (memory - chunk * logits) // (token * model.context))
    batch = config.batch_sequences
    return max(n for n in range(1, min(batch, fitting) + 1) if batch % n == 0)


def check_fits(config: Config, device: torch.device, vocab_size: int = 1) -> None:
    """Refuse a config that the memory here cannot train (see `gpt.hardware.size.check_training`).

    Raises:
        InputError: it needs more than there is.
    """
    memory, shared = total_memory(device), device.type != "cuda"
    size.check_training(config, vocab_size, device_memory=memory, shared=shared)


def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's own memory, or of the machine's; None if that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return size.machine_memory()


MODEL_BYTES = 24  # a parameter: weight, gradient, step, Adam's two moments, a copy while stacking


def models_at_once(config: Config, vocab_size: int, device: torch.device) -> int:
    """Models that are trained together at most: their weights take less than half of the memory."""
    with torch.device("meta"):
        parameters = GPT(config.model, vocab_size).num_parameters()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30
    return max(1, int(0.4 * free) // (MODEL_BYTES * parameters))


class Fitted(Protocol):
    """What computes in micro-batches, and can go on with smaller ones (`use`)."""

    config: Config
    micro_batch: int

    def use(self, micro_batch: int) -> None:
        """Go on with that."""


def with_less_memory(run: Fitted, compute: Callable[[], Computed]) -> Computed:
    """What `compute` returns, with smaller micro-batches of `run` where auto's do not fit."""
    while True:
        try:
            return compute()
        except Exception as error:
            fewer = smaller(run.micro_batch, run.config.batch_sequences)
            automatic = run.config.training.micro_batch == "auto"
            if not is_out_of_memory(error) or not automatic or fewer is None:
                raise
        run.use(fewer)  # here, where nothing holds the memory of what failed


def smaller(micro_batch: int, batch: int) -> int | None:
    """The largest divisor of the batch that is at most half of `micro_batch`; None after 1."""
    fitting = (n for n in range(micro_batch // 2, 0, -1) if batch % n == 0)
    return next(fitting, None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, of a GPU or of the machine."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "not enough memory" in text)
    )


def _memory(device: torch.device) -> int:
    """Bytes that activations may take.

    On a GPU most of what is free. On a CPU little: what stays near the caches and is given back to
    the same allocator trains about a tenth faster than what must be fetched afresh every time.
    """
    if device.type == "cuda":
        return int(0.7 * torch.cuda.mem_get_info(device)[0])
    return 64 * 2**20


def flops_per_token(config: Config, model: GPT) -> int:
    """Floating-point operations of forward and backward for one token: 6 N + 12 L d T.

    N leaves out the position embedding, which is only looked up, and the token embedding unless it
    is the head too; the second term is attention's (Chowdhery et al. 2022, appendix B).
    """
    shape = config.model
    numbers = model.num_parameters() - model.position_embedding.weight.numel()
    if model.head is not None:
        numbers -= model.token_embedding.weight.numel()
    return 6 * numbers + 12 * shape.layers * shape.width * shape.context


# Dense bf16 and fp16 FLOP/s that the makers state, by a part of the device's name.
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


def peak_flops(device_name: str, precision: str) -> float | None:
    """Matrix FLOP/s of a GPU at 16 bits; None if it is not known, or for fp32."""
    if precision == "fp32":
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)

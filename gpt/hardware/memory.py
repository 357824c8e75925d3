"""Memory: which micro-batch fits, and what to do when it turns out not to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from gpt.config import Config
from gpt.errors import OutOfMemoryError
from gpt.hardware import size
from gpt.model.gpt2 import GPT

Computed = TypeVar("Computed")
Given = ParamSpec("Given")

MODEL_BYTES = 24  # per parameter: weight, gradient, step, two moments, a copy while stacking


def micro_batch(config: Config, vocab_size: int, device: torch.device, *, models: int = 1) -> int:
    """Sequences per forward pass: the largest divisor of the batch that fits in memory.

    A token needs 17 d L numbers for activations (the 34 bytes of Korthikanti et al. 2022 at 16
    bits) and 3 V fp32 numbers for logits, the latter for at most `training.loss_chunk` tokens at a
    time. The attention matrix is never formed, except with a soft cap (the scores, their tanh and
    the weights then take h T L numbers each) or with dropout (weights, mask and what is kept).

    Args:
        models: how many models run forward at once, each with that many sequences.
    """
    if config.training.micro_batch != "auto":
        return config.training.micro_batch
    model = config.model
    number = 4 if config.training.precision == "fp32" else 2
    formed = model.attention.soft_cap is not None or model.dropout > 0
    attention = 3 * model.heads * model.context if formed else 0
    token, logits = (17 * model.width + attention) * model.layers * number, 3 * vocab_size * 4
    memory, chunk = _activation_memory(device) // models, config.training.loss_chunk
    fitting = max(1, memory // ((token + logits) * model.context))
    if chunk is not None:
        fitting = max(fitting, (memory - chunk * logits) // (token * model.context))
    batch = config.batch_sequences
    return max(n for n in range(1, min(batch, fitting) + 1) if batch % n == 0)


def _activation_memory(device: torch.device) -> int:
    """Bytes that activations may take.

    On a GPU, most of what is free. On a CPU, little: training is about a tenth faster if it reuses
    memory that mostly stays in the caches than if it allocates memory anew every time.
    """
    if device.type == "cuda":
        return int(0.7 * torch.cuda.mem_get_info(device)[0])
    return 64 * 2**20


def check_fits(config: Config, device: torch.device, vocab_size: int = 1) -> None:
    """Reject a config that needs more memory than there is (`gpt.hardware.size.check_training`).

    Raises:
        InputError: the config needs more memory than there is.
    """
    memory, shared = total_memory(device), device.type != "cuda"
    size.check_training(config, vocab_size, device_memory=memory, shared=shared)


def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's own memory, or of the machine's; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return size.machine_memory()


def models_at_once(config: Config, vocab_size: int, device: torch.device) -> int:
    """How many models to train in one batch: on a GPU they take at most 40% of the free memory.

    On a CPU they take at most 40% of 4 GiB.
    """
    with torch.device("meta"):
        parameters = GPT(config.model, vocab_size).num_parameters()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30
    return max(1, int(0.4 * free) // (MODEL_BYTES * parameters))


def release_memory(device: torch.device) -> None:
    """Release memory that a GPU's allocator holds but does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class MicroBatched(Protocol):
    """Something that computes in micro-batches and can switch to smaller ones."""

    config: Config
    micro_batch: int

    def set_micro_batch(self, micro_batch: int) -> None:
        """Use that many sequences per forward pass from now on."""


Trainer = TypeVar("Trainer", bound=MicroBatched)


def with_less_memory(
    compute: Callable[Concatenate[Trainer, Given], Computed],
) -> Callable[Concatenate[Trainer, Given], Computed]:
    """A method that is repeated with smaller micro-batches while memory runs out.

    Only `training.micro_batch: auto` is ever made smaller.
    """

    @functools.wraps(compute)
    def repeat(trainer: Trainer, /, *args: Given.args, **options: Given.kwargs) -> Computed:
        while True:
            try:
                return compute(trainer, *args, **options)
            except Exception as error:
                fewer = smaller(trainer.micro_batch, trainer.config.batch_sequences)
                automatic = trainer.config.training.micro_batch == "auto"
                if not is_out_of_memory(error) or not automatic or fewer is None:
                    raise
            trainer.set_micro_batch(fewer)  # outside `except`: the failed attempt's memory is free

    return repeat


def smaller(micro_batch: int, batch: int) -> int | None:
    """The largest divisor of the batch that is at most half of `micro_batch`; None after 1."""
    fitting = (n for n in range(micro_batch // 2, 0, -1) if batch % n == 0)
    return next(fitting, None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine ran out of memory."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "not enough memory" in text)
    )

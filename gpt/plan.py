"""What a config amounts to, before anything runs: device, size, batch, epochs.

The banner of a run and `--dry-run` both come from `describe`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gpt.config import Config
from gpt.errors import InputError
from gpt.model import GPT


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
    parts = config.batch_sequences // micro_batch
    if train_tokens is None:
        size = "not prepared yet"
    else:
        size = f"{train_tokens:,} training tokens, seen {total / train_tokens:.2f} times"
    rows = {
        "steps": f"{config.training.steps:,}" + (f", of which {done:,} are done" if done else ""),
        "device": f"{device.type}, {config.training.precision}",
        "model": f"{parameters:,} parameters, {parameters - embeddings:,} without embeddings; "
        f"{config.model.norm.placement}-norm, {config.optimizer.name}",
        "batch": f"{batch_tokens:,} tokens a step: {config.batch_sequences} sequences of "
        f"{config.model.context}" + (f", in {parts} micro-batches" if parts > 1 else ""),
        "data": f"{size}; {config.data.tokenizer} vocabulary of {model.vocab_size:,}",
        "directory": str(directory),
    }
    return "\n".join([config.name, *(f"  {name:<10} {text}" for name, text in rows.items())])


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


def micro_batch(config: Config, vocab_size: int, device: torch.device) -> int:
    """Sequences of one forward pass: the largest divisor of the batch that fits the memory.

    Counts, for each token, 34 d L numbers of activations (Korthikanti et al. 2022, without the
    attention matrix, which is never formed) and 3 V of logits.
    """
    if config.training.micro_batch != "auto":
        return config.training.micro_batch
    model = config.model
    numbers = 34 * model.width * model.layers + 3 * vocab_size
    fitting = max(1, _memory(device) // (4 * numbers * model.context))
    batch = config.batch_sequences
    return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fitting)


def _memory(device: torch.device) -> int:
    """Bytes that activations may take."""
    if device.type == "cuda":
        return int(0.7 * torch.cuda.mem_get_info(device)[0])
    return 2 * 2**30

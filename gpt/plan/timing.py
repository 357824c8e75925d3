"""How long training takes, extrapolated from a few updates that are timed on this machine."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from gpt.config import Config
from gpt.hardware.device import flush_denormals
from gpt.trainer import Trainer

TIMED_FLOPS = {"cpu": 2e10, "mps": 2e11, "cuda": 2e13}  # of an update; a longer one is scaled up
LONGER = 10  # times as many for the estimate of one run, as a large model is slow on few tokens


def make_trainer(config: Config, vocab_size: int, device: torch.device) -> Trainer:
    """A trainer to time. On a CPU it is not compiled, as compiling takes longer than it saves.

    Raises:
        InputError: the config cannot run here.
    """
    if device.type == "cpu":
        plain = config.training.model_copy(update={"compile": False})
        config = config.model_copy(update={"training": plain})
    trainer = Trainer(config, vocab_size, device)
    trainer.reset()
    return trainer


@flush_denormals()  # as training does
def update_seconds(
    trainer: Trainer, vocab_size: int, seconds: float, longer: float = LONGER
) -> float:
    """Seconds of an update of the whole batch.

    Args:
        trainer: after `reset`; its weights change.
        seconds: to spend on it, with at least one update.
        longer: how many times TIMED_FLOPS an update may take, after a first one that warms up.
    """
    config, device = trainer.config, trainer.device

    def batch(flops: float) -> Tensor:
        affordable = int(flops // trainer.model.flops_per_token())
        length = min(config.model.context, max(1, affordable))
        sequences = min(trainer.micro_batch, max(1, affordable // length))
        return torch.randint(vocab_size, (sequences, length))

    tokens = batch(TIMED_FLOPS[device.type])
    computing = updating = 0.0
    count = -1  # the first update warms up
    while count < 1 or computing + updating < seconds:
        began = now(device)
        loss, grad_norm = trainer.backward(1, tokens, tokens)
        between = now(device)
        trainer.update(1.0, loss, grad_norm)
        count += 1
        if count:
            computing += between - began
            updating += now(device) - between
        else:
            tokens = batch(longer * TIMED_FLOPS[device.type])
    scale = config.batch_sequences * config.model.context / tokens.numel()
    return (computing * scale + updating) / count


def evaluation_seconds(config: Config, update: float, sequences: int | None = None) -> float:
    """Seconds of all evaluations of a run, whose forward pass takes a third of an update.

    Args:
        update: seconds of an update.
        sequences: validation sequences; None: unknown, and taken to be a batch unless the config
            limits them.
    """
    count = 2 + (config.training.steps - 1) // config.evaluation.every
    limits = [n for n in (sequences, config.evaluation.sequences) if n is not None]
    evaluated = min(limits, default=config.batch_sequences)
    return update * count * evaluated / config.batch_sequences / 3


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()

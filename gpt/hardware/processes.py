"""How many processes share a run, and this machine's cores. Nothing here imports torch."""

from __future__ import annotations

import os

from gpt import variants
from gpt.config import Config
from gpt.errors import InputError, option


def is_launched() -> bool:
    """Whether torchrun, or gpt/cli/launch.py, has started this process."""
    return "WORLD_SIZE" in os.environ


def launched() -> int:
    """How many processes the launcher has started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """How often the launcher has started them again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def after_restart(resume: str) -> str:
    """How a run is resumed: after a restart, "never" would refuse what the run itself has made."""
    return "auto" if resume == "never" and restarts() else resume


def leads() -> bool:
    """Whether this process is the only one, or the one of rank 0, which talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_processes(config: Config, processes: int) -> None:
    """Refuse a number of processes that cannot train `config` together.

    Raises:
        InputError: it does not divide the batch (the message names numbers that do), or an option
            needs the whole batch or the whole model.
    """
    batch, norm = config.batch_sequences, config.model.norm.type
    if batch % processes:
        usable = [n for n in range(1, batch + 1) if batch % n == 0]
        shown = ", ".join(map(str, usable[:12])) + (", ..." if len(usable) > 12 else "")
        raise InputError(
            f"{option('training.processes')}: {processes} cannot share a batch of {batch} "
            f"sequences equally; use {shown}, or another {option('training.batch_sequences')}"
        )
    if processes > 1 and norm in variants.names("gpt.model.norm", "ACROSS_TOKENS"):
        raise InputError(
            f"{option('training.processes')}: {processes}, but the statistics of "
            f"{option('model.norm.type')} {norm} are over the sequences of one process; use 1"
        )
    if processes > 1 and config.training.parallel == "fsdp":
        _check_sharded(config)


def _check_sharded(config: Config) -> None:
    """Refuse what does not work if each process holds a part of the model."""
    training = config.training
    conflicts = {
        "training.precision": (training.precision == "fp16", "fp16, whose scale all must agree on"),
        "training.compile": (training.compile, "true, which is not supported"),
        "diagnostics.every": (
            config.diagnostics.every is not None,
            f"{config.diagnostics.every}, which measures whole weights and gradients",
        ),
    }
    for name, (applies, why) in conflicts.items():
        if applies:
            raise InputError(
                f"{option('training.parallel')}: fsdp conflicts with {option(name)} {why}; use ddp"
            )

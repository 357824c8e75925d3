"""How many processes share a run, and this machine's cores. Nothing here imports torch."""

from __future__ import annotations

import os

from gpt import variants
from gpt.config import Config
from gpt.errors import InputError, option


def launched() -> int:
    """How many processes torchrun, or gpt/cli/launch.py, has started for this run; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is the only one, or the one of rank 0, which talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_processes(config: Config, processes: int) -> None:
    """Refuse a number of processes that cannot share each batch of `config` equally.

    Raises:
        InputError: names the numbers that can; or an option that needs the whole batch.
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

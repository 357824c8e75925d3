"""Rank 0 trains, and the others follow: `together` is the whole of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from gpt.config import Config
from gpt.distributed.group import Group, failing_together, joined
from gpt.distributed.trainer import ParallelTrainer
from gpt.run.directory import RunResult
from gpt.trainer import Trainer

Stop = Callable[[], bool]


def together(
    config: Config, device: torch.device, stop: Stop, lead: Callable[[Group], RunResult]
) -> RunResult:
    """The result of `lead(group)`, which rank 0 calls while the other processes follow it.

    Args:
        stop: whether this process was asked to stop.

    Raises:
        InputError: the processes cannot train this config, or `lead` raised it.
        LostProcessError: a process was killed, or does not respond.
        SystemExit: another process has failed, and has said why.
    """
    with joined(config, device) as group:
        if group.size == 1:
            return lead(group)
        with failing_together(group):
            if not group.leads:
                return _follow(config, group, stop)
            result = lead(group)
            group.publish(result.to_json())
            return result


def _follow(config: Config, group: Group, stop: Stop) -> RunResult:
    while not (group.is_ready() or group.has_ended()):
        if stop():
            group.ask_to_stop()
        time.sleep(0.1)
    if group.is_ready():
        _, vocab_size = group.receive()
        ParallelTrainer(config, vocab_size, group).follow(stop)
    return RunResult.from_json(group.result())


def make_trainer(
    config: Config,
    vocab_size: int,
    group: Group,
    *,
    check_stop: Callable[[], object],
    notify: Callable[[str], object],
) -> Trainer:
    """The trainer of the only process, or of rank 0.

    Raises:
        InputError: see `Trainer` and `ParallelTrainer`.
    """
    if group.size == 1:
        return Trainer(config, vocab_size, group.device, check_stop=check_stop, notify=notify)
    group.start(vocab_size)
    return ParallelTrainer(config, vocab_size, group, check_stop=check_stop, notify=notify)

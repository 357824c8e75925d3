"""Rank 0 trains, and the others follow: `together` does both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from gpt.config import Config
from gpt.distributed.group import Group, joined
from gpt.errors import OutOfMemoryError
from gpt.hardware.device import flush_denormals
from gpt.hardware.memory import is_out_of_memory
from gpt.rng import generator
from gpt.run.directory import RunResult
from gpt.run.recovery import advise_untried
from gpt.trainer import Trainer

Stop = Callable[[], bool]
TIMED = 5  # updates
POLL = 0.2  # seconds


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
    with joined(config, device, stop) as group:
        if not group.leads:
            return _follow(config, group, stop)
        result = lead(group)
        group.publish(result.to_json())
        return result


def _follow(config: Config, group: Group, stop: Stop) -> RunResult:
    """Compute what rank 0 asks for; before that, and if it continues alone, wait for its result."""
    started = False
    while not group.wait_for("result", POLL):
        if stop():
            group.ask_to_stop()
        if group.is_ready() and not started:
            started = True
            _compute(config, group, stop)
    return RunResult.from_json(group.result())


def _compute(config: Config, group: Group, stop: Stop) -> None:
    """Compute what rank 0 asks for, until it continues alone or ends the run.

    Raises:
        OutOfMemoryError: this process does not have enough memory.
    """
    from gpt.distributed.trainer import ParallelTrainer  # a second of imports, if needed

    with flush_denormals():
        _, vocab_size = group.receive()
        trainer = ParallelTrainer(config, vocab_size, group)
        try:
            trainer.follow(stop)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = str(error).partition("\n")[0]
            raise OutOfMemoryError(advise_untried(trainer, shortage)) from None


def make_trainer(
    config: Config,
    vocab_size: int,
    group: Group,
    check_stop: Callable[[], object],
    notify: Callable[[str], object],
    before: int | None,
) -> Trainer:
    """The trainer of the only process, or of rank 0.

    Args:
        check_stop, notify: see `Trainer`.
        before: how many processes this run has had; None if it is new. With `training.processes:
            auto` the run keeps that number, as with another one it would sum in another order.

    Raises:
        InputError: see `Trainer` and `ParallelTrainer`.
    """

    def alone() -> Trainer:
        return Trainer(config, vocab_size, group.device, check_stop=check_stop, notify=notify)

    if group.size == 1:
        return alone()
    from gpt.distributed.trainer import ParallelTrainer

    group.start(vocab_size)
    trainer = ParallelTrainer(config, vocab_size, group, check_stop=check_stop, notify=notify)
    if config.training.processes != "auto" or group.device.type != "cpu":
        return trainer
    if before is None:
        shares = _sharing_is_faster(trainer, alone, group.threads, notify)
    else:
        shares = before > 1
    if shares:
        return trainer
    group.release()
    torch.set_num_threads(group.threads)
    return alone()


def _sharing_is_faster(
    trainer: Trainer,
    alone: Callable[[], Trainer],
    threads: int,
    notify: Callable[[str], object],
) -> bool:
    """Whether the processes of `trainer` take less time than rank 0 with all threads would."""
    each = torch.get_num_threads()
    shared = _update_seconds(trainer)
    torch.set_num_threads(threads)
    whole = _update_seconds(alone())
    torch.set_num_threads(each)
    processes, s = f"{trainer.processes} processes", "s" if each > 1 else ""
    notify(
        f"training.processes auto: {shared:.3g} s for an update by {processes} with {each} "
        f"thread{s} each, {whole:.3g} s by 1 process with {threads}: training in "
        f"{processes if shared <= whole else '1 process'}"
    )
    return shared <= whole


@flush_denormals()  # as training does
def _update_seconds(trainer: Trainer) -> float:
    """Seconds of an update, from the median of TIMED with one micro-batch for each process."""
    sequences = trainer.micro_batch * trainer.processes
    batch = trainer.config.batch_sequences * trainer.processes  # its config is that of a share
    shape = (sequences, trainer.config.model.context)
    tokens = torch.randint(trainer.model.vocab_size, shape, generator=generator("timing"))
    trainer.reset()
    seconds = []
    for _ in range(1 + TIMED):  # the first warms up
        began = time.monotonic()
        trainer.update(1.0, *trainer.backward(1, tokens, tokens))
        seconds.append((time.monotonic() - began) / sequences * batch)
    return statistics.median(seconds[1:])

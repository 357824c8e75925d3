"""`train.py`, in which one of several processes fails: `FAULT="kill 1 backward 3" faulty.py ...`.

FAULT names what happens (an entry of FAULTS), the rank, the stage (one of STAGES), and at which
call of the stage's function, from 1, it happens. torch starts each process by importing this
script again, which installs the fault. Only the first attempt is disturbed.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import gpt.training
from gpt.checkpoint import store
from gpt.distributed.trainer import FOLLOWED, ParallelTrainer
from gpt.errors import InputError
from gpt.optim import Optimizer
from gpt.trainer import Trainer

STAGES: dict[str, tuple[Any, str]] = {  # -> where its function is, and the function's name
    "joining": (dist, "init_process_group"),
    "data": (gpt.training, "prepare"),
    "backward": (Trainer, "backward"),
    "update": (Optimizer, "step"),
    "evaluation": (ParallelTrainer, "_evaluate_share"),
    "gather": (ParallelTrainer, "_gather"),
    "checkpoint": (store, "save_file"),
}
LEADERS = ("data", "checkpoint")  # stages of rank 0 alone, during which another rank may die


class Fault(NamedTuple):
    """What happens to a rank, and when."""

    what: str
    rank: int
    stage: str
    number: int

    @property
    def installed_in(self) -> int:
        """The rank that notices that the moment has come."""
        return 0 if self.stage in LEADERS else self.rank

    @property
    def signal_file(self) -> Path:
        """The file with which rank 0 makes another rank fail."""
        return Path(f"fault-{os.getppid()}")


def _send(number: signal.Signals) -> None:
    """Send a signal to this process, a moment later."""
    threading.Timer(0.002, lambda: os.kill(os.getpid(), number)).start()


def _raise(error: Exception) -> None:
    raise error


FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: _send(signal.SIGKILL),
    "stop": lambda: _send(signal.SIGSTOP),
    "terminate": lambda: _send(signal.SIGTERM),
    "memory": lambda: _raise(torch.OutOfMemoryError("no memory for 1 GiB")),
    "input": lambda: _raise(InputError("data.path: is unreadable there")),
    "bug": lambda: _raise(KeyError("a bug")),
    "full": lambda: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoints")),
}


def install(fault: Fault) -> None:
    """Make this process, if it is the rank in question, fail as `fault` says."""
    owner, name = STAGES[fault.stage]
    function, calls = getattr(owner, name), [0]

    @functools.wraps(function)
    def failing(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == fault.number and _disturbed() == fault.installed_in:
            if fault.installed_in == fault.rank:
                FAULTS[fault.what]()
            else:
                fault.signal_file.touch()
        return function(*args, **options)

    setattr(owner, name, failing)
    FOLLOWED.update({key: failing for key, value in FOLLOWED.items() if value is function})
    if fault.installed_in != fault.rank:
        threading.Thread(target=_await, args=[fault], daemon=True).start()


def _disturbed() -> int | None:
    """The rank of this process, at the first attempt; None after a restart."""
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    return int(os.environ["RANK"]) if first else None


def _await(fault: Fault) -> None:
    while not (_disturbed() == fault.rank and fault.signal_file.exists()):
        time.sleep(0.001)
    FAULTS[fault.what]()


if os.environ.get("FAULT"):
    what, rank, stage, number = os.environ["FAULT"].split()
    install(Fault(what, int(rank), stage, int(number)))

if __name__ == "__main__":
    from gpt.cli.common import command
    from gpt.cli.train import load, report, train

    sys.argv[0] = "train.py"
    with command("train.py"):
        sys.exit(report(train(*load(sys.argv[1:]))))

"""`--processes N`: train in several processes on this machine, by torch's elastic launcher.

torchrun does the same, also on several machines. Here the parent gets the result, or an error;
at Ctrl-C, it asks all to stop. If a process is killed or does not respond,
the parent kills the others, and all start again from the last checkpoint. An error in the program
would recur, so it ends the run.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gpt.cli.common import STOP_SIGNALS, USER_ERRORS, StopSignals
from gpt.config import Config
from gpt.errors import InputError, LostProcessError, StoppedError, naming_flags
from gpt.hardware.device import pick_device
from gpt.hardware.processes import after_restart, check_processes, cores, restarts
from gpt.hardware.size import check_training, machine_memory
from gpt.io.children import blocked, environment
from gpt.io.console import show
from gpt.io.files import read_json
from gpt.io.wait import wait_for
from gpt.run.directory import RunDirectory, RunResult


def count(config: Config, out_dir: Path) -> int:
    """How many processes to start for `config`: with auto, at most as many as may be useful.

    With auto, a run that exists is resumed with as many as it had.

    Raises:
        InputError: they cannot share its batches.
    """
    given = config.training.processes
    device = pick_device(config.training.device)
    most = torch.cuda.device_count() if device.type == "cuda" else cores()
    facts = RunDirectory(out_dir).environment
    if given == "auto" and facts.is_file():
        before = read_json(facts, dict[str, Any]).get("processes", 1)
        most = min(most, before) if isinstance(before, int) else most
    if given == "auto":
        return max((n for n in range(2, most + 1) if _can_share(config, n, device)), default=1)
    check_processes(config, given)
    if device.type == "cuda" and given > most:
        raise InputError(f"--training.processes: {given}, but this machine has {most} GPUs")
    return given


def _can_share(config: Config, processes: int, device: torch.device) -> bool:
    """Whether so many processes can train `config`, and a machine's memory is enough for them."""
    try:
        check_processes(config, processes)
        memory = machine_memory()
        if device.type == "cpu" and memory is not None:
            check_training(config, device_memory=memory // processes, shared=True)
    except InputError:
        return False
    return True


@dataclass(frozen=True)
class Shared:
    """What the processes share with their parent; the arrays are in the order of ranks.

    Attributes:
        stop: true once they should save and end.
        pids: their process ids; 0 before they have started.
        done: whether each has finished its work; they end once all have.
        errors: an error that ends the run, which the parent raises.
    """

    stop: Synchronized[int]
    pids: SynchronizedArray[int]
    done: SynchronizedArray[int]
    errors: SimpleQueue[BaseException]

    def __getstate__(self) -> dict[str, Any]:
        """What torch hands to the processes that it is about to start, unless an error ends all."""
        self.raise_error()
        return self.__dict__

    def raise_error(self) -> None:
        """In the parent: raise the error of a process, if there is one."""
        if not self.errors.empty():
            raise self.errors.get()

    def kill_incomplete(self) -> None:
        """Kill all processes if one has died: the others can only wait for it."""
        started = [rank for rank, pid in enumerate(self.pids[:]) if pid]
        if any(not self.done[rank] and not _exists(self.pids[rank]) for rank in started):
            for pid in (self.pids[rank] for rank in started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.pids[:] = [0] * len(self.pids)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # the latter: another user's process by now
        return False
    return True


def train(
    config: Config,
    out_dir: Path,
    *,
    processes: int,
    resume: str = "auto",
    max_restarts: int = 3,
    max_seconds: float | None = None,
) -> RunResult:
    """Train as `gpt.training.train` does, in several processes.

    Args:
        max_restarts: how often they start again after one of them was killed or did not respond.
        max_seconds: see `StopSignals`.

    Raises:
        InputError, StoppedError: as `gpt.training.train`.
        LostProcessError: a process was killed or did not respond after the last restart.
        SystemExit: of an error in the program, whose traceback has been shown.
    """
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            signals_to_handle="",  # `stop` does
        ),
        _run,
    )
    context = multiprocessing.get_context("spawn")
    with environment(PYTHONWARNINGS="ignore:resource_tracker"):  # if this process is killed
        resource_tracker.ensure_running()
    shared = Shared(
        context.Value("b", False, lock=False),
        context.Array("i", processes, lock=False),
        context.Array("b", processes, lock=False),
        context.SimpleQueue(),
    )

    def launched() -> RunResult:
        with blocked(*STOP_SIGNALS):  # a terminal sends them to all; `shared.stop` is enough
            result: RunResult = launch(config, out_dir, resume, max_restarts, shared)[0]
        return result

    with StopSignals(max_seconds) as stop:

        def look_after() -> None:
            shared.stop.value = stop()
            shared.kill_incomplete()

        try:
            return wait_for(launched, meanwhile=look_after)
        except ChildFailedError as error:
            shared.raise_error()
            raise LostProcessError(_describe(error)) from None


def _describe(error: ChildFailedError) -> str:
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed (see above)"
    return f"the process of rank {rank} {how}; the same command resumes"


def _run(
    config: Config, out_dir: Path, resume: str, max_restarts: int, shared: Shared
) -> RunResult | None:
    """Train in one of the processes; returns the result on rank 0, and None on the others.

    Raises:
        SystemExit: this process, or another one, has failed.
    """
    rank = int(os.environ["RANK"])
    shared.done[rank] = False
    shared.pids[rank] = os.getpid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    atexit.register(gc.freeze)  # as in gpt/cli/common.py
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if rank == 0 and restarts():
        show(f"restart {restarts()} of {max_restarts}: a process was killed or failed", sys.stderr)
    with naming_flags(), _reporting(rank, shared):
        from gpt import training

        stop = lambda: bool(shared.stop.value or terminated)  # noqa: E731
        result = training.train(config, out_dir, resume=after_restart(resume), stop=stop)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch has this process wait for the others
    shared.done[rank] = True
    return result if rank == 0 else None


@contextlib.contextmanager
def _reporting(rank: int, shared: Shared) -> Iterator[None]:
    """A context whose errors end the process, and the run if a restart would meet them again."""
    try:
        yield
    except (InputError, StoppedError) as error:
        shared.errors.put(error)
    except LostProcessError as error:
        if shared.stop.value:
            shared.errors.put(StoppedError("stopped; the same command resumes"))
        else:
            show(str(error), sys.stderr)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in USER_ERRORS:
            shared.errors.put(error)
        else:
            show(f"rank {rank}:\n{traceback.format_exc()}", sys.stderr)
            if not isinstance(error, torch.AcceleratorError):  # a GPU's failure may pass
                shared.errors.put(SystemExit(1))
    else:
        return
    raise SystemExit(1)


def _end_with_parent() -> None:
    """End this process at once when its parent has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

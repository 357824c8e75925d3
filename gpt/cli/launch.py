"""`--processes N`: train in several processes on this machine, by torch's elastic launcher.

torchrun does the same, also on several machines. Here the result, or an error, returns to the
parent, which Ctrl-C reaches and which asks all to stop. If a process is killed or does not respond,
the parent kills the others, and all start again from the last checkpoint. An error in the program
would recur, so it ends the run.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import uuid
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gpt.cli.common import STOP_SIGNALS, StopSignals
from gpt.config import Config
from gpt.errors import InputError, LostProcessError, StoppedError, naming_flags
from gpt.hardware.device import pick_device
from gpt.hardware.processes import check_processes, cores, leads
from gpt.io.children import blocked, environment
from gpt.io.console import show
from gpt.io.files import read_json
from gpt.io.wait import wait_for
from gpt.run.directory import RunDirectory, RunResult


def count(config: Config, out_dir: Path) -> int:
    """How many processes to start for `config`: with auto, at most as many as may be useful.

    A run that exists is resumed with as many as it has.

    Raises:
        InputError: they cannot share its batches.
    """
    given = config.training.processes
    environment = RunDirectory(out_dir).environment
    if given == "auto" and environment.is_file():
        given = read_json(environment, dict[str, Any]).get("processes", 1)
    if given != "auto":
        check_processes(config, given)
        return given
    device = pick_device(config.training.device)
    most = torch.cuda.device_count() if device.type == "cuda" else cores()
    return max(n for n in range(1, most + 1) if config.batch_sequences % n == 0)


Answer = RunResult | InputError | StoppedError | SystemExit | None


@dataclass(frozen=True)
class Shared:
    """Memory that the processes share with their parent; the arrays are in the order of ranks.

    Attributes:
        stop: true once they should save and end.
        pids: their process ids; 0 before they work.
        answered: whether they are about to end, with an answer.
    """

    stop: Synchronized[int]
    pids: SynchronizedArray[int]
    answered: SynchronizedArray[int]

    def kill_incomplete(self) -> None:
        """Kill all processes if one has died: the others can only wait for it."""
        started = [rank for rank, pid in enumerate(self.pids[:]) if pid]
        if any(not self.answered[rank] and not _exists(self.pids[rank]) for rank in started):
            for pid in (self.pids[rank] for rank in started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.pids[:] = [0] * len(self.pids)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
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
        LostProcessError: a process was killed or did not respond once more.
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
            signals_to_handle="",  # `stop` does
        ),
        _run,
    )
    context = multiprocessing.get_context("spawn")
    shared = Shared(
        context.Value("b", False, lock=False),
        context.Array("i", processes, lock=False),
        context.Array("b", processes, lock=False),
    )
    with environment(PYTHONWARNINGS="ignore:resource_tracker"):  # if this process is killed
        resource_tracker.ensure_running()

    def launched() -> dict[int, Answer]:
        with blocked(*STOP_SIGNALS):  # a terminal sends them to all; `shared.stop` is enough
            answers: dict[int, Answer] = launch(config, out_dir, resume, max_restarts, shared)
        return answers

    with StopSignals(max_seconds) as stop:

        def look_after() -> None:
            shared.stop.value = stop()
            shared.kill_incomplete()

        try:
            answers = wait_for(launched, meanwhile=look_after)
        except ChildFailedError as error:
            raise LostProcessError(_describe(error)) from None
    answer = next(answer for _, answer in sorted(answers.items()) if answer is not None)
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _describe(error: ChildFailedError) -> str:
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed (see above)"
    return f"the process of rank {rank} {how}; the same command resumes"


def _run(config: Config, out_dir: Path, resume: str, max_restarts: int, shared: Shared) -> Answer:
    """Train in one of the processes.

    Returns:
        The result, on rank 0; what the parent raises; or None, if another process answers.

    Raises:
        SystemExit: another process was killed or does not respond.
    """
    rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    shared.answered[rank] = False
    shared.pids[rank] = os.getpid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if rank == 0 and attempt != "0":
        show(f"restart {attempt} of {max_restarts}: a process was killed or failed", sys.stderr)
    with naming_flags():
        answer = _train(config, out_dir, resume, shared, terminated)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch lets it wait for the others
    shared.answered[rank] = True
    return answer


def _train(
    config: Config, out_dir: Path, resume: str, shared: Shared, terminated: list[int]
) -> Answer:
    from gpt import training

    def stop() -> bool:
        return bool(shared.stop.value or terminated)

    try:
        result = training.train(config, out_dir, resume=resume, stop=stop)
    except (InputError, StoppedError) as error:
        return error
    except LostProcessError as error:
        if shared.stop.value:
            return StoppedError("stopped; the same command resumes")
        show(str(error), sys.stderr)
        raise SystemExit(1) from None
    except SystemExit:
        return None
    except Exception as error:
        show(f"rank {os.environ['RANK']}:\n{traceback.format_exc()}", sys.stderr)
        if isinstance(error, torch.AcceleratorError):  # of a GPU, not of the program
            raise SystemExit(1) from None
        return SystemExit(1)
    return result if leads() else None


def _end_with_parent() -> None:
    """End this process at once when its parent has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

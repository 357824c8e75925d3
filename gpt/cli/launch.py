"""`--processes N`: train in several processes on this machine, by torch's elastic launcher.

torchrun does the same, also on several machines. Here the result, or the error, of rank 0 returns
to the parent. A process that crashes or is killed ends all; they start again together, and resume
from the last checkpoint.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gpt.cli.common import STOP_SIGNALS, StopSignals
from gpt.config import Config
from gpt.errors import InputError, LostProcessError, StoppedError, naming_flags
from gpt.hardware.device import pick_device
from gpt.hardware.processes import check_processes, cores
from gpt.io.console import show
from gpt.io.files import read_json
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
        processes = given
    else:
        device = pick_device(config.training.device)
        most = torch.cuda.device_count() if device.type == "cuda" else cores()
        processes = max(n for n in range(1, most + 1) if config.batch_sequences % n == 0)
    check_processes(config, processes)
    return processes


Answer = RunResult | InputError | StoppedError | None


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
        max_restarts: how often they start again after one of them has crashed or was killed.
        max_seconds: see `StopSignals`.

    Raises:
        InputError, StoppedError: as `gpt.training.train`.
        LostProcessError: a process crashed or was killed once more.
    """
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    launched = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=max_restarts,
            signals_to_handle="",  # `_forward` does
        ),
        _run,
    )
    before = {number: signal.signal(number, _forward) for number in STOP_SIGNALS}
    try:
        answer: Answer = launched(config, out_dir, resume, max_seconds)[0]
    except ChildFailedError as error:
        raise LostProcessError(_describe(error)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if isinstance(answer, Exception):
        raise answer
    assert answer is not None, "rank 0 answers"
    return answer


def _describe(error: ChildFailedError) -> str:
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed (see above)"
    return f"the process of rank {rank} {how}; the same command resumes"


def _forward(number: int, frame: FrameType | None) -> None:
    """Forward a signal to all processes, which save and end; a second signal kills them."""
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, signal.SIGTERM)
    for each in STOP_SIGNALS:
        signal.signal(each, _kill)


def _kill(number: int, frame: FrameType | None) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


def _run(config: Config, out_dir: Path, resume: str, max_seconds: float | None) -> Answer:
    """Train in one of the processes.

    Returns:
        On rank 0, the result, or the error that the parent shows; None on the others.

    Raises:
        SystemExit: it crashed.
    """
    from gpt import training

    os.setsid()  # Ctrl-C reaches the parent alone, which forwards it
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    leads, attempt = os.environ["RANK"] == "0", os.environ["TORCHELASTIC_RESTART_COUNT"]
    if leads and attempt != "0":
        show(f"restart {attempt}: a process had failed or was killed", sys.stderr)
    with naming_flags(), StopSignals(max_seconds, quiet=not leads) as stop:
        try:
            result = training.train(config, out_dir, resume=resume, stop=stop)
        except (InputError, StoppedError) as error:
            return error
        except LostProcessError as error:
            show(str(error), sys.stderr)
            raise SystemExit(1) from None
        except SystemExit:
            return None
        except Exception:
            show(f"rank {os.environ['RANK']}:\n{traceback.format_exc()}", sys.stderr)
            raise SystemExit(1) from None
    return result if leads else None

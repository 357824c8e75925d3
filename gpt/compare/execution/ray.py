"""The engine `ray`: tasks on the nodes of a Ray cluster.

Without an address, it starts a cluster of this machine alone, which ends with the comparison. Tasks
report their progress, and learn of a stop, through files (remote.py); they answer through Ray.

If the process or the node of a task dies, the task is run again, on whichever node has room, and
its cells resume from their last save. After MOST_DEATHS deaths, they are recorded as killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from gpt.compare.execution import remote
from gpt.compare.execution.cell_runs import CellError
from gpt.compare.execution.engine import Engine, Work
from gpt.compare.execution.tasks import GPU_WORKERS, Task
from gpt.compare.grid import Cell
from gpt.errors import InputError, UnreachableError
from gpt.hardware.device import pick_device
from gpt.io.wait import wait_for

MOST_DEATHS = 3  # of the processes and nodes of one task
SECONDS_BETWEEN_POLLS = 0.2
PROBE_SECONDS = 5.0  # to reach the port of an address
CONNECT_SECONDS = 14.0  # for Ray to answer there


@dataclass(frozen=True)
class Ray(Engine):
    """Tasks on a Ray cluster.

    Attributes:
        address: "auto" or HOST:PORT of a cluster; None starts one here.
        cpus_per_task: how many of a node's CPUs a task occupies; None means one.
        gpus_per_task: how many of its GPUs; None means one for a batch that trains on a GPU, and an
            eighth for a single cell.
    """

    address: str | None = None
    cpus_per_task: float | None = None
    gpus_per_task: float | None = None

    def __enter__(self) -> Self:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self.address is None:  # in this thread, whose end also ends Ray's processes
            before = signal.getsignal(signal.SIGTERM)
            ray.init("local", include_dashboard=False, **quiet)
            signal.signal(signal.SIGTERM, before)
            return self
        try:
            if self.address != "auto":
                _probe(self.address)
            with _silent_stderr():
                wait_for(lambda: ray.init(self.address, **quiet), CONNECT_SECONDS)
        except InputError:
            raise
        except TimeoutError:
            raise UnreachableError(
                f"--address: {self.address}: no Ray cluster answers; if it needs a token, set "
                "RAY_AUTH_MODE=token"
            ) from None
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise UnreachableError(f"--address: {self.address}: {_summary(error)}") from None
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()

    def workers(self, cells: Sequence[Cell], wanted: int | None) -> int:
        """By default, as many tasks as the cluster has room for; see `Engine.workers`."""
        if wanted is not None:  # nodes may start as they are needed
            return wanted
        demand = self._demand(cells)
        room = _room(demand)
        if not room:
            needs = [f"{n:g} {name}{'s' if n > 1 else ''}" for name, n in demand.items() if n]
            raise InputError(
                f"no node of the Ray cluster has the {' and '.join(needs)} that a task needs; "
                "see --cpus-per-task and --gpus-per-task, or give --workers to wait for one"
            )
        return room

    def _demand(self, cells: Sequence[Cell], *, batched: bool = False) -> dict[str, float]:
        """The resources of a task."""
        on_gpu = any(pick_device(cell.config.training.device).type == "cuda" for cell in cells)
        gpus = 0.0 if not on_gpu else 1.0 if batched else 1 / GPU_WORKERS
        return {
            "CPU": 1.0 if self.cpus_per_task is None else self.cpus_per_task,
            "GPU": gpus if self.gpus_per_task is None else self.gpus_per_task,
        }

    def run(self, work: Work) -> bool:
        import ray

        session = remote.begin(
            work.directory,
            keep_checkpoints=work.keep_checkpoints,
            threads=max(1, int(self.cpus_per_task or 1)),
            attended=True,
        )
        train = ray.remote(max_retries=0)(remote.Session.train)
        stopped = False
        waiting, deaths = deque(work.tasks), Counter[str]()
        running: dict[Any, Task] = {}
        failure: InputError | None = None
        progress = _Progress(work, session)
        demands = [self._demand(task.cells, batched=task.batched) for task in work.tasks[:1]]
        if not all(map(_room, demands)):
            work.say("no node of the Ray cluster has room for a task; waiting for one")
        try:
            while running or waiting:
                while waiting and len(running) < work.workers:
                    task = waiting.popleft()
                    demand = self._demand(task.cells, batched=task.batched)
                    options = {"num_cpus": demand["CPU"], "num_gpus": demand["GPU"]}
                    running[train.options(**options).remote(session, task)] = task
                done, _ = ray.wait(list(running), timeout=SECONDS_BETWEEN_POLLS)
                for answer in done:
                    task = running.pop(answer)
                    session.forget(task.name)
                    try:
                        work.record(task, ray.get(answer))
                    except ray.exceptions.RayTaskError as error:
                        if not session.is_over():  # else it was stopped before it began
                            failure = failure or _failure(error)
                    except ray.exceptions.RayError as error:
                        deaths[task.name] += 1
                        if deaths[task.name] == MOST_DEATHS:
                            work.record(task, [_killed(error)] * len(task.cells))
                        elif not stopped:
                            waiting.appendleft(task)
                            work.say(f"{task.name}: {_summary(error)}; it is run again")
                progress.show(running.values())
                if failure or work.stop() or session.is_over():
                    session.stop()
                    waiting.clear()
                    begun = session.begun()
                    running = {a: task for a, task in running.items() if task.name in begun}
                    stopped = True
        finally:
            session.close()
        if failure is not None:
            raise failure
        return not stopped


class _Progress:
    """Shows the updates of the running tasks, and warns of locks that do not hold."""

    def __init__(self, work: Work, session: remote.Session) -> None:
        self.work, self.session = work, session
        self.updates: dict[str, int] = {}
        self.next, self.warned = 0.0, False

    def show(self, running: Iterable[Task]) -> None:
        """Read the files of the running tasks, if it is time."""
        if time.monotonic() < self.next:
            return
        begun = self.session.begun()
        for task in running:
            if task.name in begun:
                self.updates |= self.session.updates(task.name)
        self.work.progress(self.updates)
        host = self.session.unlocked()
        if host is not None and not self.warned:
            self.warned = True
            self.work.say(
                f"warning: locks in {self.session.directory} do not hold on node {host}: make sure "
                "that no other process works there (docs/cluster.md)"
            )
        self.next = time.monotonic() + remote.SECONDS_BETWEEN_UPDATES


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what Ray's C++ prints meanwhile; errors are exceptions."""
    sys.stderr.flush()
    before = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _probe(address: str) -> None:
    """Check that something listens at HOST:PORT.

    Raises:
        InputError: the address has another form.
        OSError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536 or not host or "/" in host:
        raise InputError(f"--address: {address!r} is neither auto nor HOST:PORT")
    try:
        wait_for(
            lambda: socket.create_connection((host, int(port)), PROBE_SECONDS).close(),
            PROBE_SECONDS,
        )
    except OSError as error:
        raise OSError(f"cannot be reached: {error.strerror or error}") from None


def _room(demand: Mapping[str, float]) -> int:
    """How many tasks the nodes of the cluster have room for."""
    import ray

    return sum(
        min(int(node["Resources"].get(name, 0) / n + 1e-9) for name, n in demand.items() if n)
        for node in ray.nodes()
        if node["Alive"]
    )


def _failure(error: Any) -> InputError:
    """What keeps a node from running tasks, from a `RayTaskError`.

    Raises:
        RayTaskError: it is something else.
    """
    import ray

    if isinstance(error.cause, InputError):
        return error.cause
    if isinstance(error.cause, ray.exceptions.RaySystemError):  # the node cannot read the task
        address = re.search(r"ip=([^,)]+)", str(error))
        reason = str(error).strip().rpartition("\n")[2]
        return InputError(
            f"node {address[1] if address else '?'}: {reason}; every node needs the same steadygpt"
        )
    raise error


def _killed(error: Exception) -> CellError:
    import ray

    out_of_memory = isinstance(error, ray.exceptions.OutOfMemoryError)
    status: Literal["killed", "out of memory"] = "out of memory" if out_of_memory else "killed"
    return CellError(status, f"died {MOST_DEATHS} times: {_summary(error)}")


def _summary(error: Exception) -> str:
    """The first sentence of one of Ray's messages."""
    return re.split(r"\.\s|\.?$|\n", str(error), maxsplit=1)[0]

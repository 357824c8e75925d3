"""The processes of one run: how they find each other, agree, exchange messages, and fail.

torchrun, or gpt/cli/launch.py, sets RANK, WORLD_SIZE and the other variables of
torch.distributed's "env://" in the environment of each process.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
    rendezvous,
)

from gpt.config import Config
from gpt.errors import InputError, LostProcessError, StoppedError, option
from gpt.hardware.processes import check_processes, cores, is_launched, launched, restarts

MESSAGE = 1024  # bytes of a message
STOP_POLL = 0.2  # seconds between checks whether another process was asked to stop
PATIENCE = 2.0  # seconds to wait for another process to note that it failed
# Seconds in which gloo's thread releases the tensors of the last operation. It needs the GIL
# for that: if a DDP module ended the group meanwhile, both would wait for each other; if the
# process exited, the thread would crash.
RELEASE = 0.2
CODE = Path(__file__).parents[1]  # the package
_runs = itertools.count()  # of this process


class Group:
    """A process and the others of its run, if there are any. Rank 0 leads.

    Attributes:
        rank, size: the number of this process, and how many there are.
        device: where this process computes.
        threads: of this process, if it had the machine to itself.
    """

    def __init__(self, device: torch.device, rank: int, size: int, store: Store) -> None:
        self.device, self.rank, self.size, self.store = device, rank, size, store
        given = "OMP_NUM_THREADS" in os.environ  # by torchrun, for one of several processes
        self.threads = cores() if given and size > 1 else torch.get_num_threads()
        self._looked, self._stop, self._started = 0.0, False, False

    @property
    def leads(self) -> bool:
        """Whether this process leads the others."""
        return self.rank == 0

    # -- Messages --------------------------------------------------------------------------------

    def send(self, *message: Any) -> None:
        """Send all others a message of rank 0: a name and arguments, at most MESSAGE bytes."""
        text = json.dumps(message).encode()
        assert len(text) <= MESSAGE, f"a message of {len(text)} bytes"
        dist.broadcast(torch.frombuffer(bytearray(text.ljust(MESSAGE)), dtype=torch.uint8), 0)

    def receive(self) -> list[Any]:
        """The next message of rank 0."""
        buffer = torch.empty(MESSAGE, dtype=torch.uint8)
        dist.broadcast(buffer, 0)
        message: list[Any] = json.loads(bytes(buffer.numpy()))
        return message

    def scatter(self, whole: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """The share of this process in a tensor of integers, whose first dimension is divided.

        Args:
            whole: on rank 0, on the CPU, with `size` times the rows of a share; None elsewhere.
            shape: of a share.
        """
        share = torch.empty(shape, dtype=torch.int64)
        parts = None if whole is None else [p.contiguous() for p in whole.chunk(self.size)]
        dist.scatter(share, parts, 0)
        return share

    def smallest(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    # -- Waiting and stopping --------------------------------------------------------------------

    def start(self, vocab_size: int) -> None:
        """On rank 0: the data is prepared, so the others can begin to follow."""
        self._started = True
        self.store.set("ready", "1")
        self.send("vocabulary", vocab_size)

    def is_ready(self) -> bool:
        """Whether rank 0 has started, which may take hours, as it prepares the data."""
        return self.store.check(["ready"])

    def publish(self, result: str) -> None:
        """On rank 0: end the run, with its result for the others."""
        self.store.set("result", result)
        self.release()

    def release(self) -> None:
        """On rank 0: let the others stop following."""
        if self._started:
            self._started = False
            self.send("end")

    def result(self) -> str:
        """What rank 0 published."""
        return str(self.store.get("result").decode())

    def ask_to_stop(self) -> None:
        """Ask rank 0 to end the run, because this process was asked to stop."""
        self.store.set("stop", "1")

    def any_asked(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """A function that returns whether this process, by `stop`, or another was asked to stop.

        It looks for requests to the others at most every STOP_POLL seconds.
        """
        if self.size == 1:
            return stop

        def asked() -> bool:
            now = time.monotonic()
            if not self._stop and now > self._looked + STOP_POLL:
                self._looked, self._stop = now, self.store.check(["stop"])
            return self._stop or stop()

        return asked

    # -- Failing ---------------------------------------------------------------------------------

    def fail(self, code: int) -> None:
        """Note that this process fails, unless another one has failed before.

        Raises:
            SystemExit: another one has, and has said why; with its exit code.
        """
        mine = f"{self.rank} {code}"
        with contextlib.suppress(dist.DistError):  # the launcher, which keeps the store, is gone
            first = self.store.compare_set("failure", "", mine).decode()
            if first != mine:
                raise SystemExit(int(first.split()[1]))

    def lost(self, error: Exception) -> NoReturn:
        """End this process, which another one has left waiting.

        Raises:
            SystemExit: that one has said why; with its exit code.
            LostProcessError: it was killed, or does not respond.
        """
        with contextlib.suppress(dist.DistError):
            self.wait_for("failure", PATIENCE)
        self.fail(1)
        slow = "timed out" in str(error).lower()
        why = f"within {option('training.process_timeout')}" if slow else "any more"
        raise LostProcessError(f"another process of the run does not respond {why}") from None

    def wait_for(self, key: str, seconds: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Whether `key` is in the store within some seconds, and before `stop()`.

        Raises:
            SystemExit: another process has failed, and has said why.
        """
        end = time.monotonic() + seconds
        while not self.store.check([key]):
            if self.store.check(["failure"]):
                self.fail(1)
            if time.monotonic() > end or stop():
                return False
            time.sleep(0.05)
        return True


@contextlib.contextmanager
def joined(config: Config, device: torch.device, stop: Callable[[], bool]) -> Iterator[Group]:
    """The group of the processes that train `config` together; perhaps of this one alone.

    An error of one process, here or within the context, ends all, and is shown once, with its rank.

    Args:
        stop: whether this process was asked to stop.

    Raises:
        InputError: the processes cannot share the batch, or have other configs or other code.
        LostProcessError: another process was killed, or does not respond.
        SystemExit: another process has failed, and has said why.
    """
    size = launched()
    if size == 1:
        if config.training.processes not in (1, "auto") and not is_launched():
            raise InputError(
                f"{option('training.processes')}: {config.training.processes}, but this is one "
                "process; start them with train.py or torchrun, not from Python"
            )
        yield Group(device, 0, 1, HashStore())
        return
    with connected(config, device, stop) as group:
        yield group


@contextlib.contextmanager
def connected(
    config: Config, device: torch.device, stop: Callable[[], bool] = lambda: False
) -> Iterator[Group]:
    """The group of the processes that a launcher has started, even if it is a single one.

    Raises:
        InputError, LostProcessError, SystemExit: see `joined`.
    """
    timeout = datetime.timedelta(seconds=config.training.process_timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        raise LostProcessError(str(error).partition("\n")[0]) from None
    except ValueError as error:  # a variable is missing
        raise InputError(f"WORLD_SIZE is set, but {error}") from None
    # The launcher's own store outlives a restart, and with it the addresses of the old group. A
    # store of rank 0 does not, and machines may have counted different numbers of restarts.
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = restarts() if of_launcher else 0
    store = PrefixStore(f"attempt {attempt}, run {next(_runs)}", store)
    gpu = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        device = torch.device("cuda", gpu)
    group = Group(device, rank, size, store)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", size))  # this machine's cores
        torch.set_num_threads(max(1, cores() // sharing))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _failing_together(group):
        if device.type == "cuda":
            if gpu >= torch.cuda.device_count():
                raise InputError(f"there is no GPU for process {gpu} of this machine; start fewer")
            torch.cuda.set_device(device)
        _agree(group, config, stop)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            yield group
        finally:
            time.sleep(RELEASE)
            dist.destroy_process_group()


def _agree(group: Group, config: Config, stop: Callable[[], bool]) -> None:
    """Check that all processes are there, and can train one config with one version of the program.

    Raises:
        InputError: on rank 0, if they cannot.
        LostProcessError: one is missing after `training.process_timeout`, or at a stop.
        SystemExit: another process has failed, and has said why.
    """
    mine = {"config": config.to_yaml(), "code": _code_digest()}
    group.store.set(f"identity {group.rank}", json.dumps(mine))
    if group.leads:
        check_processes(config, group.size)
    timeout = config.training.process_timeout
    for rank in range(1, group.size) if group.leads else (0,):
        key = f"identity {rank}" if group.leads else "agreed"
        if not group.wait_for(key, timeout, stop):
            if stop():
                raise StoppedError("stopped; the same command starts again")
            raise LostProcessError(f"the process of rank {rank} has not started")
        if not group.leads:
            return
        other = json.loads(group.store.get(key))
        different = [what for what, value in mine.items() if other[what] != value]
        if different:
            raise InputError(
                f"the {different[0]} of the process of rank {rank} differs from rank 0's; "
                "start all with the same command, on the same version of steadygpt"
            )
    group.store.set("agreed", "yes")


def _code_digest() -> str:
    """SHA-256 of the package's source."""
    digest = hashlib.sha256()
    for path in sorted(CODE.rglob("*.py")):
        digest.update(path.relative_to(CODE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _failing_together(group: Group) -> Iterator[None]:
    """A context in which an error of one process ends all; see `joined`."""
    try:
        yield
    except InputError as error:
        group.fail(2)
        if not group.leads:
            error.args = (f"rank {group.rank}: {error}",)
        raise
    except StoppedError:
        group.fail(75)
        raise
    except Exception as error:
        if _is_of_another(error):
            group.lost(error)
        group.fail(1)
        raise


def _is_of_another(error: Exception) -> bool:
    """Whether a collective operation failed because of another process."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)  # the file that raised it
    )

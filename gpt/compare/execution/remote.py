"""A task on another machine: its checks, its progress, and when to stop.

Machines share a file system but no memory, so a comparison and its tasks talk through files:

    DIR/cluster/token         a random number: tasks train while the file contains theirs
    DIR/cluster/updates/CELL  how many updates the cells of a task have made, as JSON by cell; the
                              file is named after the first one, and rewritten every few seconds
    DIR/cluster/ended/CELL    how a task ended, if the engine does not say (slurm.py)
    DIR/cluster/unlocked      the name of a machine on which the comparison's lock does not hold

To stop its tasks, a comparison deletes the token; each task saves its cells after the update in
progress. The token also shows each machine whether it sees the directory of the comparison, or only
one of the same name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter

import gpt
from gpt.compare.execution.cell_runs import CellError, cell_directory
from gpt.compare.execution.tasks import Task
from gpt.compare.execution.worker import train_task
from gpt.errors import InputError
from gpt.io.files import is_locked, write_text
from gpt.run.directory import command_line

FOLDER = "cluster"  # in the directory of a comparison
ENDED = "ended"  # in it
SECONDS_BETWEEN_CHECKS = 0.2  # of the token, by a task
SECONDS_BETWEEN_UPDATES = 2.0  # of the file in which a task counts its updates
LOCK_WAIT = 180.0  # seconds in which a file server notices that the machine of a lock has died
_UPDATES = TypeAdapter(dict[str, int])


@dataclass(frozen=True)
class Session:
    """What another machine needs to know to train tasks of a comparison.

    Attributes:
        directory: of the comparison; absolute.
        working: the working directory, to which relative paths in configs refer.
        token: contents of DIR/cluster/token.
        code: the versions that train, by package.
        argv: the command line, for environment.json.
        keep_checkpoints: see `train_task`.
        threads: for each task.
        attended: whether the process that holds the lock of the comparison lives for as long as
            tasks run. Then they test the lock, and stop once the token is gone.
    """

    directory: Path
    working: Path
    token: str
    code: dict[str, str]
    argv: list[str]
    keep_checkpoints: bool
    threads: int
    attended: bool

    @property
    def folder(self) -> Path:
        """Where the files are that the machines share."""
        return self.directory / FOLDER

    def train(self, task: Task, stop: Callable[[], bool] = lambda: False) -> list[CellError | None]:
        """Train a task's cells on this machine; see `train_task`.

        Args:
            stop: a further reason to stop.

        Raises:
            InputError: this machine does not see the files, or has other code; names the machine.
        """
        self._check()
        os.chdir(self.working)
        sys.argv = self.argv
        torch.set_num_threads(self.threads)
        is_over = _Throttled(self.is_over)

        def stopping() -> bool:
            return stop() or (self.attended and is_over())

        counter = _Counter(self.folder / "updates", [cell.id for cell in task.cells])
        _wait_for_locks([cell_directory(self.directory, cell) for cell in task.cells], stopping)
        return train_task(
            task,
            self.directory,
            keep_checkpoints=self.keep_checkpoints,
            save_checkpoints=True,  # a machine may be taken away at any time
            stop=stopping,
            on_update=counter,
        )

    def _check(self) -> None:
        host = socket.gethostname()
        for path in (self.directory, self.working):
            if not path.is_dir():
                raise InputError(
                    f"node {host} cannot see {path}; every node needs it under this path"
                )
        if self.is_over():  # if it has only been stopped, nobody reads this
            raise InputError(
                f"node {host} has another directory at {self.directory}; every node needs the same "
                "one, on a shared file system"
            )
        for package, version in versions().items():
            if version != self.code[package]:
                raise InputError(
                    f"node {host} has {package} {version}, but the comparison was started with "
                    f"{self.code[package]}; install the same on every node"
                )
        if self.attended and not is_locked(self.directory):
            (self.folder / "unlocked").write_text(host)

    def is_over(self) -> bool:
        """Whether the token was deleted or replaced, at which tasks stop."""
        try:
            return (self.folder / "token").read_text() != self.token
        except FileNotFoundError:
            return True
        except OSError:  # the file server is away for a moment
            return False

    def stop(self) -> None:
        """Ask all tasks to save their cells and end."""
        (self.folder / "token").unlink(missing_ok=True)

    def close(self) -> None:
        """Ask all tasks to stop, and delete the files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def begun(self) -> set[str]:
        """The names of the tasks that have begun to train; see `names`."""
        return names(self.folder / "updates")

    def updates(self, name: str) -> dict[str, int]:
        """How many updates the cells of a task have made, by their ids."""
        try:
            return _UPDATES.validate_json((self.folder / "updates" / name).read_bytes())
        except (OSError, ValueError):  # missing, or half-written
            return {}

    def forget(self, name: str) -> None:
        """Delete the number of updates of a task that has ended or died."""
        (self.folder / "updates" / name).unlink(missing_ok=True)

    def unlocked(self) -> str | None:
        """The name of a machine on which the lock of the comparison does not hold, if any."""
        path = self.folder / "unlocked"
        return (path.read_text() or None) if path.is_file() else None  # half-written


def begin(directory: Path, *, keep_checkpoints: bool, threads: int, attended: bool) -> Session:
    """Write the files of a session whose tasks will run on other machines.

    Args:
        attended: see `Session`; if not, a token that is there is kept, as tasks may be running.
    """
    folder = directory.absolute() / FOLDER
    if attended:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("updates", ENDED):
        (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / "token"
    if attended or not path.is_file():
        write_text(path, secrets.token_hex(16))
    return Session(
        folder.parent,
        Path.cwd(),
        path.read_text(),
        versions(),
        command_line(),
        keep_checkpoints,
        threads,
        attended,
    )


def names(folder: Path) -> set[str]:
    """The names of the files in a folder.

    A network file system remembers for up to a minute that a file was absent, but looks again when
    its folder is listed.
    """
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what trains; that of this package contains a hash of its files."""
    package = Path(gpt.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return {
        "steadygpt": f"{gpt.__version__} ({digest.hexdigest()[:8]})",
        "torch": torch.__version__,
    }


def _wait_for_locks(paths: Sequence[Path], stop: Callable[[], bool]) -> None:
    """Wait for locks that a dead machine has left; a file server may take minutes to notice."""
    end = time.monotonic() + LOCK_WAIT
    while any(is_locked(path) for path in paths) and time.monotonic() < end and not stop():
        time.sleep(1.0)


class _Throttled:
    """Calls a function at most once per SECONDS_BETWEEN_CHECKS, and remembers that it was true."""

    def __init__(self, function: Callable[[], bool]) -> None:
        self.function, self.answer, self.next = function, False, 0.0

    def __call__(self) -> bool:
        if not self.answer and time.monotonic() >= self.next:
            self.answer = self.function()
            self.next = time.monotonic() + SECONDS_BETWEEN_CHECKS
        return self.answer


class _Counter:
    """Counts updates in a file; call it with the index of the cell that has made one."""

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        self.path, self.ids = folder / ids[0], ids
        self.updates = Counter(dict.fromkeys(ids, 0))
        self.write()

    def __call__(self, index: int) -> None:
        self.updates[self.ids[index]] += 1
        if time.monotonic() >= self.next:
            self.write()

    def write(self) -> None:
        """Write the file; a reader may find it half-written, and training does not need it."""
        with contextlib.suppress(OSError):
            self.path.write_text(json.dumps(self.updates))
        self.next = time.monotonic() + SECONDS_BETWEEN_UPDATES

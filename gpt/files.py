"""Files written whole or not at all, flushed to disk, and told apart by size and SHA-256.

Checkpoints, run directories and prepared data all stand on these few functions. What a user or a
stranger left on disk is opened by `open_regular` and, where it should be small, read by
`read_small`, so that a named pipe cannot block the program and a device cannot fill its memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from gpt.errors import InputError
from gpt.wait import PATIENCE, wait_for

SMALL = 2**26  # bytes that a file may have which is read whole, unless its reader says otherwise
LOCK = ".lock"  # in a directory that one process at a time works in
WRITING = ".writing-"  # how the names of files and folders begin that are not whole yet


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, links followed; never wait for a writer to a named pipe.

    Raises:
        InputError: there is something else, such as a device, a named pipe or a folder.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | NON_BLOCKING)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise InputError(f"{path}: is {kind}, not a regular file")
    return open(handle, "rb")


NON_BLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # neither is everywhere


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
        InputError: it is larger, not a regular file, or its file system does not answer within
            `PATIENCE` seconds.
        OSError: it cannot be opened or read.
    """

    def read() -> bytes:
        with open_regular(path) as file:
            return file.read(limit + 1)

    try:
        contents = wait_for(read, PATIENCE)
    except TimeoutError:
        raise InputError(f"{path}: could not be read within {PATIENCE:g} s") from None
    if len(contents) > limit:
        raise InputError(f"{path}: is larger than {limit:,} bytes")
    return contents


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f"{WRITING}{path.name}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with this number
        with temporary.open("xb") as file:
            file.write(contents)
        flush(temporary)
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names none
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def describe(path: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def flush(path: Path) -> None:
    """Flush a file or folder to disk (folders cannot be opened on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_one(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the file `lock`, which is there only meanwhile or after a kill, and then held by none.

    Raises:
        InputError: another process holds it; with the text `refusal`.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
        mine = lock.stat()
    except Timeout:
        raise InputError(refusal) from None
    except OSError as error:
        raise InputError(f"{lock}: cannot be held: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the directory was moved or deleted meanwhile
            if os.path.samestat(mine, lock.stat()):
                lock.unlink()
        held.release()


@contextlib.contextmanager
def only_one_in(directory: Path, refusal: str) -> Iterator[None]:
    """Hold a directory, which is made if need be, and is gone again if nothing came into it.

    Raises:
        InputError: another process holds it (with the text `refusal`), or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot be made: {error.strerror}") from None
    try:
        with only_one(directory / LOCK, refusal):
            yield
    finally:
        with contextlib.suppress(OSError):  # something is in it, or it is gone
            directory.rmdir()


def is_scrap(path: Path) -> bool:
    """Whether a name in a directory is that of its lock, or of what a kill left half written."""
    return path.name == LOCK or path.name.startswith(WRITING)


def stays_inside(directory: Path) -> None:
    """Nothing in a directory is a link to outside it, so that what is written there stays there.

    Raises:
        InputError: naming the link.
    """
    inside = directory.resolve()
    for path in directory.rglob("*"):
        if path.is_symlink():
            try:
                stays = path.resolve(strict=True).is_relative_to(inside)
            except (OSError, RuntimeError):  # it leads nowhere, or to itself
                stays = False
            if not stays:
                raise InputError(f"{path}: is a link that leads out of {directory}")


def sweep(folder: Path) -> None:
    """Delete what a process that was killed while writing left half done in `folder`."""
    for path in folder.glob(f"{WRITING}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

"""Reading and writing files safely: atomic writes, locks, checksums, and regular files only.

Checkpoints, run directories and prepared data all rest on these few functions. Files from users and
other untrusted sources are opened with `open_regular` and, if they should be small, read with
`read_small` or `read_json`, so that a named pipe cannot block the program and a device cannot fill
its memory. Nothing is written or deleted through a link: `lock_directory` rejects a directory that
contains a symbolic link, and files are replaced, or copied before being changed in place, so that
other hard links to them keep their contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter

from gpt.errors import InputError
from gpt.io.wait import TIMEOUT, wait_for

T = TypeVar("T")
# Numbers in JSON files, within ranges that any program can read.
Natural = Annotated[int, Field(ge=0, le=2**53)]
Time = Annotated[float, Field(ge=0, le=1e100)]
Loss = Annotated[float, Field(ge=-1e100, le=1e100)] | None

SMALL = 2**26  # default size limit, in bytes, of a file that is read at once
LOCK = ".lock"  # in a directory in which one process at a time may work
PARTIAL_PREFIX = ".writing-"  # of the names of incomplete files and folders


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, following links, without blocking on a named pipe.

    Raises:
        InputError: it is something else, such as a device, a named pipe or a folder.
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


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into an `InputError`: `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


NON_BLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # absent on some platforms


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
        InputError: it is larger, not a regular file, or its file system does not respond within
            `TIMEOUT` seconds.
        OSError: it cannot be opened or read.
    """

    def read() -> bytes:
        with open_regular(path) as file:
            return file.read(limit + 1)

    try:
        contents = wait_for(read, TIMEOUT)
    except TimeoutError:
        raise InputError(f"{path}: could not be read within {TIMEOUT:g} s") from None
    if len(contents) > limit:
        raise InputError(f"{path}: is larger than {limit:,} bytes")
    return contents


def read_json(path: Path, kind: type[T], advice: str = "") -> T:
    """The contents of a small JSON file, validated strictly as a `kind` by Pydantic.

    Args:
        advice: what to do if the file is damaged.

    Raises:
        InputError: it cannot be read, or contains something else.
    """
    with reading(path):
        contents = read_small(path)
    try:
        return TypeAdapter(kind).validate_json(contents, strict=True)
    except ValueError:
        raise InputError(f"{path}: is damaged{advice and f'; {advice}'}") from None


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a small file atomically: it is complete, or as it was before."""
    temporary = path.with_name(f"{PARTIAL_PREFIX}{path.name}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process with the same id
        with temporary.open("xb") as file:
            file.write(contents)
        fsync(temporary)
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # the error of a full disk has no file name
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def make_folder(parent: Path, prefix: str) -> Path:
    """Make a folder with a new name and, unlike mkdtemp's, with the mode that the umask gives.

    Raises:
        OSError: it cannot be made.
    """
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def open_for_update(path: Path) -> BinaryIO:
    """Open a file for changes in place, creating it if needed; hard links keep the old contents.

    Raises:
        InputError: it is a symbolic link, or not a regular file.
        OSError: it cannot be opened, or the disk has no room for a copy.
    """
    refuse_link(path)
    if not path.exists():
        path.open("xb").close()
    with open_regular(path) as shared:
        if os.fstat(shared.fileno()).st_nlink > 1:  # there are other hard links to it
            copy = path.with_name(f"{PARTIAL_PREFIX}{path.name}")
            copy.unlink(missing_ok=True)
            with copy.open("xb") as own:
                shutil.copyfileobj(shared, own)
            copy.replace(path)
    return path.open("r+b")


def size_and_hash(path: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    with open_regular(path) as file:
        return {
            "size": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def fsync(path: Path) -> None:
    """Flush a file or folder to disk (Windows cannot open folders)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def lock_file(lock: Path, refusal: str, wait: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock. The file is removed on exit; a killed process leaves it unlocked.

    The file names its process and machine. On a network file system, the lock of a machine that has
    died may be held for minutes; or locks may not hold between machines at all.

    Args:
        wait: seconds to wait for another process that holds it.

    Raises:
        InputError: another process holds the lock (with the text `refusal`), or the file cannot be
            created.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=wait)
        mine = lock.stat()
    except Timeout:
        raise InputError(refusal + _other_machine(lock)) from None
    except OSError as error:
        raise InputError(f"{lock}: cannot be locked: {error.strerror}") from None
    if mine.st_nlink == 1:  # not also another file, by a hard link
        with contextlib.suppress(OSError):  # Windows lets nobody write it
            lock.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")  # as filelock's soft locks
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the directory was moved or deleted meanwhile
            if os.path.samestat(mine, lock.stat()):
                lock.unlink()
        held.release()


def _other_machine(lock: Path) -> str:
    """` (process 123 on node7)`, if another machine holds a lock."""
    try:
        pid, host = read_small(lock, 1000).decode().split()[:2]
    except (OSError, ValueError):  # empty, of an older version, or unreadable on Windows
        return ""
    return "" if host == socket.gethostname() else f" (process {pid} on {host})"


@contextlib.contextmanager
def lock_directory(directory: Path, refusal: str) -> Iterator[None]:
    """Hold an exclusive lock on a directory; it is created if needed, and removed if left empty.

    Raises:
        InputError: another process holds it (with the text `refusal`), it contains a symbolic link,
            or it cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot be created: {error.strerror}") from None
    try:
        refuse_links(directory)
        with lock_file(directory / LOCK, refusal):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or already deleted
            directory.rmdir()


def is_locked(directory: Path) -> bool:
    """Whether a process holds the lock of a directory.

    A lock left by a killed process is acquired for an instant to find that out. One that this user
    may not open counts as held.
    """
    lock = directory / LOCK
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def is_partial(path: Path) -> bool:
    """Whether a file or folder is a lock, or was left incomplete by a killed process."""
    return path.name == LOCK or path.name.startswith(PARTIAL_PREFIX)


def refuse_link(path: Path) -> None:
    """Reject a symbolic link where the program writes or deletes.

    Raises:
        InputError: `path` is one.
    """
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link; nothing is written or deleted through links")


def refuse_links(directory: Path) -> None:
    """Reject symbolic links below a directory, so that nothing outside it is written or deleted.

    The directory itself may be a link, and so may its parents.

    Raises:
        InputError: names the first link found.
        OSError: a folder cannot be read.
    """
    folders = [os.fspath(directory)]
    while folders:
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile by another run
            for entry in os.scandir(folders.pop()):
                if entry.is_symlink():
                    raise InputError(
                        f"{entry.path}: is a symbolic link, but files in {directory} are written "
                        "and deleted;\nreplace the link with its target (only the directory itself "
                        "may be a link)"
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def remove_partial(folder: Path) -> None:
    """Delete the incomplete files and folders that a killed process left in `folder`."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

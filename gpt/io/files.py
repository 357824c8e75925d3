"""Files written whole or not at all, flushed to disk, and told apart by size and SHA-256.

Checkpoints, run directories and prepared data all stand on these few functions. What a user or a
stranger left on disk is opened by `open_regular` and, where it should be small, read by
`read_small` or `read_json`, so that a named pipe cannot block the program and a device cannot fill
its memory. Nothing is written or deleted through a link: `only_one_in` refuses a directory that
holds a symbolic one, and files are replaced, or copied before they are changed in place, so that
whatever else has a hard link to them keeps what it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from gpt.errors import InputError
from gpt.io.wait import PATIENCE, wait_for

T = TypeVar("T")

SMALL = 2**26  # bytes that a file may have which is read whole, unless its reader says otherwise
LOCK = ".lock"  # in a directory that one process at a time works in
WRITING = ".writing-"  # how the names of files and folders begin that are not whole yet


def open_regular(path: Path) -> BufferedReader:
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


def read_json(path: Path, kind: type[T], advice: str = "") -> T:
    """What a small JSON file holds, checked to be a `kind`, as Pydantic does strictly.

    Args:
        advice: what helps if it is damaged.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_json(read_small(path), strict=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{path}: is damaged{advice and f'; {advice}'}") from None


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


def open_own(path: Path) -> BinaryIO:
    """Open a file for changes in place, and make it if need be; what links to it stays as it is.

    Raises:
        InputError: it is a symbolic link, or not a regular file.
        OSError: it cannot be opened, or the disk has no room for a copy.
    """
    refuse_link(path)
    if not path.exists():
        path.open("xb").close()
    with open_regular(path) as shared:
        if os.fstat(shared.fileno()).st_nlink > 1:  # hard links from elsewhere
            copy = path.with_name(f"{WRITING}{path.name}")
            copy.unlink(missing_ok=True)
            with copy.open("xb") as own:
                shutil.copyfileobj(shared, own)
            copy.replace(path)
    return path.open("r+b")


def describe(path: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    with open_regular(path) as file:
        return {
            "size": os.fstat(file.fileno()).st_size,
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
        InputError: another process holds it (with the text `refusal`), it holds a symbolic link, or
            it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot be made: {error.strerror}") from None
    try:
        refuse_links(directory)
        with only_one(directory / LOCK, refusal):
            yield
    finally:
        with contextlib.suppress(OSError):  # something is in it, or it is gone
            directory.rmdir()


def is_scrap(path: Path) -> bool:
    """Whether a name in a directory is that of its lock, or of what a kill left half written."""
    return path.name == LOCK or path.name.startswith(WRITING)


def refuse_link(path: Path) -> None:
    """Refuse a symbolic link where the program writes or deletes.

    Raises:
        InputError: `path` is one.
    """
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link, and nothing is written or deleted there")


def refuse_links(directory: Path) -> None:
    """Refuse symbolic links below a directory, so that what is written or deleted there is its own.

    The directory itself may be one, and so may the folders that it lies in.

    Raises:
        InputError: there is a link; it is named.
        OSError: a folder cannot be read.
    """
    folders = [os.fspath(directory)]
    while folders:
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, by a run beside this one
            for entry in os.scandir(folders.pop()):
                if entry.is_symlink():
                    raise InputError(
                        f"{entry.path}: is a symbolic link, and files in {directory} are written "
                        "and deleted;\nreplace it with what it points to (the directory itself may "
                        "be a link)"
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def sweep(folder: Path) -> None:
    """Delete what a process that was killed while writing left half done in `folder`."""
    for path in folder.glob(f"{WRITING}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

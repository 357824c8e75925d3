"""Which files data.path names: files, folders and patterns, with links followed once.

Nothing is dropped silently: what is left out of a folder is counted by reason, for the log.
"""

from __future__ import annotations

import glob
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from gpt.config import SourceConfig
from gpt.errors import InputError, printable
from gpt.io.text import SUFFIXES


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source, in order.

    Attributes:
        files: the files to read; empty for a dataset on the hub.
        folders: device and inode of each folder that was searched.
        left_out: paths in these folders that are not read, by reason.
    """

    files: list[Path]
    folders: set[tuple[int, int]] = field(default_factory=set)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: Path) -> None:
        self.left_out.setdefault(reason, []).append(path)

    def has_searched(self, folder: Path) -> bool:
        status = folder.stat()
        return (status.st_dev, status.st_ino) in self.folders

    def describe_left_out(self) -> str:
        """Such as `hidden: 2 (in/.git, in/.env); unreadable: 1 (in/p)`; empty if there are none."""
        return "; ".join(
            f"{reason}: {len(paths):,} ({', '.join(printable(str(path)) for path in paths[:3])}"
            f"{', ...' if len(paths) > 3 else ''})"
            for reason, paths in ((r, [*dict.fromkeys(p)]) for r, p in self.left_out.items())
        )


SPECIAL = "devices, sockets or named pipes"
BROKEN_LINK = "broken links"
UNREADABLE = "unreadable"


def find_files(config: SourceConfig, *suffixes: str) -> SourceFiles:
    """The files that `path` names; in a folder, all files below it whose names end in `suffixes`.

    A file that is reached by several names, through links, is read once.

    Raises:
        InputError: a path names no file to read.
    """
    found = SourceFiles([])
    for name in config.path:
        path = Path(name)
        kind = _kind(path)
        if kind == "folder":
            files = []
            searched = SourceFiles([], left_out=found.left_out)  # separate, as paths may overlap
            for below in walk(path, searched):
                if not suffixes or below.name.lower().endswith(suffixes):
                    files.append(below)
                else:
                    found.leave_out("other suffixes", below)
            found.folders.update(searched.folders)
        elif kind == "file":
            files = [path]
        else:
            files = [p for p in _matches(name, found) if _is_readable(p, found)]
        if not files:
            raise InputError(f"path: {name}: {_why_empty(path, kind, suffixes, found)}")
        found.files.extend(sorted(files))
    found.files[:] = _unique_files(found)
    return found


def _why_empty(path: Path, kind: str, suffixes: tuple[str, ...], found: SourceFiles) -> str:
    """Why a path names no file to read."""
    left_out = found.describe_left_out()
    if kind == "folder":
        plain = [suffix for suffix in suffixes if not suffix.endswith(SUFFIXES)]
        ending = f" ending in {' or '.join(plain)}" if plain else ""
        return f"contains no files{ending}" + (f"; left out: {left_out}" if left_out else "")
    if kind == SPECIAL:
        return "is a device, socket or named pipe, not a regular file"
    if kind == UNREADABLE:
        return "cannot be read: permission denied"
    if path.is_symlink():
        return "is a broken link"
    detail = f"left out: {left_out}" if left_out else f"working directory: {Path.cwd()}"
    return f"no such file, folder or pattern ({detail})"


def _kind(path: Path) -> str:
    """The kind of a path, links followed: "folder", "file", or why it cannot be read."""
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return UNREADABLE
    except (OSError, ValueError):  # missing, a loop of links, or an invalid name
        return BROKEN_LINK
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return SPECIAL
    return "file" if os.access(path, os.R_OK) else UNREADABLE


def _is_readable(path: Path, found: SourceFiles) -> bool:
    """Whether a path is a readable file; if it is not a folder either, records why."""
    kind = _kind(path)
    if kind not in ("file", "folder"):
        found.leave_out(kind, path)
    return kind == "file"


def walk(folder: Path, found: SourceFiles, *, follow: bool = True) -> Iterator[Path]:
    """The files below a folder, no folder searched twice.

    Args:
        found: where searched folders and paths left out are recorded.
        follow: whether to follow links to folders.
    """
    folders, links = deque([folder]), deque[Path]()
    while folders or links:  # links come last, so that a file is listed under its real path
        folder = (folders or links).popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in found.folders:
                continue
            entries = sorted(folder.iterdir())
        except OSError:
            found.leave_out(UNREADABLE, folder)
            continue
        found.folders.add((status.st_dev, status.st_ino))
        for path in entries:
            if path.name.startswith("."):
                found.leave_out("hidden", path)
            elif _kind(path) != "folder":
                if _is_readable(path, found):
                    yield path
            elif not path.is_symlink():
                folders.append(path)
            elif follow:
                links.append(path)
            else:
                found.leave_out("linked folders", path)


def _matches(pattern: str, found: SourceFiles) -> Iterator[Path]:
    """`glob.glob(pattern, recursive=True)`, but safe where links form a loop.

    Below `**`, no folder is searched twice for the same rest of the pattern.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    at = parts.index("**")
    expects_hidden = any(part.startswith(".") for part in parts[at:])
    folders, links = deque[tuple[Path, tuple[str, ...]]](), deque[tuple[Path, tuple[str, ...]]]()

    def search(path: Path, patterns: tuple[str, ...]) -> None:
        if patterns and path.is_dir():  # links come last: a file is listed under its real path
            (links if path.is_symlink() else folders).append((path, patterns))

    for root in glob.glob(str(Path(*parts[:at]))) if at else ["."]:
        search(Path(root), parts[at:])
    searched = set[tuple[int, int, int]]()
    while folders or links:
        folder, patterns = (folders or links).popleft()
        first, rest = patterns[0], patterns[1:]
        try:
            status = folder.stat()
            state = status.st_dev, status.st_ino, len(patterns)
            if state in searched:
                continue
            entries = sorted(folder.iterdir()) if glob.has_magic(first) else [folder / first]
        except OSError:
            found.leave_out(UNREADABLE, folder)
            continue
        searched.add(state)
        if first == "**" and rest:
            search(folder, rest)
        for path in entries:
            if path.name.startswith(".") and not first.startswith("."):
                if first == "**" and not expects_hidden:
                    found.leave_out("hidden", path)
            elif first == "**" or fnmatch(path.name, first):
                if not rest and os.path.lexists(path):
                    yield path
                search(path, patterns if first == "**" else rest)


def _unique_files(found: SourceFiles) -> list[Path]:
    """Each file once: under the name that contains no link, or else the first."""
    names: dict[tuple[int, int], list[Path]] = {}
    for path in dict.fromkeys(found.files):
        status = path.stat()
        names.setdefault((status.st_dev, status.st_ino), []).append(path)
    files = []
    for paths in names.values():
        own = next((p for p in paths if os.path.realpath(p) == os.path.abspath(p)), paths[0])
        for path in paths:
            if path != own:
                found.leave_out("duplicate links to a file", path)
        files.append(own)
    return files

"""Files that are no longer needed: finding and removing them, for `steadygpt clean`.

Only what this program makes is found, by the names that it gives. Symbolic links are neither
followed nor removed. A run or comparison in which a process works, and data that a process is
preparing, are left alone: each is locked while something that belongs to it is removed. Whatever
the config of a run names, such as the checkpoint in `init_from`, is left alone too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt import checkpoint as store
from gpt import metrics
from gpt.config import read_yaml
from gpt.errors import InputError
from gpt.io.files import PARTIAL_PREFIX, lock_directory, lock_file, read_json
from gpt.run.directory import RunDirectory
from gpt.run.fallback import fallback_parent

RECENT = 3600.0  # seconds; a file that last changed longer ago is not being written anymore
CONFIGS = ("config.yaml", "grid.yaml")  # of a run, and of a comparison
OF_CACHE = ("meta.json", "tokenizer.json", "counts.bin", "val.bin")  # to recognize a cache by


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can go.

    Attributes:
        why: what it is.
        size: bytes, of all its files.
        owner: the directory or, for prepared data, the lock file to lock while it is removed; None
            if no process can be using it.
    """

    path: Path
    why: str
    size: int
    owner: Path | None


def find(folders: Sequence[Path], users: Sequence[Path] = ()) -> tuple[list[Leftover], list[str]]:
    """Everything below some folders that can go, and what was left alone, as sentences.

    Args:
        folders: of runs, comparisons and prepared data.
        users: other folders with runs that may use what is found.

    Raises:
        OSError: a folder cannot be read.
    """
    used: set[str] = set()  # fingerprints of the runs' data
    named: set[Path] = set()
    for folder, owner, _ in _walk([*users, *folders], links=True):
        used |= _fingerprint(folder / "environment.json", "data_fingerprint")
        if folder == owner:
            named |= _named_paths(folder)
    found: list[Leftover] = []
    left: dict[Path, str] = {}
    for folder, owner, entries in _walk(folders):
        fingerprint = _fingerprint(folder / "meta.json", "fingerprint")
        if fingerprint - used and all((folder / name).is_file() for name in OF_CACHE):
            found.append(_unused(folder))
        for path in entries:
            if path.name.startswith(PARTIAL_PREFIX):
                if owner is None and time.time() - _changed(path) < RECENT:
                    left[path] = "has changed within the last hour: a process may be writing it"
                else:
                    found.append(_partial(path, owner))
        found += [_preparation(path) for path in entries if _is_preparation(path)]
        if folder == owner:
            found += _of_run(RunDirectory(folder))
    sentences = [f"left alone: {path}: {why}" for path, why in left.items()]
    busy: set[Path | None] = set()
    for owner in dict.fromkeys(each.owner for each in found):
        try:
            with _locked(owner):
                pass
        except InputError as error:
            busy.add(owner)
            sentences.append(f"left alone: {error}")
    free = {each.path: each for each in found if each.owner not in busy}
    needed = {path for name in named for path in (name, *name.parents)}
    return [each for each in free.values() if each.path.resolve() not in needed], sentences


def remove(leftover: Leftover) -> None:
    """Delete it; after a kill in the middle, the rest is found again.

    Raises:
        InputError: a process uses it.
        OSError: it cannot be deleted.
    """
    path = leftover.path
    with _locked(leftover.owner):
        if not path.name.startswith(PARTIAL_PREFIX):  # never half a checkpoint under its own name
            path = path.rename(path.with_name(f"{PARTIAL_PREFIX}{path.name.lstrip('.')}"))
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _walk(
    folders: Iterable[Path], *, links: bool = False
) -> Iterator[tuple[Path, Path | None, list[Path]]]:
    """Each folder, the run or comparison that it belongs to, and its entries without links.

    Args:
        links: follow those to a run or comparison; one to another folder may lead anywhere.
    """
    waiting: list[tuple[Path, Path | None]] = [(folder, None) for folder in folders]
    seen: set[tuple[int, int]] = set()
    while waiting:
        folder, owner = waiting.pop()
        try:
            info = folder.stat()
            everything = sorted(Path(entry.path) for entry in os.scandir(folder))
        except FileNotFoundError:  # deleted meanwhile
            continue
        entries = [path for path in everything if not path.is_symlink()]
        if (info.st_dev, info.st_ino) in seen:  # given twice, or inside another one
            continue
        seen.add((info.st_dev, info.st_ino))
        if _is_owner(folder):
            owner = folder
        yield folder, owner, entries
        for path in reversed(everything):
            followed = path in entries or (links and _is_owner(path))
            if followed and not path.name.startswith(".") and path.is_dir():
                waiting.append((path, owner))


def _is_owner(folder: Path) -> bool:
    """Whether a folder holds a run or a comparison."""
    return any((folder / name).is_file() for name in CONFIGS)


def _named_paths(folder: Path) -> set[Path]:
    """The paths in the configs of a run or comparison: `init_from`, `data.path` and so on."""
    trees: list[Any] = []
    for name in CONFIGS:
        with contextlib.suppress(InputError):
            trees.append(read_yaml(folder / name))
    return {
        Path(text).resolve() for text in _strings(trees) if "/" in text and os.path.exists(text)
    }


def _strings(tree: Any) -> Iterator[str]:
    """All texts in a tree of dicts and lists."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(each)


def _fingerprint(path: Path, key: str) -> set[str]:
    """The fingerprint of prepared data in a JSON file, if it has one."""
    with contextlib.suppress(InputError):
        value = read_json(path, dict[str, Any]).get(key)
        return {value} if isinstance(value, str) else set()
    return set()


def _partial(path: Path, owner: Path | None) -> Leftover:
    return Leftover(path, "left incomplete by a killed process", _size(path), owner)


def _is_preparation(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".building") and path.is_dir()


def _preparation(path: Path) -> Leftover:
    final = path.with_name(path.name.removeprefix(".").removesuffix(".building"))
    return Leftover(path, "an interrupted preparation", _size(path), _lock_of_cache(final))


def _unused(path: Path) -> Leftover:
    return Leftover(path, "prepared data that no run here uses", _size(path), _lock_of_cache(path))


def _lock_of_cache(folder: Path) -> Path:
    """As in gpt/data/preparation.py."""
    return folder.with_name(f".{folder.name}.lock")


def _of_run(run: RunDirectory) -> list[Leftover]:
    """The checkpoints of a run that nothing needs, and its state saved elsewhere."""
    folder = run.checkpoints
    found = [
        Leftover(path, "a damaged checkpoint that was set aside", _size(path), run.path)
        for path in sorted(folder.glob("damaged-step-*"))
        if path.is_dir() and not path.is_symlink()
    ]
    try:
        config, result = run.read_config(), run.read_result()
    except InputError:  # not a run, or damaged
        return found
    if result is None or result.status == "interrupted":
        return found
    every = config.checkpoint.keep_every
    pointers = {store.read_pointer(folder, name) for name in store.POINTERS} - {None}
    others = [
        Leftover(path, "a checkpoint that is neither latest nor best", _size(path), run.path)
        for step, path in store.steps(folder).items()
        if not (path in pointers or path.is_symlink() or (every and step % every == 0))
    ]
    if others and pointers and all(path and store.is_intact(path) for path in pointers):
        found += others  # otherwise one of them may be the newest intact one
    if result.status == "finished":
        for path in sorted(fallback_parent(config).glob(f"{config.name}-*")):
            spare = RunDirectory(path)
            with contextlib.suppress(InputError, OSError):
                same = spare.config.is_file() and not spare.read_config().differences(config)
                same = same and _first_update(spare) == _first_update(run)
                own = spare.read_result() if same else result
                unfinished = own is None or own.status == "interrupted"
                if unfinished and not path.is_symlink() and not path.samefile(run.path):
                    why = f"saved when {run.path} could not be written; that run has since finished"
                    found.append(Leftover(path, why, _size(path), path))
    return found


def _first_update(run: RunDirectory) -> metrics.Record:
    """What was measured at the first update, including the seconds, which identifies a run."""
    return next((each for each in metrics.read(run.metrics) if "loss" in each), {})


@contextlib.contextmanager
def _locked(owner: Path | None) -> Iterator[None]:
    """Hold the lock of a directory or the lock file of prepared data.

    Raises:
        InputError: a process holds it, or it cannot be locked.
    """
    if owner is None:
        yield
    elif owner.is_dir():
        with lock_directory(owner, f"{owner}: a process is working there"):
            yield
    else:
        with lock_file(owner, f"{owner}: a process is preparing this data"):
            yield


def _changed(path: Path) -> float:
    """When a file, or anything in a folder, was last changed (Unix time)."""
    return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder, without following links."""
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        return info.st_size
    return sum(_size(path / name) for name in os.listdir(path))

"""Checkpoints: all that a run needs to go on, on disk whole or not at all, and verified.

    checkpoints/step-00001000/model.safetensors, optimizer.safetensors, state.json,
                              tokenizer.json, manifest.json
    checkpoints/latest, checkpoints/best      one line each: the name of a checkpoint folder

A checkpoint is written to a temporary folder, every file flushed to disk, its manifest (step, sizes
and SHA-256) last; the folder is flushed, renamed into place, the rename flushed, and only then the
pointer replaced. So a name `step-...` always holds a whole checkpoint, and `load` refuses one that
was altered since. Tensors are safetensors and the rest is JSON: to read a checkpoint runs no code.

`Writer` does so in a thread, from a copy, while training goes on.

`python -m gpt.checkpoint verify DIR` tells of every checkpoint whether it is whole. This module
knows tensors, names and files, not models.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.errors import InputError
from gpt.io.files import WRITING, describe, flush, open_regular, read_small, write_text

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,15})")
POINTER = 2**10  # bytes that `latest` or `best` may have


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        model, optimizer: tensors by name.
        state: everything else, JSON values; `step` is the number of updates made.
        tokenizer: the vocabulary, as `gpt.data.tokenizer.to_json` writes it.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    tokenizer: str

    @property
    def step(self) -> int:
        """Updates made."""
        return int(self.state["step"])

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"step-{self.step:08d}"

    def copy(self) -> Checkpoint:
        """With tensors of its own, on the CPU, that training does not change."""
        model, optimizer = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (self.model, self.optimizer)
        )
        return replace(self, model=model, optimizer=optimizer)


# ---------------------------------------------------------------------------------------------
# Writing


def save(
    folder: Path, checkpoint: Checkpoint, *, best: bool = False, replaces: bool = False
) -> Path:
    """Write `checkpoint` below `folder` (checkpoints/), and point `latest` (and `best`) at it.

    Args:
        replaces: whether a checkpoint of that step, which this one completes, is deleted; otherwise
            what stands there under its name is set aside.

    Raises:
        OSError: it cannot be written; what stood there before is as it was.
    """
    if not folder.is_dir():
        folder.mkdir()
        flush(folder.parent)
    final = folder / checkpoint.name
    temporary = Path(tempfile.mkdtemp(prefix=WRITING, dir=folder))
    try:
        _write(temporary, checkpoint)
        temporary.chmod(0o755)
        if final.exists():
            if replaces:
                _delete(final)
            else:
                set_aside(final)
        temporary.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    point(folder, final.name, best=best)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name, tensors in (("model", checkpoint.model), ("optimizer", checkpoint.optimizer)):
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            save_file(whole, folder / f"{name}.safetensors")
        except SafetensorError as error:  # whose number is only in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(folder / f"{name}.safetensors")) from None
    (folder / "state.json").write_text(json.dumps(checkpoint.state, indent=2) + "\n", "utf-8")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer, "utf-8")
    for name in FILES:
        flush(folder / name)
    files = {name: describe(folder / name) for name in FILES}
    write_text(folder / MANIFEST, _to_text({"step": checkpoint.step, "files": files}))


def _to_text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint another name, so that its step can be saved again."""
    number, aside = 1, folder.with_name(f"damaged-{folder.name}")
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(aside)
    flush(folder.parent)
    return aside


def point(folder: Path, name: str, *, best: bool) -> None:
    """Make `latest` (and `best`) name the checkpoint `name`, where they do not yet."""
    for pointer in ("best", "latest") if best else ("latest",):
        if pointed(folder, pointer) != folder / name:
            write_text(folder / pointer, f"{name}\n")


def prune(folder: Path, kept: Collection[int]) -> None:
    """Delete all checkpoints but those of the steps `kept`, and that `latest` and `best` name."""
    pointers = (pointed(folder, "latest"), pointed(folder, "best"))
    for step, path in steps(folder).items():
        if step not in kept and path not in pointers:
            _delete(path)


def _delete(folder: Path) -> None:
    """Delete a checkpoint, whose name is first given up: `step-...` is never half a checkpoint."""
    doomed = folder.with_name(f"{WRITING}{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


class Writer:
    """A thread that writes, one thing at a time, while training goes on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Call `write` in the thread, once what was started before is done.

        Raises:
            OSError: see `wait`.
        """
        self.wait()
        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Until all that was started is done.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread, once what was started is done."""
        self._pool.shutdown()


# ---------------------------------------------------------------------------------------------
# Reading


class PrunedError(InputError):
    """A checkpoint was deleted or replaced while it was read, as a run does that is still going."""


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within it a checkpoint is read; it counts as damaged only if it is the same one afterwards.

    Raises:
        PrunedError: it is not there any more, or another one is.
        InputError: it is damaged.
    """
    before = _identity(folder)
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError, OSError, MemoryError) as error:
        if before is None or _identity(folder) != before:
            raise PrunedError(f"{folder}: is not there, or was deleted while it was read") from None
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: is damaged: {error}") from None


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        stat = folder.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def load(folder: Path, *, optimizer: bool = True) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Args:
        optimizer: whether the optimizer's tensors are read; sampling does not need them.

    Raises:
        PrunedError: it is deleted or replaced meanwhile.
        InputError: a file is missing, has another size or hash than was written, or is not a valid
            file of its kind.
    """
    with reading(folder):
        _verify(folder, [name for name in FILES if optimizer or name != "optimizer.safetensors"])
        checkpoint = Checkpoint(
            model=_read_tensors(folder / "model.safetensors"),
            optimizer=_read_tensors(folder / "optimizer.safetensors") if optimizer else {},
            state=json.loads(read_small(folder / "state.json")),
            tokenizer=read_small(folder / "tokenizer.json").decode(),
        )
        if not isinstance(checkpoint.state, dict) or checkpoint.state.get("step") != _step(folder):
            raise ValueError("state.json is of another step")
    return checkpoint


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _openable(path) as named:
        return load_file(named)


@contextlib.contextmanager
def _openable(path: Path) -> Iterator[Path]:
    """A name of the file that safetensors can open: it takes valid Unicode alone."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with open_regular(path) as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def verify(folder: Path) -> None:
    """Hold every file of a checkpoint against its manifest.

    Raises:
        PrunedError: it is deleted or replaced meanwhile.
        InputError: naming the first file that differs.
    """
    with reading(folder):
        _verify(folder, FILES)


def _verify(folder: Path, names: Collection[str]) -> None:
    for name in (MANIFEST, *names):
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path}: is damaged: it is no file of its own")
    try:
        files = _read_manifest(folder)
        for name in names:  # what shows at once, before gigabytes are hashed
            path = folder / name
            if path.stat().st_size != files[name]["size"]:
                raise InputError(f"{path}: is damaged: it is not what was written")
            if path.suffix == ".safetensors":
                with _openable(path) as named, safe_open(named, "pt"):  # reads its header
                    pass
            else:
                read_small(path)
        for name in names:
            if files[name] != describe(folder / name):
                raise InputError(f"{folder / name}: is damaged: it is not what was written")
    except SafetensorError as error:
        raise InputError(f"{path}: is damaged: {error}") from None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: is missing, so this is no checkpoint") from None
    except (KeyError, TypeError):
        raise InputError(f"{folder / MANIFEST}: is damaged") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What a manifest says of the files.

    Raises:
        InputError: it is not what `_write` wrote, or of another step.
    """
    text = read_small(folder / MANIFEST)
    try:
        manifest = json.loads(text)
        same = text == _to_text(manifest).encode()
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise InputError(f"{folder / MANIFEST}: is damaged")
    if manifest["step"] != _step(folder):
        raise InputError(f"{folder}: holds the checkpoint of another step")
    files: dict[str, Any] = manifest["files"]
    return files


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint folder is what was written."""
    try:
        verify(folder)
    except InputError:
        return False
    return True


def _step(folder: Path) -> int | None:
    match = STEP_NAME.fullmatch(folder.absolute().name)
    return int(match[1]) if match else None


def newest_whole(
    folder: Path, among: Callable[[int], bool] = lambda step: True
) -> tuple[Checkpoint | None, list[InputError]]:
    """The checkpoint of the highest step that is whole, and why newer ones are not taken.

    Args:
        among: which steps come into question.

    Returns:
        The checkpoint, None if there is none at all; what is wrong with each that was skipped.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    skipped: list[InputError] = []
    for path in (path for step, path in reversed(steps(folder).items()) if among(step)):
        try:
            return load(path), skipped
        except InputError as error:
            skipped.append(error)
    if skipped:
        raise InputError(
            f"{skipped[0]};\nno checkpoint in {folder} is whole (of {len(skipped)}); "
            "choose another --out-dir to start again"
        )
    return None, []


def pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint folder that `latest` or `best` names, or None.

    Raises:
        InputError: the pointer is not a small regular file.
    """
    name, before = "", None
    while name != before:  # what it named may have been pruned since: then it names another now
        try:
            before, name = name, read_small(folder / pointer, POINTER).decode().strip()
        except (OSError, UnicodeDecodeError):
            return None
        if STEP_NAME.fullmatch(name) and (folder / name).is_dir():
            return folder / name
    return None


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints below `folder` by step, oldest first."""
    found = ((_step(path), path) for path in folder.glob("step-*"))
    return dict(sorted((step, path) for step, path in found if step is not None))

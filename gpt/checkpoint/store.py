"""The checkpoints of a run on disk: written atomically, verified when read.

    checkpoints/step-00001000/model.safetensors, optimizer.safetensors, state.json,
                              tokenizer.json, manifest.json
    checkpoints/latest, checkpoints/best      one line each: the name of a checkpoint folder

A checkpoint is written to a temporary folder. Every file is flushed to disk, the manifest (step,
sizes and SHA-256) last; then the folder is flushed and renamed into place, the rename is flushed,
and only then is the pointer replaced. So a folder named `step-...` always holds a complete
checkpoint, and `load` rejects one that has been altered since. Tensors are stored as safetensors
and everything else as JSON: loading an untrusted checkpoint cannot execute code, and unexpected
contents are rejected.

This module knows tensors, names and files, but not models.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.errors import InputError, option
from gpt.io.files import (
    PARTIAL_PREFIX,
    fsync,
    make_folder,
    open_regular,
    read_small,
    size_and_hash,
    write_text,
)

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")
MANIFEST = "manifest.json"
POINTERS = ("latest", "best")
STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,15})")
POINTER_SIZE = 2**10  # maximum bytes of `latest` and `best`
ALTERED = "it has changed since it was written"


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint folder.

    Attributes:
        model, optimizer: tensors by name.
        state: everything else, as JSON values; `step` is the number of updates made.
        tokenizer: the vocabulary, as written by `gpt.data.tokenizer.to_json`.
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
        """Name of its folder."""
        return f"step-{self.step:08d}"

    def copy(self) -> Checkpoint:
        """A copy on the CPU, whose tensors training does not change."""
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
        replaces: whether this checkpoint completes an existing one of the same step, which is then
            deleted; otherwise an existing one is set aside under another name.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it cannot be written; existing checkpoints are unchanged.
    """
    if not folder.is_dir():
        folder.mkdir()
        fsync(folder.parent)
    final = folder / checkpoint.name
    temporary = make_folder(folder, PARTIAL_PREFIX)
    replaced: Path | None = None
    try:
        _write(temporary, checkpoint)
        if final.exists():
            if replaces:
                replaced = _rename_to_partial(final)
            else:
                set_aside(final)
        temporary.rename(final)
        fsync(folder)
    except BaseException:
        if replaced is not None and not final.exists():
            replaced.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    write_pointers(folder, final.name, best=best)
    if replaced is not None:
        shutil.rmtree(replaced)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    (folder / "state.json").write_text(json.dumps(checkpoint.state, indent=2) + "\n", "utf-8")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer, "utf-8")
    for name, tensors in (("model", checkpoint.model), ("optimizer", checkpoint.optimizer)):
        save_tensors(tensors, folder / f"{name}.safetensors")
    for name in FILES:
        fsync(folder / name)
    files = {name: size_and_hash(folder / name) for name in FILES}
    write_text(folder / MANIFEST, manifest_text({"step": checkpoint.step, "files": files}))


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # as the umask says; safetensors makes its files 0600
    try:
        save_file(contiguous, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:  # gives the errno only in its message
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def manifest_text(manifest: dict[str, Any]) -> str:
    """The exact text of a manifest: any other spelling of the same JSON is rejected."""
    return json.dumps(manifest, indent=2) + "\n"


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again; returns the new name."""
    number, aside = 1, folder.with_name(f"damaged-{folder.name}")
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(aside)
    fsync(folder.parent)
    return aside


def write_pointers(folder: Path, name: str, *, best: bool) -> None:
    """Point `latest` (and `best`) at the checkpoint `name`, unless they already point there."""
    for pointer in ("best", "latest") if best else ("latest",):
        if read_pointer(folder, pointer) != folder / name:
            write_text(folder / pointer, f"{name}\n")


def prune(folder: Path, kept: Collection[int]) -> None:
    """Delete all checkpoints except `latest`, `best` and those of the steps in `kept`."""
    pointers = (read_pointer(folder, "latest"), read_pointer(folder, "best"))
    for step, path in steps(folder).items():
        if step not in kept and path not in pointers:
            shutil.rmtree(_rename_to_partial(path))


def _rename_to_partial(folder: Path) -> Path:
    """Rename a checkpoint before it is deleted: a folder `step-...` is never half a checkpoint."""
    partial = folder.with_name(f"{PARTIAL_PREFIX}{folder.name}")
    folder.rename(partial)
    return partial


class BackgroundWriter:
    """A thread that writes one thing at a time while training continues."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Call `write` in the thread, after waiting for the previous call.

        Raises:
            OSError: the previous call failed to write.
        """
        self.wait()
        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until the last call has finished.

        Raises:
            OSError: it failed to write.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Finish the last call and end the thread."""
        self._pool.shutdown()


# ---------------------------------------------------------------------------------------------
# Reading


class PrunedError(InputError):
    """A checkpoint was deleted or replaced while being read, as can happen during training."""


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """A context for reading a checkpoint: distinguishes damage from concurrent deletion.

    Raises:
        PrunedError: the folder is gone or has been replaced by another.
        InputError: the checkpoint is damaged.
    """
    before = _identity(folder)
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError, OSError, MemoryError) as error:
        if before is None or _identity(folder) != before:
            raise PrunedError(
                f"{folder}: does not exist, or was deleted while being read"
            ) from None
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
        optimizer: whether to read the optimizer's tensors, which sampling does not need.

    Raises:
        PrunedError: it was deleted or replaced meanwhile.
        InputError: a file is missing, differs in size or hash from what was written, or is not a
            valid file of its kind.
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
            raise ValueError("state.json belongs to another step")
    return checkpoint


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _openable(path) as name:
        return load_file(name)


@contextlib.contextmanager
def _openable(path: Path) -> Iterator[Path]:
    """A name under which safetensors can open the file: it accepts only valid Unicode."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with open_regular(path) as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        PrunedError: it was deleted or replaced meanwhile.
        InputError: names the first file that differs.
    """
    with reading(folder):
        _verify(folder, FILES)


def _verify(folder: Path, names: Collection[str]) -> None:
    for name in (MANIFEST, *names):
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path}: is damaged: it is not a regular file")
    try:
        files = _read_manifest(folder)
        for name in names:  # quick checks, before gigabytes are hashed
            path = folder / name
            if path.stat().st_size != files[name]["size"]:
                raise InputError(f"{path}: is damaged: {ALTERED}")
            if path.suffix == ".safetensors":
                with _openable(path) as opened, safe_open(opened, "pt"):  # reads its header
                    pass
            else:
                read_small(path)
        for name in names:
            if files[name] != size_and_hash(folder / name):
                raise InputError(f"{folder / name}: is damaged: {ALTERED}")
    except SafetensorError as error:
        raise InputError(f"{path}: is damaged: {error}") from None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: is missing; the checkpoint is incomplete") from None
    except (KeyError, TypeError):
        raise InputError(f"{folder / MANIFEST}: is damaged") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's description of each file.

    Raises:
        InputError: it was not written by `_write`, or belongs to another step.
    """
    text = read_small(folder / MANIFEST)
    try:
        manifest = json.loads(text)
        same = text == manifest_text(manifest).encode()
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise InputError(f"{folder / MANIFEST}: is damaged")
    if manifest["step"] != _step(folder):
        raise InputError(f"{folder}: contains the checkpoint of another step")
    files: dict[str, Any] = manifest["files"]
    return files


def is_intact(folder: Path) -> bool:
    """Whether a checkpoint folder is complete and unaltered."""
    try:
        verify(folder)
    except InputError:
        return False
    return True


def _step(folder: Path) -> int | None:
    match = STEP_NAME.fullmatch(folder.absolute().name)
    return int(match[1]) if match else None


def newest_intact(
    folder: Path, among: Callable[[int], bool] = lambda step: True
) -> tuple[Checkpoint | None, list[InputError]]:
    """The intact checkpoint of the highest step, and why newer ones were skipped.

    Args:
        among: which steps to consider.

    Returns:
        The checkpoint, or None if there is none at all; the error of each one skipped.

    Raises:
        InputError: there are checkpoints, but all are damaged.
    """
    skipped: list[InputError] = []
    for path in (path for step, path in reversed(steps(folder).items()) if among(step)):
        try:
            return load(path), skipped
        except InputError as error:
            skipped.append(error)
    if skipped:
        raise InputError(
            f"{skipped[0]};\nnone of the {len(skipped)} checkpoints in {folder} is intact; "
            f"choose another {option('out_dir')} to start over"
        )
    return None, []


def read_pointer(folder: Path, pointer: str) -> Path | None:
    """The checkpoint folder that `latest` or `best` points to, or None.

    Raises:
        InputError: the pointer is not a small regular file.
    """
    name, before = "", None
    while name != before:  # the checkpoint may just have been pruned: read the new pointer then
        try:
            before, name = name, read_small(folder / pointer, POINTER_SIZE).decode().strip()
        except (OSError, UnicodeDecodeError):
            return None
        if STEP_NAME.fullmatch(name) and (folder / name).is_dir():
            return folder / name
    return None


def named(name: str, folder: Path) -> Path | None:
    """The checkpoint folder that a name means, or None if there is no such checkpoint.

    Args:
        name: the path of a checkpoint folder, or of a file `latest` or `best`; or else `latest`,
            `best` or a step, such as 250 or step-00000250, of a checkpoint in `folder`.
        folder: the checkpoints of a run.
    """
    path = Path(name)
    step = re.fullmatch(r"(?:step-)?0*([0-9]{1,16})", name)
    if os.path.isdir(path):  # false, not an error, for a name that is too long
        return path if _step(path.resolve()) is not None else None  # a link may have any name
    if path.name in POINTERS and os.path.isfile(path):
        return read_pointer(path.parent, path.name)
    if name in POINTERS:
        return read_pointer(folder, name)
    return steps(folder).get(int(step[1])) if step else None


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints below `folder` by step, oldest first."""
    found = ((_step(path), path) for path in folder.glob("step-*"))
    return dict(sorted((step, path) for step, path in found if step is not None))

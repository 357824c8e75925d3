"""Checkpoints: all that a run needs to go on, on disk whole or not at all, and verified.

    checkpoints/step-00001000/model.safetensors, optimizer.safetensors, state.json,
                              tokenizer.json, manifest.json
    checkpoints/latest, checkpoints/best      one line each: the name of a checkpoint folder

A checkpoint is written to a temporary folder, every file flushed to disk, its manifest (sizes and
SHA-256) last; then the folder is renamed into place and the pointer replaced. So a name
`step-...` always holds a whole checkpoint, and `load` refuses one that was altered since. Tensors
are safetensors and the rest is JSON: reading a checkpoint never runs code.

This module knows tensors, names and files, not models.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.errors import InputError
from gpt.files import describe, flush, write_text

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")
STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        model, optimizer: tensors by name.
        state: everything else, JSON values.
        tokenizer: the vocabulary, as `gpt.tokenizer.to_json` writes it.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    tokenizer: str

    @property
    def step(self) -> int:
        """Updates made."""
        return int(self.state["step"])


def save(folder: Path, checkpoint: Checkpoint, *, best: bool = False) -> Path:
    """Write `checkpoint` below `folder` (checkpoints/), and point `latest` (and `best`) at it.

    A checkpoint of that step that stands there already is left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:08d}"
    if not final.exists():
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        try:
            _write(temporary, checkpoint)
            temporary.chmod(0o755)
            temporary.rename(final)
            flush(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    if best:
        point(folder, "best", final.name)
    point(folder, "latest", final.name)  # last: a run that stops before this makes the step again
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name, tensors in (("model", checkpoint.model), ("optimizer", checkpoint.optimizer)):
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(on_cpu, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(checkpoint.state, indent=2) + "\n", "utf-8")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer, "utf-8")
    files = {path.name: describe(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"files": files}, indent=2) + "\n", "utf-8")
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def load(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Raises:
        InputError: a file is missing, has another size or hash than was written, or is no valid
            file of its kind.
    """
    verify(folder)
    try:
        return Checkpoint(
            model=load_file(folder / "model.safetensors"),
            optimizer=load_file(folder / "optimizer.safetensors"),
            state=json.loads((folder / "state.json").read_text("utf-8")),
            tokenizer=(folder / "tokenizer.json").read_text("utf-8"),
        )
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{folder}: is damaged: {error}") from None


def verify(folder: Path) -> None:
    """Hold every file of a checkpoint against its manifest.

    Raises:
        InputError: naming the first file that differs.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        files: dict[str, Any] = manifest["files"]
        for name in FILES:
            if files[name] != describe(folder / name):
                raise InputError(f"{folder / name}: is damaged: it is not what was written")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: is missing, so this is no checkpoint") from None
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / 'manifest.json'}: is damaged") from None


def point(folder: Path, pointer: str, name: str) -> None:
    """Make `pointer` (latest or best) name the checkpoint `name`, atomically."""
    write_text(folder / pointer, name + "\n")


def pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint folder that `latest` or `best` names, or None."""
    try:
        name = (folder / pointer).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / name if STEP_NAME.fullmatch(name) and (folder / name).is_dir() else None


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from: the one that `latest` names, else the highest step, or None."""
    return pointed(folder, "latest") or next(iter(reversed(steps(folder).values())), None)


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints below `folder` by step, oldest first."""
    found = ((STEP_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return {int(match[1]): path for match, path in sorted(found, key=lambda f: f[1]) if match}


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the `keep` newest and those that `latest` and `best` name."""
    newest = list(steps(folder).values())[-keep:]
    kept = [*newest, pointed(folder, "latest"), pointed(folder, "best")]
    for path in steps(folder).values():
        if path not in kept:
            shutil.rmtree(path)

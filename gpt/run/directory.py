"""A run directory: what stands where, whether training may start in it, and reading it back.

    runs/NAME/config.yaml, environment.json, tokenizer.json, metrics.jsonl, history.jsonl,
              result.json, loss.png, samples/, checkpoints/

A directory that holds a run is never overwritten. `open_run` decides, before anything is written,
between a fresh start, going on, and a finished run whose result stands; `load_run` gives sampling
the model and tokenizer of a run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from gpt import __version__
from gpt import checkpoint as checkpoints
from gpt import config as configs
from gpt.checkpoint import Checkpoint, PrunedError
from gpt.config import Config, changed, may_change
from gpt.data import tokenizer
from gpt.data.tokenizer import Encoding
from gpt.diagnostics.failure import Failure
from gpt.errors import InputError
from gpt.hardware.size import check_loading, parameters
from gpt.io.files import SMALL, is_scrap, open_own, read_json, write_text
from gpt.model import GPT
from gpt.run.state import Loss, Natural, Time
from gpt.schedule import rate_change

ATTEMPTS = 100  # to read a checkpoint beside a run that prunes

Status = Literal["finished", "diverged", "interrupted"]


@dataclass(frozen=True)
class RunResult:
    """How a run ended. Losses in nats per token; None where there is none (or it is not finite).

    Attributes:
        status: finished, diverged (a non-finite loss or weight), or interrupted (saved; resumable).
        step: updates made; of a diverged run, the update at which it was seen.
        tokens: training tokens seen.
        train_loss: of the last update.
        val_loss, best_val_loss: of the last evaluation, and the lowest of all.
        val_bits_per_byte: of the last evaluation.
        seconds: wall-clock time of all sessions of the run.
        tokens_per_second: training speed, evaluation and saving left out.
        reason: why it ended, in words.
        directory: the run directory.
        failure: of a diverged run, what happened where.
        skipped_updates: updates lost to a non-finite loss or gradient (training.nonfinite: skip, or
            an overflow of fp16).
        rollbacks: times that the run went back to a checkpoint (training.nonfinite: rollback).
    """

    status: Status
    step: Natural
    tokens: Natural
    train_loss: Loss
    val_loss: Loss
    best_val_loss: Loss
    val_bits_per_byte: Loss
    seconds: Time
    tokens_per_second: Time
    reason: str
    directory: Path = field(compare=False)
    failure: Failure | None = None
    skipped_updates: Natural = 0
    rollbacks: Natural = 0

    @property
    def is_possible(self) -> bool:
        """Whether a run can have ended so: one that finished made updates and was evaluated."""
        evaluated = (self.val_loss, self.best_val_loss, self.val_bits_per_byte)
        return self.status != "finished" or (self.step > 0 and None not in evaluated)


class RunDirectory:
    """The paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.history = path / "history.jsonl"
        self.result = path / "result.json"
        self.plot = path / "loss.png"
        self.layers = path / "layers.png"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"

    def check_places(self) -> None:
        """What stands in the run's places is of its kind.

        Raises:
            InputError: naming what is not.
        """
        for folder in (self.samples, self.checkpoints):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder}: is not a folder")
        pointers = (self.checkpoints / "latest", self.checkpoints / "best")
        facts = (self.result, self.environment, self.tokenizer)
        for file in (self.metrics, self.history, *facts, self.plot, *pointers):
            if file.exists() and not file.is_file():
                raise InputError(f"{file}: is not a regular file")
            if file.exists() and file != self.metrics and file.stat().st_size > SMALL:
                raise InputError(f"{file}: is larger than {SMALL:,} bytes")

    def read_config(self) -> Config:
        """The run's config.

        Raises:
            InputError: this is no run directory, or its config is damaged.
        """
        if not self.config.is_file():
            what = "holds no run (no config.yaml)" if self.path.is_dir() else "no such directory"
            raise InputError(f"{self.path}: {what}")
        return configs.load(self.config)

    def read_result(self) -> RunResult | None:
        """The result, or None while the run has not ended.

        Raises:
            InputError: it is damaged.
        """
        if not self.result.is_file():
            return None
        tree = read_json(self.result, dict[str, Any])
        try:
            result = TypeAdapter(RunResult).validate_python({**tree, "directory": self.path})
        except ValueError:
            result = None
        if result is None or not result.is_possible:
            raise InputError(f"{self.result}: is damaged")
        return result

    def write_result(self, result: RunResult) -> None:
        """Write result.json, atomically."""
        tree = asdict(result)
        del tree["directory"]
        write_text(self.result, json.dumps(tree, indent=2, allow_nan=False) + "\n")

    def note(self, event: str, step: int, **facts: Any) -> None:
        """Append to history.jsonl what happened to the run, beside training."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"time": now, "step": step, "event": event, **facts}) + "\n"
        with open_own(self.history) as file:
            file.seek(0, os.SEEK_END)
            file.write(line.encode())

    def write_environment(self, device: torch.device, **facts: Any) -> None:
        """Write environment.json: all that the config does not say about how this run was made.

        Args:
            facts: what training knows: micro_batch, data_fingerprint, unigram_entropy (H₁) and
                initial_weights (see `gpt.init.fingerprints`).
        """
        packages = ("numpy", "safetensors", "tiktoken", "tokenizers", "torch")
        versions = {"python": platform.python_version(), "steadygpt": __version__}
        for name in packages:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "not installed"
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        tree = {
            "versions": versions,
            "platform": platform.platform(),
            "device": device.type if gpu is None else f"{device.type}: {gpu}",
            "threads": torch.get_num_threads(),
            "git_commit": _git_commit(),
            "argv": command_line(),
            **facts,
        }
        write_text(self.environment, json.dumps(tree, indent=2) + "\n")


@dataclass(frozen=True)
class Opened:
    """What `open_run` found: where to train, and from what.

    Attributes:
        checkpoint: to go on from; None starts from nothing.
        result: of a run that has ended, so that nothing is left to do.
        resumed: whether the directory held this run before.
        changes: options that a resumed run's config says otherwise than before.
        skipped: what is wrong with checkpoints newer than `checkpoint`.
    """

    run: RunDirectory
    checkpoint: Checkpoint | None = None
    result: RunResult | None = None
    resumed: bool = False
    changes: tuple[str, ...] = ()
    skipped: tuple[InputError, ...] = ()

    def describe_changes(self, config: Config) -> list[str]:
        """What `config` says otherwise than before, and what that does to the learning rate."""
        if not self.changes:
            return []
        step = self.checkpoint.step if self.checkpoint else 0
        jump = rate_change(self.run.read_config(), config, step)
        return ["changed: " + "; ".join(self.changes), *([] if jump is None else [jump])]


def ended_run(config: Config, path: Path, resume: str) -> RunResult | None:
    """The result of a run in `path` that has ended; None where there is something to train.

    Raises:
        InputError: as `open_run`.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        if path.is_symlink() or path.exists():
            _check_unborn(run, resume)
        return None
    changes, result = _same_run(run, config, resume)
    if result is None or result.status == "interrupted":
        return None
    if result.status == "diverged" and changed(changes, "training.nonfinite"):
        raise InputError(
            f"{path}: has diverged, and does not go on; --resume with its last checkpoint starts "
            "another --out-dir from there"
        )
    steps = config.training.steps
    if result.status == "finished" and changed(changes, "training.steps") and steps != result.step:
        if steps < result.step:
            raise InputError(
                f"{path}: is at step {result.step} already; training.steps ({steps}) must be more"
            )
        return None
    return result


def open_run(config: Config, path: Path, resume: str) -> Opened:
    """Decide what a start of `config` in the directory `path` means. Writes nothing.

    Args:
        resume: "auto" goes on with an unfinished run of the same config; "never" wants a fresh
            directory; anything else is a checkpoint folder to start a fresh directory from.

    Raises:
        InputError: the directory holds something else, and would have to be overwritten; or no
            checkpoint of it is whole.
    """
    run = RunDirectory(path)
    ended = ended_run(config, path, resume)
    if ended is not None:
        return Opened(run, result=ended, resumed=True)
    if not run.config.is_file():
        return Opened(run, _start_from(config, resume))
    changes, result = _same_run(run, config, resume)
    run.check_places()
    checkpoint, skipped = checkpoints.newest_whole(run.checkpoints)
    if checkpoint is None and result is not None and result.step:
        raise InputError(f"{path}: has no checkpoint to go on from; choose another --out-dir")
    steps = config.training.steps
    most = steps - changed(changes, "training.steps")  # a new length must leave something to train
    if checkpoint is not None and checkpoint.step > most:
        raise InputError(
            f"{path}: is at step {checkpoint.step} already; training.steps ({steps}) must be more"
        )
    return Opened(run, checkpoint, resumed=True, changes=tuple(changes), skipped=tuple(skipped))


def _same_run(run: RunDirectory, config: Config, resume: str) -> tuple[list[str], RunResult | None]:
    """What `config` says otherwise than the run's, none of which makes it another; its result."""
    if resume != "auto":
        raise InputError(
            f"{run.path}: holds a run, which --resume {resume} would overwrite;\n"
            "choose another --out-dir, or go on with it by --resume auto"
        )
    changes = run.read_config().differences(config)
    refused = [change for change in changes if not may_change(change)]
    if refused:
        refused += [change for change in changes if change.startswith("data.path:")]
        shown = "; ".join(refused[:5]) + ("; ..." if len(refused) > 5 else "")
        raise InputError(
            f"{run.path}: holds a run of another config ({shown});\n"
            "choose another --out-dir or name, or give that run's config to go on with it"
        )
    return changes, run.read_result()


def _check_unborn(run: RunDirectory, resume: str) -> None:
    """A directory holds nothing, or only what a start wrote that was killed just then.

    That is folders without files, or with the checkpoint that the start was from.

    Raises:
        InputError: it holds something else.
    """
    origin = {"latest", Path(resume).name} if resume not in ("auto", "never") else set()
    ours = (run.samples, run.checkpoints)
    if not run.path.is_dir() or not all(
        (is_scrap(path) or (path in ours and path.is_dir()))
        and not path.is_symlink()
        and all(is_scrap(p) or p.name in origin for p in (path.iterdir() if path in ours else ()))
        for path in run.path.iterdir()
    ):
        raise InputError(f"{run.path}: exists and is no run; choose another --out-dir")


def _start_from(config: Config, resume: str) -> Checkpoint | None:
    if resume in ("auto", "never"):
        return None
    folder = Path(resume).absolute()
    if not checkpoints.STEP_NAME.fullmatch(folder.name) or not folder.is_dir():
        raise InputError(
            f"--resume {resume}: is neither auto, never nor a checkpoint folder, such as "
            "runs/NAME/checkpoints/step-00001000"
        )
    origin = RunDirectory(folder.parents[1])
    different = [
        line
        for line in origin.read_config().differences(config)
        if line.startswith(("model.", "data.", "optimizer.name"))
        and not line.startswith("data.cache_dir")
    ]
    if different:
        raise InputError(f"--resume {resume}: comes from another model or data: {different[0]}")
    checkpoint = checkpoints.load(folder)
    if checkpoint.step >= config.training.steps:
        raise InputError(
            f"--resume {resume}: is at step {checkpoint.step}, and training.steps is "
            f"{config.training.steps}: nothing is left to train"
        )
    return checkpoint


def load_run(
    path: Path, checkpoint: str = "best", device: torch.device | str = "cpu"
) -> tuple[GPT, Encoding, int]:
    """The model, tokenizer and step of a run, from its directory alone.

    Args:
        checkpoint: "best" (lowest validation loss of those saved; the newest if none has one),
            "latest", or a step.

    Raises:
        InputError: there is no such run or checkpoint, or it is damaged.
    """
    run = RunDirectory(path)
    config = run.read_config()
    for _ in range(ATTEMPTS):  # beside a run that trains, which prunes what was just chosen
        folder = _choose(run, checkpoint)
        with contextlib.suppress(PrunedError):
            loaded, encoding = _read(run, folder)
            break
    else:
        raise InputError(f"{path}: checkpoints are deleted faster than they can be read")
    check_loading(config.model, encoding.n_vocab, str(run.config))
    held = sum(tensor.numel() for tensor in loaded.model.values())
    least = parameters(config.model, encoding.n_vocab)
    if held < least:  # or thousands of blocks are built first
        raise InputError(
            f"{folder}: does not fit {run.config}: it holds {held:,} parameters, not {least:,} "
            "or more"
        )
    model = GPT(config.model, encoding.n_vocab)
    try:
        load_weights(model, loaded.model)
    except ValueError as error:
        raise InputError(f"{folder}: does not fit {run.config}: {error}") from None
    return model.to(device).eval(), encoding, loaded.step


def _choose(run: RunDirectory, checkpoint: str) -> Path:
    """The folder of the checkpoint that is asked for."""
    available = checkpoints.steps(run.checkpoints)
    if not available:
        raise InputError(f"{run.path}: holds no checkpoint yet")
    if checkpoint in ("best", "latest"):
        return checkpoints.pointed(run.checkpoints, checkpoint) or available[max(available)]
    steps = {str(step): path for step, path in available.items()}
    found = steps.get(checkpoint.lstrip("0") or "0")
    if found is None:
        raise InputError(
            f"--checkpoint {checkpoint}: {run.path} has best, latest, {', '.join(steps)}"
        )
    return found


def _read(run: RunDirectory, folder: Path) -> tuple[Checkpoint, Encoding]:
    """What sampling needs of a checkpoint.

    Raises:
        PrunedError: it is deleted meanwhile.
        InputError: it is damaged; then another that is not is named, if there is one.
    """

    def read(folder: Path) -> tuple[Checkpoint, Encoding]:
        with checkpoints.reading(folder):
            loaded = checkpoints.load(folder, optimizer=False)
            return loaded, tokenizer.load(folder / "tokenizer.json")

    try:
        return read(folder)
    except PrunedError:
        raise
    except InputError as error:
        others = {s: p for s, p in checkpoints.steps(run.checkpoints).items() if p != folder}
        for step, other in reversed(others.items()):
            try:
                read(other)
            except InputError:
                continue
            raise InputError(f"{error};\n--checkpoint {step} is whole") from None
        raise


def load_weights(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Take over the weights of a checkpoint.

    Raises:
        ValueError: they are of another model, or not of the types that this one has.
    """
    for name, own in model.state_dict().items():
        if name in tensors and tensors[name].dtype != own.dtype:
            raise ValueError(f"{name}: its type is {tensors[name].dtype}, not {own.dtype}")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None


def command_line() -> list[str]:
    """The arguments of this process for a record.

    Python has lone surrogates for bytes that are not UTF-8; JSON cannot hold them, so they are
    escaped.
    """
    return [argument.encode("utf-8", "backslashreplace").decode() for argument in sys.argv]


def _git_commit() -> str | None:
    """The commit of the program, with "-dirty" if it was changed since; None outside a checkout."""
    clone = Path(__file__).parents[2]
    if not (clone / ".git").exists():  # installed, perhaps inside a repository of something else
        return None
    command: list[Any] = ["git", "-C", clone, "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

"""A run directory: the files of a run, and reading and writing them.

This module does not import torch, so that listing runs starts quickly.

runs/NAME/config.yaml, environment.json, tokenizer.json, metrics.jsonl, history.jsonl,
          result.json, loss.png, layers.png, samples/, checkpoints/
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from gpt import __version__
from gpt import config as configs
from gpt.config import Config
from gpt.diagnostics.fault import Failure
from gpt.errors import InputError
from gpt.io.console import duration, format_loss
from gpt.io.files import (
    SMALL,
    Loss,
    Natural,
    Time,
    lock_directory,
    open_for_update,
    read_json,
    write_text,
)

if TYPE_CHECKING:
    import torch

Status = Literal["finished", "diverged", "interrupted"]


@dataclass(frozen=True)
class RunResult:
    """How a run ended. Losses are in nats per token; None if there is none, or it is not finite.

    Attributes:
        status: finished, diverged (a number became non-finite), or interrupted (saved; resumable).
        step: updates made; for a diverged run, the update at which the failure was seen.
        tokens: training tokens seen.
        train_loss: of the last update.
        val_loss, best_val_loss: of the last evaluation, and the lowest of all evaluations.
        val_bits_per_byte: of the last evaluation.
        seconds: wall-clock time, summed over resumptions.
        tokens_per_second: training speed, without evaluation and saving.
        reason: why it ended, as a sentence.
        directory: the run directory.
        failure: of a diverged run, what failed and where.
        skipped_updates: updates skipped because of a non-finite loss or gradient
            (training.nonfinite: skip, or an overflow of fp16).
        rollbacks: how often the run returned to a checkpoint (training.nonfinite: rollback).
        gave_up: whether a finished run ended early, by evaluation.give_up_after.
        stopped_early: the same, by evaluation.patience.
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
    gave_up: bool = False
    stopped_early: bool = False

    @property
    def is_consistent(self) -> bool:
        """Whether the fields are consistent: a finished run made updates and was evaluated."""
        evaluated = (self.val_loss, self.best_val_loss, self.val_bits_per_byte)
        return self.status != "finished" or (self.step > 0 and None not in evaluated)

    def to_json(self) -> str:
        """All fields, for another process."""
        return _RESULT.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> RunResult:
        """The result that `to_json` wrote."""
        return _RESULT.validate_json(text)

    def _repr_html_(self) -> str:
        """The numbers and the curve, for a notebook."""
        from gpt.run.notebook import to_html

        losses = {
            "validation loss": self.val_loss,
            "lowest": self.best_val_loss,
            "bits per byte": self.val_bits_per_byte,
            "training loss": self.train_loss,
        }
        numbers = {
            **{name: format_loss(loss) for name, loss in losses.items() if loss is not None},
            "updates": f"{self.step:,}",
            "tokens": f"{self.tokens:,}",
            "time": duration(self.seconds),
            "tokens/s": f"{self.tokens_per_second:,.0f}",
        }
        advice = self.failure.advice if self.failure is not None else ()
        metrics = RunDirectory(self.directory).metrics
        return to_html(
            str(self.directory), f"{self.status}: {self.reason}", numbers, advice, metrics
        )


_RESULT = TypeAdapter(RunResult)
AnyRun = str | Path | RunResult  # a run, to callers from Python


def path_of(run: AnyRun) -> Path:
    """The directory of a run.

    Raises:
        InputError: it is neither a directory's name nor a result of `train`.
    """
    if isinstance(run, RunResult):
        return run.directory
    if isinstance(run, str | Path):
        return Path(run)
    raise InputError(f"a run must be a directory or a result of train, found {_kind(run)}")


def _kind(value: object) -> str:
    return f"{value!r}" if isinstance(value, int | None) else f"a {type(value).__name__}"


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

    def lock(self) -> AbstractContextManager[None]:
        """A context in which only this process trains in the directory.

        Raises:
            InputError: another process does.
        """
        return lock_directory(self.path, f"{self.path}: another process is training there")

    def check_paths(self) -> None:
        """Check that the run's paths are folders or files, as they should be, and not too large.

        Raises:
            InputError: names the first that is not.
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
            InputError: this is not a run directory, or its config is damaged.
        """
        if not self.config.is_file():
            what = "is not a run (no config.yaml)" if self.path.is_dir() else "no such directory"
            raise InputError(f"{self.path}: {what}")
        return configs.load_resolved(self.config)

    def read_environment(self) -> dict[str, Any]:
        """The facts of environment.json; see `write_environment`.

        Raises:
            InputError: it is missing or damaged.
        """
        return read_json(self.environment, dict[str, Any])

    def guessing_losses(self) -> dict[str, float]:
        """The losses of guessing on this run's data; see the function `guessing_losses`.

        Raises:
            InputError: environment.json is missing or damaged.
        """
        facts = self.read_environment()
        try:
            vocabulary = facts["initial_weights"]["token_embedding.weight"]["shape"][0]
            return guessing_losses(facts["unigram_entropy"], vocabulary)
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(f"{self.environment}: is damaged") from None

    def read_result(self) -> RunResult | None:
        """The result, or None while the run has not ended.

        Raises:
            InputError: result.json is damaged.
        """
        if not self.result.is_file():
            return None
        tree = read_json(self.result, dict[str, Any])
        try:
            result = _RESULT.validate_python({**tree, "directory": self.path})
        except ValueError:
            result = None
        if result is None or not result.is_consistent:
            raise InputError(f"{self.result}: is damaged")
        return result

    def write_result(self, result: RunResult) -> None:
        """Write result.json, atomically."""
        tree = asdict(result)
        del tree["directory"]
        write_text(self.result, json.dumps(tree, indent=2, allow_nan=False) + "\n")

    def note(self, event: str, step: int, **facts: Any) -> None:
        """Append an event that is not part of training, such as a resumption, to history.jsonl."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"time": now, "step": step, "event": event, **facts}) + "\n"
        with open_for_update(self.history) as file:
            file.seek(0, os.SEEK_END)
            file.write(line.encode())

    def write_environment(self, device: torch.device, **facts: Any) -> None:
        """Write environment.json: how this run was produced, apart from its config.

        Args:
            facts: more fields: micro_batch, data_fingerprint, unigram_entropy,
                initial_weights (see `gpt.model.init.fingerprints`) and, of a run that started from
                a checkpoint or other weights, started_from or init_from.
        """
        import torch

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


def guessing_losses(unigram_entropy: float, vocabulary: int) -> dict[str, float]:
    """The validation losses of guessing, in nats per token, by how one guesses.

    Args:
        unigram_entropy: H₁, see `Dataset.unigram_entropy`.
        vocabulary: V, the number of tokens.
    """
    return {
        "by token frequencies (H₁)": float(unigram_entropy),
        "uniformly (ln V)": math.log(vocabulary),
    }


def command_line() -> list[str]:
    """The command line of this process, as text that JSON can hold.

    Python represents bytes that are not UTF-8 as lone surrogates; they are escaped.
    """
    return [argument.encode("utf-8", "backslashreplace").decode() for argument in sys.argv]


def _git_commit() -> str | None:
    """The program's git commit, with "-dirty" if files have changed; None outside a checkout."""
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

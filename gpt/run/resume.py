"""How training starts in a directory: a fresh run, a resumption, or nothing left to do.

A directory that holds a run is never overwritten. `open_run` decides before anything is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from gpt import checkpoint as store
from gpt.checkpoint import Checkpoint
from gpt.config import Config, Differences, describe_differences, may_change
from gpt.errors import InputError, option
from gpt.io.files import is_partial
from gpt.run.directory import RunDirectory, RunResult
from gpt.schedule import lr_multiplier


@dataclass(frozen=True)
class ResumePlan:
    """Where to train, and from which state.

    Attributes:
        directory: where the run is, or will be.
        checkpoint: to start from; None: from the initial weights.
        result: of a run that has ended, so that nothing is left to do.
        existing: whether the directory already holds this run.
        changes: options that differ from the config that the run had before.
        damaged: what is wrong with checkpoints newer than `checkpoint`.
    """

    directory: RunDirectory
    checkpoint: Checkpoint | None = None
    result: RunResult | None = None
    existing: bool = False
    changes: Differences = field(default_factory=dict)
    damaged: tuple[InputError, ...] = ()

    @property
    def resuming(self) -> bool:
        """Whether training continues from a checkpoint of this directory."""
        return self.existing and self.checkpoint is not None

    def describe_changes(self, config: Config) -> list[str]:
        """The changed options, and what they do to the learning rate, as lines for the user."""
        if not self.changes:
            return []
        step = self.checkpoint.step if self.checkpoint else 0
        jump = describe_lr_change(self.directory.read_config(), config, step)
        return [
            "changed: " + "; ".join(describe_differences(self.changes)),
            *([] if jump is None else [jump]),
        ]


def describe_lr_change(before: Config, now: Config, step: int) -> str | None:
    """A sentence on how a new `training.steps` changes the learning rate after `step` updates.

    Returns:
        None if it does not, as with a constant body.
    """
    if step == 0:
        return None
    old = lr_multiplier(before.schedule, step, before.training.steps)
    new = lr_multiplier(now.schedule, step, now.training.steps)
    if math.isclose(old, new, rel_tol=1e-6):
        return None
    full = now.optimizer.learning_rate
    following = full * lr_multiplier(now.schedule, step + 1, now.training.steps)
    return (
        f"the {now.schedule.body} schedule now spans {now.training.steps} steps: the learning rate "
        f"was {full * old:.2e} at step {step} and is {following:.2e} at step {step + 1}"
    )


def ended_run(config: Config, path: Path, resume: str | Path) -> RunResult | None:
    """The result of a run in `path` that has ended; None if there is something left to train.

    Raises:
        InputError: see `open_run`.
    """
    directory = RunDirectory(path)
    if not directory.config.is_file():
        if path.is_symlink() or path.exists():
            _check_unused(directory, resume)
        return None
    changes, result = _same_run(directory, config, resume)
    if result is None or result.status == "interrupted":
        return None
    if result.status == "diverged" and "training.nonfinite" in changes:
        raise InputError(
            f"{path}: has diverged and cannot be resumed; to continue from its last checkpoint in "
            f"another {option('out_dir')}, pass that checkpoint to {option('resume')}"
        )
    steps = config.training.steps
    if result.status == "finished" and "training.steps" in changes and steps != result.step:
        if steps < result.step:
            raise InputError(
                f"{path}: already at step {result.step}; training.steps ({steps}) must be greater"
            )
        return None
    return result


def open_run(config: Config, path: Path, resume: str | Path) -> ResumePlan:
    """Decide how a run of `config` in the directory `path` starts. Writes nothing.

    Args:
        resume: "auto" resumes an unfinished run of the same config; "never" requires a fresh
            directory; anything else is a checkpoint folder from which a fresh directory starts.

    Raises:
        InputError: the directory holds something that would have to be overwritten, or none of its
            checkpoints is intact.
    """
    directory = RunDirectory(path)
    ended = ended_run(config, path, resume)
    if ended is not None:
        return ResumePlan(directory, result=ended, existing=True)
    if not directory.config.is_file():
        return ResumePlan(directory, _start_from(config, resume))
    changes, result = _same_run(directory, config, resume)
    directory.check_paths()
    checkpoint, damaged = store.newest_intact(directory.checkpoints)
    if checkpoint is None and result is not None and result.step:
        raise InputError(
            f"{path}: has no checkpoint to resume from; choose another {option('out_dir')}"
        )
    steps = config.training.steps
    most = steps - ("training.steps" in changes)  # a new length must leave something to train
    if checkpoint is not None and checkpoint.step > most:
        raise InputError(
            f"{path}: already at step {checkpoint.step}; training.steps ({steps}) must be greater"
        )
    return ResumePlan(directory, checkpoint, existing=True, changes=changes, damaged=tuple(damaged))


def _same_run(
    directory: RunDirectory, config: Config, resume: str | Path
) -> tuple[Differences, RunResult | None]:
    """The changed options, all of which a resumed run may change, and the run's result."""
    if resume != "auto":
        raise InputError(
            f"{directory.path}: holds a run, which {option('resume')} {resume} would overwrite;\n"
            f"choose another {option('out_dir')}, or resume it with {option('resume')} auto"
        )
    changes = directory.read_config().differences(config)
    refused = [option for option in changes if not may_change(option)]
    if refused:
        refused += [option for option in changes if option == "data.path"]
        lines = describe_differences({option: changes[option] for option in refused})
        shown = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
        raise InputError(
            f"{directory.path}: contains a run with a different config ({shown});\n"
            f"choose another {option('out_dir')} or name, or give that run's config to resume it"
        )
    return changes, directory.read_result()


def _check_unused(directory: RunDirectory, resume: str | Path) -> None:
    """Check that a directory holds nothing but the leftovers of a start that was killed.

    Leftovers are empty folders, and a copy of the checkpoint from which the run was started.

    Raises:
        InputError: it holds something else.
    """
    origin = {"latest", Path(resume).resolve().name} if resume not in ("auto", "never") else set()
    ours = (directory.samples, directory.checkpoints)
    if not directory.path.is_dir() or not all(
        (is_partial(path) or (path in ours and path.is_dir()))
        and not path.is_symlink()
        and all(is_partial(p) or p.name in origin for p in (path.iterdir() if path in ours else ()))
        for path in directory.path.iterdir()
    ):
        raise InputError(
            f"{directory.path}: exists and is not a run; choose another {option('out_dir')}"
        )


def _start_from(config: Config, resume: str | Path) -> Checkpoint | None:
    if resume in ("auto", "never"):
        return None
    folder = Path(resume).resolve()
    if not store.STEP_NAME.fullmatch(folder.name) or not folder.is_dir():
        raise InputError(
            f"{option('resume')} {resume}: is neither auto, never nor a checkpoint folder, such as "
            "runs/NAME/checkpoints/step-00001000"
        )
    origin = RunDirectory(folder.parents[1])
    different = {
        option: values
        for option, values in origin.read_config().differences(config).items()
        if option.startswith(("model.", "data.", "optimizer.name")) and option != "data.cache_dir"
    }
    if different:
        first, *_ = describe_differences(different)
        raise InputError(
            f"{option('resume')} {resume}: has another model, optimizer or data: {first}"
        )
    checkpoint = store.load(folder)
    if checkpoint.step >= config.training.steps:
        raise InputError(
            f"{option('resume')} {resume}: is at step {checkpoint.step}, and training.steps is "
            f"{config.training.steps}: nothing is left to train"
        )
    return checkpoint

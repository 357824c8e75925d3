"""How training starts in a directory: a fresh run, a resumption, or nothing left to do.

A directory that holds a run is never overwritten. `open_run` decides before anything is written.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt import checkpoint as store
from gpt.checkpoint import Checkpoint
from gpt.checkpoint.state import Progress, read_state
from gpt.config import Config, Differences, describe_differences, may_change
from gpt.errors import InputError, nearest, option
from gpt.exchange import pretrained
from gpt.exchange.pretrained import Pretrained
from gpt.io.files import is_partial, read_json
from gpt.run.directory import RunDirectory, RunResult
from gpt.schedule import lr_multiplier
from gpt.tracking import check_installed


@dataclass(frozen=True)
class ResumePlan:
    """Where to train, and from which state.

    Attributes:
        directory: where the run is, or will be.
        checkpoint: to start from; None: from the initial weights.
        before: the config of the checkpoint's run, if this is another run or has another length.
        pretrained: the weights of `init_from`, if they are the initial ones.
        result: of a run that has ended, so that nothing is left to do.
        existing: whether the directory already holds this run.
        started_from: the checkpoint from which the run was started, as `_origin` names it.
        changes: options that differ from the config that the run had before.
        damaged: what is wrong with checkpoints newer than `checkpoint`.
    """

    directory: RunDirectory
    checkpoint: Checkpoint | None = None
    before: Config | None = None
    pretrained: Pretrained | None = None
    result: RunResult | None = None
    existing: bool = False
    started_from: str | None = None
    changes: Differences = field(default_factory=dict)
    damaged: tuple[InputError, ...] = ()

    @property
    def resuming(self) -> bool:
        """Whether training continues from a checkpoint of this directory."""
        return self.existing and self.checkpoint is not None

    @property
    def processes(self) -> int | None:
        """How many processes the run has had; None if it starts now."""
        if not (self.existing and self.directory.environment.is_file()):
            return None
        return int(self.directory.read_environment().get("processes", 1))

    def describe_changes(self, config: Config) -> list[str]:
        """The changed options, and what they do to the learning rate, as lines for the user."""
        lines = []
        if self.changes:
            lines.append("changed: " + "; ".join(describe_differences(self.changes)))
        if self.before is not None and self.checkpoint is not None:
            progress = read_state(self.checkpoint).progress
            jump = describe_lr_change(self.before, config, progress)
            lines += [] if jump is None else [jump]
        return lines


# Changing one of these options may give a finished run more to do.
EXTENDING = {"training.steps", "evaluation.give_up_after", "evaluation.patience"}

RewarmFrom = tuple[int, float] | None  # a step, and the learning rate of its update


def lr_scale(config: Config, step: int, rewarm_from: RewarmFrom = None) -> float:
    """The learning rate of update `step`, as a multiple of `optimizer.learning_rate`.

    Of the n = `schedule.rewarm` updates after `rewarm_from`, update k has (n - k) / n of that rate
    and k / n of the schedule's: a linear warm-up to the rate of a schedule that then decays again
    (Gupta et al. 2023; Ibrahim et al. 2024).
    """
    scale = lr_multiplier(config.schedule, step, config.training.steps)
    if rewarm_from is None:
        return scale
    since, rate = rewarm_from
    if not since < step < since + config.schedule.rewarm:
        return scale
    last = rate / config.optimizer.learning_rate
    return last + (scale - last) * (step - since) / config.schedule.rewarm


def start_rewarm(before: Config, now: Config, progress: Progress) -> RewarmFrom:
    """The last step and rate under `before`, if the rate is to move from there to `now`'s."""
    noted = progress.rewarm_from
    if noted is not None and noted[0] == progress.step:  # the run was killed before its next update
        return noted
    if now.schedule.rewarm == 0:
        return None
    return progress.step, _rate(before, progress.step, noted)


def _rate(config: Config, step: int, rewarm_from: RewarmFrom) -> float:
    return config.optimizer.learning_rate * lr_scale(config, step, rewarm_from)


def describe_lr_change(before: Config, now: Config, progress: Progress) -> str | None:
    """A sentence on how another config, such as a longer one, changes the learning rate.

    Returns:
        None if it does not, as with a constant body.
    """
    step, rewarm = progress.step, now.schedule.rewarm
    if step == 0:
        return None
    last = _rate(before, step, progress.rewarm_from)
    if math.isclose(last, _rate(now, step, None), rel_tol=1e-6):
        return None
    left = now.training.steps - step
    then = step + min(max(rewarm, 1), left)
    rate = _rate(now, then, start_rewarm(before, now, progress))
    longer = before.training.steps != now.training.steps
    spans = f"the {now.schedule.body} schedule now spans {now.training.steps} steps"
    why = spans if longer else "another schedule or rate"
    advice = "" if rewarm else "; schedule.rewarm: N spreads this over N updates"
    if rewarm > left:
        advice = f"; schedule.rewarm ({rewarm}) is more than the {left} updates left"
    return (
        f"{why}: the learning rate {'moves' if rewarm else 'jumps'} from {last:.2e} at step {step} "
        f"to {rate:.2e} at step {then}, by a factor of {rate / last:.3g}{advice}"
    )


def check_types(config: Config, resume: str | Path) -> None:
    """Check two arguments of `train`.

    Raises:
        InputError: one is of another type.
    """
    if not isinstance(config, Config):
        found = type(config).__name__
        raise InputError(f"config: must come from load, as in load('quickstart'); found a {found}")
    if not isinstance(resume, str | Path):
        raise InputError(f"resume: must be auto, never or a checkpoint folder, found {resume!r}")


def ended_run(config: Config, path: Path, resume: str | Path) -> RunResult | None:
    """The result of a run in `path` that has ended; None if there is something left to train.

    Raises:
        InputError: see `open_run`.
    """
    directory = RunDirectory(path)
    if not directory.config.is_file():
        if path.is_symlink() or path.exists():
            _check_unused(directory, _find(config, resume))
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
    if result.status == "finished" and steps != result.step and not EXTENDING.isdisjoint(changes):
        if steps < result.step:
            raise _too_few(directory, result.step, steps)
        return None
    return result


def open_run(config: Config, path: Path, resume: str | Path, *, fetch: bool = True) -> ResumePlan:
    """Decide how a run of `config` in the directory `path` starts. Writes nothing.

    Args:
        resume: "auto" resumes an unfinished run of the same config; "never" requires a fresh
            directory; anything else names a checkpoint (see `gpt.checkpoint.named`; without a
            folder, of runs/NAME) from which a fresh directory starts. Calling again resumes.
        fetch: whether weights on the hub may be fetched, as they must be before training.

    Raises:
        InputError: the directory holds something that would have to be overwritten, none of its
            checkpoints is intact, the weights of `init_from` do not fit, or a tracker is not
            installed.
    """
    directory, origin = RunDirectory(path), _origin(config, resume)
    ended = ended_run(config, path, resume)
    if ended is not None:
        return ResumePlan(directory, result=ended, existing=True)
    check_installed(config.tracking)
    if not directory.config.is_file():
        start, before = _start_from(config, resume)
        weights = _pretrained(config, fetch) if start is None else None
        return ResumePlan(directory, start, before, weights, started_from=origin)
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
        raise _too_few(directory, checkpoint.step, steps)
    return ResumePlan(
        directory,
        checkpoint,
        directory.read_config() if "training.steps" in changes else None,
        _pretrained(config, fetch) if checkpoint is None else None,
        existing=True,
        started_from=origin,
        changes=changes,
        damaged=tuple(damaged),
    )


def _pretrained(config: Config, fetch: bool) -> Pretrained | None:
    """The weights of `init_from`; None without any, or if they would have to be fetched.

    Raises:
        InputError: they do not fit the config, or its vocabulary is not theirs.
    """
    if config.init_from is None:
        return None
    weights = pretrained.find(config, fetch=fetch)
    if weights is not None:
        weights.check_vocabulary(config.data)
    return weights


def _too_few(directory: RunDirectory, step: int, steps: int) -> InputError:
    return InputError(
        f"{directory.path}: already at step {step}; to train longer, training.steps ({steps}) must "
        f"be greater;\nits own config is {directory.config}"
    )


def _same_run(
    directory: RunDirectory, config: Config, resume: str | Path
) -> tuple[Differences, RunResult | None]:
    """The changed options, all of which a resumed run may change, and the run's result."""
    if resume != "auto" and not _started_from(directory, _origin(config, resume)):
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
            f"choose another {option('out_dir')} or name, or resume it with its own config: "
            f"{directory.config}"
        )
    return changes, directory.read_result()


def _check_unused(directory: RunDirectory, checkpoint: Path | None) -> None:
    """Check that a directory holds nothing but the leftovers of a start that was killed.

    Leftovers are empty folders, and a copy of the checkpoint from which the run was started.

    Raises:
        InputError: it holds something else.
    """
    origin = {"latest", checkpoint.resolve().name} if checkpoint is not None else set()
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


def _find(config: Config, resume: str | Path) -> Path | None:
    """The checkpoint folder that `resume` names, if it names one that exists."""
    if resume in ("auto", "never"):
        return None
    return store.named(str(resume), _own_checkpoints(config))


def _origin(config: Config, resume: str | Path) -> str | None:
    """The absolute path of the checkpoint that `resume` names, which may be gone by now."""
    if resume in ("auto", "never"):
        return None
    of_path = os.path.lexists(resume) or Path(resume).name != resume
    return os.path.realpath(resume if of_path else _own_checkpoints(config) / resume)


def _own_checkpoints(config: Config) -> Path:
    return RunDirectory(Path("runs") / config.name).checkpoints


def _started_from(directory: RunDirectory, origin: str | None) -> bool:
    """Whether a run was started from `origin`, or was killed before environment.json said so."""
    if origin is None or not directory.environment.is_file():
        return origin is not None
    return bool(read_json(directory.environment, dict[str, Any]).get("started_from") == origin)


def _start_from(config: Config, resume: str | Path) -> tuple[Checkpoint | None, Config | None]:
    """The checkpoint that `resume` names, and the config of its run."""
    if resume in ("auto", "never"):
        return None, None
    found = _find(config, resume)
    if found is None:
        run = RunDirectory(Path(resume))
        if run.config.is_file():
            raise InputError(
                f"{option('resume')} {resume}: is a run; to start from its newest checkpoint: "
                f"{option('resume')} {run.checkpoints / 'latest'}\n"
                f"to continue that run: {option('out_dir')} {resume}"
            )
        own = _own_checkpoints(config)
        raise InputError(
            f"{option('resume')} {resume}: is neither auto, never nor a checkpoint folder, such as "
            "runs/NAME/checkpoints/step-00001000"
            f"{nearest(str(resume), ['auto', 'never', 'latest'])};\n"
            f"{own} holds {', '.join(map(str, store.steps(own))) or 'no checkpoint'}"
        )
    folder = found.resolve()
    origin = RunDirectory(folder.parents[1]).read_config()
    different = {
        option: values
        for option, values in origin.differences(config).items()
        if option.startswith(("model.", "data.", "optimizer.name"))
        and option not in ("data.cache_dir", "data.vocabulary")  # the tokens must be the same ones
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
    return checkpoint, origin

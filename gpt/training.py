"""The training loop: `train(config)` makes a run directory and returns a `RunResult`.

    data -> Trainer (model, optimizer) -> Run (log, evaluation, checkpoints) -> fit -> RunResult

`fit` is the loop. A step is `trainer.backward` and `trainer.update` (gpt/trainer.py); everything
between steps is in `Run`. All randomness is a function of (seed, step), so a resumed run repeats
an uninterrupted one bit for bit on one machine. A non-finite loss ends the run as `diverged`
instead of raising; `training.nonfinite` chooses stop, skip or rollback.

Nothing here is specific to a placement, an optimizer or a schedule: they come from their tables.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

from gpt.config import Config
from gpt.data.preparation import prepare
from gpt.distributed.group import Group
from gpt.distributed.lead import make_trainer, together
from gpt.errors import NonFiniteError, OutOfMemoryError, StepInterruptedError
from gpt.hardware.device import flush_denormals, pick_device
from gpt.hardware.memory import check_fits, is_out_of_memory
from gpt.io.console import Console
from gpt.io.wait import raise_if
from gpt.run.banner import describe_run
from gpt.run.cautions import cautions
from gpt.run.directory import RunDirectory, RunResult
from gpt.run.recovery import advise_on_memory
from gpt.run.resume import check_types, ended_run, open_run
from gpt.run.run import Run
from gpt.trainer import Trainer


def train(
    config: Config,
    out_dir: str | Path | None = None,
    *,
    resume: str | Path = "auto",
    quiet: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_update: Callable[[], object] = lambda: None,
) -> RunResult:
    """Train a GPT as `config` says.

    Several threads may train at once, each in a directory of its own. Settings that are global to
    the process (torch's random generators, the treatment of denormal numbers) are restored.

    Args:
        out_dir: the run directory; runs/NAME by default.
        resume: "auto", "never" or a checkpoint folder, see `gpt.run.resume.open_run`.
        quiet: print nothing.
        stop: polled often, also in the middle of an update or an evaluation. Once it returns true,
            the last update is saved and the run ends as interrupted. Whatever was due after that
            update is done first when the run is resumed.
        on_update: called after every update.

    Returns:
        How the run ended. A diverged run is a result with status "diverged" and keeps its last good
        checkpoint.

    Raises:
        InputError: the config cannot run here; the directory holds another run, or another process
            trains in it, or it cannot be written (then the state is saved elsewhere if possible).
        OutOfMemoryError: not even one sequence fits in memory, or not as many as configured.
        StoppedError: `stop` returned true during data preparation; the next start continues there.
    """
    check_types(config, resume)
    path = Path(out_dir) if out_dir is not None else Path("runs") / config.name
    device = pick_device(config.training.device)

    def lead(group: Group) -> RunResult:
        ended = ended_run(config, path, resume)
        if ended is not None:
            return ended
        check_fits(config, device)
        with (
            RunDirectory(path).lock(),
            flush_denormals(),
            contextlib.closing(Console(quiet)) as console,
        ):
            plan = open_run(config, path, resume)
            if plan.result is not None:  # another process has just finished it
                return plan.result
            asked = group.any_asked(stop)
            dataset = prepare(config.data, console, asked)
            check_stop = functools.partial(raise_if, asked)
            trainer = make_trainer(
                config, dataset.encoding.n_vocab, group, check_stop, console.say, plan.processes
            )
            run = Run(config, plan, dataset, trainer, console, stop=asked, on_update=on_update)
            with contextlib.closing(run):
                console.say(describe_run(config, trainer, dataset, path, done=run.progress.step))
                console.warn(cautions(config, dataset))
                return _fit_or_recover(run, trainer)

    return together(config, device, stop, lead)


def _fit_or_recover(run: Run, trainer: Trainer) -> RunResult:
    """Train to the end; after a failure, roll back, or end the run and locate the failure."""
    while True:
        shortage = None
        try:
            return fit(run, trainer)
        except NonFiniteError as error:
            fault = error.fault
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = str(error).partition("\n")[0]
        if shortage is not None:  # outside `except`: the failed attempt's memory is free
            step = run.progress.step + 1
            raise OutOfMemoryError(advise_on_memory(trainer, step, run.batch, shortage))
        if not run.roll_back(fault):
            return run.diverge(fault)


def fit(run: Run, trainer: Trainer) -> RunResult:
    """The training loop.

    Raises:
        NonFiniteError: a loss, a gradient or a weight is not finite.
    """
    result = run.begin()
    if result is not None:
        return result
    try:
        with contextlib.closing(run.batches()) as batches:
            for step, inputs, targets in batches:
                loss, grad_norm = trainer.backward(step, inputs, targets)
                layer_stats = run.before_update(step, inputs, targets)
                skipped = trainer.update(run.lr_scale(step), loss, grad_norm)
                result = run.after_update(step, loss, grad_norm, skipped, layer_stats)
                if result is not None:
                    return result
    except StepInterruptedError:
        return run.interrupt()
    return run.finish()

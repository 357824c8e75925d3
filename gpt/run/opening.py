"""Opening a run for training: its state, its folders, announcements and its identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from gpt import checkpoint as store
from gpt.checkpoint import Checkpoint
from gpt.checkpoint.state import Progress, read_state
from gpt.config import Config, describe_differences
from gpt.data import tokenizer
from gpt.data.prepared import Dataset
from gpt.errors import InputError, option
from gpt.exchange import pretrained
from gpt.exchange.pretrained import Pretrained
from gpt.io.console import Console
from gpt.io.files import remove_partial, write_text
from gpt.model.init import fingerprints
from gpt.run.directory import command_line
from gpt.run.fallback import later_fallback
from gpt.run.resume import ResumePlan, start_rewarm
from gpt.trainer import Trainer


def check_tokens(plan: ResumePlan, config: Config, dataset: Dataset) -> None:
    """Refuse to resume a run on different data.

    Raises:
        InputError: the prepared tokens differ from those of the checkpoint.
    """
    if plan.checkpoint is None:
        return
    if read_state(plan.checkpoint).data_fingerprint != dataset.fingerprint:
        data = {key: each for key, each in plan.changes.items() if key.startswith("data.")}
        raise InputError(
            f"{plan.directory.path}: the checkpoint was trained on tokens other than the config's "
            f"({'; '.join(describe_differences(data)) or 'the text has changed'});\n"
            f"use the same text, or start a new run in another {option('out_dir')} "
            f"without {option('resume')}"
        )


def restore(
    trainer: Trainer,
    checkpoint: Checkpoint | None,
    first_inputs: Callable[[], Tensor],
    weights: Pretrained | None = None,
) -> Progress:
    """Set the trainer's state from a checkpoint, or as it is before the first update.

    Args:
        first_inputs: makes (B, T) tokens of the first batch, for placements that calibrate on them.
        weights: those of `init_from`, if they have been found already. Looked up again, they
            might differ: a run that still trains may have a new best checkpoint.

    Returns:
        The progress at that point.

    Raises:
        InputError: the checkpoint does not fit the config.
    """
    if checkpoint is None:
        start_afresh(trainer, first_inputs, weights)
        return Progress()
    state = read_state(checkpoint)
    try:
        trainer.load(
            checkpoint, state.scaler, updates=state.progress.step - state.progress.skipped_updates
        )
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{checkpoint.name}: does not fit the config: {reason}") from None
    return state.progress


def start_afresh(
    trainer: Trainer, first_inputs: Callable[[], Tensor], weights: Pretrained | None = None
) -> None:
    """Set the trainer's state before the first update: new weights, or those of `init_from`.

    Raises:
        InputError: the weights of `init_from` do not fit.
    """
    config = trainer.config
    if weights is None and config.init_from is not None:
        weights = pretrained.find(config)
    loaded = weights.load(config.model) if weights is not None else None  # before anything changes
    trainer.reset()
    if loaded is None:
        trainer.calibrate(first_inputs())
        return
    try:
        trainer.set_weights(loaded)
    except ValueError as error:
        raise InputError(f"init_from: {config.init_from}: does not fit: {error}") from None


def adopt_checkpoint(
    plan: ResumePlan, config: Config, trainer: Trainer, progress: Progress
) -> None:
    """Adjust the restored state to this directory, which may differ from the checkpoint's.

    Raises:
        InputError: the checkpoint's micro-batch does not suit the config.
    """
    checkpoint = plan.checkpoint
    if not plan.existing:  # `best` is the best of this directory
        progress.best_val_loss = progress.best_saved_val_loss = None
        progress.evals_since_best = 0
        progress.start_step = progress.step
    elif checkpoint is not None and config.training.micro_batch == "auto":
        micro_batch = checkpoint.state["micro_batch"]
        if micro_batch > config.batch_sequences:
            raise InputError(f"{checkpoint.name}: micro-batch is larger than the batch")
        if trainer.config.batch_sequences % micro_batch == 0:  # the share of a process
            trainer.micro_batch = micro_batch  # keeps the order of sums
    if plan.before is None:
        return
    progress.rewarm_from = start_rewarm(plan.before, config, progress)
    if plan.existing and progress.step == plan.before.training.steps:
        progress.start_step = progress.step  # the former last step counts as scheduled


def make_folders(plan: ResumePlan, config: Config) -> None:
    """Make the folders that training writes into, and remove what a killed process left there.

    Raises:
        InputError: a folder cannot be made.
    """
    directory, fallback = plan.directory, config.checkpoint.spare_dir
    try:
        directory.samples.mkdir(exist_ok=True)
        if fallback:
            Path(fallback).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be created: {error.strerror}") from None
    for folder in (directory.path, directory.samples, directory.checkpoints):
        remove_partial(folder)


def announce(plan: ResumePlan, config: Config, step: int, console: Console) -> None:
    """Report where the run resumes and what changed or is damaged; set damaged checkpoints aside.

    Args:
        step: the step from which it resumes.
    """
    directory, resuming = plan.directory, plan.resuming
    if plan.pretrained is not None:
        console.say(plan.pretrained.summary(config.model))
    for damage in plan.damaged:
        console.say(f"skipped: {damage}")
    later = later_fallback(config, directory.path, step) if resuming else None
    if later is not None:
        console.say(
            f"a later state of this run is in {later}: resume it with {option('out_dir')} {later}"
        )
    if plan.damaged:
        console.say(f"resuming from step {step}")
        for path in store.steps(directory.checkpoints).values():
            if not store.is_intact(path):
                console.say(f"set aside: {store.set_aside(path)}")
    if plan.existing and not resuming:
        console.say("no checkpoint had been saved: starting again from step 0")
    for line in plan.describe_changes(config):
        console.say(line)


def write_identity(
    plan: ResumePlan,
    config: Config,
    dataset: Dataset,
    trainer: Trainer,
    step: int,
    unigram_entropy: float,
) -> None:
    """Write config, tokenizer and environment: from here on, the directory holds this run."""
    directory, resuming = plan.directory, plan.resuming
    if plan.existing:
        directory.note(
            "resumed",
            step,
            changes=describe_differences(plan.changes),
            skipped=[str(damage) for damage in plan.damaged],
            command=command_line(),
        )
    directory.result.unlink(missing_ok=True)
    if plan.changes or not resuming:
        write_text(directory.config, config.to_yaml())
    if not resuming or not directory.tokenizer.is_file():
        write_text(directory.tokenizer, tokenizer.to_json(dataset.encoding))
    if not resuming or not directory.environment.is_file():
        source: dict[str, object] = {}
        if plan.started_from is not None:
            source["started_from"] = plan.started_from
        if plan.pretrained is not None:
            source["init_from"] = plan.pretrained.facts()
        directory.write_environment(
            trainer.device,
            **source,
            processes=trainer.processes,
            micro_batch=trainer.micro_batch,
            data_fingerprint=dataset.fingerprint,
            unigram_entropy=unigram_entropy,
            initial_weights=fingerprints(trainer.whole_model()),
        )

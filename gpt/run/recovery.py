"""After a failure: roll back to a checkpoint, locate the failure, or advise on memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

from torch import Tensor

from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.state import Progress
from gpt.data.sequences import ValidationSequences
from gpt.diagnostics.failure import first_nonfinite
from gpt.diagnostics.fault import FaultLocation
from gpt.errors import Fault, InputError, option
from gpt.hardware.device import host_tensor
from gpt.hardware.memory import is_out_of_memory, smaller
from gpt.model.gpt2 import GPT
from gpt.run.opening import restore
from gpt.trainer import Trainer

MakeBatch = Callable[[int], tuple[Tensor, Tensor]]  # step -> inputs and targets, on the host


def roll_back(
    trainer: Trainer,
    manager: CheckpointManager,
    progress: Progress,
    fault: Fault,
    first_inputs: Callable[[], Tensor],
) -> Progress | None:
    """Return to the last scheduled checkpoint or to step 0, and skip the batches trained on since.

    Chowdhery et al. 2022 (PaLM, section 5.1) did so by hand, and the spikes did not recur.

    Returns:
        The new progress; None, with nothing changed, if nothing intact is left to return to.
    """
    try:
        checkpoint = manager.newest(lambda step: manager.is_scheduled(step, progress))
    except InputError:
        return None
    if checkpoint is None and progress.start_step:
        return None
    try:
        restored = restore(trainer, checkpoint, first_inputs)
    except InputError:  # the weights of init_from are gone
        return None
    manager.drop_unscheduled(progress)
    manager.saved_step = restored.step or None
    restored.rollbacks = progress.rollbacks + 1
    restored.protected_steps = progress.protected_steps
    restored.skipped_batches = progress.skipped_batches + fault.step - restored.step
    return restored


def locate_by_replay(
    trainer: Trainer,
    manager: CheckpointManager,
    lr_scale: Callable[[int], float],
    fault: Fault,
    make_batch: MakeBatch,
    first_inputs: Callable[[], Tensor],
    notify: Callable[[str], object],
) -> FaultLocation | None:
    """Find where a number first became non-finite, by repeating the run from its last checkpoint.

    The failed update corrupted the weights, so training is repeated up to the last good ones.

    Raises:
        StepInterruptedError: a stop was requested.
    """
    try:
        checkpoint = manager.newest()
        restore(trainer, checkpoint, first_inputs)
    except InputError:
        return None
    first = checkpoint.step + 1 if checkpoint else 1
    if first < fault.step:
        notify(f"locating the failure: repeating steps {first} to {fault.step}")
    for step in range(first, fault.step + 1):
        trainer.check_stop()
        inputs, targets = make_batch(step)
        loss, norm = trainer.backward(step, inputs, targets)
        failed = not loss.isfinite() or not (norm.isfinite() or trainer.scaler.is_enabled())
        if failed and (step == fault.step or not trainer.skips_nonfinite):
            break
        trainer.update(lr_scale(step), loss, norm)
    return locate_in_batch(trainer, step, inputs, targets)


def locate_in_batch(
    trainer: Trainer, step: int, inputs: Tensor, targets: Tensor
) -> FaultLocation | None:
    """Find what becomes non-finite first in a training batch with the weights as they are."""
    x, y = trainer.to_device(inputs), trainer.to_device(targets)
    return _first_nonfinite(trainer, trainer.whole_model(), trainer.micro_batches(step, x, y))


def locate_in_validation(trainer: Trainer, sequences: ValidationSequences) -> FaultLocation | None:
    """Find what becomes non-finite first in the validation sequences."""
    return _first_nonfinite(
        trainer,
        trainer.whole_model().eval(),
        (
            (host_tensor(x, trainer.device), host_tensor(y, trainer.device))
            for x, y in sequences.batches(trainer.micro_batch)
        ),
    )


def _first_nonfinite(
    trainer: Trainer, model: GPT, batches: Generator[tuple[Tensor, Tensor]]
) -> FaultLocation | None:
    with contextlib.closing(batches):
        for x, y in batches:
            trainer.check_stop()
            x, y = trainer.to_device(x), trainer.to_device(y)
            with trainer.autocast():
                place = first_nonfinite(model, x, y, trainer.config.training.z_loss)
            if place is not None:
                return place
    return None


# ---------------------------------------------------------------------------------------------
# Out of memory

SINGLE = "training.micro_batch: out of memory with a single sequence at a time ({})"


def advise_on_memory(trainer: Trainer, step: int, make_batch: MakeBatch, shortage: str) -> str:
    """A message that names a smaller micro-batch whose forward and backward pass fits.

    Args:
        step: of the next update.
        shortage: the allocator's message.
    """
    if trainer.processes > 1:  # they would all have to try
        return advise_untried(trainer, shortage)
    tried = trainer.micro_batch
    trainer.check_stop = lambda: None  # the run has ended; a second signal kills it
    inputs, targets = make_batch(step)
    fitting = smaller(tried, trainer.config.batch_sequences)
    while fitting is not None and not _fits(trainer, fitting, step, inputs, targets):
        fitting = smaller(fitting, trainer.config.batch_sequences)
    if fitting is None:
        return SINGLE.format(shortage)
    automatic = trainer.config.training.micro_batch == "auto"
    return (
        f"training.micro_batch: out of memory with {tried} sequences at a time; {fitting} "
        f"would fit;\n{option('training.micro_batch')} {fitting}"
        + ("" if automatic else ", or auto, which finds one that fits,")
        + " resumes from the last checkpoint"
    )


def advise_untried(trainer: Trainer, shortage: str) -> str:
    """A message that names a smaller micro-batch, which may fit."""
    tried, fewer = trainer.micro_batch, smaller(trainer.micro_batch, trainer.config.batch_sequences)
    if fewer is None:
        return SINGLE.format(shortage)
    return (
        f"training.micro_batch: out of memory with {tried} sequences at a time;\n"
        f"{option('training.micro_batch')} {fewer} may fit, and resumes from the last checkpoint"
    )


def _fits(trainer: Trainer, micro_batch: int, step: int, inputs: Tensor, targets: Tensor) -> bool:
    """Whether `backward` has memory for micro-batches of that size."""
    trainer.micro_batch = micro_batch
    trainer.discard_gradients()
    try:
        trainer.backward(step, inputs, targets)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True

"""When a run saves a checkpoint, which one is its best, and which ones are deleted again.

A checkpoint is scheduled if an uninterrupted run would save it: every `checkpoint.every` steps, at
the last step, and at the step where the run directory began. Others are saved only for a stop, or
when a run gives up. Those of a stop are deleted once they are not needed, so that a stopped run
ends with the same files as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gpt import checkpoint as store
from gpt.checkpoint import Checkpoint
from gpt.checkpoint.state import Progress
from gpt.config import Config


class CheckpointManager:
    """The checkpoints of one run, written in a thread while training continues.

    Args:
        folder: the run's checkpoints/.
        saved_step: the step whose checkpoint this run saved last, if any.
    """

    def __init__(self, folder: Path, config: Config, *, saved_step: int | None = None) -> None:
        self.folder, self.config, self.saved_step = folder, config, saved_step
        self._writer = store.BackgroundWriter()

    def is_scheduled(self, step: int, progress: Progress) -> bool:
        """Whether an uninterrupted run saves at that step; pruning may delete it later."""
        if progress.pending and step == progress.step:  # its evaluation comes first
            return False
        ends = (self.config.training.steps, progress.start_step)
        return step % self.config.save_every == 0 or step in ends

    def save(
        self, progress: Progress, make: Callable[[bool], Checkpoint], *, evaluated: bool
    ) -> None:
        """Start to write a checkpoint of the step in `progress`, and then prune.

        Args:
            make: returns the checkpoint, given whether it is the best so far.
            evaluated: whether the validation loss in `progress` is of this step.

        Raises:
            OSError: the checkpoint before this one could not be written.
        """
        before = progress.best_saved_val_loss
        if (
            evaluated
            and progress.val_loss is not None
            and self.is_scheduled(progress.step, progress)
        ):
            progress.best_saved_val_loss = (
                progress.val_loss if before is None else min(progress.val_loss, before)
            )
        best = progress.best_saved_val_loss != before
        checkpoint, snapshot = make(best).copy(), replace(progress)
        replaces, self.saved_step = self.saved_step == progress.step, progress.step

        def write() -> None:
            store.save(self.folder, checkpoint, best=best, replaces=replaces)
            self.prune(snapshot)

        self._writer.start(write)

    def prune(self, progress: Progress) -> None:
        """Delete the checkpoints that the config does not keep."""
        config = self.config.checkpoint
        found = list(store.steps(self.folder))
        scheduled = [step for step in found if self.is_scheduled(step, progress)]
        kept = {*scheduled[-config.keep :], *progress.protected_steps}
        if config.keep_every is not None:
            kept.update(step for step in found if step % config.keep_every == 0)
        store.prune(self.folder, kept)

    def drop_unscheduled(self, progress: Progress) -> None:
        """Delete what was saved for a stop: an uninterrupted run would end without it."""
        found = store.steps(self.folder)
        scheduled = [path.name for step, path in found.items() if self.is_scheduled(step, progress)]
        if scheduled:
            store.write_pointers(self.folder, scheduled[-1], best=False)
        else:
            (self.folder / "latest").unlink(missing_ok=True)
        self.prune(progress)

    def newest(self, among: Callable[[int], bool] = lambda step: True) -> Checkpoint | None:
        """The newest intact checkpoint, None if there is none.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        return store.newest_intact(self.folder, among)[0]

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            OSError: a checkpoint could not be written.
        """
        self._writer.wait()

    def close(self) -> None:
        """Finish what the thread is writing, and end it."""
        self._writer.close()

"""One run: everything between its steps, from opening its directory to writing its result.

`gpt.training.fit` drives it, and gpt/ensemble.py drives many at once. The arithmetic of a step is
the trainer's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt import checkpoint as store
from gpt import metrics
from gpt.checkpoint import Checkpoint
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.state import Progress, State, read_state
from gpt.config import Config
from gpt.data import tokenizer
from gpt.data.prefetch import prefetch
from gpt.data.prepared import Dataset
from gpt.data.sequences import TrainingSequences, ValidationSequences
from gpt.diagnostics.curvature import loss_hessian, measure_sharpness, stability_threshold
from gpt.diagnostics.failure import advice, describe_location
from gpt.diagnostics.fault import Failure, FaultLocation
from gpt.diagnostics.layers import LayerStats
from gpt.diagnostics.noise_scale import measure_noise_scale, part_size
from gpt.errors import Fault, InputError, NonFiniteError, StepInterruptedError
from gpt.generation import continue_text
from gpt.hardware.device import host_tensor
from gpt.hardware.memory import is_out_of_memory, release_memory
from gpt.io.console import Console
from gpt.io.files import write_text
from gpt.run import fallback, opening, recovery
from gpt.run.directory import RunDirectory, RunResult, Status, guessing_losses
from gpt.run.log import Measured, RunLog, Update
from gpt.run.resume import ResumePlan, lr_scale
from gpt.tracking import Tracking
from gpt.trainer import Trainer

CALIBRATION_SEQUENCES = 64  # at most this many, from the first batch, calibrate a placement


class Run:
    """Everything between the steps of a run: logging, evaluation, samples, checkpoints, the result.

    Args:
        plan: the run directory, locked by this process, and the checkpoint to resume from.
        dataset: the prepared data of `config.data`.
        trainer: its state is set here.
        stop, on_update: as for `train`.
        save_checkpoints: whether scheduled checkpoints are saved; one for a stop always is.
        plot: whether loss.png is drawn at the end.

    Raises:
        InputError: the data does not suit the config or the checkpoint, or the directory cannot be
            written.
    """

    def __init__(
        self,
        config: Config,
        plan: ResumePlan,
        dataset: Dataset,
        trainer: Trainer,
        console: Console,
        *,
        stop: Callable[[], bool],
        on_update: Callable[[], object],
        save_checkpoints: bool = True,
        plot: bool = True,
    ) -> None:
        self.config, self.directory, self.dataset = config, plan.directory, dataset
        self.trainer, self.console = trainer, console
        self.stop, self.on_update = stop, on_update
        self.save_checkpoints, self.plot = save_checkpoints, plot
        self.too_large: set[str] = set()  # measures for which memory has run out
        if config.sampling.tokens:  # an unusable prompt fails now, not at the first sample
            tokenizer.encode(dataset.encoding, config.sampling.prompt, "sampling.prompt")
        context = config.model.context
        self.sequences = TrainingSequences(
            dataset.train,
            context,
            config.data_seed,
            weights=dataset.weights,
            windows=config.data.windows,
        )
        self.validation = ValidationSequences(dataset.val, context, config.evaluation.sequences)
        self.unigram_entropy = dataset.unigram_entropy(self._target_counts)
        opening.check_tokens(plan, config, dataset)
        self.progress = opening.restore(
            trainer, plan.checkpoint, self._first_inputs, plan.pretrained
        )
        opening.adopt_checkpoint(plan, config, trainer, self.progress)
        self._open(plan)

    def _first_inputs(self) -> Tensor:
        few = min(self.config.batch_sequences, CALIBRATION_SEQUENCES)
        return host_tensor(self.sequences.batch(1, few)[0], self.trainer.device)

    def _open(self, plan: ResumePlan) -> None:
        """Make the directory ready for training, and write what is already known into it.

        The process may be killed at any point, so no step here depends on a later one.
        """
        directory, config, step = self.directory, self.config, self.progress.step
        kept = metrics.read_up_to(directory.metrics, step) if plan.resuming else []
        if self.progress.pending:  # an evaluation of this step, cut short, is repeated
            kept = [line for line in kept if line["step"] < step or "val_loss" not in line]
        opening.make_folders(plan, config)
        opening.announce(plan, config, step, self.console)
        saved_step = step if plan.resuming else None
        self.checkpoints = CheckpointManager(directory.checkpoints, config, saved_step=saved_step)
        if plan.checkpoint is not None and plan.resuming:  # finish what was left undone by a kill
            name, best = plan.checkpoint.name, bool(plan.checkpoint.state["best"])
            if self._note_changes(plan):  # state.json must say so before config.yaml changes
                store.save(directory.checkpoints, self._checkpoint(best), best=best, replaces=True)
            store.write_pointers(directory.checkpoints, name, best=best)
            self.checkpoints.prune(self.progress)
        elif step:  # a copy of the other run's checkpoint, to restart from after a crash
            store.save(directory.checkpoints, self._checkpoint(best=False))
        opening.write_identity(plan, config, self.dataset, self.trainer, step, self.unigram_entropy)
        self.environment = directory.environment.read_text("utf-8")
        self.log = RunLog(directory.metrics, config, self.trainer.model, self.console, kept)
        self.tracking = Tracking(config, directory.path, self.console.say)

    def _note_changes(self, plan: ResumePlan) -> bool:
        """Note in the progress which checkpoints are kept only because of the earlier options.

        Returns:
            Whether the progress now says more than the checkpoint, also about the learning rate.
        """
        progress = self.progress
        if any(f"checkpoint.{key}" in plan.changes for key in ("every", "keep", "keep_every")):
            found = store.steps(self.directory.checkpoints)
            progress.protected_steps = tuple(step for step in found if step != progress.step)
            return True
        if plan.before is not None and progress.rewarm_from is not None:
            return True
        # training.steps was raised: this step is scheduled because the run once ended here
        return progress.start_step == progress.step and progress.step % self.config.save_every != 0

    # -- What the loop calls ---------------------------------------------------------------------

    def begin(self) -> RunResult | None:
        """Prepare for the next update; returns the result if the run ends before it.

        Raises:
            NonFiniteError: the validation loss is not finite.
        """
        step = self.progress.step
        self.began = time.monotonic() - self.progress.seconds
        result = None
        if self.stop():
            return self.end("interrupted", f"stopped before step {step + 1}")
        ending = self._early_end()
        if ending is not None:  # it was killed before it wrote its result
            return self.end("finished", ending)
        if step == 0:
            try:
                self._evaluate()
            except StepInterruptedError:
                return self.end("interrupted", "stopped before step 1")
        if self.progress.pending:
            result = self._complete_step(stopping=False)
        self.console.start(self.config.training.steps, step)
        self.log.start_clock()
        return result

    def batches(self) -> Generator[tuple[int, Tensor, Tensor]]:
        """Step number, inputs and targets of all updates to come; prefetched for a GPU."""
        steps = range(self.progress.step + 1, self.config.training.steps + 1)
        on_gpu = self.trainer.device.type == "cuda"
        batches = prefetch(self._pinned_batch, steps) if on_gpu else (self.batch(n) for n in steps)
        with contextlib.closing(batches):
            for step, (inputs, targets) in zip(steps, batches, strict=True):
                yield step, inputs, targets

    def _pinned_batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(step)
        return inputs.pin_memory(), targets.pin_memory()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of update `step`: (sequences, T) each, on the host.

        Raises:
            StepInterruptedError: a stop was requested.
        """
        number = step + self.progress.skipped_batches
        x, y = self.sequences.batch(
            number, self.config.batch_sequences, check=self.trainer.check_stop
        )
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)) for part in (x, y))
        return inputs, targets

    def lr_scale(self, step: int) -> float:
        """The learning rate of update `step`, as a multiple of `optimizer.learning_rate`."""
        return lr_scale(self.config, step, self.progress.rewarm_from)

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step`."""
        return self.lr_scale(step) * self.config.optimizer.learning_rate

    def before_update(self, step: int, inputs: Tensor, targets: Tensor) -> LayerStats | None:
        """Measure what `diagnostics` asks for, and add the inputs to the digest.

        Raises:
            StepInterruptedError: a stop was requested.
        """
        every = self.config.diagnostics.every
        due = every is not None and (step == 1 or step % every == 0)
        layer_stats = self._measure(step, inputs, targets) if due else None
        for sequence in inputs.numpy():  # one by one: the digest is the same for any batch size
            inputs_so_far = self.progress.inputs_digest.encode() + sequence.tobytes()
            self.progress.inputs_digest = hashlib.sha256(inputs_so_far).hexdigest()
        return layer_stats

    def _measure(self, step: int, inputs: Tensor, targets: Tensor) -> LayerStats:
        """The snapshot of an update, before the update."""
        diagnostics, trainer = self.config.diagnostics, self.trainer
        optimizer = trainer.optimizer
        adam, eps = optimizer.by_parameter("betas"), self.config.optimizer.eps
        moments, updates = optimizer.second_moments()
        layer_stats = LayerStats(trainer.model, adam, eps, moments)
        few = min(diagnostics.sequences, trainer.micro_batch)
        with trainer.autocast():
            x = trainer.to_device(inputs[:few])
            self._attempt("activations", lambda: layer_stats.measure_activations(x))
        of_model = layer_stats.of_model
        if diagnostics.sharpness:
            of_model["sharpness"] = None  # unless there is memory for it
            sharpness = functools.partial(self._sharpness, inputs, targets, moments, updates)
            self._attempt("sharpness", lambda: of_model.update(sharpness()))
            rate = self.learning_rate(step)
            of_model |= stability_threshold(self.config.optimizer, rate, updates + 1)
        if diagnostics.noise_scale:
            of_model["noise_scale"] = None
            self._attempt("noise_scale", lambda: of_model.update(self._noise(inputs, targets)))
        return layer_stats

    def _attempt(self, name: str, measure: Callable[[], object]) -> None:
        """Measure something; if memory runs out, leave it out and say so, once."""
        try:
            measure()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release_memory(self.trainer.device)  # outside `except`: the failed attempt's memory is free
        if name not in self.too_large:
            self.too_large.add(name)
            self.console.say(f"diagnostics: not enough memory to measure {name}; leaving it out")

    def _sharpness(
        self, inputs: Tensor, targets: Tensor, moments: Mapping[str, Tensor], updates: int
    ) -> metrics.Record:
        trainer, few = self.trainer, slice(self.config.diagnostics.sharpness)
        product = loss_hessian(
            trainer.model,
            trainer.to_device(inputs[few]),
            trainer.to_device(targets[few]),
            self.config.training.z_loss,
            micro_batch=trainer.micro_batch,
            check=trainer.check_stop,
        )
        return measure_sharpness(trainer.model, product, trainer.optimizer, moments, updates)

    def _noise(self, inputs: Tensor, targets: Tensor) -> metrics.Record:
        trainer = self.trainer
        x, y = trainer.to_device(inputs), trainer.to_device(targets)
        part = part_size(len(x), trainer.micro_batch)
        return measure_noise_scale(trainer.model, x, y, self.config.training.z_loss, part)

    def after_update(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        skipped: bool,
        layer_stats: LayerStats | None,
    ) -> RunResult | None:
        """Log an update; evaluate, sample and save if due; returns the result if the run has ended.

        Returns:
            None while the run continues.

        Raises:
            NonFiniteError: something is not finite.
        """
        if layer_stats is not None:
            layer_stats.measure_update()
        rate, digest = self.learning_rate(step), self.progress.inputs_digest[:16]
        self.log.add(Update(step, loss, grad_norm, rate, digest, skipped, layer_stats))
        self.on_update()
        stopping = self.stop()
        if not (stopping or any(self._due(step)) or step % self.log.read_every == 0):
            return None
        self._count_updates()
        result = self._complete_step(stopping)
        self.log.start_clock()
        return result

    def interrupt(self) -> RunResult:
        """Save the newest update, because a stop was requested before the next one was made.

        Raises:
            NonFiniteError: something is not finite.
        """
        self._count_updates()
        step = self.progress.step
        if step == 0:
            return self.end("interrupted", "stopped before step 1")
        if step != self.checkpoints.saved_step:
            self._check_weights()
        with self._or_elsewhere(evaluated=False):
            if step != self.checkpoints.saved_step:
                self._save(evaluated=False)
            self.checkpoints.wait()
        return self.end("interrupted", f"stopped after step {step}; state saved")

    def finish(self) -> RunResult:
        """End a run that has made all its updates."""
        return self.end("finished", f"completed all {self.config.training.steps} steps")

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and close the log and its trackers."""
        self.log.metrics.close()
        self.checkpoints.close()
        self.tracking.close()

    # -- After an update -------------------------------------------------------------------------

    def _count_updates(self) -> None:
        """Read the updates since the last call, count them in the progress, and log them.

        Raises:
            NonFiniteError: one of them is not finite; those after it are dropped.
        """
        updates, seconds = self.log.read()
        self.progress.update_seconds += seconds
        counted: list[Measured] = []
        try:
            for measured in updates:
                counted.append(measured)
                self._count(measured)
        finally:
            if counted:
                self.log.write(counted, seconds / len(updates))

    def _count(self, measured: Measured) -> None:
        """Count an update.

        Raises:
            NonFiniteError: it is not finite, and the config does not let it be skipped (again).
        """
        training, progress, update = self.config.training, self.progress, measured.update
        progress.step, progress.train_loss = update.step, _finite_or_none(measured.loss)
        progress.skipped_updates += update.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if update.skipped else 0
        if update.skipped and training.nonfinite == "skip":
            self.console.say(
                f"step {update.step}: skipped: loss {measured.loss:g}, gradient norm "
                f"{measured.grad_norm:g} ({progress.skipped_updates} skipped so far)"
            )
        in_a_row = progress.skipped_in_a_row
        too_often = in_a_row > training.nonfinite_limit
        again = f", and {in_a_row} updates in a row were skipped" if too_often else ""
        values = {"training loss": measured.loss, "gradient norm": measured.grad_norm}
        for quantity, value in values.items():
            overflow = quantity == "gradient norm" and training.precision == "fp16"
            forgiven = update.skipped and (overflow or training.nonfinite == "skip")
            if not math.isfinite(value) and (too_often or not forgiven):
                text = f"the {quantity} became {value} at step {update.step}{again}"
                raise NonFiniteError(update.step, quantity, text)

    def _due(self, step: int) -> tuple[bool, bool, bool]:
        """Whether an evaluation, a sample and a checkpoint are due after update `step`."""
        config, last = self.config, step == self.config.training.steps
        evaluating = last or step % config.evaluation.every == 0
        sampling = last or step % (config.sampling.every or config.evaluation.every) == 0
        saving = last or step % config.save_every == 0
        return evaluating, sampling and config.sampling.tokens > 0, saving and self.save_checkpoints

    def _complete_step(self, stopping: bool) -> RunResult | None:
        """Evaluate, sample and save, if due after the newest update.

        Args:
            stopping: a stop was requested: save, and leave the rest to the resumed run.
        """
        step = self.progress.step
        last = step == self.config.training.steps
        evaluating, sampling, saving = self._due(step)
        if stopping or saving or last:
            self._check_weights()
        stopping = stopping or not self._evaluate_and_sample(evaluating, sampling)
        self.progress.pending = stopping and (evaluating or sampling)
        evaluated = evaluating and not stopping
        ending = self._early_end() if evaluated else None
        with self._or_elsewhere(evaluated=evaluated):
            if stopping or saving or (ending and self.save_checkpoints):
                self._save(evaluated=evaluated)
            if stopping or last or ending:
                self.checkpoints.wait()
        if stopping:
            return self.end("interrupted", f"stopped after step {step}; state saved")
        return self.end("finished", ending) if ending else None

    def _evaluate_and_sample(self, evaluating: bool, sampling: bool) -> bool:
        """Evaluate and sample, if due; returns False, with the progress unchanged, if stopped."""
        before = replace(self.progress)
        try:
            if evaluating:
                self._evaluate()
            if sampling:
                with self._or_elsewhere(evaluated=evaluating):
                    self._sample()
        except StepInterruptedError:
            self.progress = before
            return False
        return True

    def _check_weights(self) -> None:
        if not self.trainer.weights_are_finite():
            step = self.progress.step
            raise NonFiniteError(step, "weight", f"a weight became non-finite at step {step}")

    @functools.cached_property
    def _target_counts(self) -> npt.NDArray[np.int64]:
        """How often each token is a target of the validation sequences, (vocabulary,)."""
        vocabulary = self.dataset.encoding.n_vocab
        counts = np.zeros(vocabulary, np.int64)
        for _, targets in self.validation.batches(64):
            counts += np.bincount(targets.ravel(), minlength=vocabulary)
        return counts

    @functools.cached_property
    def _validation_size(self) -> tuple[int, int]:
        """Tokens of the validation targets, and the bytes of text that they stand for."""
        byte_lengths = np.array(tokenizer.byte_lengths(self.dataset.encoding))
        return int(self._target_counts.sum()), int(self._target_counts @ byte_lengths)

    def _evaluate(self) -> None:
        """Measure and log the validation loss on the fixed sequences.

        Raises:
            NonFiniteError: it is not finite.
            StepInterruptedError: a stop was requested meanwhile.
        """
        progress = self.progress
        loss = self.trainer.evaluate(self.validation)
        tokens, text_bytes = self._validation_size
        bits = loss * tokens / math.log(2) / text_bytes
        self.log.metrics.write(
            [{"step": progress.step, "val_loss": loss, "val_bits_per_byte": bits}]
        )
        self.console.say(
            f"step {progress.step}: validation loss {loss:.4f} nats per token, "
            f"{bits:.4f} bits per byte"
        )
        progress.val_loss, progress.val_bits_per_byte = _finite_or_none(loss), _finite_or_none(bits)
        if not math.isfinite(loss):
            text = f"the validation loss became {loss} at step {progress.step}"
            raise NonFiniteError(progress.step, "validation loss", text)
        best = progress.best_val_loss
        improved = best is None or loss < best
        progress.best_val_loss = loss if improved else best
        progress.evals_since_best = 0 if improved else progress.evals_since_best + 1
        learned = loss < self.unigram_entropy - metrics.LEARNED_MARGIN
        progress.stalled_evals = 0 if learned or progress.step == 0 else progress.stalled_evals + 1

    def _gives_up(self) -> bool:
        patience = self.config.evaluation.give_up_after
        return patience is not None and self.progress.stalled_evals >= patience

    def _stops_early(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.evals_since_best >= patience

    def _early_end(self) -> str | None:
        """Why the run ends at this step, before its last one; None if it does not."""
        progress = self.progress
        if progress.step == self.config.training.steps:
            return None
        if self._gives_up():
            known = f"no better than token frequencies for {progress.stalled_evals} evaluations"
            return f"given up at step {progress.step}: {known} in a row"
        if self._stops_early():
            best = f"no validation loss below {progress.best_val_loss:.4f}"
            return (
                f"stopped early at step {progress.step}: {best} in {progress.evals_since_best} "
                "evaluations in a row"
            )
        return None

    def _sample(self) -> None:
        """Write a sample of the current model's text into samples/.

        Raises:
            StepInterruptedError: a stop was requested meanwhile.
        """
        self.trainer.check_stop()
        options = self.config.sampling
        text = continue_text(
            self.trainer.whole_model(),
            self.dataset.encoding,
            options.prompt,
            tokens=options.tokens,
            sampling=options,
            seed=self.config.seed,
            on_token=self.trainer.check_stop,
        )
        path = self.directory.samples / f"step-{self.progress.step:08d}.txt"
        write_text(path, text + "\n")

    # -- Saving ----------------------------------------------------------------------------------

    def _save(self, *, evaluated: bool) -> None:
        """Start to write a checkpoint of this step, once its metrics are on disk.

        Raises:
            OSError: the metrics, or the checkpoint before this one, could not be written.
        """
        self.log.metrics.sync()
        self.progress.seconds = time.monotonic() - self.began
        self.checkpoints.save(self.progress, self._checkpoint, evaluated=evaluated)

    def _checkpoint(self, best: bool) -> Checkpoint:
        state = State(
            step=self.progress.step,
            progress=self.progress,
            scaler=self.trainer.scaler.state_dict(),
            micro_batch=self.trainer.micro_batch,
            best=best,
            data_fingerprint=self.dataset.fingerprint,
        )
        return Checkpoint(
            *self.trainer.tensors(),
            asdict(state),
            tokenizer.to_json(self.dataset.encoding),
        )

    @contextlib.contextmanager
    def _or_elsewhere(self, *, evaluated: bool) -> Iterator[None]:
        """Save the run elsewhere if its own directory cannot be written.

        Raises:
            InputError: the directory could not be written; gives the run's new directory.
        """
        try:
            yield
        except OSError as error:
            raise self._save_to_fallback(error, evaluated=evaluated) from None

    def _save_to_fallback(self, why: OSError, *, evaluated: bool) -> InputError:
        """Save this run, as it is now, in a directory elsewhere; returns a message for the user."""
        with contextlib.suppress(OSError):  # an earlier checkpoint failed too
            self.checkpoints.wait()
        step = self.progress.step

        def save(directory: RunDirectory) -> None:
            self.directory = directory
            self.log.restart(directory.metrics, metrics.read_up_to(directory.metrics, step))
            self.progress.best_saved_val_loss, self.progress.start_step = None, step
            self.checkpoints.close()
            self.checkpoints = CheckpointManager(directory.checkpoints, self.config)
            self._save(evaluated=evaluated)
            self.checkpoints.wait()

        return fallback.save_to_fallback(
            self.directory,
            self.config,
            step,
            why,
            files={
                "tokenizer.json": tokenizer.to_json(self.dataset.encoding),
                "environment.json": self.environment,
                "metrics.jsonl": self.log.metrics.contents(),
            },
            save=save,
        )

    # -- Failure ---------------------------------------------------------------------------------

    def roll_back(self, fault: Fault) -> bool:
        """Return to the last scheduled checkpoint or to step 0; skip the batches trained on since.

        Returns:
            False, with nothing done, if `training.nonfinite` is not rollback, the limit is reached,
            or nothing intact is left to return to.
        """
        training, before = self.config.training, self.progress
        self._wait_for_checkpoint()
        if training.nonfinite != "rollback" or before.rollbacks >= training.nonfinite_limit:
            return False
        now = recovery.roll_back(self.trainer, self.checkpoints, before, fault, self._first_inputs)
        if now is None:
            return False
        now.seconds = time.monotonic() - self.began
        self.progress = now
        self.log.rewind(now.step)
        self.directory.note(
            "rolled back", now.step, why=fault.text, skipped_batches=now.skipped_batches
        )
        self.console.close()
        self.console.say(
            f"{fault.text}: rollback {now.rollbacks} to step {now.step}, skipping the batches since"
        )
        return True

    def _wait_for_checkpoint(self) -> None:
        try:
            self.checkpoints.wait()
        except OSError as error:  # then that checkpoint does not exist
            self.console.say(f"{error.filename}: {error.strerror}")

    def _locate(self, fault: Fault, *, applied: bool) -> FaultLocation | None:
        """Where inside the network a failure began.

        Args:
            applied: whether the failed update was applied. If so, the weights are corrupt and the
                last steps are repeated; if not, the weights are intact and its batch suffices.
        """
        if fault.quantity == "validation loss":
            return recovery.locate_in_validation(self.trainer, self.validation)
        if not applied:
            return recovery.locate_in_batch(self.trainer, fault.step, *self.batch(fault.step))
        return recovery.locate_by_replay(
            self.trainer,
            self.checkpoints,
            self.lr_scale,
            fault,
            self.batch,
            self._first_inputs,
            self.console.say,
        )

    def diverge(self, fault: Fault, *, applied: bool = True) -> RunResult:
        """End as diverged, with the failed quantity, its origin, and advice.

        Args:
            applied: whether the update that failed was applied.
        """
        self._wait_for_checkpoint()
        try:
            place = self._locate(fault, applied=applied)
        except StepInterruptedError:
            return self._interrupt_search(fault)
        self.checkpoints.drop_unscheduled(self.progress)
        reason = fault.text
        if place is not None:
            reason += f", first {describe_location(place, self.config.model.layers)}"
        updates = fault.step if fault.quantity in ("weight", "validation loss") else fault.step - 1
        tips = advice(self.config, place, updates)
        failure = Failure(fault.step, fault.quantity, place, tuple(tips))
        return self.end("diverged", reason, failure)

    def _interrupt_search(self, fault: Fault) -> RunResult:
        """End at the newest checkpoint: a resumed run diverges again, and searches again."""
        try:
            checkpoint = self.checkpoints.newest()
        except InputError:
            checkpoint = None
        self.progress = read_state(checkpoint).progress if checkpoint else Progress()
        reason = f"{fault.text}; stopped while locating the cause; a resumed run searches again"
        return self.end("interrupted", reason)

    # -- The end ---------------------------------------------------------------------------------

    def end(self, status: Status, reason: str, failure: Failure | None = None) -> RunResult:
        """Draw loss.png and write result.json."""
        progress, config = self.progress, self.config
        ended_early = status == "finished" and progress.step < config.training.steps
        self.log.metrics.close()
        self.console.close()
        tokens = progress.step * self.log.batch_tokens
        result = RunResult(
            status=status,
            step=progress.step,
            tokens=tokens,
            train_loss=progress.train_loss,
            val_loss=progress.val_loss,
            best_val_loss=progress.best_val_loss,
            val_bits_per_byte=progress.val_bits_per_byte,
            seconds=time.monotonic() - self.began,
            tokens_per_second=tokens / progress.update_seconds if tokens else 0.0,
            reason=reason,
            directory=self.directory.path,
            failure=failure,
            skipped_updates=progress.skipped_updates,
            rollbacks=progress.rollbacks,
            gave_up=ended_early and self._gives_up(),
            stopped_early=ended_early and not self._gives_up(),
        )
        if self.plot and progress.step and status != "interrupted":  # an interrupt must end soon
            from gpt.run.plot import plot_run  # loads matplotlib, so not before training

            plot_run(
                metrics.read(self.directory.metrics),
                self.directory.plot,
                title=config.name,
                levels=guessing_losses(self.unigram_entropy, self.dataset.encoding.n_vocab),
                clip=config.optimizer.clip,
            )
        self.directory.write_result(result)  # last: it marks the run as ended
        return result


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""The training loop: `train(config)` makes a run directory and returns a `RunResult`.

    tokenizer and data -> GPT -> optimizer ->(resume) -> update, update, update ... -> RunResult

One update is: learning rate for this step, forward and backward over the micro-batches of the
step's batch, gradient norm, clipping, optimizer. After it come, when due, evaluation, a sample and
a checkpoint. Everything random is a function of (seed, step), so a resumed run repeats the
undisturbed one bit for bit on one machine. A non-finite loss is a result, not an exception; what
comes of it is training.nonfinite.

Nothing here is specific to a placement, an optimizer or a schedule: they come from their tables.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from gpt import checkpoint as checkpoints
from gpt.checkpoint import Checkpoint
from gpt.config import Config, changed
from gpt.data import tokenizer
from gpt.data.preparation import prepare
from gpt.data.prepared import Dataset
from gpt.data.sequences import Batch, TrainingSequences, ValidationSequences, prefetch
from gpt.diagnostics.failure import (
    Failure,
    FaultLocation,
    advice,
    describe_location,
    first_nonfinite,
)
from gpt.diagnostics.layers import EPS_ALARM, LayerStats
from gpt.errors import InputError, OutOfMemoryError
from gpt.generate import continue_text
from gpt.init import fingerprints, initialize
from gpt.io.console import Console
from gpt.io.files import lock_directory, remove_partial, write_bytes, write_text
from gpt.model import GPT
from gpt.optim import Optimizer
from gpt.placement import check
from gpt.rng import global_generator
from gpt.run import metrics, plan
from gpt.run.directory import (
    Opened,
    RunDirectory,
    RunResult,
    Status,
    command_line,
    ended_run,
    load_weights,
    open_run,
)
from gpt.run.state import Progress, State, read_state
from gpt.schedule import rate

DTYPES = {  # of matrix products and attention; weights and their sums stay fp32
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

Computed = TypeVar("Computed")

READ_EVERY = {"cpu": 1}  # steps between reads of the metrics where reading costs nothing
CALIBRATION_SEQUENCES = 64  # of the first batch, at most, for what a placement sets from data


def train(
    config: Config,
    out_dir: str | Path | None = None,
    *,
    resume: str = "auto",
    quiet: bool = False,
    stop: Callable[[], bool] = lambda: False,
    made: Callable[[], object] = lambda: None,
) -> RunResult:
    """Train a GPT as `config` says.

    Several threads may train at once, each in a directory of its own; those with dropout take turns
    in it. What is global to the process (torch's generators, the treatment of denormal numbers) is
    as before when it returns.

    Args:
        out_dir: the run directory; runs/NAME unless given.
        resume: "auto", "never" or a checkpoint folder, see `gpt.run.directory.open_run`.
        quiet: print nothing.
        stop: asked again and again, also in the middle of an update or an evaluation; once true,
            the last update is saved and the run ends as interrupted. What was due after that update
            comes first when the run is resumed.
        made: called after every update.

    Returns:
        How it ended. A diverged run is a result with status "diverged"; its last good checkpoint
        stays.

    Raises:
        InputError: the config cannot be run here; the directory holds another run, or another
            process trains there, or it cannot be written (then the state is saved elsewhere, where
            there is somewhere).
        OutOfMemoryError: not even one sequence at a time fits, or not as many as the config says.
        StoppedError: `stop` came true while data was prepared; a start goes on from there.
    """
    check(config.model)
    path = Path(out_dir) if out_dir is not None else Path("runs") / config.name
    device = plan.pick_device(config.training.device)
    ended = ended_run(config, path, resume)
    if ended is not None:
        return ended
    plan.check_fits(config, device)
    with (
        lock_directory(path, f"{path}: another process trains there"),
        flush_denormals(),
        contextlib.closing(Console(quiet)) as console,
    ):
        opened = open_run(config, path, resume)
        if opened.result is not None:  # another process has just finished it
            return opened.result
        dataset = prepare(config.data, console, stop)
        return Training(config, opened, dataset, device, console, stop, made).run()


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Within it, this thread takes numbers too small for full precision as 0; after it, as before.

    On a CPU a failing run is otherwise many times slower.
    """
    before = sys.float_info.min / 2 == 0  # whether they are flushed already
    if not before:
        torch.ones(2**20).add_(1)  # starts torch's other threads now: they inherit the setting
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@dataclass(frozen=True)
class Gradients:
    """What a run asks for first in an update: the gradients of one batch, left in its weights.

    The answer is the loss and the norm of the gradients, scalars on the device; None if the run was
    asked to stop before they were computed.

    Attributes:
        inputs, targets: (sequences, T), on the host.
    """

    step: int
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Apply:
    """What it asks for next: the update, at `share` of the full rate, clipped.

    The answer is whether it was skipped because something was not finite.

    Attributes:
        loss, norm: what `Gradients` was answered with.
    """

    share: float
    loss: Tensor
    norm: Tensor


Work: TypeAlias = Generator[Gradients | Apply, Any, "RunResult"]


@dataclass(frozen=True)
class _Update:
    """What one update reports; the tensors stay on the device until they are read."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    batches: str
    skipped: bool
    look: LayerStats | None


class _StopAskedError(Exception):
    """A stop was asked for in the middle of something that can be done again after a resume."""


class _Fault(NamedTuple):
    """What was seen not to be finite: after which update, which quantity, and in words."""

    step: int
    quantity: str
    text: str


class Training:
    """One run in progress: data, model, optimizer, and the loop over them.

    Args:
        opened: the run directory, held by this process.
        dataset: what `config.data` says, prepared.
        alone: whether this is all that runs. If not (gpt/ensemble.py), someone else makes the
            updates that `work` asks for, leaves out those that are not finite, and draws loss.png.
        saves: whether checkpoints are saved as scheduled, and not only when the run is stopped.
    """

    def __init__(
        self,
        config: Config,
        opened: Opened,
        dataset: Dataset,
        device: torch.device,
        console: Console,
        stop: Callable[[], bool],
        made: Callable[[], object],
        *,
        alone: bool = True,
        saves: bool = True,
    ) -> None:
        self.config, self.device, self.directory = config, device, opened.run
        self.console, self.stop, self.made = console, stop, made
        self.alone, self.saves = alone, saves
        context, precision = config.model.context, config.training.precision
        self.dataset = dataset
        encoding = self.dataset.encoding
        if config.sampling.tokens:
            tokenizer.encode(encoding, config.sampling.prompt, "sampling.prompt")  # now or never
        self.sequences = TrainingSequences(
            self.dataset.train,
            context,
            config.data_seed,
            weights=self.dataset.weights,
            windows=config.data.windows,
        )
        self.validation = ValidationSequences(
            self.dataset.val, context, config.evaluation.sequences
        )
        self.byte_lengths = np.array(tokenizer.byte_lengths(encoding))
        plan.check_fits(config, device, encoding.n_vocab)
        with global_generator(device):  # torch draws weights of its own, which are then replaced
            self.model = GPT(config.model, encoding.n_vocab).to(device)
        self.model.loss_chunk = config.training.loss_chunk
        self.objective = self.model.objective
        if config.training.compile:  # a last, smaller part of the validation is compiled for itself
            self.objective = torch.compile(self.objective, dynamic=False)
        self.micro_batch = plan.micro_batch(config, encoding.n_vocab, device)
        self.read_every = READ_EVERY.get(device.type, config.training.log_every)
        self.flops_per_token = plan.flops_per_token(config, self.model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.peak_flops = plan.peak_flops(name, precision)
        self.skips = config.training.nonfinite == "skip" or precision == "fp16"
        self.alarmed = False
        self.unigram_entropy = self.dataset.unigram_entropy()
        self._check_tokens(opened)
        self.progress = self._set_state(opened.checkpoint)
        if not opened.resumed:  # `best` is the best of this directory
            self.progress.best_val_loss = self.progress.best_saved_val_loss = None
            self.progress.forked_at = self.progress.step
        elif opened.checkpoint is not None and config.training.micro_batch == "auto":
            self.micro_batch = opened.checkpoint.state["micro_batch"]  # sums keep their order
            if self.micro_batch > config.batch_sequences:
                raise InputError(f"{opened.checkpoint.name}: its micro-batch is no part of a batch")
        if (
            changed(opened.changes, "training.steps")
            and self.progress.step == opened.run.read_config().training.steps
        ):
            self.progress.forked_at = self.progress.step  # where it had ended is kept as scheduled
        self._open_directory(opened)

    def _check_tokens(self, opened: Opened) -> None:
        if opened.checkpoint is None:
            return
        if read_state(opened.checkpoint).data_fingerprint != self.dataset.fingerprint:
            data = [change for change in opened.changes if change.startswith("data.")]
            raise InputError(
                f"{self.directory.path}: the tokens are not those that this run was trained on so "
                f"far ({'; '.join(data) or 'the text is another'});\n"
                "give it the same text, or choose another --out-dir"
            )

    def _set_state(self, checkpoint: Checkpoint | None) -> Progress:
        """Weights and optimizer as they were at `checkpoint`, or before the first update.

        Returns:
            What the run knew of itself then.
        """
        config = self.config
        initialize(self.model, config.model, config.seed)
        self.optimizer = Optimizer(self.model.named_parameters(), config.optimizer)
        fp16 = config.training.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        if checkpoint is None:
            few = min(config.batch_sequences, CALIBRATION_SEQUENCES)
            first = self._host_tensor(self.sequences.batch(1, few)[0])  # of its first sequences
            with global_generator(self.device, config.seed, "calibration"):  # of dropout
                self.model.calibrate(self._on_device(first))
            return Progress()
        state = read_state(checkpoint)
        try:
            load_weights(self.model, checkpoint.model)
            self.optimizer.load_state(checkpoint.optimizer)
            updates = state.progress.step - state.progress.skipped
            if updates and self.optimizer.has_memory and not checkpoint.optimizer:
                raise ValueError("the optimizer's state is missing")
            if state.scaler and fp16:
                self.scaler.load_state_dict(state.scaler)
        except (ValueError, KeyError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{checkpoint.name}: does not fit the config: {said}") from None
        return state.progress

    def _open_directory(self, opened: Opened) -> None:
        run, step, config = self.directory, self.progress.step, self.config.checkpoint
        going_on = opened.resumed and opened.checkpoint is not None
        kept = metrics.read_up_to(run.metrics, step) if going_on else []
        if self.progress.pending:  # an evaluation of this step, cut short, comes again
            kept = [line for line in kept if line["step"] < step or "val_loss" not in line]
        spare = Path(config.spare_dir) if config.spare_dir else None
        for folder in (run.samples, spare):
            try:
                if folder is not None:
                    folder.mkdir(parents=folder is spare, exist_ok=True)
            except OSError as error:
                raise InputError(f"{folder}: cannot be made: {error.strerror}") from None
        for folder in (run.path, run.samples, run.checkpoints):
            remove_partial(folder)
        for damage in opened.skipped:
            self.console.say(f"skipped: {damage}")
        later = self._later_state() if going_on else None
        if later is not None:
            self.console.say(f"a later state of this run is in {later}: --out-dir {later} has it")
        if opened.skipped:
            self.console.say(f"going on from step {step}")
            for path in checkpoints.steps(run.checkpoints).values():
                if not checkpoints.is_intact(path):
                    self.console.say(f"set aside: {checkpoints.set_aside(path)}")
        self.spared: list[int] = []
        if any(changed(opened.changes, f"checkpoint.{key}") for key in ("keep", "keep_every")):
            self.spared = list(checkpoints.steps(run.checkpoints))  # other options kept them
        if opened.checkpoint is not None and going_on:  # what a kill had left undone
            name, best = opened.checkpoint.name, bool(opened.checkpoint.state["best"])
            checkpoints.write_pointers(run.checkpoints, name, best=best)
            self._prune(run.checkpoints)
        elif step:  # another run's checkpoint is where this one starts from, also after a crash
            checkpoints.save(run.checkpoints, self._checkpoint())
        if opened.resumed and not going_on:
            self.console.say("no checkpoint had been saved: starting again from step 0")
        for line in opened.describe_changes(self.config):
            self.console.say(line)
        if opened.resumed:
            run.note(
                "went on",
                step,
                changes=opened.changes,
                skipped=[str(damage) for damage in opened.skipped],
                command=command_line(),
            )
        run.result.unlink(missing_ok=True)
        if opened.changes or not going_on:  # from here on the directory is this run
            write_text(run.config, self.config.to_yaml())
        if not going_on or not run.tokenizer.is_file():
            write_text(run.tokenizer, tokenizer.to_json(self.dataset.encoding))
        if not going_on or not run.environment.is_file():
            run.write_environment(
                self.device,
                micro_batch=self.micro_batch,
                data_fingerprint=self.dataset.fingerprint,
                unigram_entropy=self.unigram_entropy,
                initial_weights=fingerprints(self.model),
            )
        self.saved_step = step if going_on else None
        self.environment = run.environment.read_text("utf-8")
        self.log = metrics.MetricsLog(run.metrics, kept)
        self.writer = checkpoints.BackgroundWriter()

    # -- The loop --------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Train to the end, to divergence, or until a stop is asked for."""
        self.console.say(
            plan.describe(
                self.config,
                self.model,
                device=self.device,
                micro_batch=self.micro_batch,
                train_tokens=self.dataset.train_tokens,
                directory=self.directory.path,
                done=self.progress.step,
            )
        )
        try:
            work, answer = self.work(), None
            with contextlib.closing(work):
                while True:
                    try:
                        wanted = work.send(answer)
                    except StopIteration as ended:
                        return ended.value
                    answer = self._answer(wanted)
        except Exception as error:
            if not plan.is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
        raise OutOfMemoryError(self._what_would_fit(said))  # here, where nothing holds that memory

    def _answer(self, wanted: Gradients | Apply) -> tuple[Tensor, Tensor] | bool | None:
        if isinstance(wanted, Apply):
            return self._apply(wanted)
        inputs, targets = self._on_device(wanted.inputs), self._on_device(wanted.targets)
        try:
            return self._with_less_memory(lambda: self._gradients(wanted.step, inputs, targets))
        except _StopAskedError:
            return None

    def work(self) -> Work:
        """The run, but for what is computed in an update: that it asks for, and is sent.

        Returns:
            How it ended.
        """
        self.began = time.monotonic() - self.progress.seconds
        with contextlib.closing(self.writer):
            while True:
                ended = yield from self._updates()
                if isinstance(ended, RunResult):
                    return ended
                try:
                    self.writer.wait()
                except OSError as error:  # then that checkpoint is none to go back to
                    self.console.say(f"{error.filename}: {error.strerror}")
                if not self._rolled_back(ended):
                    return self._diverged(ended)

    def _updates(self) -> Generator[Gradients | Apply, Any, RunResult | _Fault]:
        """Update after update, from where the progress is; returns how the run ended or failed."""
        config, progress = self.config, self.progress
        steps = config.training.steps
        if self.stop():
            return self._end("interrupted", f"stopped before step {progress.step + 1} was made")
        if self._gives_up():  # and was killed before it said so
            return self._given_up()
        ended = self._before_first_update() if progress.step == 0 else None
        if progress.pending:
            ended = self._after_update(stopping=False)
        if ended is not None:
            return ended
        self.console.start(steps, progress.step)
        unread: list[_Update] = []
        unread_since = time.monotonic()
        numbers = range(progress.step + 1, steps + 1)
        threaded = self.alone and self.device.type == "cuda"
        batches = prefetch(self._batch, numbers) if threaded else (self._batch(n) for n in numbers)
        with contextlib.closing(batches):
            try:
                for step, batch in zip(numbers, batches, strict=True):
                    unread.append((yield from self._update(step, *batch)))
                    self.made()
                    stopping = self.stop()
                    if not (stopping or any(self._due(step)) or step % self.read_every == 0):
                        continue
                    ended = self._record(unread, unread_since) or self._after_update(stopping)
                    if ended is not None:
                        return ended
                    unread, unread_since = [], time.monotonic()
            except _StopAskedError:
                return self._stop_before_update(unread, unread_since)
        return self._end("finished", f"all {steps} steps are done")

    def _due(self, step: int) -> tuple[bool, bool, bool]:
        """Whether an evaluation, a sample and a checkpoint come after update `step`."""
        config, last = self.config, step == self.config.training.steps
        evaluating = last or step % config.evaluation.every == 0
        sampling = last or step % (config.sampling.every or config.evaluation.every) == 0
        saving = last or step % config.save_every == 0
        return evaluating, sampling and config.sampling.tokens > 0, saving and self.saves

    def _before_first_update(self) -> RunResult | _Fault | None:
        """The first evaluation; returns how the run ended or failed at it, or None."""
        try:
            return self._with_less_memory(self._evaluate)
        except _StopAskedError:
            return self._end("interrupted", "stopped before step 1 was made")

    def _stop_before_update(self, unread: list[_Update], since: float) -> RunResult | _Fault:
        """Save the newest update, as a stop was asked for while the next one was computed."""
        fault = self._record(unread, since) if unread else None
        step = self.progress.step
        if fault is None and step != self.saved_step:
            fault = self._spoilt_weight()
        if fault is not None:
            return fault
        if step == 0:
            return self._end("interrupted", "stopped before step 1 was made")
        with self._elsewhere_if_need_be(evaluated=False):
            if step != self.saved_step:
                self._save(evaluated=False)
            self.writer.wait()
        return self._end("interrupted", f"stopped after step {step}, and saved")

    def _after_update(self, stopping: bool) -> RunResult | _Fault | None:
        """Evaluate, sample and save, where that is due after the newest update, and end.

        Args:
            stopping: a stop was asked for: save, and leave the rest for when the run is resumed.

        Returns:
            How the run ended or failed; None if it goes on.
        """
        config, step = self.config, self.progress.step
        last = step == config.training.steps
        evaluating, sampling, saving = self._due(step)
        fault = self._spoilt_weight() if stopping or saving or last else None
        before, giving_up = replace(self.progress), False
        try:
            if fault is None and evaluating:
                self._stop_short(stopping)
                fault = self._with_less_memory(self._evaluate)
            if fault is not None:
                return fault
            giving_up = evaluating and not last and self._gives_up()
            if sampling:
                self._stop_short(stopping)
                with self._elsewhere_if_need_be(evaluated=evaluating):
                    self._sample()
            self.progress.pending = False
        except _StopAskedError:
            stopping, self.progress = True, replace(before, pending=True)
        evaluated = evaluating and not self.progress.pending
        with self._elsewhere_if_need_be(evaluated=evaluated):
            if stopping or saving or (giving_up and self.saves):
                self._save(evaluated=evaluated)
            if stopping or last or giving_up:
                self.writer.wait()
        if stopping:
            return self._end("interrupted", f"stopped after step {step}, and saved")
        return self._given_up() if giving_up else None

    def _stop_short(self, stopping: bool = False) -> None:
        """Leave what can be done again, if a stop was asked for.

        Raises:
            _StopAskedError: it was.
        """
        if stopping or self.stop():
            raise _StopAskedError

    def _spoilt_weight(self) -> _Fault | None:
        if self._weights_are_finite():
            return None
        step = self.progress.step
        return _Fault(step, "weight", f"a weight became non-finite at step {step}")

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of update `step`, in memory that the device can copy from."""
        number = step + self.progress.passed_over
        size = self.config.batch_sequences
        x, y = self.sequences.batch(number, size, check=self._stop_short)
        return self._host_tensor(x), self._host_tensor(y)

    def _update(
        self, step: int, inputs: Tensor, targets: Tensor
    ) -> Generator[Gradients | Apply, Any, _Update]:
        """One update of the weights. Nothing in it waits for the device, but fp16's scaler.

        Raises:
            _StopAskedError: a stop was asked for before the gradients were computed.
        """
        config = self.config
        computed: tuple[Tensor, Tensor] | None = yield Gradients(step, inputs, targets)
        if computed is None:
            raise _StopAskedError
        loss, norm = computed
        seen = self.progress.batches.encode() + inputs.numpy().tobytes()
        self.progress.batches = hashlib.sha256(seen).hexdigest()
        look = None
        every = config.diagnostics.every
        if every is not None and (step == 1 or step % every == 0):
            optimizer = self.optimizer
            look = LayerStats(self.model, optimizer.eps(), optimizer.second_moments())
            few = min(config.diagnostics.sequences, self.micro_batch)
            with self._autocast():
                look.measure_activations(self._on_device(inputs[:few]))
        share = rate(config.schedule, step, config.training.steps)
        skipped = yield Apply(share, loss, norm)
        if look is not None:
            look.measure_update()
        learning_rate = share * config.optimizer.learning_rate
        return _Update(step, loss, norm, learning_rate, self.progress.batches[:16], skipped, look)

    def _micro_batches(
        self, step: int, inputs: Tensor, targets: Tensor
    ) -> Generator[tuple[Tensor, Tensor]]:
        """The parts of a batch, each with its own dropout.

        Raises:
            _StopAskedError: a stop was asked for between two of them.
        """
        seed, dropout = self.config.seed, self.config.model.dropout
        parts = zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True)
        for index, part in enumerate(parts):
            if index:
                self._stop_short()
            with (
                global_generator(self.device, seed, "dropout", step, index)
                if dropout
                else contextlib.nullcontext()
            ):
                yield part

    def _with_less_memory(self, compute: Callable[[], Computed]) -> Computed:
        return plan.with_less_memory(self, compute)

    def use(self, micro_batch: int) -> None:
        """Go on with smaller micro-batches."""
        self.optimizer.zero_grad()
        release_memory(self.device)
        self.console.say(
            f"out of memory with micro-batches of {self.micro_batch} sequences; "
            f"going on with {micro_batch}"
        )
        self.micro_batch = micro_batch

    def _gradients(self, step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward: the loss, and the norm of the gradients, which the weights hold."""
        config = self.config
        loss = torch.zeros((), device=self.device)
        for x, y in self._micro_batches(step, inputs, targets):
            with self._autocast():
                minimised, cross_entropy = self.objective(x, y, config.training.z_loss)
            share_of_batch = len(x) / config.batch_sequences
            self.scaler.scale(minimised * share_of_batch).backward()
            loss += cross_entropy.detach() * share_of_batch

        self.scaler.unscale_(
            cast(torch.optim.Optimizer, self.optimizer)
        )  # of which it reads groups
        gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
        return loss, torch.nn.utils.get_total_norm(gradients)

    def _apply(self, wanted: Apply) -> bool:
        """Clip the gradients and update the weights; returns whether all of it was skipped."""
        clip = self.config.optimizer.clip
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, wanted.norm)
        skipped = self.skips and not (wanted.loss + wanted.norm).isfinite().item()
        if not skipped:
            self.optimizer.step(wanted.share)
        self.scaler.update()
        self.optimizer.zero_grad()
        return skipped

    def _record(self, updates: list[_Update], since: float) -> _Fault | None:
        """Read and log `updates`, made since the time `since`; returns how they failed, or None."""
        config, progress = self.config, self.progress
        losses = torch.stack([update.loss for update in updates]).tolist()
        norms = torch.stack([update.grad_norm for update in updates]).tolist()
        seconds = time.monotonic() - since
        batch_tokens = config.batch_sequences * config.model.context
        tokens_per_second = len(updates) * batch_tokens / seconds
        progress.update_seconds += seconds
        fault = None
        records: list[metrics.Record] = []
        speed: metrics.Record = {
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds / len(updates),
        }
        if self.peak_flops is not None:
            speed["mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops
        for update, loss, norm in zip(updates, losses, norms, strict=True):
            records.append(
                {
                    "step": update.step,
                    "tokens": update.step * batch_tokens,
                    "loss": loss,
                    "learning_rate": update.learning_rate,
                    "grad_norm": norm,
                    "batches": update.batches,
                    **({"skipped": True} if update.skipped else {}),
                    **speed,
                }
            )
            if update.look is not None:
                layers = update.look.to_records(update.step)
                records += layers
                self._warn(layers)
            progress.step, progress.train_loss = update.step, _finite(loss)
            progress.skipped += update.skipped
            progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if update.skipped else 0
            if update.skipped and config.training.nonfinite == "skip":
                self.console.say(
                    f"step {update.step}: skipped: loss {loss:g}, gradient norm {norm:g} "
                    f"({progress.skipped} skipped so far)"
                )
            fault = self._fault(update, loss, norm)
            if fault is not None:
                break
        self.log.write(records)
        if progress.step % config.training.log_every == 0 or progress.step == config.training.steps:
            last = updates[-1]
            self.console.progress(
                last.step,
                f"loss {losses[-1]:.4f}  rate {last.learning_rate:.2e}  "
                f"{tokens_per_second:,.0f} tokens/s",
            )
        return fault

    def _fault(self, update: _Update, loss: float, norm: float) -> _Fault | None:
        """What is not finite after an update, unless that update was skipped for it."""
        config, step, in_a_row = self.config.training, update.step, self.progress.skipped_in_a_row
        for quantity, value in (("training loss", loss), ("gradient norm", norm)):
            overflow = quantity == "gradient norm" and config.precision == "fp16"
            forgiven = update.skipped and (overflow or config.nonfinite == "skip")
            too_often = in_a_row > config.nonfinite_limit
            if not math.isfinite(value) and (too_often or not forgiven):
                again = f", and {in_a_row} updates in a row were skipped" if too_often else ""
                text = f"the {quantity} became {value} at step {step}{again}"
                return _Fault(step, quantity, text)
        return None

    def _warn(self, layers: list[metrics.Record]) -> None:
        """Say once that gradients have come near Adam's epsilon, which then damps the updates."""
        for record in layers:
            if not self.alarmed and record.get("grad_over_eps", math.inf) < EPS_ALARM:
                self.alarmed = True
                self.console.say(
                    f"step {record['step']}: the gradients of layer {record['layer']} have an RMS "
                    f"of {record['grad_rms']:.1e}, under {EPS_ALARM} times optimizer.eps: "
                    "its updates shrink"
                )

    @torch.no_grad()
    def _weights_are_finite(self) -> bool:
        return bool(torch.stack([p.isfinite().all() for p in self.model.parameters()]).all())

    @torch.no_grad()
    def _evaluate(self) -> _Fault | None:
        """Validation loss on the fixed sequences, logged; returns how it failed, or None.

        Raises:
            _StopAskedError: a stop was asked for in the middle of it.
        """
        progress = self.progress
        total = torch.zeros((), device=self.device)
        tokens = text_bytes = 0
        self.model.eval()
        try:
            for inputs, targets in self.validation.batches(self.micro_batch):
                if tokens:
                    self._stop_short()
                x, y = (self._on_device(self._host_tensor(each)) for each in (inputs, targets))
                with self._autocast():
                    total += self.objective(x, y)[1] * len(x)
                tokens += targets.size
                text_bytes += int(self.byte_lengths[targets].sum())
        finally:
            self.model.train()
        loss = total.item() / len(self.validation)
        bits = loss * tokens / math.log(2) / text_bytes
        self.log.write([{"step": progress.step, "val_loss": loss, "val_bits_per_byte": bits}])
        self.console.say(
            f"step {progress.step}: validation loss {loss:.4f} nats per token, "
            f"{bits:.4f} bits per byte"
        )
        progress.val_loss, progress.val_bits_per_byte = _finite(loss), _finite(bits)
        if not math.isfinite(loss):
            text = f"the validation loss became {loss} at step {progress.step}"
            return _Fault(progress.step, "validation loss", text)
        progress.best_val_loss = _lower(loss, progress.best_val_loss)
        learnt = loss < self.unigram_entropy - metrics.LEARNT
        progress.idle = 0 if learnt or progress.step == 0 else progress.idle + 1
        return None

    def _gives_up(self) -> bool:
        patience = self.config.evaluation.give_up_after
        return patience is not None and self.progress.idle >= patience

    def _given_up(self) -> RunResult:
        known = f"no more than token frequencies at {self.progress.idle} evaluations"
        step = self.progress.step
        return self._end("finished", f"given up at step {step}: {known} in a row")

    def _sample(self) -> None:
        """Text of the model as it is now, into samples/.

        Raises:
            _StopAskedError: a stop was asked for in the middle of it.
        """
        options, encoding = self.config.sampling, self.dataset.encoding
        if options.tokens:
            text = continue_text(
                self.model,
                encoding,
                options.prompt,
                tokens=options.tokens,
                sampling=options,
                seed=self.config.seed,
                drawn=self._stop_short,
            )
            write_text(self.directory.samples / f"step-{self.progress.step:08d}.txt", text + "\n")

    @contextlib.contextmanager
    def _elsewhere_if_need_be(self, *, evaluated: bool) -> Iterator[None]:
        """Save the run elsewhere where it cannot be saved in its directory.

        Raises:
            InputError: it could not be saved there, in words for a user.
        """
        try:
            yield
        except OSError as error:
            raise self._saved_elsewhere(error, evaluated=evaluated) from None

    def _save(self, *, evaluated: bool) -> None:
        """Begin to write a checkpoint of this step, never ahead of the metrics on disk.

        Raises:
            OSError: the metrics, or the checkpoint before this one, could not be written.
        """
        self.log.sync()
        progress, folder = self.progress, self.directory.checkpoints
        before = progress.best_saved_val_loss
        if evaluated and progress.val_loss is not None and self._is_scheduled(progress.step):
            progress.best_saved_val_loss = _lower(progress.val_loss, before)
        progress.seconds = time.monotonic() - self.began
        best = progress.best_saved_val_loss != before
        checkpoint = self._checkpoint(best).copy()
        replaces, self.saved_step = self.saved_step == progress.step, progress.step

        def write() -> None:
            checkpoints.save(folder, checkpoint, best=best, replaces=replaces)
            self._prune(folder)

        self.writer.start(write)

    def _is_scheduled(self, step: int) -> bool:
        """Whether a checkpoint of that step stands there in the undisturbed run, not for a stop."""
        if self.progress.pending and step == self.progress.step:  # it is evaluated first
            return False
        ends = (self.config.training.steps, self.progress.forked_at)
        return step % self.config.save_every == 0 or step in ends

    def _prune(self, folder: Path) -> None:
        config = self.config.checkpoint
        found = list(checkpoints.steps(folder))
        kept = {*list(filter(self._is_scheduled, found))[-config.keep :], *self.spared}
        if config.keep_every is not None:
            kept.update(step for step in found if step % config.keep_every == 0)
        checkpoints.prune(folder, kept)

    def _spare_place(self) -> Path:
        return Path(self.config.checkpoint.spare_dir or tempfile.gettempdir())

    def _later_state(self) -> Path | None:
        """Where `_saved_elsewhere` put a later state of this run before, if it is still there."""
        for path in self._spare_place().glob(f"{self.config.name}-*"):
            run = RunDirectory(path)
            with contextlib.suppress(InputError, OSError):
                same = run.config.is_file() and not run.read_config().differences(self.config)
                steps = checkpoints.steps(run.checkpoints)
                if (
                    same
                    and path != self.directory.path
                    and max(steps, default=0) > self.progress.step
                ):
                    return path
        return None

    def _saved_elsewhere(self, why: OSError, *, evaluated: bool) -> InputError:
        """Make a directory of this run, as it is now, where it can be written; in words for a user.

        What stands in the run's own directory is not touched.
        """
        with contextlib.suppress(OSError):  # an earlier checkpoint, of which this is told now
            self.writer.wait()
        own, step = self.directory, self.progress.step
        reason = f"{why.filename or own.path}: {why.strerror}"
        if not own.config.is_file():
            reason = f"{own.path}: was deleted or moved while training"
        saved = checkpoints.read_pointer(own.checkpoints, "latest")
        before = f"{saved} is untouched" if saved else "no checkpoint is left there"
        place = self._spare_place()
        made: Path | None = None
        try:
            place.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f"{self.config.name}-", dir=place))
            run = self.directory = RunDirectory(made)
            write_text(run.config, self.config.to_yaml())
            write_text(run.tokenizer, tokenizer.to_json(self.dataset.encoding))
            write_text(run.environment, self.environment)
            write_bytes(run.metrics, self.log.contents())
            self.log.close()
            self.log = metrics.MetricsLog(run.metrics, metrics.read_up_to(run.metrics, step))
            self.progress.best_saved_val_loss, self.progress.forked_at = None, step
            self.saved_step = None
            self._save(evaluated=evaluated)
            self.writer.wait()
        except OSError as error:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            return InputError(
                f"{reason};\nnor can the state of step {step} be saved in {place}: "
                f"{error.strerror}\n{before}; the same command goes on from there"
            )
        return InputError(
            f"{reason};\n{before}, and the state of step {step} is in {run.path}:\n"
            f"--out-dir {run.path} goes on from there"
        )

    # -- Out of memory ---------------------------------------------------------------------------

    def _what_would_fit(self, error: str) -> str:
        """In words for a user, the largest micro-batch with which an update does fit."""
        tried = self.micro_batch
        self.stop = lambda: False  # the run has ended; a second signal ends this
        inputs, targets = map(self._on_device, self._batch(self.progress.step + 1))
        while (smaller := plan.smaller(self.micro_batch, self.config.batch_sequences)) is not None:
            self.micro_batch = smaller
            self.optimizer.zero_grad()
            release_memory(self.device)
            try:
                self._gradients(self.progress.step + 1, inputs, targets)
            except Exception as another:
                if not plan.is_out_of_memory(another):
                    raise
                continue
            automatic = self.config.training.micro_batch == "auto"
            return (
                f"training.micro_batch: out of memory with {tried} sequences at a time; {smaller} "
                f"would fit;\n--training.micro-batch {smaller}"
                + ("" if automatic else ", or auto, which finds what fits,")
                + " goes on from the last checkpoint"
            )
        return f"training.micro_batch: out of memory with a single sequence at a time ({error})"

    def _checkpoint(self, best: bool = False) -> Checkpoint:
        state = State(
            step=self.progress.step,
            progress=self.progress,
            scaler=self.scaler.state_dict(),
            micro_batch=self.micro_batch,
            best=best,
            data_fingerprint=self.dataset.fingerprint,
        )
        return Checkpoint(
            self.model.state_dict(),
            self.optimizer.state(),
            asdict(state),
            tokenizer.to_json(self.dataset.encoding),
        )

    # -- Divergence ------------------------------------------------------------------------------

    def _rolled_back(self, fault: _Fault) -> bool:
        """Go back to the last scheduled checkpoint, and over the batches that were seen since.

        So did Chowdhery et al. 2022 (PaLM, section 5.1) by hand, and the spikes did not come again.

        Returns:
            False, with nothing done, if training.nonfinite wants none, it was done too often, or
            no checkpoint is whole any more.
        """
        training, before = self.config.training, self.progress
        if training.nonfinite != "rollback" or before.rollbacks >= training.nonfinite_limit:
            return False
        try:
            checkpoint, _ = checkpoints.newest_intact(
                self.directory.checkpoints, self._is_scheduled
            )
        except InputError:
            return False
        if checkpoint is None and before.forked_at:
            return False
        self._drop_unscheduled()
        now = self.progress = self._set_state(checkpoint)
        self.saved_step = now.step or None
        now.rollbacks = before.rollbacks + 1
        now.passed_over = before.passed_over + fault.step - now.step
        self.log.close()
        log = self.directory.metrics
        self.log = metrics.MetricsLog(log, metrics.read_up_to(log, now.step) if checkpoint else ())
        self.directory.note("rolled back", now.step, why=fault.text, passed_over=now.passed_over)
        self.console.close()
        self.console.say(
            f"{fault.text}: back to step {now.step}, and past the batches since ({now.rollbacks})"
        )
        return True

    def _diverged(self, fault: _Fault) -> RunResult:
        """End with what was seen, where it began, and what to try next."""
        try:
            place = self._first_place(fault)
        except _StopAskedError:
            return self._stopped_in_search(fault)
        self._drop_unscheduled()
        reason = fault.text
        if place is not None:
            reason += f", first {describe_location(place, self.config.model.layers)}"
        spoilt_by_update = fault.quantity in ("weight", "validation loss")
        tips = advice(self.config, place, fault.step if spoilt_by_update else fault.step - 1)
        return self._end(
            "diverged", reason, Failure(fault.step, fault.quantity, place, tuple(tips))
        )

    def _stopped_in_search(self, fault: _Fault) -> RunResult:
        """End where the newest checkpoint is: a resumed run diverges again, and searches again."""
        try:
            checkpoint, _ = checkpoints.newest_intact(self.directory.checkpoints)
        except InputError:
            checkpoint = None
        self.progress = read_state(checkpoint).progress if checkpoint else Progress()
        why = f"{fault.text}; stopped while looking for where that began"
        return self._end("interrupted", f"{why}, which a resumed run repeats")

    def _drop_unscheduled(self) -> None:
        """Delete what was saved for a stop: the undisturbed run would end without it."""
        folder = self.directory.checkpoints
        if self.alone or self.saves:
            found = checkpoints.steps(folder)
            scheduled = [path.name for step, path in found.items() if self._is_scheduled(step)]
            if scheduled:
                checkpoints.write_pointers(folder, scheduled[-1], best=False)
            else:
                (folder / "latest").unlink(missing_ok=True)
            self._prune(folder)

    def _first_place(self, fault: _Fault) -> FaultLocation | None:
        """What was first not finite, inside the network.

        A validation loss fails on weights that are still there. An update that fails has spoilt its
        weights, so the run is repeated from the last checkpoint to the last weights that were good;
        unless it does not run alone, where that update was left out.
        """
        if fault.quantity == "validation loss":
            self.model.eval()
            batches = self.validation.batches(self.micro_batch)
            tensors = (map(self._host_tensor, batch) for batch in batches)
            return self._look_for_nonfinite((x, y) for x, y in tensors)
        if not self.alone:
            inputs, targets = self._batch(fault.step)
            return self._look_for_nonfinite(self._micro_batches(fault.step, inputs, targets))
        try:
            checkpoint, _ = checkpoints.newest_intact(self.directory.checkpoints)
        except InputError:
            return None
        self._set_state(checkpoint)
        first = checkpoint.step + 1 if checkpoint else 1
        if first < fault.step:
            self.console.say(f"looking for where it began: steps {first} to {fault.step} once more")
        for step in range(first, fault.step + 1):
            self._stop_short()
            inputs, targets = map(self._on_device, self._batch(step))
            loss, norm = self._gradients(step, inputs, targets)
            if not loss.isfinite() or not (norm.isfinite() or self.scaler.is_enabled()):
                return self._look_for_nonfinite(self._micro_batches(step, inputs, targets))
            share = rate(self.config.schedule, step, self.config.training.steps)
            self._apply(Apply(share, loss, norm))
        return self._look_for_nonfinite(self._micro_batches(fault.step, inputs, targets))

    def _look_for_nonfinite(
        self, batches: Generator[tuple[Tensor, Tensor]]
    ) -> FaultLocation | None:
        """Where one of `batches` first becomes non-finite.

        Raises:
            _StopAskedError: a stop was asked for between two of them.
        """
        z_loss = self.config.training.z_loss
        with contextlib.closing(batches):
            for x, y in batches:
                self._stop_short()
                x, y = self._on_device(x), self._on_device(y)
                with self._autocast():
                    place = first_nonfinite(self.model, x, y, z_loss)
                if place is not None:
                    return place
        return None

    def _end(self, status: Status, reason: str, failure: Failure | None = None) -> RunResult:
        """Write loss.png and result.json."""
        progress, config = self.progress, self.config
        self.log.close()
        self.console.close()
        tokens = progress.step * config.batch_sequences * config.model.context
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
            skipped_updates=progress.skipped,
            rollbacks=progress.rollbacks,
        )
        if progress.step and self.alone and status != "interrupted":  # which must end soon
            from gpt.run.plot import plot_run  # with it comes matplotlib, which no step waits for

            plot_run(metrics.read(self.directory.metrics), self.directory.plot, title=config.name)
        self.directory.write_result(result)  # last: with it the run has ended
        return result

    def _host_tensor(self, array: Batch) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))  # or its copy would wait for the GPU
        pinned = self.alone and self.device.type == "cuda"
        return tensor.pin_memory() if pinned else tensor

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.config.training.precision)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Where matrix products and attention are computed in `training.precision`."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def release_memory(device: torch.device) -> None:
    """Give back what a GPU's allocator holds but does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _lower(loss: float, than: float | None) -> float:
    return loss if than is None else min(loss, than)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

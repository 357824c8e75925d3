"""The training loop: `train(config)` makes a run directory and returns a `RunResult`.

    tokenizer and data -> GPT -> optimizer ->(resume) -> update, update, update ... -> RunResult

One update is: learning rate for this step, forward and backward over the micro-batches of the
step's batch, gradient norm, clipping, optimizer. After it come, when due, evaluation, a sample and
a checkpoint. Everything random is a function of (seed, step), so a resumed run repeats the
undisturbed one bit for bit on one machine. A non-finite loss is a result, not an exception.

Nothing here is specific to a placement, an optimizer or a schedule: they come from their tables.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt import checkpoint as checkpoints
from gpt import data, metrics, plan, tokenizer
from gpt.checkpoint import Checkpoint
from gpt.config import Config
from gpt.console import Console
from gpt.errors import InputError
from gpt.generate import continue_text
from gpt.init import initialize
from gpt.model import GPT
from gpt.optim import Optimizer
from gpt.plot import plot_run
from gpt.rng import derive
from gpt.run import Opened, RunResult, Status, open_run, write_text
from gpt.schedule import rate

DTYPES = {  # of matrix products and attention; weights and their sums stay fp32
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def train(
    config: Config,
    out_dir: str | Path | None = None,
    *,
    resume: str = "auto",
    quiet: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Train a GPT as `config` says.

    Args:
        out_dir: the run directory; runs/NAME unless given.
        resume: "auto", "never" or a checkpoint folder, see `gpt.run.open_run`.
        quiet: print nothing.
        stop: asked after every update; once true, the run is saved and ends as interrupted.

    Returns:
        How it ended. A diverged run is a result with status "diverged"; its last good checkpoint
        stays.

    Raises:
        InputError: the config cannot be run here, or the directory holds another run.
    """
    path = Path(out_dir) if out_dir is not None else Path("runs") / config.name
    device = plan.pick_device(config.training.device)
    opened = open_run(config, path, resume)
    if opened.result is not None:
        return opened.result
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), contextlib.closing(Console(quiet)) as console:
        return _Training(config, opened, device, console).run(stop)


@dataclass
class _Progress:
    """What a run knows of itself beside weights and optimizer; saved in state.json."""

    step: int = 0
    seconds: float = 0.0  # wall clock
    update_seconds: float = 0.0  # of it, in updates
    train_loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    best_val_loss: float | None = None


@dataclass(frozen=True)
class _Update:
    """What one update reports; the tensors stay on the device until they are read."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float


class _Training:
    """One run in progress: data, model, optimizer, and the loop over them."""

    def __init__(
        self, config: Config, opened: Opened, device: torch.device, console: Console
    ) -> None:
        torch.set_flush_denormal(True)  # a failing run is otherwise many times slower on a CPU
        self.config, self.device, self.console, self.directory = config, device, console, opened.run
        context = config.model.context
        self.dataset = data.prepare(config.data, console.say)
        self.sequences = data.TrainingSequences(self.dataset.train, context, config.data_seed)
        self.validation = data.validation_sequences(
            self.dataset.val, context, config.evaluation.sequences
        )
        vocab_size = self.dataset.encoding.n_vocab
        self.model = GPT(config.model, vocab_size)
        initialize(self.model, config.seed)
        self.model.to(device)
        self.loss = torch.compile(self.model.loss) if config.training.compile else self.model.loss
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.training.precision == "fp16")
        self.micro_batch = plan.micro_batch(config, vocab_size, device)
        self.progress = _Progress()
        if opened.checkpoint is not None:
            self._restore(opened.checkpoint)
        self._open_directory(opened)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["data_fingerprint"] != self.dataset.fingerprint:
            raise InputError("data: the tokens are not those that this run was trained on so far")
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state(checkpoint.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.micro_batch = state["micro_batch"]
        self.progress = _Progress(**state["progress"])

    def _open_directory(self, opened: Opened) -> None:
        run = self.directory
        try:
            run.samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{run.path}: cannot be made: {error.strerror}") from None
        if not opened.resumed:
            tokenizer.save(self.dataset.encoding, run.tokenizer)
            run.write_environment(self.device, self.dataset.fingerprint, self.micro_batch)
            write_text(run.config, self.config.to_yaml())  # from here on this is a run
        run.result.unlink(missing_ok=True)
        keep_to = self.progress.step if opened.resumed and opened.checkpoint else None
        self.log = metrics.MetricsLog(run.metrics, keep_to)

    # -- The loop --------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool]) -> RunResult:
        """Train to the end, to divergence, or until `stop`."""
        config, progress = self.config, self.progress
        steps = config.training.steps
        evaluate_every = config.evaluation.every
        save_every = config.checkpoint.every or evaluate_every
        sample_every = config.sampling.every or evaluate_every
        self.began = time.monotonic() - progress.seconds
        self.console.say(
            plan.describe(
                config,
                self.model,
                device=self.device,
                micro_batch=self.micro_batch,
                train_tokens=len(self.dataset.train),
                directory=self.directory.path,
                done=progress.step,
            )
        )
        self.console.start(steps, done=progress.step)
        if progress.step == 0:
            self._evaluate()

        unread: list[_Update] = []
        unread_since = time.monotonic()
        for step in range(progress.step + 1, steps + 1):
            unread.append(self._update(step))
            last, stopping = step == steps, stop()
            evaluating = last or step % evaluate_every == 0
            saving = last or stopping or step % save_every == 0
            sampling = last or step % sample_every == 0
            reading = self.device.type == "cpu" or step % config.training.log_every == 0
            if not (evaluating or saving or sampling or reading):
                continue
            failure = self._record(unread, unread_since)
            if failure is None and saving and not self._weights_are_finite():
                failure = f"a weight became non-finite at step {step}"
            if failure is not None:
                return self._end("diverged", failure)
            best = self._evaluate() if evaluating else False
            if sampling:
                self._sample()
            if saving:
                self._save(best)
            if stopping and not last:
                return self._end("interrupted", f"stopped after step {step}, and saved")
            unread, unread_since = [], time.monotonic()
        return self._end("finished", f"all {steps} steps are done")

    def _update(self, step: int) -> _Update:
        """One update of the weights. Nothing in it waits for the device."""
        config = self.config
        share = rate(config.schedule, step, config.training.steps)
        self.optimizer.set_rate(share)
        inputs, targets = map(self._tensor, self.sequences.batch(step, config.batch_sequences))
        weight = self.micro_batch / config.batch_sequences
        loss = torch.zeros((), device=self.device)
        parts = zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True)
        for index, (x, y) in enumerate(parts):
            if config.model.dropout:
                torch.manual_seed(derive(config.seed, "dropout", step, index))
            with self._autocast():
                part = self.loss(x, y) * weight
            self.scaler.scale(part).backward()
            loss += part.detach()

        for optimizer in self.optimizer.parts:
            self.scaler.unscale_(optimizer)
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        if config.optimizer.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip, norm)
        for optimizer in self.optimizer.parts:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return _Update(step, loss, norm, share * config.optimizer.learning_rate)

    def _record(self, updates: list[_Update], since: float) -> str | None:
        """Read and log `updates`, made since the time `since`; returns how they failed, or None."""
        config, progress = self.config, self.progress
        losses = torch.stack([update.loss for update in updates]).tolist()
        norms = torch.stack([update.grad_norm for update in updates]).tolist()
        seconds = time.monotonic() - since
        batch_tokens = config.batch_sequences * config.model.context
        tokens_per_second = len(updates) * batch_tokens / seconds
        progress.update_seconds += seconds
        failure = None
        records: list[metrics.Record] = []
        for update, loss, norm in zip(updates, losses, norms, strict=True):
            records.append(
                {
                    "step": update.step,
                    "tokens": update.step * batch_tokens,
                    "loss": loss,
                    "learning_rate": update.learning_rate,
                    "grad_norm": norm,
                    "tokens_per_second": tokens_per_second,
                    "step_seconds": seconds / len(updates),
                }
            )
            progress.step, progress.train_loss = update.step, _finite(loss)
            if not math.isfinite(loss):
                failure = f"the training loss became {loss} at step {update.step}"
                break
        self.log.write(records)
        if progress.step % config.training.log_every == 0 or progress.step == config.training.steps:
            last = updates[-1]
            self.console.progress(last.step, losses[-1], last.learning_rate, tokens_per_second)
        return failure

    @torch.no_grad()
    def _weights_are_finite(self) -> bool:
        return bool(torch.stack([p.isfinite().all() for p in self.model.parameters()]).all())

    @torch.no_grad()
    def _evaluate(self) -> bool:
        """Validation loss on the fixed sequences, logged. Returns whether it is the lowest yet."""
        progress = self.progress
        inputs, targets = self.validation
        total = torch.zeros((), device=self.device)
        self.model.eval()
        for first in range(0, len(inputs), self.micro_batch):
            x = self._tensor(inputs[first : first + self.micro_batch])
            y = self._tensor(targets[first : first + self.micro_batch])
            with self._autocast():
                total += self.loss(x, y) * len(x)
        self.model.train()
        loss = total.item() / len(inputs)
        bits = loss / math.log(2) / self.dataset.val_bytes_per_token
        self.log.write([{"step": progress.step, "val_loss": loss, "val_bits_per_byte": bits}])
        self.console.say(
            f"step {progress.step}: validation loss {loss:.4f} nats per token, "
            f"{bits:.4f} bits per byte"
        )
        progress.val_loss, progress.val_bits_per_byte = _finite(loss), _finite(bits)
        best = progress.best_val_loss
        if not math.isfinite(loss) or (best is not None and best <= loss):
            return False
        progress.best_val_loss = loss
        return True

    def _sample(self) -> None:
        """Text of the model as it is now, into samples/."""
        options, encoding = self.config.sampling, self.dataset.encoding
        if options.tokens:
            text = continue_text(
                self.model,
                encoding,
                options.prompt,
                tokens=options.tokens,
                sampling=options,
                seed=self.config.seed,
            )
            write_text(self.directory.samples / f"step-{self.progress.step:08d}.txt", text + "\n")

    def _save(self, best: bool) -> None:
        """A checkpoint of this step, never ahead of the metrics on disk."""
        self.log.sync()
        self.progress.seconds = time.monotonic() - self.began
        state = {
            "format": 1,
            "step": self.progress.step,
            "progress": vars(self.progress),
            "scaler": self.scaler.state_dict(),
            "micro_batch": self.micro_batch,
            "data_fingerprint": self.dataset.fingerprint,
        }
        folder = self.directory.checkpoints
        saved = checkpoints.save(
            folder, Checkpoint(self.model.state_dict(), self.optimizer.state(), state)
        )
        if best:
            checkpoints.point(folder, "best", saved.name)
        checkpoints.prune(folder, self.config.checkpoint.keep)

    def _end(self, status: Status, reason: str) -> RunResult:
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
            tokens_per_second=tokens / progress.update_seconds,
            reason=reason,
            directory=self.directory.path,
        )
        records = metrics.read(self.directory.metrics)
        plot_run(records, self.directory.plot, title=config.name)
        self.directory.write_result(result)
        return result

    def _tensor(self, array: data.Batch) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _autocast(self) -> torch.autocast:
        precision = self.config.training.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

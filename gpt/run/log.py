"""The log of a run: updates wait on the device until they are read, counted and written.

Reading a loss from a GPU waits for the GPU to finish, so several updates are read at once.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.checkpoint.state import Progress
from gpt.config import Config
from gpt.diagnostics.layers import LayerStats
from gpt.errors import NonFiniteError
from gpt.hardware.device import peak_flops
from gpt.io.console import Console
from gpt.metrics import EPS_ALARM, MetricsLog, Record, read_up_to
from gpt.model import GPT
from gpt.run.plan import flops_per_token

READ_EVERY = {"cpu": 1}  # steps between reads, where a read does not wait for a device


@dataclass(frozen=True)
class Update:
    """The logged values of one update; the tensors stay on the device until they are read."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    inputs_digest: str
    skipped: bool
    layer_stats: LayerStats | None


class RunLog:
    """metrics.jsonl and the progress line of one run.

    Args:
        path: metrics.jsonl.
        kept: the lines of earlier sessions to keep, see `gpt.metrics.read_up_to`.
    """

    def __init__(
        self, path: Path, config: Config, model: GPT, console: Console, kept: list[Record]
    ) -> None:
        self.path, self.config, self.console = path, config, console
        self.batch_tokens = config.batch_sequences * config.model.context
        device = model.token_embedding.weight.device
        self.read_every = READ_EVERY.get(device.type, config.training.log_every)
        self.flops_per_token = flops_per_token(config, model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.peak_flops = peak_flops(name, config.training.precision)
        self.metrics = MetricsLog(path, kept)
        self._pending: list[Update] = []
        self._since = time.monotonic()
        self._warned = False

    def start_clock(self) -> None:
        """Start timing the next updates."""
        self._since = time.monotonic()

    def add(self, update: Update) -> None:
        """Queue an update, for `flush` to write."""
        self._pending.append(update)

    def flush(self, progress: Progress) -> None:
        """Read and write the updates since the last flush, and count them in `progress`.

        Raises:
            NonFiniteError: one of them was not finite; those after it are dropped.
        """
        updates, self._pending = self._pending, []
        if not updates:
            return
        losses = torch.stack([update.loss for update in updates]).tolist()
        norms = torch.stack([update.grad_norm for update in updates]).tolist()
        seconds = time.monotonic() - self._since
        progress.update_seconds += seconds
        speed = self._speed(len(updates), seconds)
        records: list[Record] = []
        try:
            for update, loss, norm in zip(updates, losses, norms, strict=True):
                records += self._records(update, loss, norm, speed)
                self._count_or_raise(progress, update, loss, norm)
        finally:
            self.metrics.write(records)
            self._show(progress.step, updates[-1], losses[-1], speed["tokens_per_second"])

    def _speed(self, updates: int, seconds: float) -> Record:
        tokens = updates * self.batch_tokens
        speed = {"tokens_per_second": tokens / seconds, "step_seconds": seconds / updates}
        if self.peak_flops is not None:
            speed["mfu"] = tokens / seconds * self.flops_per_token / self.peak_flops
        return speed

    def _records(self, update: Update, loss: float, norm: float, speed: Record) -> list[Record]:
        """The lines of metrics.jsonl for one update."""
        record: Record = {
            "step": update.step,
            "tokens": update.step * self.batch_tokens,
            "loss": loss,
            "learning_rate": update.learning_rate,
            "grad_norm": norm,
            "batches": update.inputs_digest,
            **({"skipped": True} if update.skipped else {}),
            **speed,
        }
        layers = (
            update.layer_stats.to_records(update.step) if update.layer_stats is not None else []
        )
        for layer in layers:
            self._warn(layer)
        return [record, *layers]

    def _warn(self, layer: Record) -> None:
        """Warn once that gradients are near Adam's epsilon, which then makes updates smaller."""
        if not self._warned and layer.get("grad_over_eps", math.inf) < EPS_ALARM:
            self._warned = True
            self.console.say(
                f"step {layer['step']}: the gradients of layer {layer['layer']} have an RMS "
                f"of {layer['grad_rms']:.1e}, less than {EPS_ALARM} times optimizer.eps, "
                "which makes this layer's updates smaller"
            )

    def _count_or_raise(self, progress: Progress, update: Update, loss: float, norm: float) -> None:
        """Count an update.

        Raises:
            NonFiniteError: it was not finite, and the config does not let it be skipped (again).
        """
        training = self.config.training
        progress.step, progress.train_loss = update.step, finite_or_none(loss)
        progress.skipped_updates += update.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if update.skipped else 0
        if update.skipped and training.nonfinite == "skip":
            self.console.say(
                f"step {update.step}: skipped: loss {loss:g}, gradient norm {norm:g} "
                f"({progress.skipped_updates} skipped so far)"
            )
        in_a_row = progress.skipped_in_a_row
        too_often = in_a_row > training.nonfinite_limit
        again = f", and {in_a_row} updates in a row were skipped" if too_often else ""
        for quantity, value in (("training loss", loss), ("gradient norm", norm)):
            overflow = quantity == "gradient norm" and training.precision == "fp16"
            forgiven = update.skipped and (overflow or training.nonfinite == "skip")
            if not math.isfinite(value) and (too_often or not forgiven):
                text = f"the {quantity} became {value} at step {update.step}{again}"
                raise NonFiniteError(update.step, quantity, text)

    def _show(self, step: int, last: Update, loss: float, tokens_per_second: float) -> None:
        training = self.config.training
        if step % training.log_every == 0 or step == training.steps:
            self.console.progress(
                last.step,
                f"loss {loss:.4f}  learning rate {last.learning_rate:.2e}  "
                f"{tokens_per_second:,.0f} tokens/s",
            )

    def restart(self, path: Path, kept: list[Record]) -> None:
        """Continue in `path`, from the lines `kept`."""
        self.metrics.close()
        self.path, self.metrics = path, MetricsLog(path, kept)

    def rewind(self, step: int) -> None:
        """Forget everything after `step`; at 0, everything."""
        self.restart(self.path, read_up_to(self.path, step) if step else [])


def finite_or_none(value: float) -> float | None:
    """`value`, or None if it is not finite."""
    return value if math.isfinite(value) else None

"""The log of a run: updates wait on the device until they are read and written.

Reading a loss from a GPU waits for the GPU to finish, so several updates are read at once.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.config import Config
from gpt.diagnostics.layers import LayerStats
from gpt.hardware.device import peak_flops
from gpt.io.console import Console
from gpt.metrics import EPS_ALARM, MetricsLog, Record, read_up_to
from gpt.model.gpt2 import GPT

SHOW_EVERY = 10.0  # seconds between lines of progress, at most, where steps are slow
MOVE_EVERY = 1.0  # the same for a progress bar
READ_EVERY = {"cpu": 1}  # steps between reads, by device type; otherwise training.log_every


@dataclass(frozen=True)
class Update:
    """The logged values of one update; the tensors stay on the device until `RunLog.read`."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    inputs_digest: str
    skipped: bool
    layer_stats: LayerStats | None


@dataclass(frozen=True)
class Measured:
    """An update whose loss and gradient norm have been read from the device."""

    update: Update
    loss: float
    grad_norm: float


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
        self.flops_per_token = model.flops_per_token()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.peak_flops = peak_flops(name, config.training.precision)
        self.metrics = MetricsLog(path, kept)
        self._pending: list[Update] = []
        self._since = self._shown = time.monotonic()
        self._warned = False

    def start_clock(self) -> None:
        """Start timing the next updates."""
        self._since = time.monotonic()

    def add(self, update: Update) -> None:
        """Queue an update, for `read`."""
        self._pending.append(update)

    def read(self) -> tuple[list[Measured], float]:
        """The updates since the last call, in order, and the seconds that they took."""
        updates, self._pending = self._pending, []
        if not updates:
            return [], 0.0
        losses = torch.stack([update.loss for update in updates]).tolist()
        norms = torch.stack([update.grad_norm for update in updates]).tolist()
        seconds = time.monotonic() - self._since
        return [Measured(*each) for each in zip(updates, losses, norms, strict=True)], seconds

    def write(self, updates: list[Measured], step_seconds: float) -> None:
        """Write updates to metrics.jsonl, and show the last one if it is due."""
        speed = self._speed(step_seconds)
        self.metrics.write([record for each in updates for record in self._records(each, speed)])
        if updates:
            self._show(updates[-1], speed["tokens_per_second"])

    def _speed(self, step_seconds: float) -> Record:
        tokens_per_second = self.batch_tokens / step_seconds
        speed = {"tokens_per_second": tokens_per_second, "step_seconds": step_seconds}
        if self.peak_flops is not None:
            speed["mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops
        return speed

    def _records(self, measured: Measured, speed: Record) -> list[Record]:
        """The lines of metrics.jsonl for one update."""
        update = measured.update
        record: Record = {
            "step": update.step,
            "tokens": update.step * self.batch_tokens,
            "loss": measured.loss,
            "learning_rate": update.learning_rate,
            "grad_norm": measured.grad_norm,
            "batches": update.inputs_digest,
            **({"skipped": True} if update.skipped else {}),
            **speed,
        }
        snapshot = (
            update.layer_stats.to_records(update.step) if update.layer_stats is not None else []
        )
        for measures in snapshot:
            self._warn(measures)
        return [record, *snapshot]

    def _warn(self, layer: Record) -> None:
        """Warn once that gradients are near Adam's epsilon, which then makes updates smaller."""
        if not self._warned and layer.get("grad_over_eps", math.inf) < EPS_ALARM:
            self._warned = True
            self.console.say(
                f"step {layer['step']}: the gradients of layer {layer['layer']} have an RMS "
                f"of {layer['grad_rms']:.1e}, less than {EPS_ALARM} times optimizer.eps, "
                "which makes this layer's updates smaller"
            )

    def _show(self, last: Measured, tokens_per_second: float) -> None:
        training, step = self.config.training, last.update.step
        most = MOVE_EVERY if self.console.live else SHOW_EVERY
        slow = time.monotonic() - self._shown >= most
        if step % training.log_every == 0 or step == training.steps or slow:
            self._shown = time.monotonic()
            self.console.progress(
                step,
                f"loss {last.loss:.4f}  learning rate {last.update.learning_rate:.2e}  "
                f"{tokens_per_second:,.0f} tokens/s",
            )

    def restart(self, path: Path, kept: list[Record]) -> None:
        """Continue in `path`, from the lines `kept`."""
        self.metrics.close()
        self.path, self.metrics = path, MetricsLog(path, kept)

    def rewind(self, step: int) -> None:
        """Forget everything after `step`; at 0, everything."""
        self.restart(self.path, read_up_to(self.path, step) if step else [])

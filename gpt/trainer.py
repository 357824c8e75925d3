"""The arithmetic of training: `backward` and `update` make one step, `evaluate` measures the loss.

    loss, grad_norm = trainer.backward(step, inputs, targets)
    skipped = trainer.update(lr_scale, loss, grad_norm)

A batch is split into micro-batches that fit in memory. Their gradients are averaged, clipped by
their global norm, and handed to the optimizer. Files, the schedule and the console belong to `Run`
(gpt/run/run.py). `backward` never waits for a GPU; `update` waits with fp16 or `nonfinite: skip`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping

import torch
from torch import Tensor

from gpt.checkpoint import Checkpoint
from gpt.checkpoint.weights import load_weights
from gpt.config import Config
from gpt.data.sequences import ValidationSequences
from gpt.hardware import device as devices
from gpt.hardware.device import host_tensor
from gpt.hardware.memory import check_fits, micro_batch, release_memory, with_less_memory
from gpt.model.dropout import drawing_from
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.optim import Optimizer
from gpt.rng import generator, global_generators_restored


class Trainer:
    """A model with its optimizer and loss scaler; `reset` or `load` sets their initial state.

    Args:
        vocab_size: tokens of the vocabulary.
        check_stop: called between micro-batches; an exception that it raises ends the computation.
        notify: called with a sentence for the user.

    Attributes:
        model: on the device.
        loss_fn: of the model, compiled if the config says so.
        optimizer, scaler: set by `reset` and `load`.
        micro_batch: sequences per forward pass.
        processes: how many share a batch (gpt/distributed/); here, one.
        first_sequence: of a batch, the first that this process computes.
        skips_nonfinite: whether `update` leaves out updates that are not finite.

    Raises:
        InputError: training needs more memory than there is.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        device: torch.device,
        *,
        check_stop: Callable[[], object] = lambda: None,
        notify: Callable[[str], object] = lambda text: None,
    ) -> None:
        check_fits(config, device, vocab_size)
        self.config, self.device = config, device
        self.check_stop, self.notify = check_stop, notify
        with global_generators_restored(device):  # torch draws weights, which `reset` replaces
            self.model = GPT(config.model, vocab_size).to(device)
        self.model.loss_chunk = config.training.loss_chunk
        self.loss_fn = self.model.loss_fn
        if config.training.compile:  # a smaller last batch of validation is compiled separately
            self.loss_fn = torch.compile(self.loss_fn, dynamic=False)
        self.micro_batch = micro_batch(config, vocab_size, device)
        self.processes, self.first_sequence = 1, 0
        fp16 = config.training.precision == "fp16"
        self.skips_nonfinite = config.training.nonfinite == "skip" or fp16

    # -- State -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset to the initial weights, with a new optimizer and loss scaler."""
        config = self.config
        initialize(self.model, config.model, config.seed)
        self.optimizer = Optimizer(self.model.named_parameters(), config.optimizer, self.model.m)
        fp16 = config.training.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

    def calibrate(self, inputs: Tensor) -> None:
        """Let the placement set its own weights from (B, T) tokens of the first batch."""
        model = self.whole_model()
        with self.dropout("calibration", sequences=range(len(inputs))):
            model.calibrate(self.to_device(inputs))
        self.set_weights(model.state_dict())

    def load(self, checkpoint: Checkpoint, scaler: dict[str, float | int], updates: int) -> None:
        """Continue from a checkpoint.

        Args:
            scaler: state of fp16's loss scaler.
            updates: updates that the optimizer has made.

        Raises:
            ValueError: the checkpoint does not fit the config.
        """
        self.reset()
        self.set_weights(checkpoint.model)
        self.set_optimizer_state(checkpoint.optimizer)
        if updates and self.optimizer.has_state and not checkpoint.optimizer:
            raise ValueError("the optimizer's state is missing")
        if scaler and self.scaler.is_enabled():
            try:
                self.scaler.load_state_dict(scaler)
            except (KeyError, RuntimeError) as error:
                raise ValueError(str(error)) from None

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights; raises a ValueError if they are another model's."""
        load_weights(self.model, tensors)

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the optimizer's state; raises a ValueError if it is of another one."""
        self.optimizer.load_state_tensors(tensors)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights, and the optimizer's state, for a checkpoint."""
        return self.model.state_dict(), self.optimizer.state_tensors()

    def whole_model(self) -> GPT:
        """The model with all its weights, for this process alone."""
        return self.model

    @torch.no_grad()
    def weights_are_finite(self) -> bool:
        """Whether every weight is a finite number."""
        return bool(torch.stack([p.isfinite().all() for p in self.model.parameters()]).all())

    # -- One training step -----------------------------------------------------------------------

    @with_less_memory
    def backward(self, step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of one batch, and leave them in the parameters.

        Args:
            step: seeds the dropout.
            inputs, targets: (sequences, T), on the host.

        Returns:
            The mean cross-entropy (nats per token) and the norm of the gradients, unscaled and not
            clipped: scalars on the device.
        """
        x, y = self.to_device(inputs), self.to_device(targets)
        loss = torch.zeros((), device=self.device)
        with contextlib.closing(self.micro_batches(step, x, y)) as micro_batches:
            for x, y in micro_batches:
                with self.autocast():
                    total_loss, cross_entropy = self.loss_fn(x, y, self.config.training.z_loss)
                weight = len(x) / len(inputs)
                self.scaler.scale(total_loss * weight).backward()
                loss += cross_entropy.detach() * weight
        for optimizer in self.optimizer.torch_optimizers:
            self.scaler.unscale_(optimizer)
        gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
        return loss, torch.nn.utils.get_total_norm(gradients)

    def micro_batches(
        self, step: int, inputs: Tensor, targets: Tensor
    ) -> Generator[tuple[Tensor, Tensor]]:
        """The micro-batches of a batch; while the caller computes, dropout follows `step`."""
        numbers = range(self.first_sequence, self.first_sequence + len(inputs))
        for first in range(0, len(inputs), self.micro_batch):
            if first:
                self.check_stop()
            part = slice(first, first + self.micro_batch)
            with self.dropout("dropout", step, sequences=numbers[part]):
                yield inputs[part], targets[part]

    def dropout(self, *key: int | str, sequences: range) -> contextlib.AbstractContextManager[None]:
        """A context in which the masks of a sequence are a function of (seed, key, its number)."""
        numbers = sequences if self.config.model.dropout else ()
        seed, device = self.config.seed, self.device
        return drawing_from([generator(seed, *key, n, device=device) for n in numbers])

    def update(self, lr_scale: float, loss: Tensor, grad_norm: Tensor) -> bool:
        """Clip the gradients and update the weights, at `lr_scale` times the learning rate.

        Args:
            loss, grad_norm: returned by `backward`.

        Returns:
            Whether the update was skipped because the loss or a gradient was not finite.
        """
        clip = self.config.optimizer.clip
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, grad_norm)
        # Not `scaler.step`: testing loss and norm here makes all optimizers skip together.
        skipped = self.skips_nonfinite and not (loss + grad_norm).isfinite().item()
        if not skipped:
            self.optimizer.step(lr_scale)
        self.scaler.update()
        self.optimizer.zero_grad()
        return skipped

    # -- Evaluation ------------------------------------------------------------------------------

    @with_less_memory
    @torch.no_grad()
    def evaluate(self, sequences: ValidationSequences) -> float:
        """Mean cross-entropy of the validation sequences, in nats per token."""
        total = torch.zeros((), device=self.device)
        self.model.eval()
        try:
            for batch in sequences.batches(self.micro_batch):
                self.check_stop()
                x, y = (self.to_device(host_tensor(part, self.device)) for part in batch)
                with self.autocast():
                    total += self.loss_fn(x, y)[1] * len(x)
        finally:
            self.model.train()
        return total.item() / len(sequences)

    # -- Where and how it computes ---------------------------------------------------------------

    def set_micro_batch(self, micro_batch: int) -> None:
        """Use smaller micro-batches from now on, because memory ran out."""
        self.discard_gradients()
        old, self.micro_batch = self.micro_batch, micro_batch
        self.notify(
            f"out of memory with micro-batches of {old} sequences; continuing with {micro_batch}"
        )

    def discard_gradients(self) -> None:
        """Make `backward` possible again after an attempt that failed, perhaps in unscaling."""
        self.optimizer.zero_grad()
        state = self.scaler.state_dict()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(state)
        release_memory(self.device)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device; from pinned memory, it does not wait for the GPU."""
        return tensor.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """A context in which matrix products and attention run in `training.precision`."""
        return devices.autocast(self.device, self.config.training.precision)

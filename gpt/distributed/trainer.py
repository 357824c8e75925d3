"""A trainer of which every process computes a share: rank 0's methods, and how others follow.

    rank 0:  backward(step, inputs, targets) -> send "backward" -> compute its share
    others:  follow() -> receive "backward" -> compute theirs -> receive ...

With DDP (Li et al. 2020), the default, each process has a whole model, and gradients are averaged
during the backward pass; with FSDP2 each has a part of it (sharding.py). A batch is divided in the
order of its sequences, so the number of processes changes nothing but the order of sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt.checkpoint import Checkpoint
from gpt.checkpoint.weights import load_weights
from gpt.config import Config
from gpt.data.sequences import ValidationSequences
from gpt.distributed.group import Group
from gpt.distributed.sharding import ShardedOptimizer, check_can_shard, set_whole, shard, whole
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.optim import Optimizer
from gpt.rng import global_generators_restored
from gpt.trainer import Trainer


class ParallelTrainer(Trainer):
    """The part of a trainer that one of several processes computes.

    Args:
        group: this process and the others.

    Raises:
        InputError: the config cannot be trained like this, or needs more memory than there is.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        group: Group,
        *,
        check_stop: Callable[[], object] = lambda: None,
        notify: Callable[[str], object] = lambda text: None,
    ) -> None:
        device, share = group.device, config.batch_sequences // group.size
        own = _of_share(config, share, config.training.micro_batch)
        super().__init__(own, vocab_size, device, check_stop=check_stop, notify=notify)
        self.group, self.vocab_size = group, vocab_size
        self.processes, self.first_sequence = group.size, group.rank * share
        self.micro_batch = group.smallest(self.micro_batch)
        # micro_batch is not "auto" here: all processes must use the same one
        self.config = _of_share(config, share, self.micro_batch)
        self.sharded = config.training.parallel == "fsdp"
        if self.sharded:
            check_can_shard(self.model)
            shard(self.model, group.size, device)
            self.loss_fn = self.model.loss_fn
        else:
            self._ddp = DistributedDataParallel(
                _Loss(self.model),
                device_ids=None if device.type == "cpu" else [device.index],
                gradient_as_bucket_view=True,
            )
            compiled = config.training.compile
            self.loss_fn = torch.compile(self._ddp, dynamic=False) if compiled else self._ddp
            self._order_buckets()

    def _order_buckets(self) -> None:
        """Let DDP order the gradients that it sums together, which it does after one backward pass.

        Otherwise the first update of a resumed run would sum in another order than without a stop.
        """
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with global_generators_restored(self.device), self.autocast():
            total_loss, _ = self._ddp(token, token)
        total_loss.backward()
        self.model.zero_grad()

    # -- The other processes ---------------------------------------------------------------------

    def follow(self, stop: Callable[[], bool]) -> None:
        """Compute what rank 0 asks for, until it ends the run.

        Args:
            stop: whether this process was asked to stop; it then asks rank 0 to end the run.
        """
        while True:
            name, *arguments = self.group.receive()
            if name == "end":
                return
            FOLLOWED[name](self, *arguments)
            if stop():
                self.group.ask_to_stop()

    @contextlib.contextmanager
    def _with_others(self, name: str, *arguments: Any) -> Iterator[None]:
        """On rank 0, a context for what all do at the same time; a stop waits until it ends."""
        check_stop, self.check_stop = self.check_stop, lambda: None
        try:
            self.group.send(name, *arguments)
            yield
        finally:
            self.check_stop = check_stop

    # -- State -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset to the initial weights, with a new optimizer and loss scaler."""
        with self._with_others("reset"):
            self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        if not self.sharded:
            super().reset()
            return
        plain = self._plain_model() if self.group.leads else None
        if plain is not None:
            initialize(plain, self.config.model, self.config.seed)
        set_whole(self.model.state_dict(), plain.state_dict() if plain is not None else None)
        config = self.config.optimizer
        self.optimizer = ShardedOptimizer(self.model.named_parameters(), config, self.model.m)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)

    def load(self, checkpoint: Checkpoint, scaler: dict[str, float | int], updates: int) -> None:
        """Continue from a checkpoint; see `Trainer.load`."""
        super().load(checkpoint, scaler, updates)
        with self._with_others("scaler", self.scaler.state_dict()):
            pass

    def _set_scaler(self, state: dict[str, float | int]) -> None:
        if state:
            self.scaler.load_state_dict(state)

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights; raises a ValueError if they are another model's."""
        model = self._plain_model() if self.sharded else self.model
        load_weights(model, tensors)
        with self._with_others("weights"):
            self._share_weights(model.state_dict())

    @torch.no_grad()
    def _share_weights(self, weights: Mapping[str, Tensor] | None = None) -> None:
        set_whole(self.model.state_dict(), weights)

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the optimizer's state; raises a ValueError if it is another optimizer's."""
        model = self._plain_model() if self.sharded else self.model
        plain = Optimizer(model.named_parameters(), self.config.optimizer, self.model.m)
        plain.load_state_tensors(tensors)
        if tensors:
            with self._with_others("optimizer"):
                self._share_optimizer_state(plain.state_tensors())

    @torch.no_grad()
    def _share_optimizer_state(self, state: Mapping[str, Tensor] | None = None) -> None:
        self.optimizer.reset_state()
        set_whole(self.optimizer.state_tensors(), state)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights, and the optimizer's state, for a checkpoint."""
        if not self.sharded:
            return super().tensors()
        with self._with_others("gather"):
            weights, state = self._gather()
        return weights, state

    @torch.no_grad()
    def _gather(self) -> list[dict[str, Tensor]]:
        """On rank 0, whole tensors on the CPU, one after the other; elsewhere, nothing."""
        gathered: list[dict[str, Tensor]] = []
        for tensors in super().tensors():
            gathered.append({})
            for name, tensor in tensors.items():
                full = whole(tensor)
                if self.group.leads:
                    gathered[-1][name] = full.cpu()
        return gathered

    def whole_model(self) -> GPT:
        """The model with all its weights, for this process alone; with FSDP2, a copy."""
        if not self.sharded:
            return self.model
        model = self._plain_model().to(self.device)
        model.loss_chunk = self.model.loss_chunk
        load_weights(model, self.tensors()[0])
        return model

    def _plain_model(self) -> GPT:
        with global_generators_restored(self.device):
            return GPT(self.config.model, self.vocab_size)

    def weights_are_finite(self) -> bool:
        """Whether every weight is a finite number."""
        if not self.sharded:
            return super().weights_are_finite()
        with self._with_others("check"):
            return self._are_finite()

    def _are_finite(self) -> bool:
        return bool(self.group.smallest(int(super().weights_are_finite())))

    # -- Computing -------------------------------------------------------------------------------

    def backward(self, step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of one batch; see `Trainer.backward`."""
        share = (len(inputs) // self.processes, inputs.shape[1])
        with self._with_others("backward", step, self.micro_batch, *share):
            return self._backward_share(step, self.micro_batch, *share, (inputs, targets))

    def _backward_share(
        self,
        step: int,
        micro_batch: int,
        sequences: int,
        length: int,
        batch: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.micro_batch = micro_batch  # all change it together
        x, y = self._share(sequences, length, batch)
        loss, grad_norm = super().backward(step, x, y)
        dist.all_reduce(loss)
        self._computed = loss / self.processes, whole(grad_norm)
        return self._computed

    def _share(
        self, sequences: int, length: int, batch: tuple[Tensor, Tensor] | None
    ) -> list[Tensor]:
        """Inputs and targets of this process, (sequences, length) each, on the device."""
        both = None if batch is None else torch.stack(batch, 1)
        share = self.group.scatter(both, (sequences, 2, length))
        share = share.pin_memory() if self.device.type == "cuda" else share
        return [self.to_device(part.contiguous()) for part in share.unbind(1)]

    def micro_batches(
        self, step: int, inputs: Tensor, targets: Tensor
    ) -> Generator[tuple[Tensor, Tensor]]:
        """The micro-batches of this process; with DDP, only the last one averages gradients."""
        count = -(-len(inputs) // self.micro_batch)
        parts = super().micro_batches(step, inputs, targets)
        with contextlib.closing(parts):
            for number, part in enumerate(parts, 1):
                averages = self.sharded or number == count
                with contextlib.nullcontext() if averages else self._ddp.no_sync():
                    yield part

    def update(self, lr_scale: float, loss: Tensor, grad_norm: Tensor) -> bool:
        """Clip the gradients and update the weights; see `Trainer.update`."""
        with self._with_others("update", lr_scale):
            return super().update(lr_scale, loss, grad_norm)

    def _update(self, lr_scale: float) -> None:
        super().update(lr_scale, *self._computed)

    def evaluate(self, sequences: ValidationSequences) -> float:
        """Mean cross-entropy of the validation sequences, in nats per token."""
        total = 0.0
        for batch in sequences.batches(self.micro_batch * self.processes):
            self.check_stop()
            x, y = (torch.from_numpy(part) for part in batch)
            share = -(-len(x) // self.processes)
            missing = share * self.processes - len(x)
            filled = [torch.cat([part, part[:1].expand(missing, -1)]) for part in (x, y)]
            with self._with_others("evaluate", len(x), share, x.shape[1]):
                total += self._evaluate_share(len(x), share, x.shape[1], (filled[0], filled[1]))
        return total / len(sequences)

    @torch.no_grad()
    def _evaluate_share(
        self,
        sequences: int,
        share: int,
        length: int,
        batch: tuple[Tensor, Tensor] | None = None,
    ) -> float:
        """The sum of the losses of all processes' sequences, without those that pad a share."""
        x, y = self._share(share, length, batch)
        real = min(max(sequences - self.group.rank * share, 0), share)
        few = max(real, 1)  # FSDP2 computes on all processes or none
        self.model.eval()
        try:
            with self.autocast():
                loss = self.loss_fn(x[:few], y[:few])[1]
            total = loss * real if real else torch.zeros_like(loss)  # perhaps inf * 0
        finally:
            self.model.train()
        dist.all_reduce(total)
        return float(total)


# What the other processes do, by the name of rank 0's message.
FOLLOWED: dict[str, Callable[..., object]] = {
    "reset": ParallelTrainer._reset,
    "weights": ParallelTrainer._share_weights,
    "optimizer": ParallelTrainer._share_optimizer_state,
    "scaler": ParallelTrainer._set_scaler,
    "gather": ParallelTrainer._gather,
    "check": ParallelTrainer._are_finite,
    "backward": ParallelTrainer._backward_share,
    "update": ParallelTrainer._update,
    "evaluate": ParallelTrainer._evaluate_share,
}


class _Loss(nn.Module):
    """The loss as the forward pass of a module, which is what DDP wraps."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, targets: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As `GPT.loss_fn`."""
        return self.model.loss_fn(tokens, targets, z_loss)


def _of_share(config: Config, share: int, micro_batch: Literal["auto"] | int) -> Config:
    """The config with a batch of `share` sequences, in micro-batches that divide it."""
    if micro_batch != "auto":
        micro_batch = max(n for n in range(1, min(micro_batch, share) + 1) if share % n == 0)
    batch = {"batch_sequences": share, "batch_tokens": None, "micro_batch": micro_batch}
    return config.model_copy(update={"training": config.training.model_copy(update=batch)})

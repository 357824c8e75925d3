"""Train many small runs in one batch: their weights are stacked along a leading cell dimension.

A tiny model neither fills a GPU nor hides the overhead of launching kernels from Python. N models
of one shape, stacked, are one model whose matrix products are batched; `torch.func.vmap` makes it
from the plain one. `BatchedTrainer` has `backward` and `update`, like `Trainer` (gpt/trainer.py);
everything else (data, learning rate, evaluation, log, directory, result) belongs to each cell's own
`Run`, as in gpt/training.py.

Cells cannot affect each other: only the losses are summed over the first dimension, and each loss
depends only on its own cell's weights. A cell whose loss or gradient is not finite keeps the
weights that it had before, while the others continue.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from gpt.config import Config, leaves
from gpt.data.preparation import prepare
from gpt.data.prepared import Dataset
from gpt.diagnostics.layers import LayerStats
from gpt.errors import NonFiniteError, StepInterruptedError
from gpt.hardware import memory
from gpt.hardware.device import autocast, flush_denormals, pick_device
from gpt.hardware.memory import is_out_of_memory, release_memory, with_less_memory
from gpt.io.console import Console
from gpt.io.wait import raise_if
from gpt.model.gpt2 import GPT
from gpt.model.norm import ACROSS_TOKENS
from gpt.optim import SEPARABLE, stack
from gpt.run.directory import RunDirectory, RunResult
from gpt.run.resume import open_run
from gpt.run.run import Run
from gpt.trainer import Trainer

# Options, by prefix, in which the cells of one batch may differ; all others are equal.
PER_CELL_OPTIONS = (
    "name",
    "seed",
    "data.seed",
    "schedule.",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.independent_decay",
    "optimizer.clip",
)
MIN_ACTIVE_FRACTION = 0.75  # fraction of cells that still train, below which the stack is rebuilt


def unsupported_reason(config: Config) -> str | None:
    """The option, with its value, that keeps a run out of an ensemble; None if none does."""
    reasons = {
        f"optimizer.name: {config.optimizer.name}": config.optimizer.name not in SEPARABLE,
        f"model.dropout: {config.model.dropout:g}": config.model.dropout > 0,
        f"model.norm.type: {config.model.norm.type}": config.model.norm.type in ACROSS_TOKENS,
        f"training.loss_chunk: {config.training.loss_chunk}": config.training.loss_chunk
        is not None,
        "training.precision: fp16": config.training.precision == "fp16",
        f"training.nonfinite: {config.training.nonfinite}": config.training.nonfinite != "stop",
    }
    return next((option for option, hinders in reasons.items() if hinders), None)


def shape(config: Config) -> str:
    """A key shared by the cells of one ensemble: all options except those in PER_CELL_OPTIONS."""
    common = [
        pair for pair in leaves(config.model_dump()) if not pair[0].startswith(PER_CELL_OPTIONS)
    ]
    return repr(common)


class BatchedTrainer:
    """N trainers of models of one shape, whose steps are computed together.

    The parameters, gradients and Adam moments of each trainer's model become views of the stacked
    ones: a trainer can be evaluated or saved as usual.

    `training.compile` is ignored: torch 2.13's compiler does not support
    attention's custom vmap rule.

    Args:
        trainers: on one device, after the same number of updates. Their configs differ only in
            options that may differ between cells (see `shape`).
        micro_batch: sequences of each cell per forward pass; by default, what fits in memory.
    """

    def __init__(self, trainers: Sequence[Trainer], micro_batch: int | None = None) -> None:
        first = trainers[0]
        self.config, self.device = first.config, first.device
        self.weights: dict[str, Tensor] = {}
        self.steps: dict[str, nn.Parameter] = {}  # what the optimizer adds at learning rate 1
        for name, *cells in zip(*_named([t.model for t in trainers]), strict=True):
            stacked = torch.stack([cell.detach() for cell in cells]).requires_grad_()
            stacked.grad = torch.zeros_like(stacked)
            for cell, values, gradient in zip(cells, stacked.detach(), stacked.grad, strict=True):
                cell.data, cell.grad = values, gradient
            self.weights[name] = stacked
            self.steps[name] = nn.Parameter(torch.zeros_like(stacked))
            self.steps[name].grad = stacked.grad
        optimizers = [trainer.optimizer for trainer in trainers]
        self.optimizer = stack(optimizers, self.steps, self.config.optimizer)
        decays = [optimizer.by_parameter("weight_decay") for optimizer in optimizers]
        self.decays = {name: self._numbers([own[name] for own in decays]) for name in self.weights}
        self.lr_factors = first.optimizer.by_parameter("lr_factor")  # follow from the shape
        options = [trainer.config.optimizer for trainer in trainers]
        self.rates = self._numbers([each.learning_rate for each in options])
        self.clips = self._numbers(
            [math.inf if each.clip is None else each.clip for each in options]
        )
        self.alive = torch.ones(len(trainers), dtype=torch.bool, device=self.device)
        vocab_size = first.model.vocab_size
        with torch.device("meta"):
            template = GPT(self.config.model, vocab_size)
        for attention in template.attentions():
            attention.kernel = _flattened
        loss_fn = partial(_cell_loss, _LossFn(template), self.config.training.z_loss)
        self.loss_fn = vmap(loss_fn)
        release_memory(self.device)  # or what the allocator holds would not count as free
        self.micro_batch = micro_batch or memory.micro_batch(
            self.config, vocab_size, self.device, models=len(trainers)
        )

    def _numbers(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def __len__(self) -> int:
        return len(self.alive)

    @with_less_memory
    def backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of one batch for each cell, and leave them in the parameters.

        Args:
            inputs, targets: (N, sequences, T) integers, on the host.

        Returns:
            The cells' cross-entropies and gradient norms: (N,) and (N,), on the device.
        """
        on_device = self._to_device(inputs), self._to_device(targets)
        gradients = self._gradients()
        for gradient in gradients:
            gradient.zero_()
        losses = torch.zeros(len(self), device=self.device)
        micro_batches = (half.split(self.micro_batch, dim=1) for half in on_device)
        for x, y in zip(*micro_batches, strict=True):
            with autocast(self.device, self.config.training.precision):
                total_loss, cross_entropy = self.loss_fn(self.weights, x, y)
            weight = x.shape[1] / inputs.shape[1]
            (total_loss * weight).sum().backward()
            losses += cross_entropy.detach() * weight
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        return losses, norms

    @torch.no_grad()
    def update(self, lr_scales: Sequence[float], losses: Tensor, grad_norms: Tensor) -> None:
        """Clip and update. Failed cells keep their weights.

        Args:
            lr_scales: multiples of each cell's learning rate.
            losses, grad_norms: returned by `backward`.
        """
        self.alive &= (losses + grad_norms).isfinite()
        clipping = (self.clips / (grad_norms + 1e-6)).clamp(max=1)
        scales = self._to_device(torch.tensor(lr_scales))
        rates = torch.where(self.alive, self.rates * scales, 0)
        for gradient in self._gradients():
            gradient.mul_(_per_cell(clipping, gradient))
            gradient.masked_fill_(~_per_cell(self.alive, gradient), 0)
        for step in self.steps.values():
            step.zero_()
        self.optimizer.step()
        for name, weight in self.weights.items():
            values = weight.detach()
            own_rates = rates * self.lr_factors[name]
            values.mul_(_per_cell(1 - own_rates * self.decays[name], values))
            values.addcmul_(self.steps[name], _per_cell(own_rates, values))

    def set_micro_batch(self, micro_batch: int) -> None:
        """Use smaller micro-batches from now on."""
        self.micro_batch = micro_batch
        release_memory(self.device)

    def _to_device(self, tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def _gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]


def _per_cell(numbers: Tensor, tensor: Tensor) -> Tensor:
    """(N,) numbers in a shape that broadcasts against (N, ...)."""
    return numbers.view(-1, *[1] * (tensor.ndim - 1))


def _named(models: Sequence[GPT]) -> Iterator[Iterator[Any]]:
    """The names of the parameters, and each model's parameters."""
    yield (name for name, _ in models[0].named_parameters())
    for model in models:
        yield iter(model.parameters())


class _LossFn(nn.Module):
    """A model whose `forward` is `loss_fn`, because functional_call calls `forward`."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        return self.model.loss_fn(tokens, targets, z_loss)


def _cell_loss(
    template: _LossFn, z_loss: float, weights: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """(total loss, cross-entropy) of one cell."""
    named = {f"model.{name}": weight for name, weight in weights.items()}
    return functional_call(template, named, (x, y, z_loss))


class _FlattenedAttention(torch.autograd.Function):
    """torch's attention kernel, with cells and sequences merged into one batch dimension.

    It has no `forward`, as it is only called under vmap.
    """

    @staticmethod
    def vmap(info: Any, in_dims: Any, *qkv: Tensor) -> tuple[Tensor, int]:
        q, k, v = (x.movedim(dim, 0).flatten(0, 1) for x, dim in zip(qkv, in_dims, strict=True))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.unflatten(0, (info.batch_size, -1)), 0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep: the kernel that `vmap` calls keeps what it needs."""


def _flattened(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return _FlattenedAttention.apply(q, k, v)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------------------------------
# The loop over many runs


def train_together(
    configs: Sequence[Config],
    paths: Sequence[Path],
    *,
    stop: Callable[[], bool],
    on_update: Callable[[int], object],
    save_checkpoints: bool,
) -> list[RunResult | Exception]:
    """Train runs of one shape in batches, as many at once as fit in memory.

    Args:
        paths: their run directories.
        stop: polled often; once it returns true, the runs being trained are saved after the same
            update, and every run that has not ended ends as interrupted.
        on_update: called with the index of each run that has made an update.
        save_checkpoints: whether checkpoints are saved as scheduled, or only for a stop.

    Returns:
        For each run its result, or the exception that it raised.
    """
    config = configs[0]
    device = pick_device(config.training.device)
    dataset = prepare(config.data)
    release_memory(device)
    most = memory.models_at_once(config, dataset.encoding.n_vocab, device)
    outcomes: dict[int, RunResult | Exception] = {}
    stopping = _Latch(stop)
    while len(outcomes) < len(configs):
        group = [i for i in range(len(configs)) if i not in outcomes][:most]
        with (
            contextlib.ExitStack() as held,
            flush_denormals(),
            contextlib.closing(Console(quiet=True)) as console,
        ):
            runs: dict[int, Run] = {}
            for i in group:
                try:
                    opened = _open(
                        configs[i],
                        paths[i],
                        dataset,
                        device,
                        console,
                        held,
                        stop=stopping,
                        on_update=partial(on_update, i),
                        save_checkpoints=save_checkpoints,
                    )
                except Exception as error:
                    opened = error
                if isinstance(opened, Run):
                    runs[i] = opened
                else:
                    outcomes[i] = opened
            try:
                for step in sorted({run.progress.step for run in runs.values()}):
                    at_step = [i for i, run in runs.items() if run.progress.step == step]
                    cells = _Cells({i: runs.pop(i) for i in at_step}, outcomes)
                    try:
                        fit_together(cells, stopping)
                    finally:
                        runs |= cells.running
            except Exception as error:
                if not is_out_of_memory(error) or len(group) == 1:
                    outcomes |= {i: error for i in group if i not in outcomes}
            finally:
                for i in list(runs):
                    runs.pop(i).close()
        release_memory(device)
        if any(i not in outcomes for i in group):  # out of memory: retry with fewer
            most = max(1, len(group) // 2)
    return [outcomes[i] for i in range(len(configs))]


def _open(
    config: Config,
    path: Path,
    dataset: Dataset,
    device: torch.device,
    console: Console,
    held: contextlib.ExitStack,
    *,
    stop: Callable[[], bool],
    on_update: Callable[[], object],
    save_checkpoints: bool,
) -> Run | RunResult | Exception:
    """Open a run in its directory; returns its result instead if it has ended.

    Args:
        held: receives the lock on the directory.
    """
    held.enter_context(RunDirectory(path).lock())
    plan = open_run(config, path, "auto")
    if plan.result is not None:
        return plan.result
    return Run(
        config,
        plan,
        dataset,
        Trainer(config, dataset.encoding.n_vocab, device, check_stop=partial(raise_if, stop)),
        console,
        stop=stop,
        on_update=on_update,
        save_checkpoints=save_checkpoints,
        plot=False,
    )


class _Latch:
    """A stop that stays true, so that all runs stop after the same update."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop, self._stopped = stop, False

    def __call__(self) -> bool:
        self._stopped = self._stopped or self._stop()
        return self._stopped


class _Cells:
    """The runs that still train, by number; each ends alone, with a result or an exception.

    Args:
        running: a run is removed when it ends. Keep no other reference to a run, because it
            would keep the memory of all runs allocated.
        outcomes: receives the results and exceptions.
    """

    def __init__(self, running: dict[int, Run], outcomes: dict[int, RunResult | Exception]) -> None:
        self.running, self.outcomes = running, outcomes

    @contextlib.contextmanager
    def guard(self, i: int) -> Iterator[None]:
        """End run `i` if the block raises."""
        try:
            yield
        except Exception as error:
            self.end(i, _outcome(self.running[i], error))

    def end(self, i: int, outcome: RunResult | Exception | None) -> None:
        """End run `i` with an outcome; None leaves it running."""
        if outcome is not None:
            self.outcomes[i] = outcome
            self.running.pop(i).close()


def fit_together(cells: _Cells, stopping: Callable[[], bool]) -> None:
    """The loop of `gpt.training.fit`, for runs that have made equally many updates.

    Args:
        stopping: returns whether all runs must stop.
    """
    runs = cells.running
    batched: BatchedTrainer | None = None
    stacked: list[int] = []  # the cells of `batched`, in its order; some may have ended since
    steps = _steps_to_make(next(iter(runs.values())))
    for i in list(runs):
        with cells.guard(i):
            cells.end(i, runs[i].begin())
    for step in steps:
        batches: dict[int, tuple[Tensor, Tensor]] = {}
        for i in list(runs):
            with cells.guard(i):
                batches[i] = runs[i].batch(step)
        if stopping():
            break
        if not runs:
            return
        if batched is None or len(runs) < MIN_ACTIVE_FRACTION * len(stacked):
            micro_batch = None if batched is None else batched.micro_batch
            batched, stacked = None, list(runs)  # frees its memory first
            batched = BatchedTrainer([runs[i].trainer for i in stacked], micro_batch)
        any_batch = next(iter(batches.values()))  # stands in for those of ended cells
        inputs, targets = zip(*(batches.get(i, any_batch) for i in stacked), strict=True)
        losses, grad_norms = batched.backward(torch.stack(inputs), torch.stack(targets))
        layer_stats: dict[int, LayerStats | None] = {}
        for i in list(runs):
            with cells.guard(i):
                layer_stats[i] = runs[i].before_update(step, *batches[i])
        lr_scales = [runs[i].lr_scale(step) if i in runs else 0.0 for i in stacked]
        batched.update(lr_scales, losses, grad_norms)
        for i, loss, grad_norm in zip(stacked, losses, grad_norms, strict=True):
            if i in runs:
                with cells.guard(i):
                    values = (loss, grad_norm, False, layer_stats[i])
                    cells.end(i, runs[i].after_update(step, *values))
    for i in list(runs):
        with cells.guard(i):
            cells.end(i, runs[i].interrupt() if stopping() else runs[i].finish())


def _steps_to_make(run: Run) -> range:
    return range(run.progress.step + 1, run.config.training.steps + 1)


def _outcome(run: Run, error: Exception) -> RunResult | Exception:
    """How a run that raised `error` ends."""
    try:
        if isinstance(error, StepInterruptedError):
            return run.interrupt()
        if isinstance(error, NonFiniteError):
            return run.diverge(error.fault, applied=False)
    except NonFiniteError as fault:
        return _outcome(run, fault)
    except Exception as another:
        return another
    return error

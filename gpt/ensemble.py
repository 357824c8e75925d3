"""Many small runs trained as one: their weights stacked along a first dimension, a cell each.

A tiny model does not fill a GPU, nor hide the time that Python takes to start its kernels. N of one
shape, stacked, are one model whose matrix products are batched; `torch.func.vmap` makes it from the
plain one. Everything else about a run (its data, rate, clip, evaluation, log, directory, result) is
its own `Training`, which asks for the two things that are computed here: gradients and update.

Cells cannot touch each other: no sum goes over the first dimension but that of the losses, whose
gradients are the cells' own. A cell whose loss or gradient is not finite keeps the weights that it
had before, for good, while the others go on.
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
from gpt.io.console import Console
from gpt.io.files import lock_directory
from gpt.model import GPT
from gpt.optim import SEPARABLE, Optimizer, stack
from gpt.placement import check
from gpt.run import plan
from gpt.run.directory import RunResult, open_run
from gpt.training import (
    Apply,
    Gradients,
    Training,
    Work,
    autocast,
    flush_denormals,
    release_memory,
)

# Options in which the cells of one ensemble may differ: what is a number to each of them.
OWN = (
    "name",
    "seed",
    "data.seed",
    "schedule.",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.independent_decay",
    "optimizer.clip",
)
FULL_ENOUGH = 0.75  # share of cells that still train, below which the stack is made smaller


def why_not(config: Config) -> str | None:
    """Why a run cannot be a cell of an ensemble, in words; None if it can."""
    reasons = {
        f"optimizer.name: {config.optimizer.name}": config.optimizer.name not in SEPARABLE,
        f"model.dropout: {config.model.dropout:g}": config.model.dropout > 0,
        "model.norm.type: batch": config.model.norm.type == "batch",
        f"training.loss_chunk: {config.training.loss_chunk}": config.training.loss_chunk
        is not None,
        "training.precision: fp16": config.training.precision == "fp16",
        f"training.nonfinite: {config.training.nonfinite}": config.training.nonfinite != "stop",
    }
    return next((option for option, hinders in reasons.items() if hinders), None)


def shape(config: Config) -> str:
    """What the cells of one ensemble have in common: all options but a few."""
    common = [pair for pair in leaves(config.model_dump()) if not pair[0].startswith(OWN)]
    return repr(common)


class Ensemble:
    """N models of one shape as one, and their optimizers.

    The models' parameters, gradients and Adam's moments become views of the stacked ones: what is
    done to a cell's model is done to the cell.

    Nothing is compiled, whatever `training.compile` says: torch 2.13's compiler does not follow
    attention's rule for vmap.

    Args:
        config: any cell's; they differ only in options that are a cell's own (see `shape`).
        models: on one device.
        optimizers: the models', all after the same number of updates.
        clips: the most that each cell's gradient norm may be.
        micro_batch: sequences of each cell in one forward pass; what fits, unless given.
    """

    def __init__(
        self,
        config: Config,
        models: Sequence[GPT],
        optimizers: Sequence[Optimizer],
        clips: Sequence[float | None],
        micro_batch: int | None = None,
    ) -> None:
        self.config, self.device = config, models[0].token_embedding.weight.device
        self.weights: dict[str, Tensor] = {}
        self.steps: dict[str, nn.Parameter] = {}  # what the optimizer adds to them at rate 1
        for name, *cells in zip(*_named(models), strict=True):
            stacked = torch.stack([cell.detach() for cell in cells]).requires_grad_()
            stacked.grad = torch.zeros_like(stacked)
            for cell, values, gradient in zip(cells, stacked.detach(), stacked.grad, strict=True):
                cell.data, cell.grad = values, gradient
            self.weights[name] = stacked
            self.steps[name] = nn.Parameter(torch.zeros_like(stacked))
            self.steps[name].grad = stacked.grad
        self.optimizer = stack(optimizers, self.steps, config.optimizer)
        decays = [optimizer.decays() for optimizer in optimizers]
        self.decays = {name: self._numbers([own[name] for own in decays]) for name in self.weights}
        self.rates = self._numbers([optimizer.config.learning_rate for optimizer in optimizers])
        self.clips = self._numbers([math.inf if clip is None else clip for clip in clips])
        self.alive = torch.ones(len(models), dtype=torch.bool, device=self.device)
        with torch.device("meta"):
            template = GPT(config.model, models[0].vocab_size)
        for attention in template.attentions():
            attention.kernel = _flattened
        self.objective = vmap(partial(_objective, _Objective(template), config.training.z_loss))
        vocabulary, count = models[0].vocab_size, len(models)
        release_memory(self.device)  # or what the allocator holds would not count as free
        self.micro_batch = micro_batch or plan.micro_batch(
            config, vocabulary, self.device, models=count
        )

    def _numbers(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def __len__(self) -> int:
        return len(self.alive)

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward: the losses, and the norms of the gradients, which the cells hold.

        Args:
            inputs, targets: (N, B, T) integers, on the host.

        Returns:
            (N,) and (N,).
        """
        x, y = self._on_device(inputs), self._on_device(targets)
        return plan.with_less_memory(self, lambda: self._gradients(x, y))

    def _gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        gradients = self._held()
        torch._foreach_zero_(gradients)
        losses = torch.zeros(len(self), device=self.device)
        micro_batches = (half.split(self.micro_batch, dim=1) for half in (inputs, targets))
        for x, y in zip(*micro_batches, strict=True):
            with autocast(self.device, self.config.training.precision):
                minimised, cross_entropy = self.objective(self.weights, x, y)
            share = x.shape[1] / inputs.shape[1]
            (minimised * share).sum().backward()
            losses += cross_entropy.detach() * share
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        return losses, norms

    def use(self, micro_batch: int) -> None:
        """Go on with smaller micro-batches."""
        self.micro_batch = micro_batch
        release_memory(self.device)

    def _on_device(self, tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    @torch.no_grad()
    def apply(self, shares: Sequence[float], losses: Tensor, norms: Tensor) -> None:
        """Clip the gradients and update the weights; of a cell that failed no more.

        Args:
            shares: of each cell's full rate.
            losses, norms: what `gradients` returned.
        """
        self.alive &= (losses + norms).isfinite()
        clipping = (self.clips / (norms + 1e-6)).clamp(max=1)
        rates = torch.where(self.alive, self.rates * self._on_device(torch.tensor(shares)), 0)
        gradients = self._held()
        for gradient in gradients:
            gradient.mul_(_beside(clipping, gradient))
            gradient.masked_fill_(~_beside(self.alive, gradient), 0)
        torch._foreach_zero_(list[Tensor](self.steps.values()))
        self.optimizer.step()
        for name, weight in self.weights.items():
            values = weight.detach()
            values.mul_(_beside(1 - rates * self.decays[name], values))
            values.addcmul_(self.steps[name], _beside(rates, values))

    def _held(self) -> list[Tensor]:
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]


def _beside(numbers: Tensor, tensor: Tensor) -> Tensor:
    """(N,) in a shape that goes with (N, ...)."""
    return numbers.view(-1, *[1] * (tensor.ndim - 1))


def _named(models: Sequence[GPT]) -> Iterator[Iterator[Any]]:
    """The names of the parameters, and each model's parameters."""
    yield (name for name, _ in models[0].named_parameters())
    for model in models:
        yield iter(model.parameters())


class _Objective(nn.Module):
    """A model whose `forward` is its objective, which is what functional_call calls."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        return self.model.objective(tokens, targets, z_loss)


def _objective(
    template: _Objective, z_loss: float, weights: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The objective of one cell."""
    named = {f"model.{name}": weight for name, weight in weights.items()}
    return functional_call(template, named, (x, y, z_loss))


class _FlattenedAttention(torch.autograd.Function):
    """torch's attention kernel, to which cells and sequences are one batch dimension.

    It has no `forward`, as it is called under vmap alone.
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
# Runs as cells


def train_together(
    configs: Sequence[Config],
    paths: Sequence[Path],
    *,
    stop: Callable[[], bool],
    made: Callable[[int], object],
    saves: bool,
) -> list[RunResult | Exception]:
    """Train runs of one shape as one, as many at once as the memory holds.

    Args:
        paths: their run directories.
        stop: asked again and again; once true, all are saved after the same update and end as
            interrupted.
        made: called with the index of each run that has made an update.
        saves: whether checkpoints are saved as scheduled, or only when runs are stopped.

    Returns:
        How each ended: its result, or what it raised.
    """
    config = configs[0]
    check(config.model)
    device = plan.pick_device(config.training.device)
    dataset = prepare(config.data)
    release_memory(device)
    most = plan.models_at_once(config, dataset.encoding.n_vocab, device)
    outcomes: dict[int, RunResult | Exception] = {}
    while len(outcomes) < len(configs):
        group = [i for i in range(len(configs)) if i not in outcomes][:most]
        runs: dict[int, Training] = {}
        together = _Together(stop, outcomes)
        with (
            contextlib.ExitStack() as held,
            flush_denormals(),
            contextlib.closing(Console(quiet=True)) as console,
        ):
            for i in group:
                try:
                    held.enter_context(
                        lock_directory(paths[i], f"{paths[i]}: another process trains there")
                    )
                    opened = open_run(configs[i], paths[i], "auto")
                    if opened.result is not None:
                        outcomes[i] = opened.result
                        continue
                    runs[i] = Training(
                        configs[i],
                        opened,
                        dataset,
                        device,
                        console,
                        together.stopped,
                        partial(made, i),
                        alone=False,
                        saves=saves,
                    )
                except Exception as error:
                    outcomes[i] = error
            try:
                for step in sorted({run.progress.step for run in runs.values()}):
                    at_step = [i for i, run in runs.items() if run.progress.step == step]
                    together.train({i: runs.pop(i) for i in at_step})
            except Exception as error:
                if not plan.is_out_of_memory(error) or len(group) == 1:
                    outcomes |= {i: error for i in group if i not in outcomes}
        release_memory(device)
        if any(i not in outcomes for i in group):  # for want of memory: fewer, from where they were
            most = max(1, len(group) // 2)
    return [outcomes[i] for i in range(len(configs))]


class _Together:
    """Drives runs that are at one step, update by update, to their ends.

    Args:
        outcomes: where it says how each ended.
    """

    def __init__(
        self, stop: Callable[[], bool], outcomes: dict[int, RunResult | Exception]
    ) -> None:
        self.stop, self.outcomes = stop, outcomes
        self.stopping = False

    def stopped(self) -> bool:
        """What a run asks, again and again: all stop after the same step."""
        self.stopping = self.stopping or self.stop()
        return self.stopping

    def train(self, runs: dict[int, Training]) -> None:
        """Train them, and forget each as it ends, so that nothing holds its memory."""
        works = {i: run.work() for i, run in runs.items()}
        try:
            self._train(runs, works)
        finally:
            for work in works.values():
                work.close()

    def _train(self, runs: dict[int, Training], works: dict[int, Work]) -> None:
        batches: dict[int, Gradients] = self._ask(runs, works, dict.fromkeys(works))
        ensemble: Ensemble | None = None
        cells: list[int] = []  # of the ensemble, in its order; some may have ended since
        while batches:
            if self.stopped():  # some may have asked for their next batch before others were asked
                self._ask(runs, works, dict.fromkeys(batches))
                return
            if ensemble is None or len(batches) < FULL_ENOUGH * len(cells):
                micro_batch = None if ensemble is None else ensemble.micro_batch
                ensemble, cells = None, list(batches)
                ensemble = _ensemble([runs[i] for i in cells], micro_batch)
            any_batch = next(iter(batches.values()))
            asked = [batches.get(i, any_batch) for i in cells]
            losses, norms = ensemble.gradients(
                torch.stack([batch.inputs for batch in asked]),
                torch.stack([batch.targets for batch in asked]),
            )
            found = dict(zip(cells, zip(losses, norms, strict=True), strict=True))
            updates: dict[int, Apply] = self._ask(runs, works, {i: found[i] for i in batches})
            shares = [updates[i].share if i in updates else 0.0 for i in cells]
            ensemble.apply(shares, losses, norms)
            batches = self._ask(runs, works, dict.fromkeys(updates, False))

    def _ask(
        self, runs: dict[int, Training], works: dict[int, Work], answers: dict[int, Any]
    ) -> dict[int, Any]:
        """What those runs want next that have not ended."""
        wanted = {}
        for i, answer in answers.items():
            try:
                wanted[i] = works[i].send(answer)
            except Exception as ended:
                self.outcomes[i] = ended.value if isinstance(ended, StopIteration) else ended
                del works[i], runs[i]
        return wanted


def _ensemble(runs: Sequence[Training], micro_batch: int | None) -> Ensemble:
    return Ensemble(
        runs[0].config,
        [run.model for run in runs],
        [run.optimizer for run in runs],
        [run.config.optimizer.clip for run in runs],
        micro_batch,
    )

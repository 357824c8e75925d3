"""Optimizers: torch's updates, called as functions, and what they remember of every parameter.

Weight decay acts on matrices and embeddings, never on biases, norms or a placement's own weights.
All optimizers decouple it from the gradient (Loshchilov and Hutter 2019) but SGD, where torch adds
it to the gradient. Independent decay is not multiplied by the rate (Wortsman et al. 2023).

torch's Optimizer classes would do the same, but the first of them to be made loads torch's
compiler, which takes two seconds of every start.

Not here: the learning rate's course (gpt/schedule.py) and clipping (gpt/training.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import _adafactor, adamw, radam, sgd  # Adafactor's is in a private module only

from gpt.config import OptimizerConfig

Memory = dict[str, Tensor]  # what is remembered of one parameter, by torch's names


@dataclass(frozen=True)
class Update:
    """One update of parameters that have one rule and one decay; what it changes is in lists."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    memory: list[Memory]
    rate: float
    decay: float

    def remembered(self, quantity: str) -> list[Tensor]:
        """That quantity of each parameter."""
        return [memory[quantity] for memory in self.memory]


class Rule(ABC):
    """How parameters follow their gradients."""

    fused: bool | None = None  # one kernel for all, which finds `step` on the device

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    @abstractmethod
    def shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """What is remembered of a parameter; `step` counts its updates."""

    @abstractmethod
    def apply(self, update: Update) -> None:
        """Change parameters and memory in place."""

    def start(self, parameter: Tensor) -> Memory:
        """What is remembered before the first update: zeros."""
        start = {q: parameter.new_zeros(shape) for q, shape in self.shapes(parameter).items()}
        if "step" in start:
            device = parameter.device if self.fused else "cpu"
            start["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return start


class AdamW(Rule):
    """Adam with decoupled weight decay; Kingma and Ba 2015, Loshchilov and Hutter 2019."""

    fused: bool | None = True

    def shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        return {
            "step": torch.Size(),
            "exp_avg": parameter.shape,
            "exp_avg_sq": parameter.shape,
        }

    def apply(self, update: Update) -> None:
        adamw.adamw(
            update.parameters,
            update.gradients,
            update.remembered("exp_avg"),
            update.remembered("exp_avg_sq"),
            [],
            update.remembered("step"),
            lr=update.rate,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=update.decay,
            amsgrad=False,
            maximize=False,
            fused=self.fused,
        )


class RAdam(AdamW):
    """Adam whose first updates are scaled by the variance of their rate; Liu et al. 2020.

    Without that variance's estimate (the first few steps) it is momentum SGD: warm-up built in.
    """

    fused = None

    def apply(self, update: Update) -> None:
        radam.radam(
            update.parameters,
            update.gradients,
            update.remembered("exp_avg"),
            update.remembered("exp_avg_sq"),
            update.remembered("step"),
            lr=update.rate,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=update.decay,
            decoupled_weight_decay=True,
        )


class Adafactor(Rule):
    """Adam's second moment kept as row and column means; Shazeer and Stern 2018.

    Its rate is relative to the RMS of each parameter, and at most 1/sqrt(step).
    """

    def shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        shape = parameter.shape
        if parameter.ndim < 2:
            return {"step": torch.Size(), "variance": shape}
        row, column = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        return {"step": torch.Size(), "row_var": torch.Size(row), "col_var": torch.Size(column)}

    def apply(self, update: Update) -> None:
        _adafactor.adafactor(
            update.parameters,
            update.gradients,
            [memory.get("row_var") for memory in update.memory],
            [memory.get("col_var") for memory in update.memory],
            [memory.get("variance") for memory in update.memory],
            update.remembered("step"),
            lr=update.rate,
            beta2_decay=-0.8,
            eps1=torch.finfo(update.parameters[0].dtype).eps,
            eps2=1e-3,
            d=1.0,
            weight_decay=update.decay,
            maximize=False,
        )


class SGD(Rule):
    """Stochastic gradient descent with Nesterov momentum (plain if the momentum is 0)."""

    def shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        return {"momentum_buffer": parameter.shape} if self.config.momentum else {}

    def apply(self, update: Update) -> None:
        sgd.sgd(
            update.parameters,
            update.gradients,
            [memory.get("momentum_buffer") for memory in update.memory],
            lr=update.rate,
            momentum=self.config.momentum,
            nesterov=self.config.momentum > 0,
            dampening=0,
            weight_decay=update.decay,
            maximize=False,
        )


class Muon(Rule):
    """Momentum made orthogonal, for the blocks' matrices (Jordan et al. 2024); AdamW elsewhere.

    W <- (1 - rate * decay) W - rate * 0.2 sqrt(max(rows, columns)) * orthogonal(M), M the gradient
    with Nesterov momentum. The root scales updates to the RMS of AdamW's (Liu et al. 2025), so that
    both share one rate. torch's own multiplies in bf16, which many CPUs must emulate.
    """

    def shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        return {"momentum_buffer": parameter.shape}

    def apply(self, update: Update) -> None:
        momentum = self.config.momentum
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # those go through it together
        for parameter, gradient, buffer in zip(
            update.parameters, update.gradients, update.remembered("momentum_buffer"), strict=True
        ):
            ahead = gradient.lerp(buffer.lerp_(gradient, 1 - momentum), momentum)
            alike.setdefault(parameter.shape, []).append((parameter, ahead))
        for shape, pairs in alike.items():
            steps = orthogonal(torch.stack([ahead for _, ahead in pairs]))
            size = update.rate * 0.2 * math.sqrt(max(shape))
            for (parameter, _), step in zip(pairs, steps, strict=True):
                parameter.mul_(1 - update.rate * update.decay).add_(step, alpha=-size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each matrix's U S V^T, its singular values near 1: (N, n, m) -> (N, n, m).

    Five Newton-Schulz iterations X <- a X + b (X X^T) X + c (X X^T)² X (Jordan et al. 2024), in
    bf16 under CUDA.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


OPTIMIZERS: dict[str, type[Rule]] = {
    "adamw": AdamW,
    "radam": RAdam,
    "adafactor": Adafactor,
    "muon": Muon,
    "sgd": SGD,
}


# Those whose update is the rate times a step that does not depend on the weights.
SEPARABLE = {"adamw", "radam"}


@dataclass(frozen=True)
class Group:
    """Parameters with one rule and one decay: an update takes decay * rate of each away."""

    rule: Rule
    decay: float
    parameters: dict[str, nn.Parameter]


def grouped(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[Group]:
    """Each parameter in exactly one group."""
    decay = config.weight_decay  # the rules multiply it by the rate
    decay = decay / config.learning_rate if config.independent_decay else decay
    rule = OPTIMIZERS[config.name](config)
    elsewhere = AdamW(config) if isinstance(rule, Muon) else rule
    groups: dict[tuple[Rule, float], Group] = {}
    for name, parameter in parameters:
        inside = parameter.ndim == 2 and name.startswith("blocks.")
        key = (rule if inside else elsewhere, decay if parameter.ndim >= 2 else 0.0)
        groups.setdefault(key, Group(*key, {})).parameters[name] = parameter
    return list(groups.values())


class Optimizer:
    """Updates parameters by their gradients, and remembers what that takes.

    Attributes:
        memory: by the parameters' names; begun with a first gradient, loaded, or stacked.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
    ) -> None:
        self.config = config
        self.groups = grouped(parameters, config)
        self.memory: dict[str, Memory] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters, as torch.amp.GradScaler looks for them."""
        return [{"params": list(group.parameters.values())} for group in self.groups]

    @torch.no_grad()
    def step(self, share: float = 1.0) -> None:
        """Update every parameter that has a gradient, at `share` of the full rate."""
        for group in self.groups:
            moved = {n: p for n, p in group.parameters.items() if p.grad is not None}
            if not moved:
                continue
            for name, parameter in moved.items():
                if name not in self.memory:
                    self.memory[name] = group.rule.start(parameter)
            group.rule.apply(
                Update(
                    list(moved.values()),
                    [p.grad for p in moved.values() if p.grad is not None],
                    [self.memory[name] for name in moved],
                    share * self.config.learning_rate,
                    group.decay,
                )
            )

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.groups:
            for parameter in group.parameters.values():
                parameter.grad = None

    def decays(self) -> dict[str, float]:
        """How fast each parameter decays (see `Group`)."""
        return {name: group.decay for group in self.groups for name in group.parameters}

    def eps(self) -> dict[str, float]:
        """What Adam adds to the root of its second moment, for each parameter that it updates."""
        return dict.fromkeys(self._by_adam(), self.config.eps)

    def second_moments(self) -> dict[str, Tensor]:
        """Adam's estimate of each squared gradient, without bias; none before the first update."""
        found = {}
        for name in self._by_adam():
            memory = self.memory.get(name, {})
            updates = memory["step"].item() if memory else 0
            if updates:
                found[name] = memory["exp_avg_sq"] / (1 - self.config.beta2**updates)
        return found

    def _by_adam(self) -> Iterator[str]:
        for group in self.groups:
            if isinstance(group.rule, AdamW):
                yield from group.parameters

    def state(self) -> dict[str, Tensor]:
        """All of its memory as tensors named `parameter|quantity`."""
        return _flat(self.memory)

    @property
    def has_memory(self) -> bool:
        """Whether updates leave anything in `state`; plain gradient descent's leave nothing."""
        return any(g.rule.shapes(p) for g in self.groups for p in g.parameters.values())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a copy of what `state` returned.

        Raises:
            ValueError: it is of other parameters.
        """
        if not tensors:  # of before the first update
            self.memory = {}
            return
        memory = {n: g.rule.start(p) for g in self.groups for n, p in g.parameters.items()}
        fresh = _flat(memory)
        expected, given = _kinds(fresh), _kinds(tensors)
        for key in {**given, **expected}:
            if given.get(key) != expected.get(key):
                raise ValueError(f"optimizer state of another model: {key}")
            fresh[key].copy_(tensors[key])
        self.memory = memory


def _flat(memory: Mapping[str, Memory]) -> dict[str, Tensor]:
    return {
        f"{name}|{quantity}": value for name in memory for quantity, value in memory[name].items()
    }


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in tensors.items()}


def stack(
    optimizers: Sequence[Optimizer], steps: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> Optimizer:
    """The optimizers of N models of one shape as one, at rate 1 and without decay.

    What it adds to `steps`, from their gradients, is for every model what its own optimizer would
    add to the weights, but for the rate. The optimizers' memory becomes views of this one's.

    Args:
        optimizers: of one kind, which is SEPARABLE, after the same number of updates.
        steps: (N, ...) each, by the parameters' names.
    """
    plain = {"learning_rate": 1.0, "weight_decay": 0.0}
    stacked = Optimizer(steps.items(), config.model_copy(update=plain))
    for group in stacked.groups:
        for name, step in group.parameters.items():
            stacked.memory[name] = group.rule.start(step)
            for quantity, whole in stacked.memory[name].items():
                for index, optimizer in enumerate(optimizers):
                    cell = whole[index] if whole.ndim else whole  # all have made as many updates
                    memory = optimizer.memory.setdefault(name, {})
                    if quantity in memory:
                        cell.copy_(memory[quantity])
                    memory[quantity] = cell
    return stacked

"""Optimizers: torch.optim's classes, and Muon, as one object for all parameters of a model.

Weight decay acts on matrices and embeddings, never on biases, norms or a placement's own weights.
It is decoupled from the gradient (Loshchilov and Hutter 2019) except in SGD, where torch adds it to
the gradient. It is multiplied by the learning rate unless `independent_decay` is set (Wortsman et
al. 2023). The learning rate of each parameter group follows gpt/model/parametrization.py.

The learning rate schedule is in gpt/schedule.py; gradients are clipped in the training step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import OptimizerConfig
from gpt.model.parametrization import kind_of, lr_factor

ParamGroups = list[dict[str, Any]]  # as torch.optim's classes accept them


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices; Jordan et al. 2024.

    W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(rows, columns)) * orthogonalize(M), where M is the
    gradient with Nesterov momentum. The factor gives updates the RMS of AdamW's (Liu et al. 2025),
    so that both share one learning rate. torch.optim.Muon always multiplies in bf16, which many
    CPUs emulate, and one matrix at a time; this class batches matrices of one shape.
    """

    def __init__(self, params: ParamGroups, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. Closures are not supported."""
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self.state:
                    self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
                buffer = self.state[parameter]["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - momentum)
                nesterov = parameter.grad.lerp(buffer, momentum)
                by_shape[parameter.shape].append((parameter, nesterov))
            for shape, pairs in by_shape.items():
                directions = orthogonalize(torch.stack([nesterov for _, nesterov in pairs]))
                size = lr * 0.2 * math.sqrt(max(shape))
                for (parameter, _), direction in zip(pairs, directions, strict=True):
                    parameter.mul_(1 - lr * decay).add_(direction, alpha=-size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U V^T for each matrix U S V^T (singular values near 1): (N, n, m) -> (N, n, m).

    Five Newton-Schulz iterations X <- a X + b (X X^T) X + c (X X^T)² X (Jordan et al. 2024), in
    bf16 on CUDA and in fp32 elsewhere.
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


# Resuming relies on this: at learning rate 0 and with zero gradients, a step leaves the weights
# as they are (see `Optimizer.reset_state`).
OPTIMIZERS: dict[str, Callable[[ParamGroups, OptimizerConfig], torch.optim.Optimizer]] = {
    # Kingma and Ba 2015; decoupled weight decay, Loshchilov and Hutter 2019
    "adamw": lambda groups, c: torch.optim.AdamW(
        groups, c.learning_rate, (c.beta1, c.beta2), c.eps, fused=True
    ),
    # Rectifies the variance of Adam's adaptive learning rate: its first few steps are those of SGD
    # with momentum, a built-in warm-up; Liu et al. 2020
    "radam": lambda groups, c: torch.optim.RAdam(
        groups, c.learning_rate, (c.beta1, c.beta2), c.eps, decoupled_weight_decay=True
    ),
    # Factors Adam's second moment into row and column means. The learning rate is relative to each
    # parameter's RMS, and at most 1/sqrt(step); Shazeer and Stern 2018
    "adafactor": lambda groups, c: torch.optim.Adafactor(groups, c.learning_rate),
    # For the blocks' matrices, with AdamW for all other parameters
    "muon": lambda groups, c: Muon(groups, c.learning_rate, c.momentum),
    # With Nesterov momentum unless the momentum is 0
    "sgd": lambda groups, c: torch.optim.SGD(
        groups, c.learning_rate, c.momentum, nesterov=c.momentum > 0
    ),
}

# Those whose update, without decay, is the learning rate times a step independent of the weights.
SEPARABLE = {"adamw", "radam"}


class Optimizer:
    """Updates a model of width ratio m (for muP). Its state is tensors named `parameter|quantity`.

    Attributes:
        torch_optimizers: one, or for "muon" two: Muon and AdamW. A GradScaler unscales each.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, m: float = 1.0
    ) -> None:
        self.config = config
        decay = config.weight_decay / (config.learning_rate if config.independent_decay else 1.0)
        by_rule: dict[tuple[str, float, float], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in named:
            kind = kind_of(name, parameter.ndim)
            rule = "adamw" if config.name == "muon" and kind != "hidden" else config.name
            factor = lr_factor(kind, rule, m)
            own_decay = decay / factor if parameter.ndim >= 2 else 0.0  # torch multiplies by lr
            by_rule[rule, factor, own_decay].append((name, parameter))
        groups: dict[str, ParamGroups] = defaultdict(list)
        for (rule, factor, decay), params in by_rule.items():
            groups[rule].append({"params": params, "lr_factor": factor, "weight_decay": decay})
        self.torch_optimizers = [OPTIMIZERS[rule](groups[rule], config) for rule in groups]

    @property
    def param_groups(self) -> ParamGroups:
        """The groups of all torch optimizers; together they hold each parameter exactly once."""
        return [group for optimizer in self.torch_optimizers for group in optimizer.param_groups]

    def step(self, lr_scale: float = 1.0) -> None:
        """Update every parameter that has a gradient, at `lr_scale` times the learning rate."""
        for group in self.param_groups:
            group["lr"] = lr_scale * self.config.learning_rate * group["lr_factor"]
        for optimizer in self.torch_optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for optimizer in self.torch_optimizers:
            optimizer.zero_grad()

    def by_parameter(self, option: str) -> dict[str, Any]:
        """An option, such as "lr_factor" or Adam's "betas", of each parameter with it, by name."""
        return {n: g[option] for g in self.param_groups if option in g for n in g["param_names"]}

    def second_moments(self) -> tuple[dict[str, Tensor], int]:
        """Adam's bias-corrected second moments by parameter, and how many updates are in them."""
        states = {n: state for n, state in self._state().items() if "exp_avg_sq" in state}
        updates = int(next((s["step"] for s in states.values()), 0))  # equal; waits for a GPU
        correction = 1 - self.config.beta2**updates
        return {n: s["exp_avg_sq"] / correction for n, s in states.items() if updates}, updates

    @property
    def has_state(self) -> bool:
        """Whether updates leave state; only those of SGD without momentum do not."""
        return self.config.name != "sgd" or self.config.momentum > 0

    def state_tensors(self) -> dict[str, Tensor]:
        """The state itself, not a copy; empty before the first update."""
        return {f"{n}|{key}": t for n, state in self._state().items() for key, t in state.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors`, which `state_tensors` returned, into the state.

        Raises:
            ValueError: they belong to other parameters or another optimizer.
        """
        if not tensors:  # saved before the first update
            for optimizer in self.torch_optimizers:
                optimizer.state.clear()
            return
        self.reset_state()
        state = self.state_tensors()
        for key in {**tensors, **state}:
            given, own = tensors.get(key), state.get(key)
            if given is None or own is None or (given.shape, given.dtype) != (own.shape, own.dtype):
                raise ValueError(f"optimizer state of another model: {key}")
            own.copy_(given)

    def reset_state(self) -> None:
        """Set the state of every parameter to zero, as it is when the first update begins.

        torch's classes create their state in their first step. So this takes a step that leaves the
        weights as they are: zero gradients at learning rate 0, as in torch.distributed.checkpoint.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.step(lr_scale=0.0)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for tensor in self.state_tensors().values():
            tensor.zero_()

    def _state(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: optimizer.state[parameter]
            for optimizer in self.torch_optimizers
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter in optimizer.state
        }


def stack(
    optimizers: Sequence[Optimizer], steps: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> Optimizer:
    """One optimizer for N models of one shape, at learning rate 1 and without weight decay.

    It updates `steps` from their gradients: each model's slice changes as the model's own optimizer
    would change the weights, divided by the learning rate. The state tensors of `optimizers` become
    views of the stacked optimizer's.

    Args:
        optimizers: N of one kind in SEPARABLE, after the same number of updates.
        steps: (N, ...) each, by parameter name.
    """
    plain = {"learning_rate": 1.0, "weight_decay": 0.0}
    stacked = Optimizer(steps.items(), config.model_copy(update=plain))
    stacked.reset_state()
    whole = stacked.state_tensors()
    for index, optimizer in enumerate(optimizers):
        if not optimizer.state_tensors():
            optimizer.reset_state()
        for key, tensor in optimizer.state_tensors().items():
            view = whole[key][index] if whole[key].ndim else whole[key]  # all share `step`
            tensor.data = view.copy_(tensor)
    return stacked

"""Optimizers of torch, over parameter groups in which every parameter stands exactly once.

Weight decay acts on matrices and embeddings, never on biases, norms or a placement's own weights.
All optimizers decouple it from the gradient (Loshchilov and Hutter 2019) but SGD, where torch adds
it to the gradient. Independent decay is not multiplied by the rate (Wortsman et al. 2023).

Not here: the learning rate's course (gpt/schedule.py) and clipping (gpt/training.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import OptimizerConfig

Group = dict[str, Any]  # "params": (name, parameter) pairs, "weight_decay": float


def adamw(groups: list[Group], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Adam with decoupled weight decay; Kingma and Ba 2015, Loshchilov and Hutter 2019."""
    betas = (config.beta1, config.beta2)
    return [torch.optim.AdamW(groups, config.learning_rate, betas, config.eps, fused=True)]


def radam(groups: list[Group], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Adam whose first updates are scaled by the variance of their rate; Liu et al. 2020.

    Without that variance's estimate (the first few steps) it is momentum SGD: warm-up built in.
    """
    betas = (config.beta1, config.beta2)
    return [
        torch.optim.RAdam(
            groups, config.learning_rate, betas, config.eps, decoupled_weight_decay=True
        )
    ]


def adafactor(groups: list[Group], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Adam's second moment kept as row and column means; Shazeer and Stern 2018.

    Its rate is relative to the RMS of each parameter, and at most 1/sqrt(step).
    """
    return [torch.optim.Adafactor(groups, config.learning_rate)]


class Muon(torch.optim.Muon):
    """Muon with a step of its own: torch's multiplies in bf16, which many CPUs must emulate.

    W <- (1 - rate * decay) W - rate * 0.2 sqrt(max(rows, columns)) * orthogonal(M), M the gradient
    with Nesterov momentum. The root scales updates to the RMS of AdamW's (Liu et al. 2025), so that
    both share one rate.
    """

    def __init__(self, groups: list[Group], rate: float, momentum: float) -> None:
        super().__init__(groups, rate, momentum=momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; those of one shape go through it together."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                momenta = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                steps = orthogonal(torch.stack(momenta))
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-size)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The running mean of the gradients, looked at one step ahead."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)


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


def muon(groups: list[Group], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Momentum made orthogonal for the blocks' matrices (Jordan et al. 2024), AdamW elsewhere."""
    matrices, rest = [], []
    for group in groups:
        named = group["params"]
        blocks = [(n, p) for n, p in named if n.startswith("blocks.") and p.ndim == 2]
        matrices.append({**group, "params": blocks})
        rest.append({**group, "params": [pair for pair in named if pair not in blocks]})
    inside = [group for group in matrices if group["params"]]
    outside = [group for group in rest if group["params"]]
    return [Muon(inside, config.learning_rate, config.momentum), *adamw(outside, config)]


def sgd(groups: list[Group], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Stochastic gradient descent with Nesterov momentum (plain if the momentum is 0)."""
    nesterov = config.momentum > 0
    return [
        torch.optim.SGD(groups, config.learning_rate, momentum=config.momentum, nesterov=nesterov)
    ]


OPTIMIZERS: dict[str, Callable[[list[Group], OptimizerConfig], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "radam": radam,
    "adafactor": adafactor,
    "muon": muon,
    "sgd": sgd,
}


# Those whose update is the rate times a step that does not depend on the weights.
SEPARABLE = {"adamw", "radam"}


def decay_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Parameters that decay (matrices and embeddings) and those that do not (biases, norms)."""
    named = list(model.named_parameters())
    decayed = [(name, p) for name, p in named if p.ndim >= 2]
    kept = [(name, p) for name, p in named if p.ndim < 2]
    groups = ((decayed, weight_decay), (kept, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


class Optimizer:
    """The torch optimizers of one model, driven as one.

    Attributes:
        parts: the torch optimizers; two for muon, otherwise one.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.learning_rate = config.learning_rate
        decay = config.weight_decay  # torch's optimizers multiply it by the rate
        groups = decay_groups(
            model, decay / config.learning_rate if config.independent_decay else decay
        )
        self.parts = OPTIMIZERS[config.name](groups, config)

    def eps(self) -> dict[str, float]:
        """What Adam adds to the root of its second moment, for each parameter that it updates."""
        return {name: part.defaults["eps"] for part, name, _ in self._adams()}

    def second_moments(self) -> dict[str, Tensor]:
        """Adam's estimate of each squared gradient, without bias; none before the first update."""
        found = {}
        for part, name, parameter in self._adams():
            state = part.state[parameter]
            updates = state["step"].item() if "step" in state else 0
            if updates:
                bias = 1 - part.defaults["betas"][1] ** updates
                found[name] = state["exp_avg_sq"] / bias
        return found

    def _adams(self) -> Iterator[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
        adam = (torch.optim.AdamW, torch.optim.RAdam)
        for part in self.parts:
            if isinstance(part, adam):
                yield from ((part, name, parameter) for name, parameter in _named(part))

    def decays(self) -> dict[str, float]:
        """How fast each parameter decays: by this, times the rate, times itself in an update."""
        return {
            name: group["weight_decay"]
            for part in self.parts
            for group in part.param_groups
            for name in group["param_names"]
        }

    def set_rate(self, share: float) -> None:
        """The next update is made at `share` of the full rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.learning_rate * share

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All of the optimizers' memory as tensors named `parameter|quantity`."""
        return {
            f"{name}|{quantity}": value
            for part in self.parts
            for name, parameter in _named(part)
            for quantity, value in part.state[parameter].items()
            if value is not None
        }

    @property
    def has_memory(self) -> bool:
        """Whether updates leave anything in `state`; plain gradient descent's leave nothing."""
        return any(_memory(part, p) for part in self.parts for _, p in _named(part))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over a copy of what `state` returned.

        Raises:
            ValueError: it is of other parameters.
        """
        found = {key: (value.shape, value.dtype) for key, value in tensors.items()}
        expected = {
            f"{name}|{quantity}": (shape, parameter.dtype)
            for part in self.parts
            for name, parameter in _named(part)
            for quantity, shape in _memory(part, parameter).items()
        }
        if found and found != expected:
            key = next(key for key in {**found, **expected} if found.get(key) != expected.get(key))
            raise ValueError(f"optimizer state of another model: {key}")
        for part in self.parts:
            names = [name for name, _ in _named(part)]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                name, _, quantity = key.partition("|")
                if name in names:
                    state.setdefault(names.index(name), {})[quantity] = value.clone()
            groups = part.state_dict()["param_groups"]
            part.load_state_dict({"state": state, "param_groups": groups})


def stack(
    optimizers: Sequence[Optimizer], steps: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimizers of N models of one shape as one, at rate 1 and without decay.

    What it adds to `steps`, from their gradients, is for every model what its own optimizer would
    add to the weights, but for the rate. The optimizers' memory becomes views of this one's.

    Args:
        optimizers: of one kind, which is SEPARABLE, after the same number of updates.
        steps: (N, ...) each, by the parameters' names.
    """
    group: Group = {"params": list(steps.items()), "weight_decay": 0.0}
    at_rate_1 = config.model_copy(update={"learning_rate": 1.0})
    (stacked,) = OPTIMIZERS[config.name]([group], at_rate_1)
    states = [
        {name: part.state[own] for part in optimizer.parts for name, own in _named(part)}
        for optimizer in optimizers
    ]
    for name, step in steps.items():
        memories = [state[name] for state in states]
        for quantity, shape in _memory(stacked, step[0]).items():
            if shape:
                empty = torch.zeros_like(step[0])
                whole = torch.stack([memory.get(quantity, empty) for memory in memories])
                cells = list(whole)
            else:  # the number of updates
                device = step.device if stacked.defaults.get("fused") else "cpu"
                whole = memories[0].get(quantity, torch.zeros((), device=device))
                cells = [whole] * len(memories)
            stacked.state[step][quantity] = whole
            for memory, cell in zip(memories, cells, strict=True):
                memory[quantity] = cell
    return stacked


def _memory(part: torch.optim.Optimizer, parameter: Tensor) -> dict[str, torch.Size]:
    """Quantities that an optimizer keeps of a parameter, and their shapes."""
    full, number = parameter.shape, torch.Size([])
    if isinstance(part, torch.optim.Adafactor):
        if parameter.ndim < 2:
            return {"step": number, "variance": full}
        rows, columns = torch.Size([*full[:-1], 1]), torch.Size([*full[:-2], 1, full[-1]])
        return {"step": number, "row_var": rows, "col_var": columns}
    if isinstance(part, torch.optim.AdamW | torch.optim.RAdam):
        return {"step": number, "exp_avg": full, "exp_avg_sq": full}
    return {"momentum_buffer": full} if part.defaults["momentum"] else {}


def _named(part: torch.optim.Optimizer) -> Iterable[tuple[str, nn.Parameter]]:
    for group in part.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)

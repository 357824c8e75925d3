"""Statistics of one update: one record per layer, and perhaps one of the whole model.

Layer 0 is the embeddings, 1 ... L are the blocks, L + 1 is the final norm and the head.

A snapshot of an update combines its gradients before clipping, the weights before and after it, and
an extra forward pass over a few of its sequences, in evaluation mode and without gradients,
observed by hooks. So a snapshot does not change training, and steps without one cost nothing.
Every statistic is a scalar tensor on the model's device until `to_records` fetches all at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpt.metrics import EPS_ALARM, Record
from gpt.model.gpt2 import GPT, CausalSelfAttention, causal_mask
from gpt.model.placement import Block


@dataclass(frozen=True)
class Measure:
    """How to plot one statistic.

    Attributes:
        title: of its plot.
        log: whether it spans orders of magnitude.
        alarm: values below it are marked.
        threshold: key of the values that are drawn dashed if the records have them.
    """

    title: str
    log: bool = True
    alarm: float | None = None
    threshold: str | None = None


MEASURES: dict[str, Measure] = {
    "grad_norm": Measure("gradient norm, all parameters of the layer"),
    "w2_grad_norm": Measure("gradient norm of the last feed-forward matrix"),
    "grad_over_eps": Measure(
        f"RMS of the gradient / optimizer.eps (dots: below {EPS_ALARM})", alarm=EPS_ALARM
    ),
    "grad_over_root_v": Measure("RMS of the gradient / root of Adam's second moment"),
    "update_ratio": Measure("RMS of the update / RMS of the weights (matrices)"),
    "stream_rms": Measure("RMS of the residual stream after the layer"),
    "attention_beta": Measure("residual dependency β, attention", log=False),
    "mlp_beta": Measure("residual dependency β, feed-forward", log=False),
    "attention_logit": Measure("largest attention logit"),
    "attention_entropy": Measure("entropy of the attention weights (nats)", log=False),
    "log_z": Measure("mean log Z of the output softmax", log=False),
}
# Of the whole model, in records without a layer; see curvature.py and noise_scale.py.
MODEL_MEASURES: dict[str, Measure] = {
    "sharpness": Measure(
        "sharpness, the Hessian's largest eigenvalue", threshold="sharpness_threshold"
    ),
    "preconditioned_sharpness": Measure(
        "sharpness, preconditioned by Adam", threshold="preconditioned_threshold"
    ),
    "noise_scale": Measure("gradient noise scale tr Σ / |G|² (sequences)"),
}


class LayerStats:
    """A snapshot of one update.

    Create it after the backward pass, call `measure_activations`, update the weights, call
    `measure_update`, and then `to_records`.

    Args:
        model: not compiled; holds the gradients of this update, unscaled and not yet clipped.
        adam: the names of the parameters that Adam updates.
        eps: Adam's epsilon.
        second_moments: Adam's v before this update, bias-corrected, by parameter. A gradient much
            larger than the root of v means that v is stale (Wortsman et al. 2023).

    Attributes:
        of_model: values of the whole model, to be recorded with the layers'.
    """

    def __init__(
        self,
        model: GPT,
        adam: Collection[str] = (),
        eps: float = 0.0,
        second_moments: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.model = model
        self.blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(model.config.layers + 2)]
        self.of_model: Record = {}
        self.before = {name: p.detach().clone() for name, p in self._matrices()}
        self._measure_gradients(adam, eps, second_moments)

    def _matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.ndim == 2)

    def _measure_gradients(
        self, adam: Collection[str], eps: float, second_moments: Mapping[str, Tensor]
    ) -> None:
        groups: list[list[Tensor]] = [[] for _ in self.layers]
        over_eps: list[list[Tensor]] = [[] for _ in self.layers]
        over_root_v: list[list[Tensor]] = [[] for _ in self.layers]
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                layer = layer_of(name, self.model)
                groups[layer].append(parameter.grad)
                if name in adam:
                    over_eps[layer].append(parameter.grad / eps)
                if name in second_moments:
                    over_root_v[layer].append(parameter.grad / (second_moments[name].sqrt() + eps))
        for measures, gradients, eps_ratios, v_ratios in zip(
            self.layers, groups, over_eps, over_root_v, strict=True
        ):
            if gradients:
                measures["grad_norm"] = _norm(gradients)
                measures["grad_rms"] = _joint_rms(gradients)
            if eps_ratios:
                measures["grad_over_eps"] = _joint_rms(eps_ratios)
            if v_ratios:
                measures["grad_over_root_v"] = _joint_rms(v_ratios)
        for measures, block in zip(self.layers[1:], self.blocks, strict=False):
            gradient = block.mlp.out.weight.grad
            if gradient is not None:
                measures["w2_grad_norm"] = _norm([gradient])

    @torch.no_grad()
    def measure_activations(self, tokens: Tensor) -> None:
        """Run an extra forward pass over (B, T) tokens and measure the activations."""
        model = self.model
        hooks: list[RemovableHandle] = []
        betas: list[list[Tensor]] = [[] for _ in model.blocks]
        for index, block in enumerate(self.blocks):
            measures = self.layers[index + 1]

            def attention(
                module: CausalSelfAttention, inputs: Any, measures: dict[str, Tensor] = measures
            ) -> None:
                measures.update(_attention(module, inputs[0]))

            def add(
                module: nn.Module,
                inputs: Any,
                out: Tensor,
                block_betas: list[Tensor] = betas[index],
            ) -> None:
                block_betas.append(inputs[1].float().var() / out.float().var())

            def stream(
                module: nn.Module, inputs: Any, out: Any, measures: dict[str, Tensor] = measures
            ) -> None:
                measures["stream_rms"] = _rms(out[0] if isinstance(out, tuple) else out)

            hooks += [
                block.attention.register_forward_pre_hook(attention),
                block.add.register_forward_hook(add),
                block.register_forward_hook(stream),
            ]
        training = model.training
        model.eval()
        try:
            self.layers[0]["stream_rms"] = _rms(model.embed(tokens))
            hidden = model.hidden(tokens)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        for measures, block_betas in zip(self.layers[1:], betas, strict=False):
            if len(block_betas) == 2:  # a placement may add without the module `add`
                measures["attention_beta"], measures["mlp_beta"] = block_betas
        self.layers[-1]["stream_rms"] = _rms(hidden)
        self.layers[-1]["log_z"] = model.logits(hidden).float().logsumexp(-1).mean()

    @torch.no_grad()
    def measure_update(self) -> None:
        """Measure how far the update moved the matrices."""
        moved: list[list[Tensor]] = [[] for _ in self.layers]
        weights: list[list[Tensor]] = [[] for _ in self.layers]
        for name, parameter in self._matrices():
            layer = layer_of(name, self.model)
            moved[layer].append(parameter.detach() - self.before[name])
            weights[layer].append(self.before[name])
        for measures, changes, values in zip(self.layers, moved, weights, strict=True):
            if values:
                measures["update_ratio"] = _norm(changes) / _norm(values)
        self.before.clear()

    def to_records(self, step: int) -> list[Record]:
        """One record per layer, with plain numbers; then one of the whole model, if measured."""
        tensors = [value for measures in self.layers for value in measures.values()]
        numbers = iter(torch.stack([t.float().reshape(()) for t in tensors]).tolist())
        records: list[Record] = [
            {"step": step, "layer": layer, **{key: next(numbers) for key in measures}}
            for layer, measures in enumerate(self.layers)
            if measures
        ]
        return records + ([{"step": step, **self.of_model}] if self.of_model else [])


def layer_of(name: str, model: GPT) -> int:
    """The layer of a parameter or module, by its name in `model`."""
    block = re.match(r"blocks\.(\d+)\b", name)
    if block:
        return int(block[1]) + 1
    return model.config.layers + 1 if name.startswith(("final_norm", "head")) else 0


def _attention(module: CausalSelfAttention, x: Tensor) -> dict[str, Tensor]:
    q, k, _ = module.project(x)
    scores = module.scores(q, k)
    weights = module.weights(scores).float()
    T, S = scores.shape[-2:]
    largest = scores.masked_fill(~causal_mask(T, S, scores.device), -torch.inf).amax()
    entropy = torch.special.entr(weights).sum(-1).mean()
    return {"attention_logit": largest, "attention_entropy": entropy}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)


def _joint_rms(tensors: list[Tensor]) -> Tensor:
    return _norm(tensors) / sum(t.numel() for t in tensors) ** 0.5


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()

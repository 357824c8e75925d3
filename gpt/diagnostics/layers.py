"""Measures of one update, a record for each layer: 0 the embeddings, 1 ... L the blocks, L + 1 the
final norm and head.

An update is looked at in three moments: its gradients before clipping, the weights before and after
it, and one more forward pass over a few of its sequences, in evaluation mode and without gradients,
watched by hooks that are taken away again. So looking changes nothing, and not looking costs
nothing. Every measure is a scalar tensor on the model's device until `read` fetches all at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpt.model import GPT, CausalSelfAttention, visible
from gpt.run.metrics import EPS_ALARM as EPS_ALARM
from gpt.run.metrics import Record


@dataclass(frozen=True)
class Measure:
    """What one key of a layer's record means, for a picture.

    Attributes:
        log: whether it spans orders of magnitude.
        alarm: values under it are marked.
    """

    title: str
    log: bool = True
    alarm: float | None = None


MEASURES: dict[str, Measure] = {
    "grad_norm": Measure("gradient norm, all parameters of the layer"),
    "w2_grad_norm": Measure("gradient norm of the feed-forward's last matrix"),
    "grad_over_eps": Measure(
        f"RMS of the gradient / optimizer.eps (dots: under {EPS_ALARM})", alarm=EPS_ALARM
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


class Look:
    """One update seen from inside: made before it, then `forward`, the update, `after` and `read`.

    Args:
        model: not compiled; its gradients are of this update, unscaled and not clipped yet.
        eps: Adam's, for each parameter that Adam updates, by name.
        second_moments: Adam's v of the updates so far, bias-corrected, for the same parameters. A
            gradient well over its root means that v is stale (Wortsman et al. 2023).
    """

    def __init__(
        self, model: GPT, eps: dict[str, float], second_moments: Mapping[str, Tensor]
    ) -> None:
        self.model, self.eps, self.second_moments = model, eps, second_moments
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(model.config.layers + 2)]
        self.before = {name: p.detach().clone() for name, p in self._matrices()}
        self._gradients()

    def _matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.ndim == 2)

    def _gradients(self) -> None:
        groups: list[list[Tensor]] = [[] for _ in self.layers]
        over_eps: list[list[Tensor]] = [[] for _ in self.layers]
        over_root_v: list[list[Tensor]] = [[] for _ in self.layers]
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                layer = layer_of(name, self.model)
                groups[layer].append(parameter.grad)
                if name in self.eps:
                    over_eps[layer].append(parameter.grad / self.eps[name])
                if name in self.second_moments:
                    root = self.second_moments[name].sqrt() + self.eps[name]
                    over_root_v[layer].append(parameter.grad / root)
        for measures, gradients, ratios, moved in zip(
            self.layers, groups, over_eps, over_root_v, strict=True
        ):
            if gradients:
                measures["grad_norm"] = _norm(gradients)
                measures["grad_rms"] = _joint_rms(gradients)
            if ratios:
                measures["grad_over_eps"] = _joint_rms(ratios)
            if moved:
                measures["grad_over_root_v"] = _joint_rms(moved)
        for measures, block in zip(self.layers[1:], self.model.placements(), strict=False):
            gradient = block.mlp.out.weight.grad
            if gradient is not None:
                measures["w2_grad_norm"] = _norm([gradient])

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> None:
        """Measure the activations on (B, T) tokens."""
        model = self.model
        hooks: list[RemovableHandle] = []
        betas: list[list[Tensor]] = [[] for _ in model.blocks]
        for index, block in enumerate(model.placements()):
            measures = self.layers[index + 1]

            def attention(
                module: CausalSelfAttention, inputs: Any, measures: dict[str, Tensor] = measures
            ) -> None:
                measures.update(_attention(module, inputs[0]))

            def add(
                module: nn.Module, inputs: Any, out: Tensor, seen: list[Tensor] = betas[index]
            ) -> None:
                seen.append(inputs[1].float().var() / out.float().var())

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
        for measures, seen in zip(self.layers[1:], betas, strict=False):
            if len(seen) == 2:  # a placement may add in another way, which is not watched
                measures["attention_beta"], measures["mlp_beta"] = seen
        self.layers[-1]["stream_rms"] = _rms(hidden)
        self.layers[-1]["log_z"] = model.logits(hidden).float().logsumexp(-1).mean()

    @torch.no_grad()
    def after(self) -> None:
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

    def read(self, step: int) -> list[Record]:
        """The records of all layers, as numbers."""
        tensors = [value for measures in self.layers for value in measures.values()]
        numbers = iter(torch.stack([t.float().reshape(()) for t in tensors]).tolist())
        return [
            {"step": step, "layer": layer, **{key: next(numbers) for key in measures}}
            for layer, measures in enumerate(self.layers)
            if measures
        ]


def layer_of(name: str, model: GPT) -> int:
    """The layer that a parameter or module belongs to, by its name in `model`."""
    block = re.match(r"blocks\.(\d+)\b", name)
    if block:
        return int(block[1]) + 1
    return model.config.layers + 1 if name.startswith(("final_norm", "head")) else 0


def _attention(module: CausalSelfAttention, x: Tensor) -> dict[str, Tensor]:
    q, k, _ = module.project(x)
    scores = module.scores(q, k)
    weights = module.weights(scores).float()
    T, S = scores.shape[-2:]
    largest = scores.masked_fill(~visible(T, S, scores.device), -torch.inf).amax()
    entropy = torch.special.entr(weights).sum(-1).mean()
    return {"attention_logit": largest, "attention_entropy": entropy}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)


def _joint_rms(tensors: list[Tensor]) -> Tensor:
    return _norm(tensors) / sum(t.numel() for t in tensors) ** 0.5


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()

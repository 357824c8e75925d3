"""Where a diverged run first became non-finite, and what the literature suggests to try next."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpt.config import Config
from gpt.diagnostics.fault import FaultLocation
from gpt.diagnostics.layers import layer_of
from gpt.model.gpt2 import GPT
from gpt.model.init import depth_scaled
from gpt.model.placement import PLACEMENTS, has_final_norm


def first_nonfinite(
    model: GPT, tokens: Tensor, targets: Tensor, z_loss: float
) -> FaultLocation | None:
    """Find the first non-finite value, in the order of computation; None if all are finite.

    Weights come first; then the outputs of all modules in the forward pass, the logits and the
    loss; then the gradients of the parameters, from the loss backwards; last their norm, which can
    overflow although no gradient does. Leaves the gradients in the model.

    Args:
        tokens, targets: (B, T) token ids.
        z_loss: weight of the z-loss in the loss.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return FaultLocation("weight", layer_of(name, model), name)

    found: list[FaultLocation] = []
    norms: dict[str, Tensor] = {}  # of the gradients, in the order in which they arrive
    hooks = [*_watch_outputs(model, found), *_watch_gradients(model, found, norms)]
    model.zero_grad()
    try:
        total_loss, _ = model.loss_fn(tokens, targets, z_loss)
        if not found and not total_loss.isfinite():
            found.append(FaultLocation("loss", model.config.layers + 1, "loss"))
        if not found:
            total_loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    if torch.stack(list(norms.values())).norm().isfinite():
        return None
    largest = max(norms, key=lambda name: norms[name].item())  # of infinite ones, the first
    return FaultLocation("gradient norm", layer_of(largest, model), largest)


def _watch_outputs(model: GPT, found: list[FaultLocation]) -> Iterator[RemovableHandle]:
    """Hooks that append the first module with a non-finite output to `found`."""
    names = {m: n for n, m in model.named_modules() if not isinstance(m, nn.Identity)}

    def check(module: nn.Module, inputs: Any, out: Any) -> None:
        outputs = out if isinstance(out, tuple) else (out,)
        if not found and not all(each.isfinite().all() for each in outputs):
            name = names[module]
            if name:
                found.append(FaultLocation("activation", layer_of(name, model), name))
            else:  # the model itself, whose output is the logits
                found.append(FaultLocation("logit", model.config.layers + 1, "head"))

    return (module.register_forward_hook(check) for module in names)


def _watch_gradients(
    model: GPT, found: list[FaultLocation], norms: dict[str, Tensor]
) -> Iterator[RemovableHandle]:
    """Hooks that append the first non-finite gradient to `found`, and fill in all `norms`."""

    def check(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            norms[name] = parameter.grad.norm()
            if not found and not parameter.grad.isfinite().all():
                found.append(FaultLocation("gradient", layer_of(name, model), name))

    return (
        parameter.register_post_accumulate_grad_hook(partial(check, name))
        for name, parameter in model.named_parameters()
    )


def describe_location(place: FaultLocation, layers: int) -> str:
    """The location in words, for a model of `layers` blocks."""
    if place.layer == 0:
        where = f"in the embeddings ({place.name})"
    elif place.layer <= layers:
        inside = place.name.split(".")[2:]  # nothing if it is the block itself
        where = f"in block {place.layer} of {layers}" + (f" ({'.'.join(inside)})" if inside else "")
    else:
        where = f"after the last block ({place.name})"
    return f"as a non-finite {place.quantity} {where}"


def advice(config: Config, place: FaultLocation | None, updates: int) -> list[str]:
    """What to try next, the most promising first: flags that the config does not set yet, and why.

    Args:
        place: where the first non-finite value arose, if known.
        updates: number of updates before the failure; if 0, learning rate and warm-up are
            irrelevant.
    """
    return [
        *_warmup_advice(config, updates),
        *_architecture_advice(config, updates),
        *_optimizer_advice(config, updates),
        *_logit_advice(config, place),
        *_numerical_advice(config, updates),
    ]


def _warmup_advice(config: Config, updates: int) -> Iterator[str]:
    schedule = config.schedule
    tenth = max(1, config.training.steps // 10)
    steps = schedule.effective_warmup_steps
    if updates and steps < tenth:
        yield (
            f"--schedule.warmup linear --schedule.warmup-steps {tenth}"
            f"  ({'a longer' if steps else 'a'} warm-up; Xiong et al. 2020)"
        )


def _architecture_advice(config: Config, updates: int) -> Iterator[str]:
    model, norm = config.model, config.model.norm
    placement = PLACEMENTS[norm.placement]
    if placement.final_norm and not has_final_norm(model):
        yield "--model.norm.final-norm auto  (without it, the residual stream grows without bound)"
    if placement.has_norms and norm.type == "none":
        yield "--model.norm.type layer  (adds the norms)"
    elif placement.more_stable:
        with_norms = " --model.norm.type layer" if norm.type == "none" else ""
        others = ", ".join(placement.more_stable[1:])
        yield (
            f"--model.norm.placement {placement.more_stable[0]}{with_norms}"
            f"  (more stable than {norm.placement}" + (f"; also {others})" if others else ")")
        )
    if not updates and model.init.regime != "gpt2":
        yield "--model.init.regime gpt2  (smaller initial weights)"
    if not updates and not (depth_scaled(model) or placement.scales_depth):
        yield "--model.init.depth-scaled on  (1/sqrt(2L) on projections into the residual stream)"


def _optimizer_advice(config: Config, updates: int) -> Iterator[str]:
    optimizer = config.optimizer
    if not updates:
        return
    if optimizer.name == "sgd":
        yield (
            "--optimizer.name adamw --optimizer.learning-rate 1e-3"
            "  (its updates do not grow with the gradient)"
        )
    rate = optimizer.learning_rate / 3
    yield f"--optimizer.learning-rate {rate:.2g}  (a third; repeat until training is stable)"
    if optimizer.clip is None:
        yield "--optimizer.clip 1.0  (gradient clipping, which can mask an instability)"


def _logit_advice(config: Config, place: FaultLocation | None) -> Iterator[str]:
    model, norm = config.model, config.model.norm
    if place is None:
        return
    has_norms = PLACEMENTS[norm.placement].has_norms and norm.type != "none"
    if ".attention." in place.name and has_norms and not model.attention.qk_norm:
        yield "--model.attention.qk-norm true  (bounds the attention logits; Dehghani et al. 2023)"
    if place.layer > model.layers and config.training.z_loss == 0:
        yield "--training.z-loss 1e-4  (keeps the logits small; Wortsman et al. 2023)"


def _numerical_advice(config: Config, updates: int) -> Iterator[str]:
    training = config.training
    if updates and training.nonfinite == "stop" and config.data.windows != "fixed":
        yield (
            "--training.nonfinite rollback"
            "  (returns to a checkpoint and skips the batches since; Chowdhery et al. 2022)"
        )
    if training.precision != "fp32":
        yield "--training.precision fp32  (to rule out rounding and overflow)"

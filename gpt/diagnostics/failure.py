"""Where a run that diverged first went wrong, and what the literature would try next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gpt.config import Config
from gpt.diagnostics.layers import layer_of
from gpt.init import depth_scaled
from gpt.model import GPT
from gpt.placement import PLACEMENTS, has_final_norm
from gpt.run.metrics import MOST_LAYERS


@dataclass(frozen=True)
class Place:
    """The first thing that was not finite.

    Attributes:
        quantity: weight, activation, logit, loss, gradient or gradient norm.
        layer: 0 the embeddings, 1 ... L the blocks, L + 1 the final norm, the head and the loss.
        name: of the module or parameter, such as blocks.2.mlp.up.
    """

    quantity: str
    layer: Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
    name: str


@dataclass(frozen=True)
class Failure:
    """How a run diverged.

    Attributes:
        step: the update at which it was first seen; 0: before the first.
        quantity: what was not finite: training loss, gradient norm, weight or validation loss.
        place: what inside the network was first not finite; None if it could not be found again.
        advice: what to try next, likeliest first.
    """

    step: Annotated[int, Field(ge=0, le=2**53)]
    quantity: str
    place: Place | None
    advice: tuple[str, ...]


def first_nonfinite(model: GPT, tokens: Tensor, targets: Tensor, z_loss: float) -> Place | None:
    """Look for what is not finite, in the order of computation; None if all is finite.

    Weights come first; then the outputs of all modules in the forward pass, logits and loss; then
    the gradients of the parameters, as they come from the loss backwards; last their norm, which
    can be too large for a number where no gradient is. Gradients are left behind.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return Place("weight", layer_of(name, model), name)

    found: list[Place] = []
    names = {m: n for n, m in model.named_modules() if not isinstance(m, nn.Identity)}

    def watch(module: nn.Module, inputs: Any, out: Any) -> None:
        outputs = out if isinstance(out, tuple) else (out,)
        if not found and not all(each.isfinite().all() for each in outputs):
            name = names[module]
            if name:
                found.append(Place("activation", layer_of(name, model), name))
            else:  # the model itself: its output is the logits
                found.append(Place("logit", model.config.layers + 1, "head"))

    norms: dict[str, Tensor] = {}  # of the gradients, in the order in which they come

    def arrived(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            norms[name] = parameter.grad.norm()
            if not found and not parameter.grad.isfinite().all():
                found.append(Place("gradient", layer_of(name, model), name))

    parameters = dict(model.named_parameters())
    hooks = [module.register_forward_hook(watch) for module in names]
    hooks += [
        parameter.register_post_accumulate_grad_hook(partial(arrived, name))
        for name, parameter in parameters.items()
    ]
    model.zero_grad()
    try:
        total_loss, _ = model.loss_fn(tokens, targets, z_loss)
        if not found and not total_loss.isfinite():
            found.append(Place("loss", model.config.layers + 1, "loss"))
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
    return Place("gradient norm", layer_of(largest, model), largest)


def describe(place: Place, layers: int) -> str:
    """The place in words, for a model of so many blocks."""
    if place.layer == 0:
        where = f"in the embeddings ({place.name})"
    elif place.layer <= layers:
        inside = place.name.split(".")[2:]  # nothing if it is the block itself
        where = f"in block {place.layer} of {layers}" + (f" ({'.'.join(inside)})" if inside else "")
    else:
        where = f"behind the last block ({place.name})"
    return f"as a non-finite {place.quantity} {where}"


def advice(config: Config, place: Place | None, updates: int) -> list[str]:
    """What to try next, likeliest first: flags, and why. Only what the config does not do yet.

    Args:
        updates: made before it failed; before the first one, no rate and no warm-up matters.
    """
    schedule, optimizer, training = config.schedule, config.optimizer, config.training
    model, norm = config.model, config.model.norm
    placement = PLACEMENTS[norm.placement]
    tips = []
    tenth = max(1, training.steps // 10)
    warming = 0 if schedule.warmup == "none" else schedule.warmup_steps
    if updates and warming < tenth:
        tips.append(
            f"--schedule.warmup linear --schedule.warmup-steps {tenth}"
            f"  ({'a longer' if warming else 'a'} warm-up; Xiong et al. 2020)"
        )
    if placement.final_norm and not has_final_norm(config.model):
        tips.append("--model.norm.final-norm auto  (the stream grows, and nothing bounds it)")
    if placement.has_norms and norm.type == "none":
        tips.append("--model.norm.type layer  (norms)")
    elif placement.more_stable:
        with_norms = " --model.norm.type layer" if norm.type == "none" else ""
        others = ", ".join(placement.more_stable[1:])
        tips.append(
            f"--model.norm.placement {placement.more_stable[0]}{with_norms}"
            f"  (more stable than {norm.placement}" + (f"; also {others})" if others else ")")
        )
    if not updates and model.init.regime != "gpt2":
        tips.append("--model.init.regime gpt2  (smaller first weights)")
    if not updates and not depth_scaled(model):
        tips.append("--model.init.depth-scaled on  (1/sqrt(2L) on what writes into the stream)")
    if updates and optimizer.name == "sgd":
        tips.append(
            "--optimizer.name adamw --optimizer.learning-rate 1e-3"
            "  (its steps do not grow with the gradient)"
        )
    if updates:
        rate = optimizer.learning_rate / 3
        tips.append(f"--optimizer.learning-rate {rate:.2g}  (a third, and again until it holds)")
    if updates and optimizer.clip is None:
        tips.append("--optimizer.clip 1.0  (clipping: it hides an instability, and gets past it)")
    in_attention = place is not None and ".attention." in place.name
    if in_attention and placement.has_norms and norm.type != "none" and not model.attention.qk_norm:
        tips.append("--model.attention.qk-norm true  (bounded attention; Dehghani et al. 2023)")
    at_the_end = place is not None and place.layer > model.layers
    if at_the_end and training.z_loss == 0:
        tips.append("--training.z-loss 1e-4  (holds the logits; Wortsman et al. 2023)")
    if updates and training.nonfinite == "stop":
        tips.append(
            "--training.nonfinite rollback"
            "  (back to the last checkpoint and past the batches since; Chowdhery et al. 2022)"
        )
    if training.precision != "fp32":
        tips.append("--training.precision fp32  (to see whether the arithmetic is to blame)")
    return tips

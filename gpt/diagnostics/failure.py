"""Where a run that diverged first went wrong, and what the literature would try next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gpt.config import Config
from gpt.diagnostics.layers import layer_of
from gpt.model import GPT
from gpt.placement import PLACEMENTS


@dataclass(frozen=True)
class Place:
    """The first thing that was not finite.

    Attributes:
        quantity: weight, activation, logit, loss or gradient.
        layer: 0 the embeddings, 1 ... L the blocks, L + 1 the final norm, the head and the loss.
        name: of the module or parameter, such as blocks.2.mlp.up.
    """

    quantity: str
    layer: int
    name: str


def first_nonfinite(model: GPT, tokens: Tensor, targets: Tensor, z_loss: float) -> Place | None:
    """Look for what is not finite, in the order of computation; None if all is finite.

    Weights come first, then the outputs of all modules in the forward pass, logits and loss, then
    the gradients of the parameters, from the loss backwards. Gradients are left behind.
    """
    top = model.config.layers + 1
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return Place("weight", layer_of(name, model), name)

    found: list[Place] = []

    def watch(module: nn.Module, inputs: Any, out: Any) -> None:
        outputs = out if isinstance(out, tuple) else (out,)
        if not found and not all(each.isfinite().all() for each in outputs):
            name = names[module]
            found.append(Place("activation", layer_of(name, model), name))

    names = {m: n for n, m in model.named_modules() if n and not isinstance(m, nn.Identity)}
    hooks = [module.register_forward_hook(watch) for module in names]
    try:
        logits = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    if not logits.isfinite().all():
        return Place("logit", top, "head")
    minimised, _ = model.objective(tokens, targets, z_loss)
    if not minimised.isfinite():
        return Place("loss", top, "loss")
    model.zero_grad()
    minimised.backward()
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return Place("gradient", layer_of(name, model), name)
    return None


def describe(place: Place, layers: int) -> str:
    """The place in words, for a model of so many blocks."""
    if place.layer == 0:
        where = f"in the embeddings ({place.name})"
    elif place.layer <= layers:
        name = place.name.split(".", 2)[-1]
        where = f"in block {place.layer} of {layers} ({name})"
    else:
        where = f"behind the last block ({place.name})"
    return f"as a non-finite {place.quantity} {where}"


def advice(config: Config, place: Place | None) -> list[str]:
    """What to try next, likeliest first: flags, and why. Only what the config does not do yet."""
    schedule, optimizer, training = config.schedule, config.optimizer, config.training
    placement = PLACEMENTS[config.model.norm.placement]
    tips = []
    tenth = max(1, training.steps // 10)
    warming = 0 if schedule.warmup == "none" else schedule.warmup_steps
    if warming < tenth:
        tips.append(
            f"--schedule.warmup linear --schedule.warmup-steps {tenth}"
            f"  ({'a longer' if warming else 'a'} warm-up; Xiong et al. 2020)"
        )
    if placement.has_norms and config.model.norm.type == "none":
        tips.append("--model.norm.type layer  (norms)")
    elif placement.calmer:
        others = ", ".join(placement.calmer[1:])
        tips.append(
            f"--model.norm.placement {placement.calmer[0]}"
            f"  (calmer than {config.model.norm.placement}"
            + (f"; also {others})" if others else ")")
        )
    if optimizer.name == "sgd":
        tips.append("--optimizer.name adamw  (its steps do not grow with the gradient)")
    tips.append(
        f"--optimizer.learning-rate {optimizer.learning_rate / 3:.2g}  (a third of the rate)"
    )
    if optimizer.clip is None:
        tips.append("--optimizer.clip 1.0  (clipping: it hides an instability, and gets past it)")
    in_attention = place is not None and ".attention" in place.name
    if in_attention and placement.has_norms and not config.model.attention.qk_norm:
        tips.append("--model.attention.qk-norm true  (bounded attention; Dehghani et al. 2023)")
    at_the_end = place is not None and place.layer > config.model.layers
    if at_the_end and training.z_loss == 0:
        tips.append("--training.z-loss 1e-4  (holds the logits; Wortsman et al. 2023)")
    if training.precision != "fp32":
        tips.append("--training.precision fp32  (to see whether the arithmetic is to blame)")
    return tips

"""A config for a budget of tokens, FLOPs or hours: the model that it deserves, and its steps.

The model grows or shrinks (chinchilla.py). The batch, the context and the learning rate stay, and
the warm-up and the steps between evaluations take the same fractions of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from gpt.config import Config, Count, ModelConfig, merge, nest, validate
from gpt.errors import InputError
from gpt.hardware.device import pick_device
from gpt.plan import TOKENS_PER_PARAMETER
from gpt.plan.chinchilla import largest_model
from gpt.plan.size import build
from gpt.plan.timing import evaluation_seconds, make_trainer, update_seconds

TIMED_SECONDS = 1.0  # of updates of one model
ROUNDS = 4  # at most this many models are timed, besides the config's own
SETTLED = 0.1  # relative change of the FLOP/s below which the next model would be about the same
MOST_STEPS = get_args(Count)[1].maximum
SCALED = (  # with the number of steps
    "schedule.warmup_steps",
    "evaluation.every",
    "checkpoint.every",
    "sampling.every",
    "diagnostics.every",
)


def for_tokens(config: Config, vocab_size: int, tokens: float, origin: str) -> Config:
    """The largest model for which `tokens` are at least 20 per parameter."""

    def fits(parameters: float, flops: float) -> bool:
        return TOKENS_PER_PARAMETER * parameters <= tokens

    model = largest_model(config.model, vocab_size, fits, origin)
    return _resized(config, model, tokens, origin)


def for_flops(config: Config, vocab_size: int, flops: float, origin: str) -> Config:
    """The largest model that can be trained on 20 tokens per parameter within `flops`."""

    def fits(parameters: float, per_token: float) -> bool:
        return TOKENS_PER_PARAMETER * parameters * per_token <= flops

    model = largest_model(config.model, vocab_size, fits, origin)
    tokens = flops / build(model, vocab_size).flops_per_token()
    return _resized(config, model, tokens, origin)


def for_hours(config: Config, vocab_size: int, hours: float, origin: str) -> Config:
    """The model for the FLOPs that this machine computes in `hours`, evaluations included.

    The FLOP/s depend on the model, so each is timed, beginning with that of `config`.
    """
    planned, speed = config, _flops_per_second(config, vocab_size)
    for _ in range(ROUNDS):
        planned = for_flops(config, vocab_size, 3600 * hours * speed, origin)
        before, speed = speed, _flops_per_second(planned, vocab_size)
        if abs(speed / before - 1) < SETTLED:
            break
    per_token = build(planned.model, vocab_size).flops_per_token()
    return _resized(config, planned.model, 3600 * hours * speed / per_token, origin)


# By the name of the flag: (config, tokens of the vocabulary, value, flag and value) -> config.
BUDGETS: dict[str, Callable[[Config, int, float, str], Config]] = {
    "tokens": for_tokens,
    "budget": for_flops,
    "hours": for_hours,
}


def _flops_per_second(config: Config, vocab_size: int) -> float:
    """FLOPs of the updates of a run, divided by its whole time."""
    trainer = make_trainer(config, vocab_size, pick_device(config.training.device))
    update = update_seconds(trainer, vocab_size, TIMED_SECONDS)
    steps = config.training.steps
    batch = config.batch_sequences * config.model.context * trainer.model.flops_per_token()
    return steps * batch / (steps * update + evaluation_seconds(config, update))


def _resized(config: Config, model: ModelConfig, tokens: float, origin: str) -> Config:
    """The config with another model, trained on at most `tokens`.

    Raises:
        InputError: the tokens do not suffice for one step, or are too many.
    """
    batch = config.batch_sequences * config.model.context
    steps = int(tokens // batch)
    if steps < 1:
        raise InputError(
            f"{origin}: gives {tokens:,.0f} tokens, less than one batch of {batch:,}; "
            "lower training.batch_sequences or raise the budget"
        )
    if steps > MOST_STEPS:
        raise InputError(
            f"{origin}: gives {steps:,} steps of {batch:,} tokens, but at most {MOST_STEPS:,} "
            "are possible; raise training.batch_sequences or lower the budget"
        )
    old, given = config.training.steps, config.model_dump()
    options: dict[str, object] = {"training.steps": steps}
    for option in SCALED:
        section, name = option.split(".")
        if given[section][name]:
            scaled = max(1, round(given[section][name] * steps / old))
            options[option] = min(scaled, MOST_STEPS)
    if config.checkpoint.keep_every is not None:  # a multiple of the steps between checkpoints
        times = config.checkpoint.keep_every // config.save_every
        saved = options.get("checkpoint.every") or options["evaluation.every"]
        options["checkpoint.keep_every"] = times * saved  # type: ignore[operator]
    options["name"] = f"{config.name[:80]}-{origin.strip('-').replace(' ', '-').replace('+', '')}"
    tree = merge({**given, "model": model.model_dump()}, nest(options))
    return validate(Config, tree, lambda key: f"{origin}: {key}")

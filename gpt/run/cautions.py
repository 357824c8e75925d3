"""Warnings about a run before it starts, such as too little text to measure a loss on.

None is an error, as a run may be meant that way; each is one line that names the option that helps.
This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpt.config import Config
from gpt.data.prepared import Dataset
from gpt.hardware.processes import launched
from gpt.hardware.size import parameters
from gpt.plan import TOKENS_PER_PARAMETER, USEFUL_EPOCHS

FEW_TOKENS = 10_000  # token losses have a standard deviation of 2 to 3 nats; their mean, of 0.03
MANY_EPOCHS = 100
FEW_PER_PARAMETER = 0.1  # tokens


def cautions(config: Config, dataset: Dataset | None) -> list[str]:
    """A line for everything about a run that its author may not have meant.

    Args:
        dataset: the prepared data; None: it is not prepared yet, so nothing is said about it.
    """
    lines = [*config.cautions, *_of_processes(config)]
    if dataset is not None:
        lines += [*_of_validation(config, dataset), *_of_training(config, dataset)]
    return lines


def _of_processes(config: Config) -> Iterator[str]:
    """Whether torchrun has started another number of processes than the config says."""
    given, started = config.training.processes, launched()
    if started > 1 and given not in (1, "auto", started):
        yield f"training.processes is {given}, but torchrun has started {started}, which train it"


def describe_validation(dataset: Dataset) -> str:
    """The size of the validation text, such as `937 validation tokens in 1 document`."""
    file = dataset.files[-1]
    s = "" if file.documents == 1 else "s"
    return f"{file.tokens:,} validation tokens in {file.documents:,} document{s}"


def _of_validation(config: Config, dataset: Dataset) -> Iterator[str]:
    """Whether every loss will rest on little text, or on another fraction of it than wanted."""
    data, sequences, context = config.data, config.evaluation.sequences, config.model.context
    *train, val = (file.bytes for file in dataset.files)
    share, tokens = val / max(1, sum(train) + val), dataset.files[-1].tokens
    if data.validation is None and not 0.5 < share / data.val_fraction < 2:
        other = "tail" if data.holdout == "documents" else "documents"
        how = {"tail": "cuts the end off every document", "documents": "takes whole documents"}
        yield (
            f"{describe_validation(dataset)} are {share:.2%} of the text, not the "
            f"{data.val_fraction:.2%} of data.val_fraction; data.holdout: {other}, which "
            f"{how[other]}, may come closer"
        )
    elif tokens < FEW_TOKENS:
        helps = "raise data.val_fraction" if data.validation is None else "extend data.validation"
        yield f"only {describe_validation(dataset)}, so losses are uncertain; {helps}, or add text"
    if sequences is not None and sequences * context < FEW_TOKENS <= tokens:
        few = sequences * context
        yield f"losses of {few:,} tokens are uncertain; raise evaluation.sequences"
    if tokens <= context:
        yield _too_long(context, tokens, "validation")


def _of_training(config: Config, dataset: Dataset) -> Iterator[str]:
    """Whether there is too little text, or too little training, for the batch or the model."""
    context, batch = config.model.context, config.batch_sequences * config.model.context
    tokens, seen = dataset.train_tokens, config.training.steps * batch
    shortest = min(map(len, dataset.train))
    if shortest <= context:
        yield _too_long(context, shortest, "training")
    if config.data.windows == "fixed":  # full-batch training repeats its one batch on purpose
        return
    if batch > tokens:
        yield (
            f"a batch of {batch:,} tokens is more than the {tokens:,} training tokens; lower "
            "training.batch_sequences or training.batch_tokens"
        )
    if seen >= MANY_EPOCHS * tokens:
        yield (
            f"{seen / tokens:,.0f} epochs: the model will memorize the text; lower "
            "training.steps, or add text"
        )
    numbers = parameters(config.model, dataset.encoding.n_vocab)
    useful = min(seen, USEFUL_EPOCHS * tokens)
    if useful < FEW_PER_PARAMETER * numbers:
        helps = "raise training.steps" if useful == seen else "add text"
        yield (
            f"{useful / numbers:.2g} training tokens per parameter ({useful:,} in at most "
            f"{USEFUL_EPOCHS} epochs, {numbers:,} parameters), where about "
            f"{TOKENS_PER_PARAMETER} are best (Hoffmann et al. 2022); {helps}, or lower "
            "model.width or model.layers"
        )


def _too_long(context: int, tokens: int, kind: str) -> str:
    return f"model.context {context:,} needs more than the {tokens:,} {kind} tokens; lower it"

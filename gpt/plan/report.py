"""The plan of a run: what it takes, in lines for people and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpt.config import Config
from gpt.data import preparation
from gpt.data.prepared import Dataset
from gpt.data.sequences import TrainingSequences, ValidationSequences
from gpt.errors import InputError, option
from gpt.hardware.device import pick_device
from gpt.hardware.memory import micro_batch, total_memory
from gpt.io.console import duration, labeled
from gpt.model.gpt2 import GPT
from gpt.plan import TOKENS_PER_PARAMETER, USEFUL_EPOCHS
from gpt.plan.size import (
    Memory,
    build,
    checkpoint_bytes,
    largest_micro_batch,
    memory,
    parameters,
)
from gpt.plan.timing import evaluation_seconds, make_trainer, update_seconds

TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class Data:
    """What is known of the data before it is prepared; all of it afterwards.

    Attributes:
        vocab_size: tokens of the vocabulary; with bpe the maximum until the data is prepared.
        dataset, val_sequences: None if the data is not prepared.
    """

    vocab_size: int
    dataset: Dataset | None = None
    val_sequences: int | None = None

    @property
    def train_tokens(self) -> int | None:
        """Tokens of the training text."""
        return self.dataset.train_tokens if self.dataset is not None else None


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        model: on the meta device, without data (`size.build`).
        available: bytes of memory of the device, None if unknown.
        refusal: why the run does not fit into the memory; None if it may fit.
        update: seconds of an update, None if it was not timed.
    """

    config: Config
    model: GPT
    device: torch.device
    memory: Memory
    available: int | None
    data: Data
    refusal: InputError | None
    update: float | None

    @property
    def batch_tokens(self) -> int:
        """Tokens of an update."""
        return self.config.batch_sequences * self.config.model.context

    @property
    def deserved_steps(self) -> int:
        """Steps after which the run has seen 20 tokens per parameter."""
        tokens = TOKENS_PER_PARAMETER * self.model.num_parameters()
        return -(-tokens // self.batch_tokens)

    def cost(self, steps: int) -> tuple[int, float, float | None]:
        """Tokens, FLOPs, and seconds (with the evaluations) of so many updates."""
        tokens = steps * self.batch_tokens
        flops = float(self.model.flops_per_token()) * tokens
        if self.update is None:
            return tokens, flops, None
        evaluations = evaluation_seconds(self.config, self.update, self.data.val_sequences)
        share = steps / self.config.training.steps
        return tokens, flops, steps * self.update + evaluations * share

    @property
    def fitting(self) -> int | None:
        """The largest micro-batch that fits; None if the memory is unknown or not enough."""
        return None if self.available is None else largest_micro_batch(self.memory, self.available)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: bytes, seconds and numbers, null where unknown."""

        def cost(steps: int) -> dict[str, Any]:
            tokens, flops, seconds = self.cost(steps)
            return {"steps": steps, "tokens": tokens, "flops": flops, "seconds": seconds}

        count = self.model.num_parameters()
        run, train_tokens = cost(self.config.training.steps), self.data.train_tokens
        return {
            "name": self.config.name,
            "parameters": {**parameters(self.model), "total": count},
            "vocab_size": self.model.vocab_size,
            "flops_per_token": self.model.flops_per_token(),
            **run,
            "tokens_per_parameter": run["tokens"] / count,
            "epochs": None if train_tokens is None else run["tokens"] / train_tokens,
            "device": self.device.type,
            "update_seconds": self.update,
            "memory": {**self.memory.parts(), "peak": self.memory.peak},
            "memory_available": self.available,
            "micro_batch": self.memory.micro_batch,
            "largest_micro_batch": self.fitting,
            "checkpoint_bytes": checkpoint_bytes(self.model, self.config.optimizer),
            "deserves": cost(self.deserved_steps),
        }


def find_data(config: Config) -> Data:
    """What is known of the data of a run, without preparing it.

    Raises:
        InputError: the data is missing, damaged, or smaller than a sequence.
    """
    if preparation.find(config.data) is None:
        return Data(preparation.vocab_size(config.data))
    dataset, context = preparation.prepare(config.data), config.model.context
    TrainingSequences(dataset.train, context, config.data_seed)
    validation = ValidationSequences(dataset.val, context, config.evaluation.sequences)
    return Data(dataset.encoding.n_vocab, dataset, len(validation))


def make(config: Config) -> Plan:
    """The plan of a run on this machine; its time is extrapolated from a second of updates.

    Raises:
        InputError: the device is unavailable, or as `find_data`.
    """
    device, data = pick_device(config.training.device), find_data(config)
    model, update, refusal = build(config.model, data.vocab_size), None, None
    try:
        trainer = make_trainer(config, data.vocab_size, device)
    except InputError as error:
        refusal = error
    else:
        update = update_seconds(trainer, data.vocab_size, TIMED_SECONDS)
    sequences = micro_batch(config, data.vocab_size, device)
    takes = memory(config, model, sequences, device.type)
    available = total_memory(device)
    return Plan(config, model, device, takes, available, data, refusal, update)


def describe(plan: Plan) -> str:
    """The plan in lines such as `  parameters 1,000: ...`."""
    config, model = plan.config, plan.model
    shape, count = config.model, model.num_parameters()
    tokens, flops, seconds = plan.cost(config.training.steps)
    counted = [f"{part} {n:,}" for part, n in parameters(model).items() if n]
    attention = 12 * shape.layers * shape.width * shape.context
    multiplied = (model.flops_per_token() - attention) // 6
    takes = [f"{name} {_bytes(n)}" for name, n in plan.memory.parts().items() if n]
    rows = [
        ("parameters", f"{count:,}"),
        ("", ", ".join(counted)),
        (
            "FLOPs",
            f"{flops:.3g}, {model.flops_per_token():,} per token: 6 x {multiplied:,} parameters + "
            f"12 x {shape.layers} x {shape.width} x {shape.context} of attention",
        ),
        (
            "memory",
            f"{_bytes(plan.memory.peak)} at the peak, in micro-batches of "
            f"{plan.memory.micro_batch}; {_fitting(plan)}",
        ),
        ("", ", ".join(takes)),
        ("checkpoint", _bytes(checkpoint_bytes(model, config.optimizer))),
        ("time", _time(plan, seconds)),
        ("tokens", f"{tokens:,}, {tokens / count:.3g} per parameter{_epochs(plan, tokens)}"),
        ("", _deserves(plan)),
    ]
    if config.training.processes != 1:
        given = config.training.processes
        rows.append(("processes", f"{given}; the memory and the time are those of one alone"))
    return "\n".join(labeled(rows))


def _fitting(plan: Plan) -> str:
    if plan.available is None:
        return "how much this machine has is unknown"
    has = f"the {_bytes(plan.available)} of this machine's {plan.device.type}"
    return f"up to {plan.fitting} fit into {has}" if plan.fitting else f"more than {has}"


def _time(plan: Plan, seconds: float | None) -> str:
    if plan.update is None or seconds is None:
        return "not measured, as training does not fit into the memory"
    return (
        f"about {duration(seconds)}, for updates of {plan.update:.3g} s as timed on this machine's "
        f"{plan.device.type}, and for evaluations"
    )


def _epochs(plan: Plan, tokens: int) -> str:
    """How often the data is repeated, if it is prepared."""
    if not plan.data.train_tokens:
        return ""
    epochs = tokens / plan.data.train_tokens
    beyond = f", of which those beyond {USEFUL_EPOCHS} add little" if epochs > USEFUL_EPOCHS else ""
    return f", {epochs:.2g} epochs{beyond}"


def _deserves(plan: Plan) -> str:
    """What training on Chinchilla's ratio of tokens to parameters takes."""
    steps = plan.deserved_steps
    tokens, flops, seconds = plan.cost(steps)
    time = "" if seconds is None else f", about {duration(seconds)}"
    return (
        f"{TOKENS_PER_PARAMETER} per parameter (Hoffmann et al. 2022) are {tokens:,}"
        f"{_epochs(plan, tokens)}: {option('training.steps')} {steps}, {flops:.2g} FLOPs{time}"
    )


def _bytes(count: int) -> str:
    """A number of bytes with three digits, such as `12.3 MB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"

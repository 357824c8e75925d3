"""The size of a run, from its config alone: parameters, memory and checkpoints.

All is read off a model on the "meta" device, whose tensors have shapes but no data. So every
option and placement counts as it is built, and the largest model takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpt.config import Config, ModelConfig, OptimizerConfig
from gpt.hardware.size import FP32
from gpt.model.gpt2 import GPT
from gpt.model.parametrization import kind_of

PARTS = ("token embedding", "position embedding", "attention", "MLP", "norms", "placement", "head")
# Of the 16 d numbers per token that a pre-norm block saves in fp32, half precision keeps the 2 d of
# the residual stream and halves the others: (2 * 4 + 14 * 2) / (16 * 4).
HALF_PRECISION = 9 / 16
# What glibc keeps of freed memory, fitted to measurements (docs/planning.md): 15% of what is in
# use at the peak, and as much as forward and backward pass use, up to 64 MB.
ALLOCATOR = (0.15, 64 * 10**6)
CHECKPOINT_TENSOR = 110  # bytes of a tensor's entry in the header of a safetensors file


def build(model: ModelConfig, vocab_size: int) -> GPT:
    """The model without its data, on the "meta" device."""
    with torch.device("meta"):
        return GPT(model, vocab_size)


def parameters(model: GPT) -> dict[str, int]:
    """Trainable parameters by part; "placement": those it adds itself; a tied head has none."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return counts


def _part(name: str) -> str:
    """The part that a parameter such as `blocks.0.attention.qkv.weight` belongs to."""
    modules = name.split(".")[:-1]
    if modules[-1].endswith("norm"):
        return "norms"
    tops = {"token_embedding": "token embedding", "position_embedding": "position embedding"}
    sublayers = {"attention": "attention", "mlp": "MLP"}
    if modules[0] == "blocks":
        return sublayers[modules[2]] if len(modules) > 2 else "placement"
    return tops.get(modules[0], modules[0])


# ---------------------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes on its device.

    Attributes:
        weights, gradients, optimizer: of the whole model; `optimizer` is its state.
        update: what the optimizer needs only while it updates.
        saving: copies of weights and optimizer state while a checkpoint is written.
        saves_while_training: whether there are checkpoints before the last step.
        sequence: activations of one sequence, saved for the backward pass.
        token: logits of one token, their log-softmax and the gradients of both.
        micro_batch: sequences of a forward pass.
        batch: sequences of an update.
        context, loss_chunk: tokens of a sequence, and of a part of the loss.
        allocator: as ALLOCATOR; zeros where unknown.
    """

    weights: int
    gradients: int
    optimizer: int
    update: int
    saving: int
    saves_while_training: bool
    sequence: int
    token: int
    micro_batch: int
    batch: int
    context: int
    loss_chunk: int | None
    allocator: tuple[float, int]

    @property
    def activations(self) -> int:
        """Saved by a micro-batch for the backward pass."""
        return self.micro_batch * self.sequence

    @property
    def logits(self) -> int:
        """Of a micro-batch, or of a chunk of it."""
        tokens = self.micro_batch * self.context
        return self.token * min(tokens, self.loss_chunk or tokens)

    @property
    def peak(self) -> int:
        """The most that is in use at once.

        As gradients appear, the activations that they are computed from are freed. Only those of an
        earlier micro-batch are there together with all activations. A checkpoint may still be
        written when the next update's gradients are there.
        """
        computing = self.activations + self.logits
        updating = self.gradients + self.update
        updating += self.saving if self.saves_while_training else 0
        if self.micro_batch < self.batch:
            computing += self.gradients
        used = self.weights + self.optimizer + max(computing, updating, self.saving)
        share, at_most = self.allocator
        return int((1 + share) * used + min(computing, at_most))

    def parts(self) -> dict[str, int]:
        """The parts that people ask for, by name; not all are in use at once."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "update", "saving")
        return {name: getattr(self, name) for name in names}


def memory(config: Config, model: GPT, micro_batch: int, device: str) -> Memory:
    """The memory that training takes.

    Args:
        model: from `build`.
        micro_batch: sequences of a forward pass.
        device: its type, such as "cuda". All but "cuda" share the memory in which checkpoints are
            copied; only on "cpu" is it known what the allocator keeps.
    """
    weights = FP32 * model.num_parameters()
    state, update = map(sum, zip(*optimizer_numbers(model, config.optimizer).values(), strict=True))
    optimizer = FP32 * state
    sequence, token = _saved_by_one(config, model)
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        update=FP32 * update,
        saving=0 if device == "cuda" else weights + optimizer,
        saves_while_training=config.save_every < config.training.steps,
        sequence=sequence,
        token=token,
        micro_batch=micro_batch,
        batch=config.batch_sequences,
        context=config.model.context,
        loss_chunk=config.training.loss_chunk,
        allocator=ALLOCATOR if device == "cpu" else (0.0, 0),
    )


def optimizer_numbers(model: GPT, config: OptimizerConfig) -> dict[str, tuple[int, int]]:
    """Of each parameter: numbers kept between updates, and numbers needed during an update.

    The former are exact, except for the count of updates that some optimizers keep.
    """
    numbers = {}
    for name, parameter in model.named_parameters():
        rule = config.name
        if rule == "muon" and kind_of(name, parameter.ndim) != "hidden":
            rule = "adamw"
        numbers[name] = OPTIMIZER_NUMBERS[rule](parameter.shape, config)
    return numbers


# Adam's two moments; Adafactor's means over rows and columns; momentum. Muon also needs Nesterov's
# gradients, and three copies of all matrices of one shape, about a third of the blocks' weights.
OPTIMIZER_NUMBERS: dict[str, Callable[[torch.Size, OptimizerConfig], tuple[int, int]]] = {
    "adamw": lambda shape, config: (2 * shape.numel(), 0),
    "radam": lambda shape, config: (2 * shape.numel(), 0),
    "adafactor": lambda shape, config: (sum(shape) if len(shape) > 1 else shape.numel(), 0),
    "muon": lambda shape, config: (shape.numel(), 2 * shape.numel() + min(shape) ** 2),
    "sgd": lambda shape, config: (shape.numel() if config.momentum else 0, 0),
}


def _saved_by_one(config: Config, model: GPT) -> tuple[int, int]:
    """Bytes of the activations of one sequence, and of the logits of one token.

    The backward pass of the loss holds two gradients of V numbers beside what is saved.
    """
    tokens = torch.zeros(1, config.model.context, dtype=torch.long, device="meta")
    if not config.model.dropout:  # else the weights of attention are formed
        for attention in model.attentions():
            attention.kernel = _attend
    hidden = _saved_bytes(model, lambda: model.hidden(tokens))
    whole = _saved_bytes(model, lambda: model.loss_fn(tokens, tokens, config.training.z_loss))
    logits = (whole - hidden) // config.model.context + 2 * FP32 * model.vocab_size
    exact = config.training.precision == "fp32"
    return hidden if exact else int(HALF_PRECISION * hidden), logits


class _Attend(torch.autograd.Function):
    """What torch's fused kernels save for the backward pass: q, k, v, the output and log Z."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)  # in the order of q's strides, as the kernels do
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    attended: Tensor = _Attend.apply(q, k, v)  # type: ignore[no-untyped-call]
    return attended


def _saved_bytes(model: GPT, compute: Callable[[], object]) -> int:
    """Bytes that autograd saves during `compute`, without the model's own tensors."""
    own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    known = {id(storage) for storage in own}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in known:
            saved[id(storage)] = storage  # kept, so that no other storage gets its id
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = compute()
    del graph
    return sum(storage.nbytes() for storage in saved.values())


def largest_micro_batch(memory: Memory, available: int) -> int | None:
    """The largest divisor of the batch that fits into so many bytes; None if not even 1 does."""
    divisors = (n for n in range(memory.batch, 0, -1) if memory.batch % n == 0)
    return next((n for n in divisors if replace(memory, micro_batch=n).peak <= available), None)


def checkpoint_bytes(model: GPT, config: OptimizerConfig) -> int:
    """Bytes of a checkpoint on disk, without the vocabulary."""
    state = optimizer_numbers(model, config)
    numbers = model.num_parameters() + sum(kept for kept, _ in state.values())
    return FP32 * numbers + CHECKPOINT_TENSOR * 3 * len(state)

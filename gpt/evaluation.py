"""Evaluation: the loss of a model on a text of any length, with standard errors.

    tokens -> windows -> the loss of each token -> sums -> loss, perplexity, bits per byte

The documents of a text are joined, each followed by end of text, as in training; so with a stride
of the whole context, the windows are those of the validation loss. The first token is only context.

Tokens of one document are not independent, but documents are. Each number is a ratio of sums over
documents, whose standard error is the linearized one of Cochran (1977, section 6.3): for
L = sum(l) / sum(n), with the loss l and the tokens n of each of D documents,

    SE² = D / (D - 1) * sum((l - L n)²) / sum(n)²

(the "clustered" standard error of Miller 2024, for documents of any length). A single document is
cut into contiguous blocks instead, so that the error describes that document only. No block but
the last is shorter than a context, whatever the stride: neighboring tokens resemble each other.

Pure: from a model and tokens to numbers, in constant memory. Files are read by gpt/data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt.data.sequences import Ids
from gpt.data.token_files import Tokens
from gpt.errors import InputError
from gpt.model.gpt2 import GPT

Numbers = npt.NDArray[np.float64]

MAX_BLOCKS = 64  # of a single document; before there are more, they are joined in pairs
MIN_BLOCKS = 10  # with fewer, a standard error would say little
LOSS, TOKENS, BYTES = range(3)  # the indices into a vector of sums


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; either is None where it cannot be computed."""

    value: float | None
    error: float | None


@dataclass(frozen=True)
class PositionLoss:
    """The mean loss, in nats, of the tokens with `first` to `last` tokens of context."""

    first: int
    last: int
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss: nats per token, end of text included.
        perplexity: exp(loss); its error is that of the loss, times the perplexity.
        bits_per_byte: of the UTF-8 text, the only one of the three that does not depend on the
            vocabulary.
        tokens, bytes: those that were predicted: all but the first token.
        documents: documents with a predicted token.
        units: what the standard errors treat as independent; None: there are no standard errors.
        unit_count: the number of these units; if they are very unequal, what counts is
            `effective_units`, sum(n)² / sum(n²) for units of n tokens (Kish 1965).
        by_position: the loss by the number of tokens that the model sees.
    """

    loss: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    tokens: int
    bytes: int
    documents: int
    units: Literal["documents", "blocks"] | None
    unit_count: int
    effective_units: float
    by_position: tuple[PositionLoss, ...]


def evaluate(
    model: GPT,
    tokens: Iterable[Tokens],
    *,
    byte_lengths: Sequence[int],
    stride: int | None = None,
    batch: int = 16,
) -> Evaluation:
    """How well a model predicts a text.

    Args:
        model: in evaluation mode, on any device; its `loss_chunk` limits the logits in memory.
        tokens: the ids of the text in pieces of any length; each document ends with end of text.
        byte_lengths: UTF-8 bytes of each token, by id; that of end of text, the last id, is 0.
        stride: tokens between the starts of two windows; the context, by default. See `windows`.
        batch: windows per forward pass.

    Raises:
        InputError: the text has fewer than two tokens, end of text included.
    """
    context, device = model.config.context, model.token_embedding.weight.device
    sums = _Sums(context, byte_lengths)
    for part, scored in _batches(windows(tokens, context, stride or context), batch):
        ids = torch.from_numpy(part).to(device)
        losses = token_losses(model, ids[:, :-1], ids[:, -scored:])
        first = part.shape[1] - 1 - scored
        sums.add(losses.cpu().double().numpy(), part[:, -scored:], first)
    if not sums.total[TOKENS]:
        raise InputError("the text to evaluate is empty")
    return sums.evaluation()


@torch.no_grad()
def token_losses(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target in nats: (B, T) inputs, (B, S) the last S targets -> (B, S)."""
    hidden = model.hidden(inputs)[:, -targets.shape[1] :].flatten(0, 1)
    size = model.loss_chunk or len(hidden)
    losses: list[Tensor] = []
    for x, y in zip(hidden.split(size), targets.flatten().split(size), strict=True):
        logits = model.logits(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, y, reduction="none"))
    return torch.cat(losses).view(targets.shape)


def windows(tokens: Iterable[Tokens], context: int, stride: int) -> Iterator[tuple[Ids, int]]:
    """Cut a text into windows, and score every token but the first exactly once.

    The first window scores all of its `context` targets. Each later one starts `stride` tokens
    after the one before it and scores its last `stride` targets, which are thus predicted from more
    than `context - stride` tokens. The last window may be shorter.

    Yields:
        The ids of a window (inputs and the last target: at most `context` + 1), and how many of
        the last ones are scored.
    """
    rest, scored = np.empty(0, np.int64), context
    for piece in tokens:
        rest = np.concatenate([rest, piece.astype(np.int64)])
        while len(rest) > context:
            yield rest[: context + 1], scored
            rest, scored = rest[stride:], stride
    new = len(rest) - 1 - (context - scored)
    if new > 0:
        yield rest, new


def _batches(found: Iterator[tuple[Ids, int]], size: int) -> Iterator[tuple[Ids, int]]:
    """Consecutive windows of one shape, up to `size` of them: (B, T + 1), and the number scored."""
    for (_, scored), group in itertools.groupby(found, key=lambda w: (len(w[0]), w[1])):
        while part := [ids for ids, _ in itertools.islice(group, size)]:
            yield np.stack(part), scored


class _Sums:
    """Sums of loss, tokens and bytes: of all, by document, by block and by position.

    Args:
        context: the longest window, in tokens.
        byte_lengths: as for `evaluate`.

    Attributes:
        total: (3,) loss in nats, tokens, bytes.
    """

    def __init__(self, context: int, byte_lengths: Sequence[int]) -> None:
        self.byte_lengths = np.array(byte_lengths, np.float64)
        self.end_of_text = len(byte_lengths) - 1
        self.total = np.zeros(3)
        self.documents, self.moments = 0, np.zeros((3, 3))  # sum of v v^T over documents
        self.open = np.zeros(3)  # the document whose end has not been seen
        self.blocks: list[Numbers] = []
        self.block_size = context  # in tokens; the last block may be shorter
        self.by_position = np.zeros((2, context))  # loss and tokens

    def add(self, losses: Numbers, targets: Ids, first: int) -> None:
        """Add the losses of the next targets of the text, (B, S) each: S of each of B windows.

        Args:
            first: the position of the first of the S targets in its window, from 0.
        """
        values = np.stack([losses, np.ones_like(losses), self.byte_lengths[targets]])  # (3, B, S)
        self.total += values.sum((1, 2))
        self.by_position[:, first : first + losses.shape[1]] += values[: TOKENS + 1].sum(1)
        for window in values.sum(2).T:
            self._add_to_blocks(window)
        self._add_to_documents(values.reshape(3, -1), targets.ravel() == self.end_of_text)

    def _add_to_blocks(self, window: Numbers) -> None:
        """Blocks of whole windows, twice as long whenever there are too many blocks."""
        if not self.blocks or self.blocks[-1][TOKENS] >= self.block_size:
            if len(self.blocks) == MAX_BLOCKS:
                pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
                self.blocks, self.block_size = [a + b for a, b in pairs], 2 * self.block_size
            self.blocks.append(np.zeros(3))
        self.blocks[-1] = self.blocks[-1] + window

    def _add_to_documents(self, values: Numbers, ends: npt.NDArray[np.bool_]) -> None:
        """Add (3, N) values of N tokens, of which some end a document."""
        starts = np.concatenate([[0], np.flatnonzero(ends) + 1])
        padded = np.pad(values, ((0, 0), (0, 1)))  # a document may be about to start
        documents = np.add.reduceat(padded, starts, axis=1).T
        documents[0] += self.open
        complete, self.open = documents[:-1], documents[-1]
        self.documents += len(complete)
        self.moments += complete.T @ complete

    def evaluation(self) -> Evaluation:
        """The numbers of everything that was added."""
        if self.open[TOKENS]:  # the text does not end with end of text
            self._add_to_documents(np.zeros((3, 1)), np.array([True]))
        units, count, moments = self._units()
        total = self.total

        def ratio(over: int, scale: float = 1.0) -> Estimate:
            """The loss per token or byte."""
            if not total[over]:
                return Estimate(None, None)
            value = float(total[LOSS] / total[over])
            if units is None or not math.isfinite(value):
                return Estimate(_finite(scale * value), None)
            residual = np.zeros(3)
            residual[LOSS], residual[over] = 1, -value
            squares = max(
                0.0, float(residual @ moments @ residual)
            )  # rounding can make it negative
            error = math.sqrt(count / (count - 1) * squares) / float(total[over])
            return Estimate(scale * value, scale * error)

        loss = ratio(TOKENS)
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(total[LOSS] / total[TOKENS]))
        error = None if loss.error is None else _finite(perplexity * loss.error)
        return Evaluation(
            loss=loss,
            perplexity=Estimate(_finite(perplexity), error),
            bits_per_byte=ratio(BYTES, 1 / math.log(2)),
            tokens=round(total[TOKENS]),
            bytes=round(total[BYTES]),
            documents=self.documents,
            units=units,
            unit_count=count,
            effective_units=float(total[TOKENS] ** 2 / moments[TOKENS, TOKENS]),
            by_position=tuple(self._by_position()),
        )

    def _units(self) -> tuple[Literal["documents", "blocks"] | None, int, Numbers]:
        """What is treated as independent, their number, and the sum of v v^T over them."""
        if self.documents > 1:
            return "documents", self.documents, self.moments
        blocks = np.array(self.blocks)
        enough = len(blocks) >= MIN_BLOCKS
        return "blocks" if enough else None, len(blocks), blocks.T @ blocks

    def _by_position(self) -> Iterator[PositionLoss]:
        """The mean losses of position 1, 2, 3 to 4, 5 to 8, and so on."""
        first, context = 0, self.by_position.shape[1]
        while first < context:
            last = min(max(1, 2 * first), context)
            loss, tokens = self.by_position[:, first:last].sum(1)
            if tokens:
                yield PositionLoss(first + 1, last, round(tokens), _finite(loss / tokens))
            first = last


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

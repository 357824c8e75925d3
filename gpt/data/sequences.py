"""Sequences: token files -> batches.

Sample i of a run is a pure function of (data seed, i): it does not depend on the batch size or on
what was read before. Batch n of B sequences holds samples (n - 1) B to n B - 1. Its targets are its
inputs shifted by one token. Validation sequences never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from gpt.data.token_files import Tokens
from gpt.errors import InputError
from gpt.rng import derive

Ids = npt.NDArray[np.int64]
Batch = tuple[Ids, Ids]  # inputs and targets, (sequences, T) each

CHECK_EVERY = 256  # sequences between two calls of `check`
CYCLE = 1000  # samples; every cycle divides them among several sources in the same proportion


class TrainingSequences:
    """The training tokens as an endless, seeded stream of windows of `context` tokens.

    With windows "epochs", each epoch of a source is a new permutation of its non-overlapping
    windows, from a random offset. The window that reaches the end continues with the first tokens,
    so every token is an input once per epoch, except for fewer than T before the offset. With
    "random", each window starts at a random token, as in nanoGPT. With "fixed", every batch is the
    first of "epochs": training on it is full-batch training, as in studies of sharpness.

    Args:
        train: token ids of each source.
        weights: fraction of the samples from each source; they add up to 1.
        context: T, the number of inputs in a sequence.
        seed: of the order.
        windows: "epochs", "random" or "fixed".

    Raises:
        InputError: a source has fewer tokens than a window needs, or there are too many sources.
    """

    def __init__(
        self,
        train: Sequence[Tokens],
        context: int,
        seed: int,
        *,
        weights: Sequence[float] = (1.0,),
        windows: Literal["epochs", "random", "fixed"] = "epochs",
    ) -> None:
        for number, tokens in enumerate(train):
            if len(tokens) <= context:
                of = f" of data.mix.{number}" if len(train) > 1 else ""
                raise InputError(
                    f"model.context: {context} needs more than the {len(tokens):,} training "
                    f"tokens{of}; lower it or data.val_fraction, or add text"
                )
        if len(train) > CYCLE:
            raise InputError(f"data.mix: has {len(train):,} sources; the maximum is {CYCLE:,}")
        self.train, self.context, self.seed, self.windows = train, context, seed, windows
        self.slots = _slots(weights)
        self._cycle = -1, self.slots  # the latest cycle: its number and the order of its slots
        self._epochs: dict[tuple[int, int], tuple[int, npt.NDArray[np.int64]]] = {}

    def batch(
        self,
        step: int,
        size: int,
        check: Callable[[], object] = lambda: None,
    ) -> Batch:
        """Inputs and targets of batch number `step` (from 1), (size, T) each.

        Args:
            size: number of sequences.
            check: called every `CHECK_EVERY` sequences; an exception that it raises ends the work.
        """
        first = 0 if self.windows == "fixed" else (step - 1) * size
        rows: list[Tokens] = []
        for index in range(first, first + size):
            if len(rows) % CHECK_EVERY == 0:
                check()
            rows.append(self._window(index))
        return _inputs_and_targets(rows)

    def _window(self, index: int) -> Tokens:
        """The T + 1 tokens of sample `index` of the run."""
        source, index = self._source(index)
        tokens, T = self.train[source], self.context
        if self.windows == "random":
            start = derive(self.seed, "window", source, index) % (len(tokens) - T)
        else:
            epoch, position = divmod(index, len(tokens) // T)
            offset, order = self._epoch(source, epoch)
            start = (offset + int(order[position]) * T) % len(tokens)
        window = tokens[start : start + T + 1]
        if len(window) <= T:
            window = np.concatenate([window, tokens[: T + 1 - len(window)]])
        return window

    def _source(self, index: int) -> tuple[int, int]:
        """The source of sample `index`, and the index of the sample within that source."""
        if len(self.train) == 1:
            return 0, index
        cycle, position = divmod(index, CYCLE)
        if cycle != self._cycle[0]:
            random = np.random.default_rng(derive(self.seed, "mix", cycle))
            self._cycle = cycle, random.permutation(self.slots)
        order = self._cycle[1]
        source = int(order[position])
        before = int(np.count_nonzero(order[:position] == source))
        return source, cycle * int(np.count_nonzero(order == source)) + before

    def _epoch(self, source: int, epoch: int) -> tuple[int, npt.NDArray[np.int64]]:
        """The offset of the windows of an epoch, and their order."""
        if (source, epoch) not in self._epochs:
            self._epochs.pop((source, epoch - 2), None)
            count = len(self.train[source])
            random = np.random.default_rng(derive(self.seed, "data", source, epoch))
            offset = int(random.integers(count))
            self._epochs[source, epoch] = offset, random.permutation(count // self.context)
        return self._epochs[source, epoch]


def _slots(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """The source of each slot of a cycle, in proportion to the weights; at least one per source."""
    exact = np.array(weights) * CYCLE
    counts = np.maximum(1, np.floor(exact).astype(np.int64))
    while counts.sum() < CYCLE:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > CYCLE:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return np.repeat(np.arange(len(weights)), counts)


class ValidationSequences:
    """The fixed, non-overlapping windows on which the validation loss is computed.

    Args:
        tokens: the validation tokens.
        context: T, the number of inputs in a sequence.
        limit: number of windows to use, spread evenly; None uses all.

    Raises:
        InputError: there are fewer tokens than a window needs.
    """

    def __init__(self, tokens: Tokens, context: int, limit: int | None) -> None:
        windows = (len(tokens) - 1) // context
        if windows < 1:
            raise InputError(
                f"model.context: {context} needs more than the {len(tokens):,} validation tokens; "
                "lower it, raise data.val_fraction, or add text to data.validation"
            )
        self.tokens, self.context = tokens, context
        self._windows, self._count = windows, min(windows, limit or windows)

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[Batch]:
        """All sequences in order, `size` at a time; the last batch may be smaller."""
        for first in range(0, len(self), size):
            numbers = range(first, min(first + size, len(self)))
            starts = (number * self._windows // self._count * self.context for number in numbers)
            yield _inputs_and_targets(
                [self.tokens[start : start + self.context + 1] for start in starts]
            )


def _inputs_and_targets(windows: list[Tokens]) -> Batch:
    rows = np.stack(windows).astype(np.int64)
    return rows[:, :-1], rows[:, 1:]

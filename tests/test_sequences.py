from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data.prefetch import prefetch
from gpt.data.sequences import CYCLE, TrainingSequences, ValidationSequences
from gpt.errors import InputError

TOKENS = np.arange(1000, dtype=np.uint16)


def starts(sequences: TrainingSequences, steps: range, size: int) -> list[int]:
    return [int(row[0]) for step in steps for row in sequences.batch(step, size)[0]]


def test_targets_are_the_inputs_shifted_by_one():
    x, y = TrainingSequences([TOKENS], 16, seed=0).batch(3, 4)
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == np.int64
    assert (y == (x + 1) % 1000).all()


@pytest.mark.parametrize("count", [1000, 992, 17, 18, 33])
def test_an_epoch_has_every_token_once_and_the_next_another_offset(count: int):
    sequences = TrainingSequences([TOKENS[:count]], 16, seed=3)
    windows = count // 16
    seen = []
    for epoch in range(2):
        steps = range(1 + epoch * windows, 1 + (epoch + 1) * windows)
        inputs = np.concatenate([sequences.batch(step, 1)[0] for step in steps])
        assert len(np.unique(inputs)) == inputs.size == windows * 16 > count - 16
        seen.append(inputs)
    if windows > 2:
        assert seen[0][:, 0].tolist() != sorted(seen[0][:, 0])
    assert {x % 16 for x in seen[0][:, 0]} != {x % 16 for x in seen[1][:, 0]} or count == 992


def test_offsets_change_by_epoch():
    sequences = TrainingSequences([TOKENS[:992]], 16, seed=3)
    offsets = {sequences._epoch(0, epoch)[0] for epoch in range(20)}
    assert len(offsets) > 15


def test_batches_are_a_function_of_seed_and_step():
    one, two = (TrainingSequences([TOKENS], 16, seed=5) for _ in range(2))
    later = one.batch(400, 4)[0]
    for step in range(1, 400):
        two.batch(step, 4)
    assert (two.batch(400, 4)[0] == later).all()
    assert (TrainingSequences([TOKENS], 16, seed=6).batch(400, 4)[0] != later).any()


@pytest.mark.parametrize("windows", ["epochs", "random"])
def test_the_stream_of_sequences_does_not_depend_on_the_batch_size(windows):
    sequences = TrainingSequences([TOKENS], 16, seed=0, windows=windows)
    assert starts(sequences, range(1, 13), 4) == starts(sequences, range(1, 5), 12)


@given(st.integers(2, 60), st.integers(1, 16), st.integers(0, 5))
def test_windows_of_small_corpora_stay_inside(count: int, context: int, seed: int):
    if count <= context:
        return
    for windows in ("epochs", "random"):
        sequences = TrainingSequences([TOKENS[:count]], context, seed, windows=windows)
        x, y = sequences.batch(2, 20)
        assert max(x.max(), y.max()) < count
        assert ((x[:, 1:] - x[:, :-1]) % count == 1 % count).all()


def test_a_fixed_batch_is_the_first_one_at_every_step():
    train = [TOKENS[:500], TOKENS[500:700]]
    options = {"context": 10, "seed": 1, "weights": (0.7, 0.3)}
    fixed, epochs = (TrainingSequences(train, windows=w, **options) for w in ("fixed", "epochs"))
    for step in (1, 2, 700):
        for one, another in zip(fixed.batch(step, 8), epochs.batch(1, 8), strict=True):
            assert (one == another).all()


def test_random_windows_start_anywhere():
    sequences = TrainingSequences([TOKENS], 16, seed=0, windows="random")
    found = starts(sequences, range(1, 2001), 4)
    assert min(found) < 10
    assert 960 < max(found) <= 983
    assert len(set(found)) > 950
    assert np.std(np.bincount(found, minlength=984)[:984]) < 2 * np.sqrt(8000 / 984)


def test_sources_have_their_proportions_and_their_own_epochs():
    train = [TOKENS[:500], TOKENS[500:700]]
    sequences = TrainingSequences(train, 10, seed=1, weights=(0.7, 0.3))
    found = starts(sequences, range(1, 3 * CYCLE + 1), 1)
    first = [start for start in found if start < 500]
    for cycle in range(3):
        part = found[cycle * CYCLE : (cycle + 1) * CYCLE]
        assert sum(start < 500 for start in part) == 700
    for tokens, drawn in ((500, first), (200, [s for s in found if s >= 500])):
        epoch = drawn[: tokens // 10]
        assert len(set(epoch)) == tokens // 10
    alone = TrainingSequences([train[0]], 10, seed=1)
    assert first == starts(alone, range(1, 3 * 700 + 1), 1)  # from one cycle into the next


def test_a_tiny_weight_still_has_a_slot():
    sequences = TrainingSequences([TOKENS, TOKENS], 10, 0, weights=(1 - 1e-9, 1e-9))
    assert np.bincount(sequences.slots).tolist() == [CYCLE - 1, 1]
    for weights in ([9997, 1, 1, 1], [9994, 2, 2, 2], [99.9, 0.05, 0.05], [1] * CYCLE):
        shares = np.array(weights) / sum(weights)
        slots = np.bincount(TrainingSequences([TOKENS] * len(weights), 10, 0, weights=shares).slots)
        assert slots.sum() == CYCLE
        assert slots.min() >= 1
    many = TrainingSequences([TOKENS] * 3, 10, 0, weights=(1 / 3, 1 / 3, 1 / 3))
    assert sorted(np.bincount(many.slots).tolist()) == [333, 333, 334]


def test_validation_sequences_are_spread_evenly():
    everything = ValidationSequences(TOKENS, 16, None)
    x, y = next(everything.batches(100))
    assert len(everything) == 62
    assert x[:, 0].tolist() == list(range(0, 62 * 16, 16))
    assert (y == x + 1).all()
    some = ValidationSequences(TOKENS, 16, 4)
    found = [row[0] for x, _ in some.batches(3) for row in x.tolist()]
    assert found == [0, 240, 496, 736]


def test_too_few_tokens_are_an_error():
    with pytest.raises(InputError, match=r"16 training tokens of data\.mix\.1; lower it or"):
        TrainingSequences([TOKENS, TOKENS[:16]], 16, seed=0)
    with pytest.raises(InputError, match=r"16 validation tokens; lower it, raise data\.val_fr"):
        ValidationSequences(TOKENS[:16], 16, None)


def test_prefetch_is_map():
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    squares = prefetch(make, range(5))
    assert next(squares) == 0
    assert list(itertools.islice(squares, 2)) == [1, 4]
    squares.close()
    assert made in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert list(prefetch(make, [])) == []


def test_prefetch_propagates_an_error():
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: 1 // (2 - step), range(4)))

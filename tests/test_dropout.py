"""Dropout: a sequence's masks depend on nothing but its generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpt.model.dropout import Dropout, drawing_from


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_sequence_is_dropped_alike_in_any_batch():
    x, drop = torch.randn(4, 5, 6), Dropout(0.5)
    with drawing_from(generators(0, 1, 2, 3)):
        whole = drop(x), drop(x)
    parts = []
    for first in (0, 2):
        with drawing_from(generators(first, first + 1)):
            parts.append((drop(x[first : first + 2]), drop(x[first : first + 2])))
    assert all(
        torch.equal(torch.cat(halves), one)
        for halves, one in zip(zip(*parts, strict=True), whole, strict=True)
    )
    assert not torch.equal(*whole)  # the second layer has a mask of its own


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    x = torch.ones(8, 100_000)
    with drawing_from(generators(*range(8))):
        y = Dropout(0.3)(x)
    assert sorted(set(y.unique().tolist())) == pytest.approx([0, 1 / 0.7])
    assert y.mean(1).tolist() == pytest.approx([1.0] * 8, abs=0.01)


def test_it_is_off_in_evaluation_and_at_probability_0():
    x = torch.randn(2, 3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_outside_of_a_context_it_draws_from_torchs_generator():
    x, drop = torch.ones(2, 50), Dropout(0.5)
    torch.manual_seed(0)
    first = drop(x)
    torch.manual_seed(0)
    assert torch.equal(drop(x), first)
    with drawing_from(generators(0, 1)):
        inside = drop(x)
    assert not torch.equal(inside, first)


@pytest.mark.slow
def test_it_is_the_same_when_compiled():
    model = nn.Sequential(nn.Linear(8, 8), Dropout(0.3), nn.Linear(8, 8))
    x = torch.randn(4, 8)

    def gradient(loss_fn) -> torch.Tensor:
        model.zero_grad()
        with drawing_from(generators(0, 1, 2, 3)):
            loss_fn(x).backward()
        return model[0].weight.grad.clone()

    def loss_fn(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    torch.testing.assert_close(gradient(torch.compile(loss_fn, dynamic=False)), gradient(loss_fn))

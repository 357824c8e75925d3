"""Batches made in a thread while a GPU works on the one before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(make: Callable[[int], Item], steps: Iterable[int]) -> Generator[Item]:
    """`map(make, steps)`, computing the next item in a thread while the current one is used."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = None
        for step in steps:
            current, upcoming = upcoming, pool.submit(make, step)
            if current is not None:
                yield current.result()
        if upcoming is not None:
            yield upcoming.result()

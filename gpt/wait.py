"""Waiting for something that runs in a thread: not for ever, and open to Ctrl-C.

A name server that does not answer, or a server that accepts and is silent, can hold a library for
minutes; and a library that works in another language does not let Python see a signal. Where either
can happen, the call is made in a thread, and the main one waits for it here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE = 8.0  # seconds until a server that has said nothing counts as out of reach


def wait_for(ask: Callable[[], Result], seconds: float | None = None) -> Result:
    """The result of `ask()`; signal handlers run while it is awaited.

    Args:
        seconds: how long to wait; None waits as long as it takes.

    Raises:
        TimeoutError: `ask` takes longer; it is left behind in a daemon thread.
        Exception: what `ask` raises.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]

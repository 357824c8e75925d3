"""What is asked of the network, within a time limit that holds whatever the library does.

A name server that does not answer, or a server that accepts and is silent, can hold a library for
minutes. Nothing here retries: whether to go on is for the user to say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE = 8.0  # seconds until a server that has said nothing counts as out of reach


def within(seconds: float, ask: Callable[[], Result]) -> Result:
    """The result of `ask()`.

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

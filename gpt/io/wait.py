"""Waiting for something that runs in a thread: not for ever, and open to Ctrl-C and SIGTERM.

A name server that does not answer, a server that accepts and is silent, or a named pipe without a
writer can hold a library for minutes; and a library that works in another language does not let
Python see a signal. Where any of these can happen, the call is made in a thread, and the caller
waits for it here.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from gpt.errors import StoppedError

Result = TypeVar("Result")
Stop = Callable[[], bool]

PATIENCE = 8.0  # seconds until a server that has said nothing counts as out of reach
POLL = 0.1  # seconds between two looks at a thread that works
SILENCE = 0.5  # seconds after which the waiting thread asks whether to stop, if the other did not
GRACE = 0.8  # seconds that work has to end in good order once it should stop
THREAD = "gpt.io.wait"


def wait_for(
    ask: Callable[[], Result],
    seconds: float | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Result:
    """The result of `ask()`; signal handlers run while it is awaited.

    Args:
        seconds: how long to wait; None waits as long as it takes.
        meanwhile: called every `POLL` seconds; what it raises ends the wait.

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

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    end = None if seconds is None else time.monotonic() + seconds
    while thread.is_alive():
        thread.join(POLL if end is None else max(0.0, min(POLL, end - time.monotonic())))
        if end is not None and time.monotonic() >= end:
            break
        if thread.is_alive():
            meanwhile()
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def interruptible(work: Callable[[Stop], Result], stop: Stop, message: str) -> Result:
    """The result of `work(stop)`, unless `stop` comes true first, whatever `work` is busy with.

    `work` may ask `stop` itself, to end in good order; from then on it has `GRACE` seconds, after
    which it is left behind, as if the process had been killed. An interrupt has it stop too.

    Raises:
        StoppedError: `stop` came true; with `message` if `work` did not end by itself.
        Exception: what `work` raises.
    """
    lock = threading.Lock()
    asked = time.monotonic()  # when `stop` was asked last
    until = math.inf  # when the work is left behind

    def stopping() -> bool:
        nonlocal asked, until
        with lock:
            asked = time.monotonic()
            if until == math.inf and stop():
                until = asked + GRACE
            return until < math.inf

    def check() -> None:
        if time.monotonic() > asked + SILENCE:
            stopping()
        if time.monotonic() > until:
            raise StoppedError(message)

    try:
        return wait_for(lambda: work(stopping), meanwhile=check)
    except BaseException:
        until = -math.inf
        raise


def leave(code: int) -> NoReturn:
    """End the process; at once where a thread was left behind.

    The interpreter's own end would wait for its helpers, and aborts if it cuts off a thread amid
    code of another language.
    """
    if any(thread.name == THREAD for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(code)
    raise SystemExit(code)

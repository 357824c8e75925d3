"""Calls that may never return, made in a thread with a timeout, so that Ctrl-C and SIGTERM work.

A name server that does not answer, a server that accepts a connection but sends nothing, or a named
pipe without a writer can block a library for minutes; and while native code runs, Python does not
see signals. Wherever that can happen, the call is made in a thread and the caller waits for it
here.
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

from gpt.errors import StepInterruptedError, StoppedError

Result = TypeVar("Result")
Stop = Callable[[], bool]

TIMEOUT = 8.0  # seconds after which a server that has not responded counts as unreachable
POLL = 0.1  # seconds between two checks of a working thread
STOP_CHECK = 0.5  # if the work has not called `stop` for this many seconds, the waiting thread does
GRACE = 0.8  # seconds allowed for the work to finish cleanly once it should stop
THREAD = "gpt.io.wait"


def wait_for(
    work: Callable[[], Result],
    seconds: float | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Result:
    """Call `work()` in a thread and return its result; signal handlers run while waiting.

    Args:
        seconds: how long to wait; None waits as long as it takes.
        meanwhile: called every `POLL` seconds; an exception that it raises ends the wait.

    Raises:
        TimeoutError: `work` takes longer; it is abandoned in a daemon thread.
        Exception: whatever `work` raises.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
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
    """Return the result of `work(stop)`; end soon if `stop()` becomes true, even if `work` hangs.

    `work` should call `stop` regularly and end cleanly once it returns true. If it does not end
    within `GRACE` seconds, it is abandoned, as if the process had been killed. Ctrl-C also makes
    `stop` return true.

    Raises:
        StoppedError: `stop()` became true and `work` did not end in time; with `message`.
        Exception: whatever `work` raises.
    """
    lock = threading.Lock()
    checked = time.monotonic()  # when `stop` was called last
    deadline = math.inf  # when the work is abandoned

    def stopping() -> bool:
        nonlocal checked, deadline
        with lock:
            checked = time.monotonic()
            if deadline == math.inf and stop():
                deadline = checked + GRACE
            return deadline < math.inf

    def check() -> None:
        if time.monotonic() > checked + STOP_CHECK:
            stopping()
        if time.monotonic() > deadline:
            raise StoppedError(message)

    try:
        return wait_for(lambda: work(stopping), meanwhile=check)
    except BaseException:
        deadline = -math.inf
        raise


def raise_if(stop: Callable[[], bool]) -> None:
    """Interrupt work that a resumed run repeats, if a stop is requested.

    Raises:
        StepInterruptedError: `stop` returned true.
    """
    if stop():
        raise StepInterruptedError


def leave(code: int) -> NoReturn:
    """Exit the process, immediately if a thread was abandoned.

    A normal exit of the interpreter would wait for the helper threads of libraries, and would abort
    if a thread were still running native code.
    """
    if any(thread.name == THREAD for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the reader has gone
                stream.flush()
        os._exit(code)
    raise SystemExit(code)

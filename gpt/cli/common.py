"""Shared by all commands: errors become exit codes, signals become requests to stop.

Exit codes: 0 finished, 1 internal error (traceback), 2 invalid input (or too little memory, or a
failed write), 3 diverged, 75 interrupted and saved; 130 for Ctrl-C where there is nothing to save.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from gpt.errors import InputError, LostProcessError, StoppedError, format_error, naming_flags
from gpt.io.console import set_encoding, show
from gpt.io.wait import leave

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODES = {"finished": 0, "diverged": 3, "interrupted": 75}

# Errors of the machine, not of the program: permissions, disk space, names.
USER_ERRORS = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO"),
        *("ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP"),
    )
    if hasattr(errno, name)
}


@contextlib.contextmanager
def command(prog: str) -> Iterator[None]:
    """Run a command's body: an error in the user's input ends it with a message and exit code 2."""
    set_encoding()
    atexit.register(gc.freeze)  # spares the process 0.7 s of collecting torch's objects as it exits
    try:
        # KeyboardInterrupt, the default, would be lost, or become another error, in many imports.
        interrupt = {signal.SIGINT: lambda number, frame: os._exit(130)}
        with _signal_handlers(interrupt), naming_flags():
            yield
    except InputError as error:
        show("\n".join(f"{prog}: {line}" for line in format_error(error)), sys.stderr)
        raise SystemExit(2) from None
    except StoppedError as stopped:
        show(f"{prog}: {stopped}:\n  {repeated(prog)}", sys.stderr)
        leave(75)
    except LostProcessError as lost:
        show(f"{prog}: {lost}:\n  {repeated(prog)}", sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        leave(130)
    except BrokenPipeError:  # the reader of stdout, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno not in USER_ERRORS:
            raise
        show(f"{prog}: {error.filename or 'writing'}: {error.strerror}", sys.stderr)
        raise SystemExit(2) from None


SCRIPTS = ("train", "sample", "compare")  # that a clone has at its top; others are commands only


def typed(name: str, prog: str) -> list[str]:
    """The words that start the command `name`, as a user who typed `prog` would type them."""
    here, python, script = Path.cwd(), Path(sys.executable), Path(sys.argv[0])
    interpreter = str(python.relative_to(here)) if python.is_relative_to(here) else "python"
    if prog.endswith(".py") and name in SCRIPTS:
        other = f"{name}.py"
        return [interpreter, str(script.with_name(other)) if script.name == prog else other]
    if prog.startswith("steadygpt") and script.name != "__main__.py":
        on_path = script.is_absolute() and shutil.which("steadygpt") is not None
        return [sys.argv[0] if script.stem == "steadygpt" and not on_path else "steadygpt", name]
    return [interpreter, "-m", "gpt", name]


def repeated(prog: str) -> str:
    """The command line that continues what this process has begun: its own, as it was typed.

    Args:
        prog: the command's name in its messages.
    """
    name, given = prog.removesuffix(".py").split()[-1], sys.argv[1:]
    if prog.startswith("steadygpt"):
        given = given[1:]
    for never in (["--resume", "never"], ["--resume=never"]):  # it would refuse what has begun
        at = [i for i in range(len(given)) if given[i : i + len(never)] == never]
        given = given[: at[0]] + given[at[0] + len(never) :] if at else given
    start = prog.split() if prog.startswith("python -m") else typed(name, prog)
    return shlex.join([*start, *given])


class StopSignals:
    """Turns Ctrl-C, SIGTERM and a time limit into a request to stop; call it to test for one.

    A second signal has its default action and ends the process at once.

    Args:
        max_seconds: the time limit, from now; None: no limit.
        quiet: do not say that a stop was requested.
    """

    def __init__(self, max_seconds: float | None = None, *, quiet: bool = False) -> None:
        self._requested, self._quiet = False, quiet
        self._max_seconds = math.inf if max_seconds is None else max_seconds
        self._deadline = time.monotonic() + self._max_seconds
        self._handlers = _signal_handlers(dict.fromkeys(STOP_SIGNALS, self._request))

    def __call__(self) -> bool:
        if not self._requested and time.monotonic() > self._deadline:
            self._requested = True
            if not self._quiet:
                print(
                    f"\nreached the time limit of {self._max_seconds:g} s: stopping",
                    file=sys.stderr,
                )
        return self._requested

    def __enter__(self) -> StopSignals:
        self._handlers.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handlers.__exit__(None, None, None)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        if not self._quiet:  # not `print`, which the signal may have interrupted
            os.write(2, f"\n{name}: stopping; a second signal kills the process\n".encode())


@contextlib.contextmanager
def _signal_handlers(
    handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Iterator[None]:
    """Install signal handlers, and restore the old ones; only the main thread can have any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

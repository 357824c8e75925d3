from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gpt.errors import StoppedError
from gpt.io.wait import GRACE, STOP_CHECK, Stop, interruptible, wait_for


def test_results_and_errors_are_passed_on():
    assert wait_for(lambda: 3) == 3
    with pytest.raises(KeyError):
        wait_for(lambda: {}["x"], 5)


def test_a_timeout_ends_the_wait():
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        wait_for(never.wait, 0.1)
    never.set()


def test_signal_handlers_run_while_waiting():
    seen: list[float] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(time.monotonic()))
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        wait_for(lambda: time.sleep(0.5))
        ended = time.monotonic()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 1
    assert ended - seen[0] > 0.2


def test_an_exception_of_meanwhile_ends_the_wait():
    never = threading.Event()

    def give_up() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        wait_for(never.wait, meanwhile=give_up)
    never.set()


def test_work_that_calls_stop_ends_by_itself():
    ended = threading.Event()

    def work(stop: Stop) -> None:
        while not stop():
            time.sleep(0.01)
        ended.set()
        raise StoppedError("in good order")

    asked = iter([False, False, True])  # once true is enough: it is not asked again
    with pytest.raises(StoppedError, match="in good order"):
        interruptible(work, lambda: next(asked), "left behind")
    assert ended.is_set()


def test_work_that_hangs_is_abandoned():
    never = threading.Event()
    began = time.monotonic()
    with pytest.raises(StoppedError, match="left behind"):
        interruptible(lambda stop: never.wait(), lambda: True, "left behind")
    assert STOP_CHECK + GRACE < time.monotonic() - began < 5
    never.set()


def test_an_interrupt_also_stops_the_work():
    ended = threading.Event()

    def work(stop: Stop) -> None:
        while not stop():
            time.sleep(0.01)
        ended.set()

    def interrupt() -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return False

    quiet = threading.Event()

    def silent(stop: Stop) -> None:
        quiet.wait()
        work(stop)

    with pytest.raises(KeyboardInterrupt):
        interruptible(silent, interrupt, "")
    quiet.set()
    assert ended.wait(5)


LEFT_BEHIND = """
import itertools, sys, threading, time
from tokenizers import Tokenizer, models, trainers
from gpt.io.wait import leave, wait_for

def texts():
    for number in itertools.count():
        time.sleep(0.001)
        yield f"word{number}"

train = lambda: Tokenizer(models.BPE()).train_from_iterator(texts(), trainers.BpeTrainer())
try:
    wait_for(train, 0.3)
except TimeoutError:
    print("waited")
    leave(75)
"""


def test_an_abandoned_thread_in_native_code_does_not_crash_the_exit():
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, b"waited\n", b"")

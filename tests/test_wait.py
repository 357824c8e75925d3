from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from gpt.wait import wait_for


def test_an_answer_and_an_error_come_through():
    assert wait_for(lambda: 3) == 3
    with pytest.raises(KeyError):
        wait_for(lambda: {}["x"], 5)


def test_silence_ends():
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        wait_for(never.wait, 0.1)
    never.set()


def test_signals_are_seen_meanwhile():
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

from __future__ import annotations

import threading

import pytest

from gpt.network import within


def test_an_answer_and_an_error_come_through():
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])


def test_silence_ends():
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        within(0.1, never.wait)
    never.set()

"""What a run says while it trains: a progress bar on a terminal, plain lines otherwise.

All of it goes to stderr, so that stdout carries results only. This module prints; what is recorded
for machines is in gpt/metrics.py.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm


class Console:
    """Says how a run gets on; `quiet` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if not self._quiet:
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def start(self, steps: int, done: int) -> None:
        """Begin to count: `done` of `steps` updates are behind."""
        self._steps, self._first, self._began = steps, done, time.monotonic()
        if sys.stderr.isatty() and not self._quiet:
            self._bar = tqdm(
                total=steps, initial=done, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def progress(self, step: int, loss: float, rate: float, tokens_per_second: float) -> None:
        """Updates up to `step` are done; the numbers are the newest known."""
        numbers = f"loss {loss:.4f}  rate {rate:.2e}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            per_step = (time.monotonic() - self._began) / max(1, step - self._first)
            left = duration(per_step * (self._steps - step))
            self.say(f"step {step}/{self._steps}  {numbers}  {left} left")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

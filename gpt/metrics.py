"""metrics.jsonl: one JSON object a line, appended as training goes.

Training lines hold step (from 1), tokens, loss (nats per token), learning_rate, grad_norm (before
clipping), batches (a digest of all inputs up to this step), tokens_per_second and step_seconds;
evaluation lines step (0: before the first update), val_loss (nats per token) and val_bits_per_byte.
A non-finite number is written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt.errors import InputError

Record = dict[str, Any]

LEARNT = 0.05  # nats under the unigram entropy H₁ that count as having learnt more than frequencies


class MetricsLog:
    """An append-only metrics.jsonl.

    Args:
        path: the file.
        after: keep only the lines up to this step, so that a resumed run has no step twice; None
            keeps nothing.
    """

    def __init__(self, path: Path, after: int | None) -> None:
        kept = [] if after is None else [r for r in read(path) if r["step"] <= after]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, kept))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, records: Iterable[Record]) -> None:
        """Append `records` and hand them to the operating system."""
        self._file.writelines(map(_line, records))
        self._file.flush()

    def sync(self) -> None:
        """Flush to disk, so that a checkpoint never knows more steps than the log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, without a last line that was cut off while being written.

    Raises:
        InputError: another line is no record.
    """
    records: list[Record] = []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {number} is damaged") from None
        records.append(record)
    return records


def _line(record: Record) -> str:
    lost = {k: None for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps({**record, **lost}, allow_nan=False) + "\n"

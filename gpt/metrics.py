"""metrics.jsonl: one JSON object per line, appended during training.

Training records contain step (from 1), tokens, loss (nats per token), learning_rate, grad_norm
(before clipping), batches (a digest of all inputs up to this step), tokens_per_second and
step_seconds (for cells trained in a batch: wall-clock time, including the evaluations of others);
also `"skipped": true` if the update was skipped, and mfu, the fraction of the device's peak
FLOP/s, on a known GPU with bf16 or fp16. Evaluation records contain step (0 is before the first
update), val_loss (nats per token) and val_bits_per_byte. Layer records contain step, layer,
grad_rms and the MEASURES of gpt/diagnostics/layers.py that the layer has. Records of the whole
model contain step and those of its MODEL_MEASURES that were measured before the update, with the
sharpness's thresholds, and the noise scale's numerator and denominator, gradient_noise and
gradient_signal. A non-finite number is written as null.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt.errors import InputError
from gpt.io.files import open_regular, reading, write_text

Record = dict[str, Any]

MAX_LINE = 2**16  # bytes of a line
LARGEST = 1e100  # bound on any number: fp32 ends at 3.4e38, and squares must be finite
MAX_LAYERS = 10_000  # bound on the number of layers: a plot has a row for each
# In nats: a model has learned more than token frequencies once its validation loss is this far
# below the unigram entropy (H₁, the loss of guessing by token frequency).
LEARNED_MARGIN = 0.05
EPS_ALARM = 10  # times epsilon: smaller gradients make Adam's updates shrink


class MetricsLog:
    """An append-only metrics.jsonl.

    Args:
        path: the file.
        kept: its initial records, replacing earlier contents; see `read_up_to`.
    """

    def __init__(self, path: Path, kept: Iterable[Record] = ()) -> None:
        write_text(path, "".join(map(_line, kept)))
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._waiting = b""  # not yet written to the file

    def write(self, records: Iterable[Record]) -> None:
        """Append `records` to the file.

        If the disk is full, the rest is kept and written by a later call, at the latest by `sync`.
        """
        self._waiting += "".join(map(_line, records)).encode()
        with contextlib.suppress(OSError):
            self._write_waiting()

    def sync(self) -> None:
        """Flush to disk, so that a checkpoint is never ahead of the log.

        Raises:
            OSError: the file cannot be written, or has been deleted.
        """
        self._write_waiting()
        os.fsync(self._file.fileno())
        try:
            here = os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            here = False
        if not here:
            raise OSError(errno.ENOENT, "was deleted or moved while in use", str(self._path))

    def contents(self) -> bytes:
        """All records, even if the disk is full or the file was deleted."""
        self._file.seek(0)
        return self._file.read() + self._waiting

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def read_up_to(path: Path, step: int) -> list[Record]:
    """The records of a metrics.jsonl up to a step, so that a resumed run repeats none.

    Raises:
        InputError: as `read`.
    """
    return [record for record in read(path) if record["step"] <= step]


def read(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, without an incomplete last line; none if the file is missing.

    Raises:
        InputError: any other line is not a record, or `path` is not a regular file.
    """
    records: list[Record] = []
    try:
        with reading(path), contextlib.suppress(FileNotFoundError), open_regular(path) as file:
            while (line := file.readline(MAX_LINE)).endswith(b"\n"):
                records.append(_record(line))
            if len(line) == MAX_LINE:
                raise ValueError
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path}: line {len(records) + 1} is damaged") from None
    return records


def _record(line: bytes) -> Record:
    record = json.loads(line)
    if not _is_record(record):
        raise ValueError
    return dict(record)


def _is_record(record: Any) -> bool:
    """Whether a record is one that training writes: a step, numbers, and an update's main keys."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    numbers = (value for key, value in record.items() if key != "batches")
    return (
        0 <= record["step"] <= 2**53
        and all(n is None or (isinstance(n, int | float) and abs(n) < LARGEST) for n in numbers)
        and type(record.get("layer", 0)) is int
        and 0 <= record.get("layer", 0) < MAX_LAYERS
        and isinstance(record.get("batches", ""), str)
        and ("loss" not in record or {"grad_norm", "batches", "learning_rate"} <= record.keys())
    )


def _line(record: Record) -> str:
    nulls = {k: None for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps({**record, **nulls}, allow_nan=False) + "\n"

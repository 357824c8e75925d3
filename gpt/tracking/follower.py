"""Reading metrics.jsonl while it is written, and handing it to a tracker, one step at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from gpt.config import Config, leaves
from gpt.errors import printable
from gpt.metrics import Record

POLL = 1.0  # seconds between two looks at metrics.jsonl
Values = dict[str, float]  # name, such as train/loss -> value


@dataclass(frozen=True)
class Identity:
    """tracking.json: the run's id for all trackers, and when it was first tracked (Unix time)."""

    id: str
    started: float


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is given at its start."""

    config: Config
    directory: Path
    identity: Identity

    @property
    def name(self) -> str:
        return self.directory.absolute().name

    def describe(self) -> dict[str, Any]:
        """The config, nested, and where the run is."""
        return {
            **self.config.model_dump(mode="json"),
            "directory": str(self.directory.absolute()),
            "tracking_id": self.identity.id,
        }

    def describe_flat(self) -> dict[str, bool | int | float | str]:
        """The same by dotted option, with anything but numbers as text."""
        return {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in leaves(self.describe())
        }


class Tracker(Protocol):
    """A run in a tracker. Any method may raise whatever the tracker's library raises."""

    def __init__(self, run: TrackedRun) -> None:
        """Start an empty run, in place of one with the same identity."""

    def log(self, step: int, values: Values) -> None:
        """Add everything that was measured at a step; steps increase."""

    def finish(self, result: dict[str, Any] | None) -> None:
        """End the run.

        Args:
            result: the contents of result.json; None if there is none, or the run starts again.
        """


class Follower(threading.Thread):
    """Copies a run's metrics.jsonl to a tracker, from its first line whenever it is replaced.

    Attributes:
        ended: set it when nothing more will be written.
    """

    def __init__(
        self, name: str, tracker: type[Tracker], run: TrackedRun, notify: Callable[[str], object]
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.tracker, self.tracked, self.notify = tracker, run, notify
        self.metrics, self.result = run.directory / "metrics.jsonl", run.directory / "result.json"
        self.ended = threading.Event()

    def run(self) -> None:
        """Follow the file until `ended`; a failure ends only this thread, with a warning."""
        try:
            while not self._copy():
                pass
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            self.notify(
                f"tracking: {self.name} failed and is off until the run is resumed; training and "
                f"metrics.jsonl are not affected ({printable(reason)})"
            )

    def run_has_ended(self) -> bool:
        """Whether the run has a result other than being interrupted."""
        return (self._read_result() or {}).get("status") not in (None, "interrupted")

    def _read_result(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(self.result.read_bytes()))
        return None

    def _copy(self) -> bool:
        """Copy the file, and what is appended to it; returns False once it is replaced."""
        with self.metrics.open("rb") as file:
            tracker = self.tracker(self.tracked)
            step, values = 0, Values()
            ended = replaced = False
            while not (ended or replaced):
                ended = self.ended.wait(POLL)
                replaced = self._is_replaced(file)
                while not replaced and (record := _next_record(file)) is not None:
                    if record["step"] != step and values:
                        tracker.log(step, values)
                        values = {}
                    step = record["step"]
                    values |= to_values(record)
            if values and not replaced:
                tracker.log(step, values)
            tracker.finish(None if replaced else self._read_result())
        return not replaced

    def _is_replaced(self, file: BinaryIO) -> bool:
        with contextlib.suppress(FileNotFoundError):  # deleted: nothing else will come
            return not os.path.samestat(os.fstat(file.fileno()), self.metrics.stat())
        return False


def _next_record(file: BinaryIO) -> Record | None:
    """The record in the next line; None, at the same position, if the line is not complete."""
    line = file.readline()
    if line.endswith(b"\n"):
        return dict(json.loads(line))
    file.seek(-len(line), os.SEEK_CUR)
    return None


def to_values(record: Record) -> Values:
    """The numbers of a record of metrics.jsonl, by the name under which trackers show them.

    Trackers group by the part before the slash: train/loss, val/loss, grad_rms/layer-02 and
    model/sharpness. A number that is not finite, which the file has as null, is NaN.
    """
    numbers = {key: value for key, value in record.items() if key not in ("step", "batches")}
    layer = numbers.pop("layer", None)
    if layer is not None:
        named = {f"{key}/layer-{layer:02}": value for key, value in numbers.items()}
    elif "loss" in numbers:
        named = {f"train/{key}": value for key, value in numbers.items()}
    elif "val_loss" in numbers:
        named = {f"val/{key.removeprefix('val_')}": value for key, value in numbers.items()}
    else:
        named = {f"model/{key}": value for key, value in numbers.items()}
    return {key: math.nan if value is None else float(value) for key, value in named.items()}


def to_json(value: object) -> str:
    """`value` as indented JSON, with a line break at its end."""
    return json.dumps(value, indent=2) + "\n"

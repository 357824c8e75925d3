"""Trackers: copies of a run's metrics.jsonl in TensorBoard, Weights & Biases or trackio.

follower.py     reads metrics.jsonl while the run trains, and hands it to a tracker step by step
tensorboard.py  an event file in the run directory
wandb.py        an offline run of Weights & Biases
trackio.py      a run in trackio's local database

metrics.jsonl stays the record of the run. Whenever a start or a rollback has rewritten it, each
tracker starts again from its first line, so that a tracker shows every step once. Each works in a
thread of its own: training never waits for one, and one that fails is switched off with a warning.
"""

from __future__ import annotations

import importlib.metadata
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from gpt.config import Config
from gpt.errors import InputError
from gpt.io.files import read_json, write_text
from gpt.tracking.follower import Follower, Identity, TrackedRun, Tracker, to_json
from gpt.tracking.tensorboard import TensorBoard
from gpt.tracking.trackio import Trackio
from gpt.tracking.wandb import WandB

# Each is also the name of the package that it needs, and of the extra that installs it.
TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
FINISH_SECONDS = 30.0  # how long an ended run waits for its trackers
STOP_SECONDS = 5.0  # how long a stopped run waits; its next start copies everything again


def check_installed(names: Iterable[str]) -> None:
    """Check that the packages of some trackers are installed.

    Raises:
        InputError: names those that are not, and what installs them.
    """
    missing = [name for name in names if not is_installed(name)]
    if missing:
        raise InputError(
            f"tracking: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"installed: pip install 'steadygpt[{','.join(missing)}]'"
        )


def is_installed(package: str) -> bool:
    """Whether a distribution is installed; an import would also find a folder like W&B's wandb/."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Tracking:
    """The trackers of one run; none if `config.tracking` is empty.

    Args:
        directory: the run directory, with its metrics.jsonl and without a result.json.
        notify: shows a warning.

    Raises:
        InputError: tracking.json is damaged.
        OSError: it cannot be written.
    """

    def __init__(self, config: Config, directory: Path, notify: Callable[[str], object]) -> None:
        self.notify = notify
        self.followers: Sequence[Follower] = ()
        if config.tracking:
            run = TrackedRun(config, directory, _identity(directory / "tracking.json"))
            self.followers = [Follower(n, TRACKERS[n], run, notify) for n in config.tracking]
        for follower in self.followers:
            follower.start()

    def close(self) -> None:
        """Copy the rest of metrics.jsonl and the result, and end; never raises or hangs."""
        for follower in self.followers:
            follower.ended.set()
        began = time.monotonic()
        for follower in self.followers:
            limit = FINISH_SECONDS if follower.run_has_ended() else STOP_SECONDS
            follower.join(max(0.0, began + limit - time.monotonic()))
            if follower.is_alive():
                self.notify(
                    f"tracking: {follower.name} is incomplete: it has not finished in {limit:g} s"
                )


def _identity(path: Path) -> Identity:
    """What identifies a run to its trackers, in every session and wherever it is moved."""
    if not path.exists():
        identity = Identity(id=uuid.uuid4().hex, started=time.time())
        write_text(path, to_json(asdict(identity)))
    return read_json(path, Identity, "delete it, and the trackers show a new run")

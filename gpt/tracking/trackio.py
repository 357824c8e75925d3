"""trackio: a run in its local database, which `trackio show --project steadygpt` displays."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from gpt.tracking.follower import TrackedRun, Values

PROJECT = "steadygpt"


class Trackio:
    """A run with all steps; the earlier copy of the same run is deleted from the database.

    The database is where trackio has it, TRACKIO_DIR or its default. trackio has no place for the
    result of a run.
    """

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        with contextlib.suppress(ValueError):  # no such project yet
            for old in trackio.Api().runs(PROJECT):
                if (old.config or {}).get("tracking_id") == run.identity.id:
                    old.delete()
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                PROJECT,
                name=run.name,
                config=run.describe(),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def finish(self, result: dict[str, Any] | None) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()

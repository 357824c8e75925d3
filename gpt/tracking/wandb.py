"""Weights & Biases: an offline run in the folder wandb/ beside the run directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from gpt.tracking.follower import TrackedRun, Values

PROJECT = "steadygpt"  # unless WANDB_PROJECT names another


class WandB:
    """An offline run with all steps, for `wandb sync`; the run's earlier folders are deleted.

    The folder is not in the run directory, because W&B makes symbolic links in it, which a run
    directory must not contain. The run's id is always the same, so that a folder that is
    uploaded again replaces the run on the server. (wandb ignores `resume` in an offline run.)

    W&B's environment variables take precedence: WANDB_MODE=online, WANDB_DIR, WANDB_PROJECT, ...
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")  # before the import: it sends telemetry
        import wandb

        parent = Path(os.environ.get("WANDB_DIR") or run.directory.absolute().parent)
        for old in (parent / "wandb").glob(f"*run-*-{run.identity.id}"):
            shutil.rmtree(old)
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            dir=parent,
            id=run.identity.id,
            name=run.name,
            config=run.describe(),
            reinit="create_new",  # the caller may have a run of its own
            settings=settings,
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def finish(self, result: dict[str, Any] | None) -> None:
        if result is not None:
            self._run.summary.update(result)
        self._run.finish(exit_code=0 if result and result["status"] == "finished" else 1)

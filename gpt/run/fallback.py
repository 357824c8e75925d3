"""A directory elsewhere for a run whose own directory can no longer be written."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from gpt import checkpoint as store
from gpt.config import Config
from gpt.errors import InputError, option
from gpt.io.files import make_folder, write_bytes
from gpt.run.directory import RunDirectory


def fallback_parent(config: Config) -> Path:
    """The folder for runs whose own directory cannot be written."""
    return Path(config.checkpoint.spare_dir or tempfile.gettempdir())


def save_to_fallback(
    own: RunDirectory,
    config: Config,
    step: int,
    why: OSError,
    *,
    files: Mapping[str, str | bytes],
    save: Callable[[RunDirectory], None],
) -> InputError:
    """Save a run in a new directory, because its own cannot be written.

    The run's own directory is not touched.

    Args:
        why: what could not be written.
        files: contents of the files of the run directory.
        save: moves the run into a directory, and saves a checkpoint there.

    Returns:
        A message for the user: what failed, and where the run is now.
    """
    reason = f"{why.filename or own.path}: {why.strerror}"
    if not own.config.is_file():
        reason = f"{own.path}: was deleted or moved during training"
    saved = store.read_pointer(own.checkpoints, "latest")
    before = f"{saved} is untouched" if saved else f"{own.checkpoints} holds no checkpoint"
    again = "resumes from there" if saved else "starts from step 0"
    parent = fallback_parent(config)
    made: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = make_folder(parent, f"{config.name}-")
        for name, contents in {"config.yaml": config.to_yaml(), **files}.items():
            write_bytes(made / name, contents if isinstance(contents, bytes) else contents.encode())
        save(RunDirectory(made))
    except OSError as error:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        return InputError(
            f"{reason};\nthe state of step {step} cannot be saved in {parent} either: "
            f"{error.strerror}\n{before}; the same command {again}"
        )
    return InputError(
        f"{reason};\n{before}, and the state of step {step} is in {made}:\n"
        f"{option('out_dir')} {made} resumes from there"
    )


def later_fallback(config: Config, own: Path, step: int) -> Path | None:
    """A directory made by `save_to_fallback` that holds a later state of this run than `step`."""
    for path in fallback_parent(config).glob(f"{config.name}-*"):
        run = RunDirectory(path)
        with contextlib.suppress(InputError, OSError):
            same = run.config.is_file() and not run.read_config().differences(config)
            steps = store.steps(run.checkpoints)
            if same and path != own and max(steps, default=0) > step:
                return path
    return None

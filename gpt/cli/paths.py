"""What a path on the command line holds, if it is of another kind than the command takes.

The error says what the path is, and gives the command that works. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gpt.cli.common import typed
from gpt.config import Config, read_yaml
from gpt.config.shipped import names
from gpt.errors import InputError, closest

Kind = Literal[
    "run",
    "cell",
    "comparison",
    "study",
    "checkpoint",
    "grid",
    "ladder",
    "config",
    "file",
    "folder",
    "nothing",
]
Wanted = Literal["config", "grid", "ladder"]
# What is not a run: its name, and the command that takes it.
NAMES: dict[Kind, tuple[str, str]] = {
    "config": ("config", "train"),
    "comparison": ("comparison", "compare"),
    "study": ("scaling study", "scaling"),
    "grid": ("grid", "compare"),
    "ladder": ("ladder", "scaling"),
}


def kind(path: Path) -> Kind:
    """What a path holds; a `cell` is a run of a comparison or of a scaling study."""
    if (path / "config.yaml").is_file():
        is_cell = path.absolute().parent.name == "cells"
        whole = kind(path.absolute().parents[1]) if is_cell else "nothing"
        return "cell" if whole in ("comparison", "study") else "run"
    if (path / "grid.yaml").is_file():
        from gpt.scaling.ladder import is_study  # here, as few commands need it

        with contextlib.suppress(InputError, OSError):
            return "study" if is_study(read_yaml(path / "grid.yaml")) else "comparison"
        return "comparison"
    if run_of_checkpoint(path) is not None:
        return "checkpoint"
    if path.is_dir():
        return "folder"
    if path.is_file():
        with contextlib.suppress(InputError, OSError):
            keys = set(read_yaml(path))
            if "arms" in keys:
                return "grid"
            if "sizes" in keys:
                return "ladder"
            if keys & set(Config.model_fields):
                return "config"
        return "file"
    return "nothing"


def run_of_checkpoint(path: Path) -> Path | None:
    """The run of the checkpoint that a path is: a step's folder, or a file such as `latest`."""
    if path.absolute().parent.name != "checkpoints":
        return None
    run = path.parents[1] if len(path.parts) > 2 else path.absolute().parents[1]
    is_one = path.is_dir() or (path.name in ("latest", "best") and path.is_file())
    return run if is_one and (run / "config.yaml").is_file() else None


@contextlib.contextmanager
def explained(path: str, prog: str, wanted: Wanted) -> Iterator[None]:
    """A context for reading a config, grid or ladder: says if the path is of another kind.

    Raises:
        InputError: what the path is, and the command that takes it; or the error of reading it.
    """
    try:
        yield
    except InputError:
        answer = (
            _instead_of_config(path, prog)
            if wanted == "config"
            else _instead_of_grid(path, prog, wanted)
        )
        if answer is None:
            raise
        raise InputError(f"{path}: {answer}") from None


def _instead_of_config(path: str, prog: str) -> str | None:
    given = Path(path)
    trains = prog.removesuffix(".py").endswith("train")
    match kind(given):
        case "run" | "cell" | "checkpoint" as found if not trains:
            config = (run_of_checkpoint(given) or given) / "config.yaml"
            what = "checkpoint" if found == "checkpoint" else "run directory"
            return f"is a {what}; to use its config: {prog} {shlex.quote(str(config))}"
        case "run":
            resumed = _command("train", prog, given / "config.yaml", "--out-dir", given)
            sampled = _command("sample", prog, given)
            return f"is a run directory;\nto resume it: {resumed}\nto sample from it: {sampled}"
        case "cell":
            return f"{_is_a_cell(given, prog)};\n{_by_itself(given, prog)}"
        case "checkpoint":
            config = (run_of_checkpoint(given) or given) / "config.yaml"
            started = _command("train", prog, config, "--resume", given, "--out-dir", "runs/NEW")
            return f"is a checkpoint; to start a run from it:\n{started}"
        case "file" | "folder" if kind(given.parent) in ("run", "cell"):
            return f"is a part of the run {given.parent}, not a config"
        case "comparison" | "study" | "grid" | "ladder" as found:
            return _is_a(found, path, prog)
        case "folder" if _runs(given):
            return f"is a folder of runs, such as {_runs(given)[0]}, not a config"
        case "folder":
            trained = _command("train", prog, "own-text", "--data.path", path)
            return f"is a folder, not a regular file; to train on the texts in it:\n{trained}"
        case "nothing":
            return _is_shipped(path, prog, "config")
    return None


def _instead_of_grid(path: str, prog: str, wanted: Literal["grid", "ladder"]) -> str | None:
    given = Path(path)
    match kind(given):
        case "run" | "checkpoint" as found:
            what = {"run": "run directory"}.get(found, found)
            directory = {"grid": "comparison", "ladder": "study"}[wanted]
            sampled = _command("sample", prog, given)
            return f"is a {what}, not a {directory} directory; to sample from it: {sampled}"
        case "cell":
            return _is_a_cell(given, prog)
        case "config":
            return f"is a config, not a {wanted}; to train it: {_train(path, prog)}"
        case "comparison" | "study" | "grid" | "ladder" as found:
            takes = {"grid": "compare", "ladder": "scaling"}[wanted]
            return _is_a(found, path, prog) if NAMES[found][1] != takes else None
        case "nothing":
            return _is_shipped(path, prog, wanted)
    return None


def _is_a(found: Kind, path: str | Path, prog: str) -> str:
    """What a path is, and the command that takes it."""
    name, command = NAMES[found]
    purpose = "run" if found in ("grid", "ladder") else "continue"
    return f"is a {name}; to {purpose} it: {_command(command, prog, path)}"


def _is_shipped(path: str, prog: str, wanted: Wanted) -> str | None:
    """The same for a name that comes with steadygpt, of another kind."""
    kinds: tuple[Wanted, ...] = ("config", "grid", "ladder")
    found = next((each for each in kinds if each != wanted and path in names(each)), None)
    if found is None or path in names(wanted):
        return None
    name, command = NAMES[found]
    purpose = "train" if found == "config" else "run"
    return f"is a shipped {name}; to {purpose} it: {_command(command, prog, path)}"


def check_directory(directory: Path, prog: str, wanted: Literal["comparison", "study"]) -> None:
    """Refuse to write a comparison's report over that of a scaling study, or the reverse.

    Raises:
        InputError: what the directory holds, and the command that takes it.
    """
    found = kind(directory)
    if found in ("comparison", "study") and found != wanted:
        raise InputError(f"{directory}: {_is_a(found, directory, prog)}")


def find_run(path: str, prog: str) -> Path:
    """The run directory that a path names: itself, or the run of a checkpoint.

    Raises:
        InputError: it is something else, or does not exist; the message says what to name instead.
    """
    given = Path(path)
    match kind(given):
        case "run" | "cell":
            return given
        case "checkpoint":
            return run_of_checkpoint(given) or given
        case "comparison" | "study" as found:
            cell = next(iter(_runs(given / "cells")), given / "cells/CELL")
            answer = f"is a {NAMES[found][0]}; each of its cells is a run, such as {cell}"
        case "grid" | "ladder" as found:
            name, command = NAMES[found]
            answer = f"is a {name}, not a run; to run it: {_command(command, prog, path)}"
        case "config" | "file" | "folder" if kind(given.parent) in ("run", "cell"):
            answer = f"is a part of a run; name the run: {given.parent}"
        case "config":
            run = Path("runs") / given.stem
            made = (
                f"its run is {run}" if kind(run) == "run" else f"to train it: {_train(path, prog)}"
            )
            answer = f"is a config, not a run directory; {made}"
        case "file":
            answer = "is a file, not a run directory"
        case "folder":
            inside = next(iter(_runs(given)), None)
            hint = f"; perhaps you meant {inside}" if inside else ""
            answer = f"is not a run (no config.yaml){hint}"
        case _ if given.parent.name == "checkpoints" and kind(given.parents[1]) in ("run", "cell"):
            entries = sorted(each.name for each in given.parent.iterdir())
            saved = [name for name in entries if re.fullmatch(r"step-\d+|latest|best", name)]
            answer = f"no such checkpoint; {given.parent} holds {', '.join(saved) or 'none'}"
        case _:
            known = {each.name: each for folder in ("runs", given.parent) for each in _runs(folder)}
            near = closest(given.name, known)
            hint = f"; perhaps you meant {known[near]}" if near else ""
            if near is None and path in names("config"):
                hint = f"; it is a shipped config; to train it: {_train(path, prog)}"
            answer = f"no such directory{hint}"
    raise InputError(f"{path}: {answer}")


def find_checkpoint(path: str, checkpoint: str | None, prog: str) -> tuple[Path, str]:
    """The run that a path names, and which of its checkpoints: that of the path, if it is one.

    Args:
        checkpoint: the value of --checkpoint; None if it was not given, which means best.

    Raises:
        InputError: the path is not a run, or is a cell without checkpoints.
    """
    run = find_run(path, prog)
    if kind(run) == "cell" and not (run / "checkpoints").is_dir():
        raise InputError(
            f"{run}: is a run of a {NAMES[kind(_whole(run))][0]}, which keeps checkpoints only "
            f"with keep_checkpoints: true;\n{_by_itself(run, prog)}"
        )
    if run == Path(path):
        return run, checkpoint or "best"
    if checkpoint is not None:
        raise InputError(f"--checkpoint: {path} is already a checkpoint")
    return run, path


def _is_a_cell(cell: Path, prog: str) -> str:
    """What a cell is, and the command that takes the directory it belongs to."""
    whole = _whole(cell)
    name, command = NAMES[kind(whole)]
    return f"is a run of a {name}; to continue the {name}: {_command(command, prog, whole)}"


def _whole(cell: Path) -> Path:
    """The comparison or study that a cell belongs to."""
    return cell.parents[1] if len(cell.parts) > 2 else cell.absolute().parents[1]


def _by_itself(cell: Path, prog: str) -> str:
    config, out = cell / "config.yaml", f"runs/{cell.absolute().name}"
    return f"to train it by itself: {_command('train', prog, config, '--out-dir', out)}"


def _runs(folder: str | Path) -> list[Path]:
    """The run directories in a folder, sorted."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL character
        return sorted(path for path in Path(folder).iterdir() if (path / "config.yaml").is_file())
    return []


def _train(config: str, prog: str) -> str:
    return _command("train", prog, config)


def _command(name: str, prog: str, *arguments: object) -> str:
    return shlex.join([*typed(name, prog), *map(str, arguments)])

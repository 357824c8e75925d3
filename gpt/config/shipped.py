"""The configs, grids and ladders that come with steadygpt, found by name from any folder.

`steadygpt train quickstart`, `load("quickstart")` and `base: quickstart` all mean
`configs/quickstart.yaml`; `steadygpt compare quick` means `configs/compare/quick.yaml`. Grids
from the literature are `literature/xiong2020` and so on; the ladders of scaling studies are in
`configs/scaling/`. There is one set of files: `configs/` at the top of the repository, which the
wheel holds as `gpt/configs/`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from functools import partial
from pathlib import Path
from typing import Literal

from gpt.errors import InputError, closest
from gpt.io.wait import TIMEOUT, wait_for


def _configs() -> Path:
    """The folder of configs: inside an installed package, next to it in a clone."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


FOLDERS = {
    "config": _configs(),
    "grid": _configs() / "compare",
    "ladder": _configs() / "scaling",
}
PATTERNS = {"config": "*.yaml", "grid": "**/*.yaml", "ladder": "*.yaml"}
Kind = Literal["config", "grid", "ladder"]


def names(kind: Kind) -> list[str]:
    """The names of all configs, grids or ladders that come with steadygpt, sorted."""
    folder = FOLDERS[kind]
    paths = folder.glob(PATTERNS[kind])
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in paths)


def find(name: str | Path, kind: Kind, start: Path = Path()) -> Path:
    """The YAML file that `name` means: a path if there is a file, or else a name from `names`.

    Args:
        name: a path, or the name of a config, grid or ladder that comes with steadygpt.
        start: the folder that a relative path starts from.

    Raises:
        InputError: there is no such file and no such name, or `start` holds another file that may
            be meant, NAME.yaml.
    """
    name, path = str(name), start / name
    known = name in names(kind)
    try:
        is_folder = stat.S_ISDIR(wait_for(partial(os.stat, path), TIMEOUT).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL character
        if not known:
            raise InputError(_missing(name, kind, start)) from None
    except OSError:
        return path  # reading it reports the error
    else:
        if not (is_folder and known):
            return path
    shipped, local = FOLDERS[kind] / f"{name}.yaml", start / f"{name}.yaml"
    if local.exists() and not local.samefile(shipped):
        raise InputError(
            f"{name}: is a shipped {kind}, and {local} exists too;\n"
            f"specify {name}.yaml to use that file, or rename it to use the shipped {kind}"
        )
    return shipped


def _missing(name: str, kind: Kind, start: Path) -> str:
    known = {each: each for each in names(kind)}
    local: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL character
        for folder in (Path(name).parent, Path("configs"), Path("configs/compare")):
            files = sorted((start / folder).glob("*.y*ml"))
            local = {path.stem: str(folder / path.name) for path in files} | local
    # a name without a suffix is more likely that of a shipped one
    found = {**local, **known} if Path(name).suffix == "" else {**known, **local}
    near = closest(Path(name).stem, found)
    hint = "" if near is None else f"; perhaps you meant {found[near]}"
    return (
        f"{name}: no such file (looked in {start.absolute()}), and no shipped {kind} has that name"
        f"{hint}\nshipped {kind}s: {', '.join(known)}"
    )

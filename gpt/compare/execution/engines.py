"""The engines, by the names that `--engine` accepts."""

from __future__ import annotations

from gpt.compare.execution.engine import Engine
from gpt.compare.execution.local import Local
from gpt.compare.execution.ray import Ray
from gpt.compare.execution.slurm import Slurm

ENGINES: dict[str, type[Engine]] = {
    "local": Local,
    "ray": Ray,
    "slurm": Slurm,
}

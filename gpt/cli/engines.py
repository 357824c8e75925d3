"""The engine that the flags of a command choose; see gpt/compare/execution/engines.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt.errors import InputError, as_flag
from gpt.tracking import is_installed

if TYPE_CHECKING:
    from gpt.cli.compare import CellArguments
    from gpt.compare.execution.engine import Engine

FLAGS = {"ray": ("address", "cpus_per_task", "gpus_per_task"), "slurm": ("sbatch",)}
PACKAGES = {"ray": "ray", "slurm": "submitit"}  # that an engine needs; the extra has its name


def check_engine(arguments: CellArguments) -> None:
    """Check the flags of engines, without importing torch.

    Raises:
        InputError: a flag belongs to another engine, or the package of this one is missing.
    """
    engine = arguments.engine
    for owner, flags in FLAGS.items():
        for flag in flags if owner != engine else ():
            if getattr(arguments, flag) not in (None, ()):
                raise InputError(f"{as_flag(flag)}: belongs to --engine {owner}, not to {engine}")
    for flag in ("cpus_per_task", "gpus_per_task"):
        number = getattr(arguments, flag)
        if number is not None and number > 1 and not float(number).is_integer():
            raise InputError(f"{as_flag(flag)}: {number:g} is above 1 and not a whole number")
    if arguments.cpus_per_task == 0 and not arguments.gpus_per_task:
        raise InputError("--cpus-per-task: 0 needs --gpus-per-task, or nothing limits the tasks")
    package = PACKAGES.get(engine)
    if package is not None and not is_installed(package):
        raise InputError(
            f"--engine {engine}: {package} is not installed: pip install 'steadygpt[{engine}]'"
        )


def make_engine(arguments: CellArguments) -> Engine:
    """The engine, with its flags."""
    from gpt.compare.execution.engines import ENGINES

    engine = arguments.engine
    return ENGINES[engine](**{flag: getattr(arguments, flag) for flag in FLAGS.get(engine, ())})

"""The arguments of the commands that train many cells, and the engine that they choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from gpt.config import Choice, FileName, Resource, Seconds, Section, Texts, WorkerCount
from gpt.errors import InputError, as_flag
from gpt.tracking import is_installed

if TYPE_CHECKING:
    from gpt.compare.execution.engine import Engine

FLAGS = {"ray": ("address", "cpus_per_task", "gpus_per_task"), "slurm": ("sbatch",)}
PACKAGES = {"ray": "ray", "slurm": "submitit"}  # of engines; the extra has the engine's name


class CellArguments(Section):
    """The arguments of commands that train many cells: `compare` and `scaling`."""

    out_dir: FileName | None = Field(None, title="DIR")
    """The directory to write (default: runs/NAME)."""
    workers: WorkerCount | None = Field(None, title="INT")
    """Number of processes, with one thread each on a CPU (default: one per core, at most 8 on a
    GPU). With other engines, how many tasks run at once (default: as many as fit)."""
    engine: Annotated[str, Choice("gpt.compare.execution.engines", "ENGINES")] = "local"
    """Where the cells run: in processes on this machine, on a Ray cluster, or as array jobs of
    Slurm; the results are the same."""
    address: str | None = Field(None, title="auto|HOST:PORT")
    """ray: the cluster (default: one of this machine alone, which is started)."""
    cpus_per_task: Resource | None = None
    """ray: the CPUs that a task occupies, such as 0.5 (default: 1)."""
    gpus_per_task: Resource | None = None
    """ray: the GPUs that a task occupies (default, if cells train on GPUs: 1 for a batch, else
    0.125)."""
    sbatch: Texts = Field((), title="NAME=VALUE")
    """slurm: options of sbatch, such as time=4:00:00 partition=gpu gpus-per-task=1; the time limit
    is needed."""
    dry_run: bool = False
    """List the runs and their total tokens, FLOPs and time, and write nothing."""
    report_only: bool = False
    """Rewrite the report from the existing runs."""
    seeds: str | None = Field(None, title="SEEDS")
    """Seeds instead of the file's: 8 means 0 to 7, 16:24 means 16 to 23, 1,5,7 means these."""
    max_seconds: Seconds | None = Field(None, title="SECONDS")
    """Save and exit with code 75 after this time, for batch queues (default: no limit)."""

    def check_report_only(self, *others: str) -> None:
        """Refuse flags that --report-only would ignore.

        Raises:
            InputError: names the first one.
        """
        for name in others if self.report_only else ():
            if getattr(self, name):
                raise InputError(f"give {as_flag(name)} or --report-only, not both")

    def check_engine(self) -> None:
        """Check the engine and its flags, without importing torch.

        Raises:
            InputError: a flag belongs to another engine, or a package is missing.
        """
        engine = self.engine
        for owner, flags in FLAGS.items():
            for flag in flags if owner != engine else ():
                if getattr(self, flag) not in (None, ()):
                    raise InputError(
                        f"{as_flag(flag)}: belongs to --engine {owner}, not to {engine}"
                    )
        for flag in ("cpus_per_task", "gpus_per_task"):
            number = getattr(self, flag)
            if number is not None and number > 1 and not float(number).is_integer():
                raise InputError(f"{as_flag(flag)}: {number:g} is above 1 and not a whole number")
        if self.cpus_per_task == 0 and not self.gpus_per_task:
            raise InputError(
                "--cpus-per-task: 0 needs --gpus-per-task, or nothing limits the tasks"
            )
        package = PACKAGES.get(engine)
        if package is not None and not is_installed(package):
            raise InputError(
                f"--engine {engine}: {package} is not installed: pip install 'steadygpt[{engine}]'"
            )

    def make_engine(self) -> Engine:
        """The engine, with its flags."""
        from gpt.compare.execution.engines import ENGINES

        flags = FLAGS.get(self.engine, ())
        return ENGINES[self.engine](**{flag: getattr(self, flag) for flag in flags})

"""The engine `slurm`: array jobs, one element for each task, submitted with submitit.

    DIR/cluster/jobs.json   {job: [cell, ...]}: the elements that were submitted
    DIR/cluster/ended/CELL  how a task ended; named after its first cell
    DIR/cluster/slurm/      submitit's folder: scripts, pickled tasks, and the logs of the elements

Before its time limit, and before it is preempted, Slurm sends an element SIGUSR2 (its `--signal`):
the element saves its cells and is requeued. SIGTERM, which also announces the end of a canceled
job, saves them and ends the element with exit code 75. Slurm itself requeues an element whose node
has failed; its cells resume from their last save.

The process that submits then waits. If it is stopped, the elements continue; started again, it
waits for those that are queued or running, and submits only the rest.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import gpt
from gpt.compare.execution import remote
from gpt.compare.execution.cell_runs import CellError, has_result
from gpt.compare.execution.engine import Engine, Work
from gpt.compare.execution.tasks import Task
from gpt.compare.grid import Cell
from gpt.errors import InputError, StoppedError
from gpt.io.children import blocked
from gpt.io.files import read_json, write_text

if TYPE_CHECKING:
    import submitit

JOBS = "jobs.json"
SUBMITTING = "submitting"  # in it, in place of a job, while sbatch runs
COMMANDS = ("sbatch", "squeue", "srun", "scontrol")  # of Slurm
OURS = (  # options of sbatch that this module sets, or on which it relies
    *("array", "output", "error", "open_mode", "parsable"),
    *("nodes", "ntasks", "ntasks_per_node", "tasks_per_node", "ntasks_per_gpu"),
)
MOST_ELEMENTS = 1000  # of an array; Slurm's default limit (MaxArraySize)
WARNING = 90  # seconds before the time limit, by default, at which Slurm sends SIGUSR2
MOST_REQUEUES = 1000  # of an element, at its time limit; preemptions do not count
SECONDS_BETWEEN_POLLS = 2.0  # of the files
SECONDS_BETWEEN_QUERIES = 30.0  # of the queue; an element absent from two in a row has ended


@dataclass(frozen=True)
class Slurm(Engine):
    """Array jobs of Slurm.

    Attributes:
        sbatch: options of sbatch, as NAME=VALUE or NAME; `time` is required.
    """

    sbatch: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        missing = [name for name in COMMANDS if shutil.which(name) is None]
        if missing:
            raise InputError(
                f"--engine slurm: {' and '.join(missing)} cannot be found; start it where the "
                "commands of Slurm are, such as a login node"
            )
        self._options()
        return self

    def _options(self) -> dict[str, Any]:
        """The options of sbatch, by submitit's names.

        Raises:
            InputError: one has another form, is set here, or there is no time limit.
        """
        options: dict[str, Any] = {}
        for text in self.sbatch:
            name, equals, value = text.lstrip("-").partition("=")
            name = name.replace("-", "_")
            if not re.fullmatch(r"[a-z]\w+", name) or (equals and not value):
                raise InputError(f"--sbatch: {text!r} is not NAME=VALUE, such as partition=gpu")
            if name in OURS:
                raise InputError(f"--sbatch: {text}: {name.replace('_', '-')} cannot be changed")
            options[name] = value if equals else True
        if "time" not in options:
            raise InputError(
                "--engine slurm: needs the time limit of a task, such as --sbatch time=4:00:00; "
                "tasks that take longer are saved and requeued"
            )
        warning = re.fullmatch(r"USR2@(\d+)", str(options.get("signal", f"USR2@{WARNING}")))
        if warning is None:
            raise InputError(f"--sbatch: signal={options['signal']} is not USR2@SECONDS")
        minutes, seconds = _minutes(str(options["time"])), int(warning[1])
        if 60 * minutes < 2 * seconds:
            raise InputError(
                f"--sbatch: time={options['time']} is too short: tasks are saved {seconds} seconds "
                f"before their time limit; allow at least {math.ceil(seconds / 30)} minutes"
            )
        return {**options, "time": minutes}

    def _executor(self, directory: Path, tasks: int, workers: int) -> submitit.SlurmExecutor:
        """What submits an array, of those that `tasks` tasks need."""
        import submitit

        arrays = math.ceil(tasks / MOST_ELEMENTS)
        options = self._options()
        root = Path(gpt.__file__).parents[1]
        path = f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}"
        executor = submitit.SlurmExecutor(
            directory.absolute() / remote.FOLDER / "slurm", MOST_REQUEUES
        )
        executor.update_parameters(
            job_name="steadygpt",
            time=options.pop("time"),
            array_parallelism=max(1, workers // arrays),
            signal_delay_s=WARNING,
            setup=[] if root.name == "site-packages" else [path],
            additional_parameters={"requeue": True, **options},
        )
        return executor

    def workers(self, cells: Sequence[Cell], wanted: int | None) -> int:
        """By default, at most as many tasks as an array may have; see `Engine.workers`."""
        return wanted or min(len(cells), MOST_ELEMENTS)

    def preview(self, tasks: Sequence[Task], directory: Path, workers: int) -> str:
        """The script of the first array job."""
        executor = self._executor(directory, len(tasks), workers)
        if len(tasks) > 1:
            executor.parameters["map_count"] = min(len(tasks), MOST_ELEMENTS)
        # submitit's own submission calls these two; it has no public way to see the script first
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def run(self, work: Work) -> bool:
        threads = str(self._options().get("cpus_per_task", 1))
        session = remote.begin(
            work.directory,
            keep_checkpoints=work.keep_checkpoints,
            threads=int(threads) if threads.isdecimal() else 1,
            attended=False,
        )
        queue = _Queue(session)
        waiting, rest = queue.split(work.tasks)
        if waiting:
            work.say(f"in Slurm already: {_count(waiting)}")
        failed = False
        while waiting or rest:
            rest = self._submit(work, session, rest, queue, waiting)
            failed |= _wait(work, session, queue, waiting)
            while rest and not queue.is_clear():
                if work.stop():
                    raise StoppedError(
                        f"stopped with {_count(rest)} not submitted;\nthe same command submits them"
                    )
                time.sleep(SECONDS_BETWEEN_POLLS)
        if failed:  # the logs may say more
            session.stop()
            queue.clear()
        else:
            session.close()
        return True

    def _submit(
        self,
        work: Work,
        session: remote.Session,
        tasks: list[Task],
        queue: _Queue,
        waiting: dict[str, Waiting],
    ) -> list[Task]:
        """Submit tasks as array jobs, and add them to `waiting` by the ids of their elements.

        Returns:
            Those that sbatch refused while others wait.

        Raises:
            InputError: sbatch refuses them and none waits, or its answer is not understood.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        for first in range(0, len(tasks), MOST_ELEMENTS):
            array = tasks[first : first + MOST_ELEMENTS]
            executor = self._executor(work.directory, len(tasks), work.workers)
            elements = [Element(session, task) for task in array]
            queue.write({**queue.jobs, SUBMITTING: [task.name for task in array]})
            try:
                with blocked(signal.SIGINT), executor.batch():  # a terminal also sends it to sbatch
                    jobs = [executor.submit(element) for element in elements]
            except FailedSubmissionError as error:  # the job may run
                raise InputError(str(error).splitlines()[0]) from None
            except FailedJobError as error:
                queue.write(queue.jobs)
                reason = (str(error).strip() or "sbatch failed without a message").splitlines()[-1]
                if not waiting:
                    raise InputError(reason) from None
                rest = tasks[first:]
                work.say(f"{reason}: {_count(rest)} will be submitted when the others have ended")
                return rest
            for path in executor.folder.iterdir():
                if path.is_symlink():  # submitit's, to the script; comparisons have no links
                    path.unlink()
            ids = [job.job_id for job in jobs]
            queue.add(ids, array)
            waiting |= {i: Waiting(t.name, t) for i, t in zip(ids, array, strict=True)}
            work.say(f"submitted {_count(array)} as Slurm job {ids[0].partition('_')[0]}")
        return []


def _wait(work: Work, session: remote.Session, queue: _Queue, waiting: dict[str, Waiting]) -> bool:
    """Wait until all elements have ended; returns whether a cell had an error.

    Raises:
        InputError: a node could not run a task.
        StoppedError: see `Engine.run`.
    """
    updates: dict[str, int] = {}
    failed = False
    while waiting:
        lost = queue.lost()  # before the endings are listed, or one that has just ended seems lost
        ended, begun = remote.names(session.folder / remote.ENDED), session.begun()
        for job, (name, task) in list(waiting.items()):
            if work.stop():  # sacct may take long
                break
            if name in begun:
                updates |= session.updates(name)
            if name not in ended and job not in lost:
                continue
            del waiting[job]
            try:
                if name in ended:
                    errors = _read_ending(session, name)
                else:
                    errors = _killed(session, job, name, task)
            except InputError as error:
                others = f";\n{_still(waiting)}" if waiting else ""
                raise InputError(f"{error}{others}") from None
            work.record(task, [errors.get(cell.id) for cell in task.cells])
            failed = failed or bool(errors)
            session.forget(name)
            _ending(session, name).unlink(missing_ok=True)
        work.progress(updates)
        if waiting and work.stop():
            raise StoppedError(f"stopped waiting: {_still(waiting)};\nthe same command waits again")
        if waiting:
            time.sleep(SECONDS_BETWEEN_POLLS)
    return failed


def _still(waiting: Mapping[str, Waiting]) -> str:
    """How many tasks are in Slurm, and what ends them."""
    arrays = " ".join(sorted({job.partition("_")[0] for job in waiting}))
    verb, them = ("is", "it") if len(waiting) == 1 else ("are", "them")
    return (
        f"{_count(waiting)} {verb} still queued or running in Slurm (scancel {arrays} ends {them})"
    )


def _count(tasks: Sized) -> str:
    return f"{len(tasks)} task{'' if len(tasks) == 1 else 's'}"


# ---------------------------------------------------------------------------------------------
# An element of an array job


@dataclass(frozen=True)
class Element:
    """A task that submitit runs on a node, and requeues with `checkpoint`."""

    session: remote.Session
    task: Task

    def __call__(self) -> None:
        """Train the task; write how it ended, or save it and be requeued."""
        received: list[int] = []

        def receive(number: int, frame: FrameType | None) -> None:
            received.append(number)

        requeue = signal.signal(signal.SIGUSR2, receive)
        signal.signal(signal.SIGTERM, receive)
        cells, directory = self.task.cells, self.session.directory
        ending = Ending()
        try:
            errors = self.session.train(self.task, stop=lambda: bool(received))
            ending.errors = {c.id: e for c, e in zip(cells, errors, strict=True) if e is not None}
        except InputError as error:
            ending.refused = str(error)
        signal.signal(signal.SIGUSR2, requeue)
        has_ended = all(cell.id in ending.errors or has_result(directory, cell) for cell in cells)
        if received and not has_ended and not ending.refused:
            if received[0] == signal.SIGTERM:  # it also follows SIGUSR2, at the time limit itself
                sys.exit(75)
            signal.raise_signal(signal.SIGUSR2)  # submitit requeues the element, and exits
        path = _ending(self.session, self.task.name)
        write_text(path, json.dumps(asdict(ending)) + "\n")
        sys.exit()  # submitit would write a result, into a folder that may be deleted by now

    def checkpoint(self) -> Any:
        """What submitit runs when the element is requeued: the same, as its cells are saved."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class Ending:
    """How a task ended: the errors of cells, by their ids, or why the node did not run it."""

    errors: dict[str, CellError] = field(default_factory=dict)
    refused: str | None = None


def _ending(session: remote.Session, name: str) -> Path:
    return session.folder / remote.ENDED / name


def _read_ending(session: remote.Session, name: str) -> dict[str, CellError]:
    """The errors of the cells of a task that has ended, by their ids.

    Raises:
        InputError: the node could not run it.
    """
    ending = read_json(_ending(session, name), Ending, "delete it")
    if ending.refused is not None:
        raise InputError(ending.refused)
    return ending.errors


# ---------------------------------------------------------------------------------------------
# The queue


class Waiting(NamedTuple):
    """A submitted task: the name of its files, and the cells of it that have no result yet."""

    name: str
    task: Task


class _Queue:
    """The elements that were submitted, and which of them are queued or running."""

    def __init__(self, session: remote.Session) -> None:
        self.session, self.path = session, session.folder / JOBS
        self.jobs = read_jobs(session.directory)
        self.absent: set[str] = set()  # elements that the last query did not find
        self.twice: set[str] = set()  # nor the one before
        self.next = time.monotonic() + SECONDS_BETWEEN_QUERIES

    def split(self, tasks: Sequence[Task]) -> tuple[dict[str, Waiting], list[Task]]:
        """What is still in the queue, or has ended unnoticed; and the tasks of all other cells.

        A task that a node could not run counts among the others.

        Raises:
            InputError: squeue does not answer, or a submission was cut off.
        """
        if SUBMITTING in self.jobs:
            raise InputError(
                f"{self.session.directory}: a submission to Slurm was cut off: cancel its job if\n"
                f"`squeue --me --name=steadygpt` shows one, and delete {self.path}"
            )
        ended = remote.names(self.session.folder / remote.ENDED)
        for name in ended & {ids[0] for ids in self.jobs.values()}:
            path = _ending(self.session, name)
            if read_json(path, Ending, "delete it").refused is not None:
                self.jobs = {job: ids for job, ids in self.jobs.items() if ids[0] != name}
                path.unlink()
        queued = _query() if self.jobs else set()
        if queued is None:
            raise InputError("squeue does not answer; try again later")
        cells = {cell.id: (cell, task.batched) for task in tasks for cell in task.cells}
        waiting: dict[str, Waiting] = {}
        for job, ids in self.jobs.items():
            if job in queued or ids[0] in ended:
                found = [cells.pop(name) for name in ids if name in cells]
                if found:
                    task = Task(tuple(cell for cell, _ in found), found[0][1])
                    waiting[job] = Waiting(ids[0], task)
        rest = [
            replace(task, cells=tuple(cell for cell in task.cells if cell.id in cells))
            for task in tasks
        ]
        return waiting, [task for task in rest if task.cells]

    def add(self, jobs: Sequence[str], tasks: Sequence[Task]) -> None:
        """Remember elements that have been submitted."""
        for job, task in zip(jobs, tasks, strict=True):
            self.jobs[job] = [cell.id for cell in task.cells]
        self.write(self.jobs)

    def write(self, jobs: Mapping[str, Sequence[str]]) -> None:
        """Write the file."""
        write_text(self.path, json.dumps(jobs, indent=1) + "\n")

    def lost(self) -> set[str]:
        """The elements that were absent from the queue twice."""
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + SECONDS_BETWEEN_QUERIES
            queued = _query()
            if queued is not None:
                absent = self.jobs.keys() - queued
                self.absent, self.twice = absent, absent & self.absent
        return self.twice

    def is_clear(self) -> bool:
        """Whether Slurm counts none of the elements any more; it needs a moment after their end."""
        queued = _query()
        return queued is not None and not self.jobs.keys() & queued

    def clear(self) -> None:
        """Forget all elements, as they have ended."""
        self.path.unlink(missing_ok=True)


def read_jobs(directory: Path) -> dict[str, list[str]]:
    """The elements that were submitted and may not have ended, with the ids of their cells.

    Raises:
        InputError: the file is damaged.
    """
    path = directory / remote.FOLDER / JOBS
    return read_json(path, dict[str, list[str]]) if path.is_file() else {}


def _query() -> set[str] | None:
    """The user's elements that are queued or running; None if Slurm does not answer."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(done.stdout.split())


def _killed(session: remote.Session, job: str, name: str, task: Task) -> dict[str, CellError]:
    """The errors of the cells of an element that ended without an answer.

    Raises:
        InputError: it ended before it began to train.
    """
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State,NodeList"]
    try:  # many clusters have no job accounting
        done = subprocess.run(
            [*command, f"--jobs={job}"], capture_output=True, text=True, timeout=60
        )
        state = done.stdout.strip().replace("|", " on ")
    except (OSError, subprocess.SubprocessError):
        state = ""
    ended = f"Slurm's job {job} ended early{state and f' ({state})'}"
    logs = session.folder / "slurm" / f"{job}_0_log.err"
    if name not in session.begun():
        raise InputError(
            f"{ended}, before it began: its node may not see {session.directory},\n"
            f"or it was canceled; see {logs}"
        )
    return {cell.id: CellError("killed", f"{ended}; see {logs}") for cell in task.cells}


def _minutes(text: str) -> int:
    """A time limit as sbatch takes it, such as 90, 4:00:00 or 2-12, in minutes.

    Raises:
        InputError: it is something else.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise InputError(
            f"--sbatch: time={text} is not a time limit such as 90 (minutes), 4:00:00 or 2-12 "
            "(days-hours)"
        )
    days, dash, rest = text.rpartition("-")
    parts = list(map(int, rest.split(":")))
    from_hours = parts if dash or len(parts) == 3 else [0, *parts]
    hours, minutes, seconds = [*from_hours, 0, 0][:3]
    return max(1, 1440 * int(days or 0) + 60 * hours + minutes + math.ceil(seconds / 60))

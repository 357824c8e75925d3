"""Does a run survive? `python benchmarks/reliability.py kills|stages|damage|processes|soak|all`.

    kills     SIGKILL at random moments to a real `train.py`; the same command then resumes
    stages    SIGKILL at every stage of a short run, especially saves, by fault injection
    damage    checkpoint files truncated, lengthened, deleted, swapped, or with a flipped bit
    processes SIGKILL to one of two processes at each stage (benchmarks/faulty.py); all restart
    soak      a long run of a tiny model: whether memory, speed and files stay constant

Whatever is done to it, a run must end like the undisturbed one: checkpoints, metrics and samples
equal to the last bit (clock times aside), and the same files, none left over. After every kill, all
folders `step-...` must be complete and metrics.jsonl readable. Exits 1 if anything failed; with
--out-dir, what failed is kept.

A stage is a change to the run directory (a file opened for writing, a rename, a removal ...), seen
by an audit hook just before it happens, or a flush. At a flush, the process dies once before it,
and once after losing half of the data not yet flushed, as in a power cut; while writing tensors or
metrics, it also dies half-way. Linux only: it forks, and reads the names of open files from /proc.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from unittest import mock

import psutil
import torch
import yaml
from matplotlib.figure import Figure
from safetensors.torch import save_file

import gpt.training
from gpt import checkpoint as checkpoints
from gpt import metrics
from gpt.cli.common import EXIT_CODES
from gpt.config import load
from gpt.errors import InputError

ROOT = Path(__file__).parents[1]
VERSE = "The quick brown fox jumps over the lazy dog, {} times; then it sleeps.\n"
LOG_TIMES = ("tokens_per_second", "step_seconds", "mfu")  # what no two runs share
PROGRESS_TIMES = ("seconds", "update_seconds")
RESULT_TIMES = ("seconds", "tokens_per_second")

KILLS_A_RUN = 10
STEPS_A_KILL = 30
MEMORY, SPEED = 0.02, 0.2  # relative changes allowed in a soak; a shared machine's speed varies


class Outcome(NamedTuple):
    """A row of the table."""

    name: str
    passed: int
    tried: int
    how: str  # survived, detected ...
    seconds: float

    def __str__(self) -> str:
        return f"{self.name} {self.passed} of {self.tried} {self.how}"


# ---------------------------------------------------------------------------------------------
# The run that is disturbed, and what must come out of it


def write_config(folder: Path, **options: Any) -> Path:
    """A config of a tiny run and its corpus, below `folder`; `options` overrides its sections."""
    (folder / "corpus").mkdir(parents=True)
    for index in range(40):
        text = VERSE.format(index) * (index % 5 + 2)
        (folder / f"corpus/{index:02}.txt").write_text(text)
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "source": "text",
            "path": [str(folder / "corpus")],
            "tokenizer": "bytes",
            "val_fraction": 0.2,
            "cache_dir": "cache",  # in the working directory
        },
        "model": {"layers": 2, "heads": 2, "width": 16, "context": 16, "dropout": 0.1},
        "schedule": {"warmup_steps": 5},
        "training": {"batch_sequences": 4, "device": "cpu"},
        "evaluation": {"every": 5, "sequences": 8},
        "diagnostics": {"every": 7},
        "sampling": {"tokens": 8},
        "checkpoint": {"every": 3},
    }
    for section, changes in options.items():
        tree[section] = {**tree.get(section, {}), **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def differences(run: Path, undisturbed: Path, lost: Iterable[str] = ()) -> list[str]:
    """How a finished run differs from the undisturbed one, including left-over files.

    Args:
        lost: checkpoints that may be missing, in whose place older ones are kept for longer.
    """
    names, expected = set(_files(run)), set(_files(undisturbed))
    missing = [name for name in sorted(expected - names) if not set(Path(name).parts) & set(lost)]
    found = [f"{name} is missing" for name in missing]
    known = expected | {str(parent) for name in expected for parent in Path(name).parents}
    extra = {_first_outside(name, known) for name in names - expected}
    if lost:
        extra = {name for name in extra if not name.startswith("checkpoints/step-")}
    found += [f"{name} is left over" for name in sorted(extra)]
    for name in sorted(names & expected):
        try:
            if _content(run / name) != _content(undisturbed / name):
                found.append(f"{name} differs")
        except (InputError, ValueError, KeyError, AttributeError):
            found.append(f"{name} is damaged")
    return found + torn(run)


def _files(run: Path) -> Iterator[str]:
    """Names of all files and empty folders, except those that only disturbances leave."""
    for path in run.rglob("*"):
        parts = path.relative_to(run).parts
        by_design = path.name.endswith(".lock") or path.name == "history.jsonl"
        by_design |= any(part.startswith("damaged-") for part in parts)
        if not by_design and (path.is_file() or not any(path.iterdir())):
            yield "/".join(parts)


def _first_outside(name: str, known: set[str]) -> str:
    """The file `name`, or the outermost of its parent folders that is not `known`."""
    places = itertools.accumulate(Path(name).parts, lambda place, part: f"{place}/{part}")
    return next(place for place in places if place not in known)


def _content(path: Path) -> object:
    """What a file must have in common with the undisturbed run's."""
    if path.name == "metrics.jsonl":
        return [_without(record, LOG_TIMES) for record in metrics.read(path)]
    if path.name == "result.json":
        return _without(json.loads(path.read_text("utf-8")), RESULT_TIMES)
    if path.name == "state.json":
        state = json.loads(path.read_text("utf-8"))
        return {**state, "progress": _without(state["progress"], PROGRESS_TIMES)}
    if path.name in ("manifest.json", "environment.json", "loss.png", "layers.png"):
        return None  # they depend on clock times; `torn` verifies manifests
    return path.read_bytes()


def _without(record: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}


def torn(run: Path) -> list[str]:
    """Files and folders of a killed run that are incomplete although their names say otherwise."""
    found = []
    for pointer in ("latest", "best"):
        path = run / "checkpoints" / pointer
        if path.exists() and checkpoints.read_pointer(path.parent, pointer) is None:
            found.append(f"{path}: names no checkpoint")
    for folder in checkpoints.steps(run / "checkpoints").values():
        try:
            checkpoints.verify(folder)
        except InputError as error:
            found.append(str(error))
    try:
        metrics.read(run / "metrics.jsonl")
    except InputError as error:
        found.append(str(error))
    return found


# ---------------------------------------------------------------------------------------------
# A forked process that dies at a chosen stage


def warm_up() -> None:
    """One thread for each child, and no pictures, which take half of a short run."""
    torch.set_num_threads(1)
    mock.patch.object(Figure, "savefig", _empty_picture).start()


def _empty_picture(figure: Figure, file: BinaryIO, **options: Any) -> None:
    """In place of drawing."""


def train_forked(config: Path, run: Path, fault: Fault | None = None) -> tuple[int, str]:
    """Train in a child, as `train.py` does; returns its exit code and its stderr."""
    log = run.with_suffix(".log")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(config.parent)
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            if fault is not None:
                fault.install()
            code = EXIT_CODES[gpt.training.train(load(config), run).status]
        except InputError as error:
            print(error, file=sys.stderr)
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text("utf-8", "replace")


CHANGES = {  # audit event -> how many of its first arguments are paths; folder handles come last
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.chmod": 1,
    "os.rename": 2,
    "os.truncate": 1,
}
STAGE = "stage: "


class Fault:
    """Prints each stage of a process's changes to `folder` on stderr, and kills it at stage `at`.

    Args:
        at: from 1; 0 never kills.
    """

    def __init__(self, folder: Path, at: int = 0) -> None:
        self.folder, self.at = str(folder), at
        self.numbers = itertools.count(1)  # `next` is atomic: no two threads get the same
        self.flushed: dict[int, int] = {}  # bytes by inode, which a rename does not change

    def install(self) -> None:
        """Install the hooks, in the process that is to die."""
        fsync, write = os.fsync, metrics.MetricsLog.write

        def flush(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").resolve()
            if self._ours(path):
                self._stage(f"flush {path}")
                stat = os.fstat(handle)
                if path.is_file():
                    half = (self.flushed.get(stat.st_ino, 0) + stat.st_size) // 2
                    self._stage(f"flush half of {path}", lambda: os.truncate(path, half))
                    self.flushed[stat.st_ino] = stat.st_size
            fsync(handle)

        def save(
            tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None
        ) -> None:
            def half() -> None:
                save_file(tensors, path, metadata)
                os.truncate(path, path.stat().st_size // 2)

            self._stage(f"write {path}")
            self._stage(f"write half of {path}", half)
            save_file(tensors, path, metadata)

        def append(log: metrics.MetricsLog, records: Iterable[metrics.Record]) -> None:
            records, path = list(records), Path(self.folder) / "metrics.jsonl"
            before = path.stat().st_size

            def half() -> None:
                write(log, records)
                os.truncate(path, (before + path.stat().st_size) // 2)

            self._stage(f"append to {path}")
            self._stage(f"append half to {path}", half)
            write(log, records)

        mock.patch.object(os, "fsync", flush).start()
        mock.patch.object(checkpoints.store, "save_file", save).start()
        mock.patch.object(metrics.MetricsLog, "write", append).start()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        paths: list[Path] = []
        if event == "open" and isinstance(arguments[0], str | bytes):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                paths = [Path.cwd() / os.fsdecode(arguments[0])]
        elif event in CHANGES:
            number = CHANGES[event]
            for path, handle in zip(arguments, (*arguments[-number:], -1), strict=False):
                if isinstance(path, str | bytes | os.PathLike) and len(paths) < number:
                    within = isinstance(handle, int) and handle >= 0 and event != "os.chmod"
                    base = Path(f"/proc/self/fd/{handle}").resolve() if within else Path.cwd()
                    paths.append(base / os.fsdecode(path))
        if any(map(self._ours, paths)):
            self._stage(" ".join([event.removeprefix("os."), *map(str, paths)]))

    def _ours(self, path: Path) -> bool:
        return str(path).startswith(self.folder)

    def _stage(self, name: str, harm: Callable[[], None] = lambda: None) -> None:
        number = next(self.numbers)
        if not self.at or number <= self.at:
            os.write(2, f"{STAGE}{name.replace(self.folder + '/', '')}\n".encode())
        if number == self.at:
            harm()
            os.kill(os.getpid(), signal.SIGKILL)


def stages_in(log: str) -> list[str]:
    """The stages that a `Fault` printed."""
    return [line.removeprefix(STAGE) for line in log.splitlines() if line.startswith(STAGE)]


def undisturbed(config: Path, run: Path) -> list[str]:
    """Make the undisturbed run of `config`, and return its stages."""
    code, log = train_forked(config, run, Fault(run))
    if code:
        raise SystemExit(f"the undisturbed run failed:\n{log}")
    return stages_in(log)


def broken_off(config: Path, run: Path, stages: list[str]) -> Path:
    """A run that was killed when it was about to make its last checkpoint."""
    last = max(n for n, name in enumerate(stages, 1) if name.startswith("mkdir checkpoints/"))
    code, log = train_forked(config, run, Fault(run, last))
    if code != -signal.SIGKILL:
        raise SystemExit(f"the run was not killed as intended:\n{log}")
    return run


# ---------------------------------------------------------------------------------------------
# kills


@dataclass
class Life:
    """One process of a run."""

    code: int
    log: str
    startup: float  # seconds until it worked in the directory
    waited: float  # seconds from its start, or from its first work, to the kill
    early: bool  # whether `waited` is from its start


def kills(folder: Path, number: int | None, seed: int) -> list[Outcome]:
    """Kill runs `number` times (default: 50), ten times each."""
    number = number or 50
    began, rng = time.monotonic(), random.Random(seed)  # noqa: S311
    each = min(number, KILLS_A_RUN)
    config = write_config(folder / "whole", training={"steps": STEPS_A_KILL * each, **_CPU})
    warm_up()
    undisturbed(config, folder / "whole/run")
    seconds = json.loads((folder / "whole/run/result.json").read_text())["seconds"]
    window = 1.6 * seconds / each  # so that most processes are killed, some near the end
    tried = survived = 0
    startup = 3.0
    for chain in itertools.count(1):
        if tried >= number or chain > number:
            break
        place = folder / f"run-{chain}"  # with its own cache, so that kills also hit preparation
        place.mkdir()
        shutil.copy(config, place)
        run, here, trouble = place / "run", 0, list[str]()
        while not trouble:
            killing = tried + here < number and here < each
            life = live(place, rng, window if killing else None, startup)
            startup = life.startup or startup
            if life.code == 0:
                trouble += differences(run, folder / "whole/run")
                break
            if life.code != -signal.SIGKILL:
                trouble.append(f"the next start ended with {life.code}: {life.log[-500:]}")
                break
            here += 1
            trouble += torn(run)
            since = "its start" if life.early else "its first work"
            saved = [path.name for path in checkpoints.steps(run / "checkpoints").values()]
            print(
                f"kill {tried + here} of {number}: {life.waited:.2f} s after {since}, "
                f"{saved[-1] if saved else 'nothing'} saved",
                flush=True,
            )
        tried += here
        survived += 0 if trouble else here
        _say(f"run {chain}, killed {here} times", trouble, place)
    return [Outcome("kills", survived, tried, "survived", time.monotonic() - began)]


_CPU = {"batch_sequences": 4, "device": "cpu"}


def live(place: Path, rng: random.Random, window: float | None, startup: float) -> Life:
    """Start `train.py` in `place`; kill it within `window` seconds of its first work, if given.

    One kill in five is drawn over the time from the process's start to its first work instead.
    """
    run = place / "run"
    log = place / "log.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), "config.yaml", "--out-dir", "run"]
    before = _trace(run)
    early = window is not None and rng.random() < 0.2
    wait = rng.random() * (startup if early else window or 0.0)
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--resume", "auto"], cwd=place, env=environment, stdout=file, stderr=file
        )
    began = worked = time.monotonic()
    if not early:
        while process.poll() is None and _trace(run) == before:
            time.sleep(0.005)
        worked = time.monotonic()
    if window is not None:
        try:
            process.wait(max(0.0, worked + wait - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    code = process.wait()
    return Life(code, log.read_text("utf-8", "replace"), worked - began, wait, early)


def _trace(run: Path) -> tuple[object, ...]:
    """What changes once a process works in the run directory."""
    try:
        stat = (run / "metrics.jsonl").stat()
    except OSError:
        return ((run / "config.yaml").exists(),)
    return True, stat.st_ino, stat.st_size


# ---------------------------------------------------------------------------------------------
# stages


def stages(folder: Path, number: int | None, seed: int) -> list[Outcome]:
    """Kill a fresh and a resumed run at `number` evenly spread stages (default: all)."""
    began = time.monotonic()
    config = write_config(
        folder / "whole",
        training={"steps": 6, **_CPU},
        evaluation={"every": 3, "sequences": 4},
        checkpoint={"every": 2, "keep": 1},
    )
    warm_up()
    whole = folder / "whole/run"
    fresh = undisturbed(config, whole)
    origin = broken_off(config, folder / "whole/origin", fresh)
    again = shutil.copytree(origin, folder / "whole/again")
    _, log = train_forked(config, again, Fault(again))
    places: list[tuple[Path | None, int]] = [(None, at + 1) for at in range(len(fresh))]
    places += [(origin, at + 1) for at in range(len(stages_in(log)))]
    chosen = places
    if number is not None and number < len(places):
        chosen = [places[int((i + 0.5) * len(places) / number)] for i in range(number)]
    survived = 0
    for index, (start, at) in enumerate(chosen, 1):
        run = folder / f"{'fresh' if start is None else 'again'}-{at}"
        if start is not None:
            shutil.copytree(start, run)
        code, log = train_forked(config, run, Fault(run, at))
        stage = (stages_in(log) or ["none"])[-1]
        trouble = torn(run)
        if code != -signal.SIGKILL:
            trouble.append(f"did not die, but ended with {code}: {log[-500:]}")
        code, log = train_forked(config, run)
        if code:
            trouble.append(f"the next start ended with {code}: {log.strip()[-500:]}")
        else:
            trouble += differences(run, whole)
        survived += not trouble
        _say(f"{run.name} ({stage})", trouble, run)
        if index % 50 == 0:
            print(f"{index} of {len(chosen)} stages, {survived} survived", flush=True)
    print(f"{len(places)} stages in all: {len(fresh)} of a fresh run, the rest of a resumed one")
    return [Outcome("stages", survived, len(chosen), "survived", time.monotonic() - began)]


# ---------------------------------------------------------------------------------------------
# damage: each changes a file of the first folder, and returns what it did and which folders differ


class Damage(NamedTuple):
    """What was done, and to which checkpoints."""

    text: str
    folders: set[str]


def cut(folders: list[Path], rng: random.Random) -> Damage:
    """Cut off the end of a file."""
    path = _some_file(folders[0], rng)
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return Damage(f"{path.name} cut to {size} bytes", {folders[0].name})


def flip(folders: list[Path], rng: random.Random) -> Damage:
    """Flip one bit of a file."""
    path = _some_file(folders[0], rng)
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return Damage(f"{path.name}: bit {bit} of byte {place} flipped", {folders[0].name})


def lengthen(folders: list[Path], rng: random.Random) -> Damage:
    """Append bytes to a file."""
    path = _some_file(folders[0], rng)
    number = rng.randint(1, 64)
    path.write_bytes(path.read_bytes() + rng.randbytes(number))
    return Damage(f"{path.name}: {number} bytes appended", {folders[0].name})


def remove(folders: list[Path], rng: random.Random) -> Damage:
    """Delete a file."""
    path = _some_file(folders[0], rng)
    path.unlink()
    return Damage(f"{path.name} removed", {folders[0].name})


def swap_within(folders: list[Path], rng: random.Random) -> Damage:
    """Swap two files of one checkpoint."""
    one, two = rng.sample(sorted(folders[0].iterdir()), 2)
    _swap(one, two)
    return Damage(f"{one.name} and {two.name} swapped", {folders[0].name})


def swap_between(folders: list[Path], rng: random.Random) -> Damage:
    """Swap a file with that of another checkpoint."""
    other = rng.choice(folders[1:])
    names = [p.name for p in sorted(other.iterdir()) if p.name != "tokenizer.json"]  # all equal
    name = rng.choice(names)
    _swap(folders[0] / name, other / name)
    return Damage(f"{name} swapped with {other.name}'s", {folders[0].name, other.name})


def swap_folders(folders: list[Path], rng: random.Random) -> Damage:
    """Swap two whole checkpoints."""
    other = rng.choice(folders[1:])
    _swap(folders[0], other)
    return Damage(f"swapped with {other.name}", {folders[0].name, other.name})


DAMAGES = (cut, flip, lengthen, remove, swap_within, swap_between, swap_folders)
ONE_FOLDER = (cut, flip, lengthen, remove, swap_within)


def _some_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def _swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def damage(folder: Path, number: int | None, seed: int) -> list[Outcome]:
    """Damage the newest checkpoints of a killed run `number` times (default: 100)."""
    number = number or 100
    began, rng = time.monotonic(), random.Random(seed)  # noqa: S311
    config = write_config(
        folder / "whole",
        training={"steps": 12, **_CPU},
        checkpoint={"every": 2, "keep": 4},
    )
    warm_up()
    whole = folder / "whole/run"
    origin = broken_off(config, folder / "whole/origin", undisturbed(config, whole))
    tried = detected = runs = recovered = 0
    while tried < number:
        runs += 1
        run = shutil.copytree(origin, folder / f"run-{runs}")
        left = list(reversed(checkpoints.steps(run / "checkpoints").values()))
        names = [path.name for path in left]
        many = min(rng.choice([1, 1, 1, 2, len(left)]), number - tried)
        done: list[Damage] = []
        for _ in range(many):
            kinds = DAMAGES if len(left) > 1 else ONE_FOLDER
            done.append(rng.choice(kinds)(left, rng))
            left = [path for path in left if path.name not in done[-1].folders]
            if not left:
                break
        damaged = set[str]().union(*(each.folders for each in done))
        missed = [each for each in done if not all(_is_refused(run, n) for n in each.folders)]
        tried += len(done)
        detected += len(done) - len(missed)
        trouble = [f"{each.text}: not detected" for each in missed]

        code, log = train_forked(config, run)
        if left:
            if code:
                trouble.append(f"the next start ended with {code}: {log.strip()[-500:]}")
            else:
                trouble += differences(run, whole, lost=damaged)
            skipped = names[: names.index(left[0].name)]
            reports = [line for line in log.splitlines() if "skipped" in line]
            trouble += [f"{n} is not reported as skipped" for n in skipped if n not in str(reports)]
        elif code != 2:
            trouble.append(f"with no checkpoint left it ended with {code}: {log.strip()[-500:]}")
        recovered += not trouble[len(missed) :]
        what = "; ".join(f"{'+'.join(sorted(each.folders))} {each.text}" for each in done)
        print(f"{run.name}: {what}; {len(damaged)} of {len(names)} checkpoints", flush=True)
        _say(run.name, trouble, run)
    seconds = time.monotonic() - began
    return [
        Outcome("damage", detected, tried, "detected", seconds),
        Outcome("damaged runs", recovered, runs, "recovered", seconds),
    ]


def _is_refused(run: Path, name: str) -> bool:
    try:
        checkpoints.verify(run / "checkpoints" / name)
    except InputError as error:
        return name in str(error)
    return False


# ---------------------------------------------------------------------------------------------
# processes


def processes(folder: Path, number: int | None, seed: int) -> list[Outcome]:
    """Kill one of two processes `number` times (default: 20), one in four under torchrun."""
    began, number = time.monotonic(), number or 20
    places = [
        (stage, rank, parallel)
        for parallel in ("ddp", "fsdp")
        for stage in ("joining", "data", "backward", "update", "evaluation", "gather", "checkpoint")
        for rank in (0, 1)
        if parallel == "fsdp" or stage != "gather"
    ]
    rng = random.Random(seed)  # noqa: S311
    rng.shuffle(places)
    whole: dict[str, Path] = {}
    survived = 0
    for index, (stage, rank, parallel) in zip(range(number), itertools.cycle(places), strict=False):
        if parallel not in whole:
            options = {"parallel": parallel, "processes": 2, "steps": 8, **_CPU}
            config = write_config(folder / parallel, training=options, diagnostics={"every": None})
            whole[parallel] = folder / parallel / "run"
            code, log = train_in_two(config, whole[parallel])
            if code:
                raise SystemExit(f"the undisturbed run failed:\n{log}")
        config = folder / parallel / "config.yaml"
        once = stage in ("joining", "data")
        run = folder / f"{parallel}-{index}"
        fault = f"kill {rank} {stage} {1 if once else rng.randint(1, 2)}"
        code, log = train_in_two(config, run, fault, torchrun=index % 4 == 3)
        trouble = (
            [f"ended with {code}: {log[-500:]}"] if code else differences(run, whole[parallel])
        )
        if log.count("restart 1") != (index % 4 != 3):
            trouble.append(f"did not restart once: {log[-500:]}")
        survived += not trouble
        print(f"{index + 1} of {number}: {parallel}, {fault}", flush=True)
        _say(run.name, trouble, run)
    return [Outcome("processes", survived, number, "survived", time.monotonic() - began)]


def train_in_two(
    config: Path, run: Path, fault: str = "", torchrun: bool = False
) -> tuple[int, str]:
    """Train in two processes, of which one fails; returns the exit code and what was printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": fault}
    script = [str(ROOT / "benchmarks/faulty.py"), config.name, "--out-dir", str(run)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    command = [*launcher, *script] if torchrun else script
    place = run.with_suffix(".files")  # with its own cache, so that kills also hit preparation
    place.mkdir()
    shutil.copy(config, place)
    done = subprocess.run(
        [sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True
    )
    shutil.rmtree(place)
    return done.returncode, done.stderr + done.stdout


# ---------------------------------------------------------------------------------------------
# soak


class Moment(NamedTuple):
    """What is seen of a running process from outside."""

    step: int
    memory: int  # bytes
    files: int  # without metrics and samples, which grow by design
    size: int  # of those, in bytes


def soak(folder: Path, number: int | None, seed: int) -> list[Outcome]:
    """Observe a run of `number` steps (default: 20,000) every second."""
    steps = number or 20_000
    began = time.monotonic()
    config = write_config(
        folder,
        training={"steps": steps, "log_every": max(1, steps // 20), **_CPU},
        evaluation={"every": max(1, steps // 20), "sequences": 4},
        diagnostics={"every": max(1, steps // 200)},
        checkpoint={"every": max(1, steps // 40)},
    )
    run, log = folder / "run", folder / "log.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), config.name, "--out-dir", "run"]
    moments: list[Moment] = []
    said = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        step = _last_step(run / "metrics.jsonl")
        if 0 < step < steps:
            try:
                moments.append(Moment(step, watched.memory_info().rss, *_occupied(run)))
            except psutil.Error:
                continue  # it has just ended
        if time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"step {step} of {steps}, {moments[-1].memory / 1e6:.1f} MB", flush=True)
        time.sleep(min(1.0, steps / 20_000 * 1.0 + 0.05))
    if process.returncode:
        raise SystemExit(f"the run failed:\n{log.read_text()}")

    def during(start: float, end: float) -> list[Moment]:
        return [m for m in moments if start * steps <= m.step <= end * steps]

    early, late = (
        statistics.median(m.memory for m in during(*part)) for part in ((0.1, 0.2), (0.9, 1.0))
    )
    records = [r for r in metrics.read(run / "metrics.jsonl") if "tokens_per_second" in r]
    quarter = steps // 4
    first, last = (
        statistics.median(r["tokens_per_second"] for r in part)
        for part in (records[:quarter], records[-quarter:])
    )
    # the minimum, since a checkpoint may be half written when the run is observed
    files, more_files = (min(m.files for m in during(*h)) for h in ((0.1, 0.5), (0.5, 1.0)))
    size, more = (min(m.size for m in during(*h)) for h in ((0.1, 0.5), (0.5, 1.0)))
    ratio, speed = late / early, last / first
    print(
        f"{steps} steps, {len(moments)} observations\n"
        f"memory   {early / 1e6:.1f} MB after a tenth, {late / 1e6:.1f} MB at the end: "
        f"{ratio:.4f}\n"
        f"tokens/s {first:,.0f} in the first quarter, {last:,.0f} in the last: {speed:.3f}\n"
        f"files    at least {files} ({size:,} bytes) in the first half, "
        f"{more_files} ({more:,} bytes) in the second, without metrics and samples"
    )
    checks = (ratio <= 1 + MEMORY, speed >= 1 - SPEED, more_files <= files and more <= 1.01 * size)
    seconds = time.monotonic() - began
    return [Outcome(f"soak of {steps} steps:", sum(checks), len(checks), "measures flat", seconds)]


def _last_step(path: Path) -> int:
    """The step of the last whole line of metrics.jsonl, or 0."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines[-3:] if line.endswith(b"\n") and line.startswith(b"{")]
        return int(json.loads(whole[-1])["step"])
    except (OSError, IndexError):
        return 0


def _occupied(run: Path) -> tuple[int, int]:
    """Number and bytes of the files in a run directory, without metrics and samples."""
    files = size = 0
    for place, _, names in os.walk(run):
        for name in names:
            path = Path(place) / name
            if name != "metrics.jsonl" and path.parent.name != "samples":
                try:
                    size += path.stat().st_size
                    files += 1
                except OSError:
                    continue  # it has just been removed
    return files, size


# ---------------------------------------------------------------------------------------------
# The command line


def _say(name: str, trouble: list[str], folder: Path) -> None:
    """Report what failed and keep it; otherwise delete it."""
    for line in trouble[:4]:
        print(f"FAILED {name}: {line}", flush=True)
    if len(trouble) > 4:
        print(f"FAILED {name}: and {len(trouble) - 4} more", flush=True)
    if not trouble:
        shutil.rmtree(folder)


PARTS = {"kills": kills, "stages": stages, "damage": damage, "processes": processes, "soak": soak}


def main() -> int:
    """Run the chosen parts and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--number", type=int, help="of kills, stages, damages or steps")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages")
    parser.add_argument("--out-dir", type=Path, help="an empty folder, for what failed")
    options = parser.parse_args()
    if options.number is not None and (options.part == "all" or options.number < 1):
        parser.error("--number: must be at least 1, and needs a single part")
    if options.out_dir is not None and options.out_dir.exists() and any(options.out_dir.iterdir()):
        parser.error(f"--out-dir: {options.out_dir} is not empty")
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out_dir or Path(temporary)).absolute()
        for name in PARTS if options.part == "all" else [options.part]:
            (folder / name).mkdir(parents=True)
            outcomes += PARTS[name]((folder / name).resolve(), options.number, options.seed)
    print()
    for outcome in outcomes:
        print(f"{outcome!s:48}{outcome.seconds:8.1f} s")
    return 0 if all(outcome.passed == outcome.tried for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())

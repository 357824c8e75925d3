"""Whatever its input, a command works or refuses: `python benchmarks/hostile.py --inputs 2000`.

Each input is one command on a fresh copy of a tiny fixture (a finished and a stopped run, a
comparison, a prepared corpus), whose files or arguments are corrupted; `KINDS` lists the ways. The
command runs in its own process, forked from a server that has imported torch. An input fails if

    traceback  an exception or a Python warning is printed, or the exit code is not documented
    signal     the process was killed by a signal
    time       it took more than 10 s (`--seconds`)
    memory     it needed over 1 GiB more than its program's `PLAIN` command on the intact fixture
    outside    a file beside the working directory changed: its name, bytes, mode or target
    lost       a refusal (exit code 2) changed the working directory beyond new or unfinished caches
    unclear    a refusal is not one to three printable lines that name a key, a flag or a file
    output     raw control characters, markup or a formula in what it wrote, or a missing report

Exits 1 if any input failed or did not finish. An input is a function of (seed, kind, number): one
that failed is repeated with `--kind KIND --only NUMBER`; `--keep DIR` keeps its files. Linux only.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the server forks, so one thread

import torch
import yaml
from safetensors.torch import load_file, save_file

import gpt.generation
import gpt.run.layer_plot
import gpt.run.plot
import gpt.training
from gpt import cli
from gpt.compare import report as reports
from gpt.compare.execution import local
from gpt.config import Config, option_paths, read_yaml
from gpt.config import load as load_config
from gpt.data import preparation
from gpt.errors import StoppedError
from gpt.io.files import size_and_hash

SECONDS = 10.0
GIB = 2**30
ADDRESSES = 24 * GIB  # extra address space of a process
LONGEST_FILE = 200 * 10**6  # the limit for a file that a process writes, or that is read here
SORTS = ("traceback", "signal", "time", "memory", "outside", "lost", "unclear", "output")
Command = Callable[[list[str]], int]


def inline(pool: Any, jobs: Any, workers: int) -> bool:
    """Replaces `local.Pool.run`: runs the jobs in this process, which saves seconds."""
    local._shared = replace(pool.shared, parent=os.getppid())
    for job in jobs:
        future: Future[Any] = Future()
        try:
            future.set_result(job.function(*job.arguments))
        except Exception as error:
            future.set_exception(error)
        job.done(future)
    return True


def compare_and_report(arguments: list[str]) -> int:
    """Run a comparison, then its report again: a grid that is accepted must have a report."""
    code = cli.run("compare", arguments)
    if code == 0:
        directory = arguments[arguments.index("--out-dir") + 1]
        try:
            code = cli.run("compare", [directory, "--report-only"])
        except SystemExit:
            code = NO_REPORT
    return code


NO_REPORT = 99
COMMANDS: dict[str, Command] = {
    "train.py": partial(cli.run, "train", prog="train.py"),
    "sample.py": partial(cli.run, "sample", prog="sample.py"),
    "compare.py": partial(cli.run, "compare", prog="compare.py"),
    "diagnose": partial(cli.run, "diagnose", prog="diagnose"),
    "prepare": partial(cli.run, "prepare", prog="prepare"),
    "gpt.checkpoint": partial(cli.run, "checkpoint", prog="gpt.checkpoint"),
    "compare.py twice": compare_and_report,
}


@dataclass
class Input:
    """A command on a corrupted fixture.

    Attributes:
        note: what was corrupted.
        long: the work may take long; it is then stopped by SIGTERM and may exit with 75.
        draws: pictures are drawn, which takes seconds.
    """

    command: str
    arguments: list[str]
    note: str
    stdin: str = os.devnull
    long: bool = False
    draws: bool = False


@dataclass
class Outcome:
    """What became of an input: its exit code, and each sort of failure with its evidence."""

    kind: str
    number: int
    command: str
    note: str
    code: int
    seconds: float
    memory: int  # bytes over the plain command's
    failures: dict[str, str] = field(default_factory=dict)
    said: str = ""


# ---------------------------------------------------------------------------------------------
# The fixture


CONFIG: dict[str, Any] = {
    "data": {
        "source": "text",
        "path": ["corpus"],
        "tokenizer": "bytes",
        "val_fraction": 0.3,
        "cache_dir": "cache",
    },
    "model": {"layers": 1, "heads": 1, "width": 8, "context": 8},
    "schedule": {"warmup_steps": 1},
    "training": {"steps": 4, "batch_sequences": 2, "device": "cpu"},
    "evaluation": {"every": 2, "sequences": 4},
    "diagnostics": {"every": 2, "sequences": 2},
    "checkpoint": {"every": 1, "keep": 2},
    "sampling": {"tokens": 2},
}
GRID: dict[str, Any] = {
    "base": "base.yaml",
    "arms": {"placement": {p: {"model.norm.placement": p} for p in ("pre", "post")}},
    "grid": {"optimizer.learning_rate": [0.01]},
    "seeds": 2,
    "contrasts": [{"question": "Is it?", "measure": "failure", "of": ["pre", "post"]}],
    "pairs": [["pre", "post"]],
    "probes": False,
    "keep_checkpoints": True,
}


class Place:
    """Where an input is tried: `work`, the command's directory, and `outside` beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work, self.outside = folder / "work", folder / "outside"
        self.pristine, self.materials = folder / "pristine", folder / "materials"

    def build(self) -> None:
        """Make the fixture, in a child, so that the server starts no thread."""
        self.work.mkdir(parents=True)
        code, said, *_ = forked(self._build, self, Input("", [], ""), long=120)
        if code:
            raise SystemExit(f"the fixture could not be made:\n{said}")
        self.work.rename(self.pristine)

    def _build(self) -> None:
        for index in range(8):
            path = self.work / f"corpus/{index}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"The quick brown fox jumps {index} times.\n" * (index + 2))
        Path("base.yaml").write_text(yaml.safe_dump(CONFIG))
        Path("config.yaml").write_text("base: base.yaml\n")
        Path("half.yaml").write_text("base: base.yaml\ndata: {tokenizer: chars}\n")
        Path("grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
        Path("prompt.txt").write_text("The quick")
        config = load_config("config.yaml")
        stops = itertools.chain([False, False], itertools.repeat(True))
        gpt.training.train(config, Path("runs/stopped"), quiet=True, stop=lambda: next(stops))
        gpt.training.train(config, Path("runs/finished"), quiet=True)
        shutil.copy("runs/finished/tokenizer.json", "vocabulary.json")
        cli.run("compare", ["grid.yaml", "--out-dir", "compared", "--workers", "1"])
        half, asked = load_config("half.yaml").data, Counter[str]()

        def stop() -> bool:  # after the vocabulary, when the first tokens are written
            asked["stop"] += 1
            return asked["stop"] > 8

        with contextlib.suppress(StoppedError):
            preparation.prepare(half, stop=stop)
        self._make_materials()

    def _make_materials(self) -> None:
        """Data files of every odd sort."""
        import numpy as np
        import pyarrow as pa
        from pyarrow import parquet

        folder = self.materials
        folder.mkdir()
        text = "The quick brown fox, \u00e4\u00f6\u00fc.\n" * 60
        lines = "".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(60))
        rows = pa.table({"text": ["a b c " * 20] * 40})
        ids = np.arange(4000) % 250
        raw: dict[str, bytes] = {
            "utf-16": text.encode("utf-16"),
            "utf-32": text.encode("utf-32"),
            "latin-1": text.encode("latin-1"),
            "bom": b"\xef\xbb\xbf" + text.encode(),
            "empty": b"",
            "nuls": b"abc\0def\0" * 99,
            "surrogates": b"\xed\xa0\x80abc" * 99,
            "gzip": gzip.compress(text.encode()),
            "gzip-cut": gzip.compress(text.encode())[:-9],
            "gzip-jsonl": gzip.compress(lines.encode()),
            "bz2": bz2.compress(text.encode()),
            "xz": lzma.compress(text.encode()),
            "zstd": bytes(pa.compress(text.encode(), codec="zstd", asbytes=True)),
            "dna": b"ACGTTGCA" * 20_000,
            "dna-random": bytes(random.Random(0).choices(b"ACGT", k=300_000)),  # noqa: S311
            "swollen.gz": gzip.compress(b'{"text": "' + b"x" * 10**8 + b'"}'),
            "endless.gz": gzip.compress(b"x" * 10**8),
            "array.jsonl": json.dumps([{"text": "a"}] * 30).encode(),
            "pretty.jsonl": json.dumps({"text": "a"}, indent=1).encode(),
            "null.jsonl": (lines + '{"text": null}\n' + lines).encode(),
            "types.jsonl": b'{"text": 3}\n{"text": ["a"]}\n{"text": {"a": 1}}\n',
            "deep.jsonl": b'{"text": ' + b"[" * 90_000,
            "digits.jsonl": b'{"text": ' + b"9" * 90_000 + b"}",
            "lone.jsonl": b'{"text": "\\ud800 a"}\n' * 30,
            "lines.jsonl": lines.encode(),
            "uint16.bin": ids.astype("<u2").tobytes(),
            "uint32.bin": ids.astype("<u4").tobytes(),
            "int64.bin": ids.astype("<i8").tobytes(),
            "odd.bin": ids.astype("<u2").tobytes()[:-1],
            "beyond.bin": (ids + 60_000).astype("<u2").tobytes(),
        }
        for name, content in raw.items():
            (folder / name).write_bytes(content)
        np.save(folder / "ids.npy", ids)
        np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with zipfile.ZipFile(folder / "a.zip", "w") as file:
            file.writestr("a.txt", text)
        tables = {
            "plain.parquet": rows,
            "null.parquet": pa.table({"text": ["a", None, "b"] * 9}),
            "binary.parquet": pa.table({"text": [b"a b", b"\xff"] * 9}),
            "numbers.parquet": pa.table({"text": [1, 2]}),
            "nested.parquet": pa.table({"doc": [{"text": "in"}] * 30, "doc.text": ["flat"] * 30}),
            "struct.parquet": pa.table({"text": [{"a": "b"}] * 30}),
            "none.parquet": pa.table({"text": pa.array([], pa.string())}),
            "swollen.parquet": pa.table({"text": ["x" * 10**6] * 300}),
        }
        for name, table in tables.items():
            parquet.write_table(table, folder / name, compression="zstd")
        whole = (folder / "plain.parquet").read_bytes()
        (folder / "cut.parquet").write_bytes(whole[:-20])

    def fresh(self) -> None:
        """Copy the fixture, and create files outside it that a careless write could damage."""
        for path in (self.work, self.outside):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.pristine, self.work, symlinks=True)
        shutil.copytree(self.pristine / "runs/finished", self.outside / "run", symlinks=True)
        for name in ("cell.png", "a.svg", "notes.txt", "train.bin", "result.json", "config.yaml"):
            (self.outside / name).write_bytes(f"{{}} # {name}\n".encode() * 40)
        (self.outside / "empty").mkdir()


def contents(folder: Path) -> dict[str, tuple[object, ...]]:
    """Type, mode, and content or link target of everything below a folder, except lock files."""
    found: dict[str, tuple[object, ...]] = {}
    for place, folders, names in os.walk(os.fsencode(folder)):
        for name in sorted([*folders, *names]):
            path = os.path.join(place, name)
            info = os.lstat(path)
            what: object = info.st_rdev
            if stat.S_ISLNK(info.st_mode):
                what = os.readlink(path)
            elif stat.S_ISREG(info.st_mode):
                what = info.st_size
                if info.st_size < LONGEST_FILE:
                    with open(path, "rb") as file:
                        what = hashlib.file_digest(file, "sha256").hexdigest()
            key = os.fsdecode(os.path.relpath(path, os.fsencode(folder)))
            if not key.endswith(".lock"):
                found[key] = (info.st_mode, what)
    return found


# ---------------------------------------------------------------------------------------------
# A command in a process of its own


def forked(
    action: Callable[[], object], place: Place, given: Input, long: float | None = None
) -> tuple[int, str, str, float, int]:
    """Call `action` in a child: exit code (-signal if killed), stderr, stdout, seconds, memory.

    Memory is how far the largest resident set lies above the server's at the fork.
    """
    out, err = place.folder / "stdout", place.folder / "stderr"
    before = _resident(os.getpid())
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(place.work)
            _redirect(given.stdin, out, err)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            _limit(resource.RLIMIT_AS, size + ADDRESSES)
            _limit(resource.RLIMIT_FSIZE, LONGEST_FILE)
            code = _called(action, given)
            threading._shutdown()  # type: ignore[attr-defined] # joins threads, as at exit
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 255)
    handle, asked, late = os.pidfd_open(child), False, False
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    while not poll.poll(50):
        spent = time.monotonic() - began
        late = spent > (long or SECONDS)
        if late or _resident(child) - before > 4 * GIB:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
                os.kill(child, signal.SIGKILL)
        elif given.long and spent > 0.6 * SECONDS and not asked:
            os.kill(child, signal.SIGTERM)
            asked = True
    os.close(handle)
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # workers that it left
    texts = [path.read_bytes()[: 10**6].decode("utf-8", "replace") for path in (err, out)]
    code = os.waitstatus_to_exitcode(status)
    return code, texts[0], texts[1], seconds, max(0, usage.ru_maxrss * 1024 - before)


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0  # it has just ended
    return pages * resource.getpagesize()


def _limit(resource_: int, most: int) -> None:
    """Lower a limit of this process, which may have a lower one already."""
    hard = resource.getrlimit(resource_)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource_, (most, most))


def _redirect(stdin: str, out: Path, err: Path) -> None:
    os.dup2(os.open(stdin, os.O_RDONLY | os.O_NONBLOCK), 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _called(action: Callable[[], object], given: Input) -> int:
    """Call `action`; returns the exit code that its process would have."""
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = [given.command, *given.arguments]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(os, "fsync", return_value=None))
        stack.enter_context(mock.patch.object(local.Pool, "run", inline))
        if not given.draws:
            for module in (gpt.run.plot, gpt.run.layer_plot):
                stack.enter_context(mock.patch.object(module, "save", return_value=None))
            stack.enter_context(mock.patch.object(reports, "draw", return_value={}))
        try:
            code = action()
        except SystemExit as end:
            code = end.code
    return code if isinstance(code, int) else 1 if code else 0


# ---------------------------------------------------------------------------------------------
# What makes a failure


CODES = {"train.py": {0, 3, 75}, "prepare": {0, 75}, "compare.py": {0, 75}}
KEYS = {part for key in option_paths(Config) for part in key.split(".")}
KEYS |= {"run", "arms", "grid", "seeds", "pairs", "contrasts", "base", "exclude", "workers"}
IN_CACHE = re.compile(r"new cache|gone 'cache/\.[^/']+\.building['/]")  # changes that are allowed
RAW = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
SCRIPT = "<script>alert(1)</script>"


def attempt(
    given: Input, place: Place, plain: dict[str, int], long: float | None = None
) -> Outcome:
    """Run the command of an input, and judge it."""
    inside, outside = contents(place.work), contents(place.outside)
    run = COMMANDS[given.command]
    code, err, out, seconds, memory = forked(lambda: run(given.arguments), place, given, long)
    memory = max(0, memory - plain.get(given.command, 0))
    failures: dict[str, str] = {}
    fine = CODES.get(given.command, {0})
    if seconds > SECONDS or (given.long and code == -signal.SIGTERM):
        failures["time"] = f"{seconds:.1f} s"
    elif code < 0 and memory < GIB:
        failures["signal"] = signal.Signals(-code).name
    if memory > GIB:
        failures["memory"] = f"{memory / GIB:.1f} GiB over the plain command's"
    fault = re.search(r"Traceback \(most recent|panicked at|\.py:\d+: \w*Warning", err)
    if fault or (code >= 0 and code not in {*fine, 2, NO_REPORT}):
        failures["traceback"] = _last_line(err) if fault else f"exit code {code}"
    changes = _changes(outside, contents(place.outside))
    if changes:
        failures["outside"] = "; ".join(changes[:3])
    if code == 2:
        now = contents(place.work)
        lost = [c for c in _changes(inside, now) if not IN_CACHE.match(c)]
        if lost:
            failures["lost"] = "; ".join(lost[:3])
        if problem := why_unclear(given, err):
            failures["unclear"] = problem
    wrong = [_raw(err), "" if given.command == "sample.py" else _raw(out)]
    wrong += [_wrong_report(place.work) if code in (0, NO_REPORT) else ""]
    wrong += ["it was accepted and has no report" if code == NO_REPORT else ""]
    if any(wrong):
        failures["output"] = "; ".join(filter(None, wrong))
    command = shlex.join([given.command, *(word[:300] for word in given.arguments)])
    note = given.note if given.stdin == os.devnull else f"{given.note}; stdin {given.stdin}"
    shown = "\n".join(line[:300] for line in err.splitlines()[:4])
    return Outcome("", 0, command, note, code, seconds, memory, failures, shown)


def _can_be_shown(line: str) -> bool:
    """Whether a line cannot control a terminal; wide and non-breaking spaces are harmless."""
    return all(c.isprintable() or unicodedata.category(c) == "Zs" for c in line)


def why_unclear(given: Input, err: str) -> str:
    """What is wrong with a refusal; empty if nothing is."""
    start = given.command.removesuffix(" twice") + ": "
    lines = err.removesuffix("\n").split("\n")
    first = next((n for n, line in enumerate(lines) if line.startswith(start)), len(lines))
    complaint = [line for line in lines[first:] if not line.endswith("prompt from stdin")]
    if not 1 <= len(complaint) <= 3:
        return f"{len(complaint)} lines from the first that begins with {start!r}"
    for line in complaint:
        if not line.startswith(start) or not _can_be_shown(line) or len(line) >= 5000:
            return f"one of its lines is not fit to print: {line[:200]!r}"
    text = "\n".join(complaint).removeprefix(start)
    words = [Path(word).name for word in given.arguments if word]
    named = "--" in text or re.search(r"[\w-]+\.\w+", text) or set(re.findall(r"\w+", text)) & KEYS
    return "" if named or any(word in text for word in words) else f"names nothing: {text[:200]}"


def _last_line(err: str) -> str:
    """The last line of a traceback, and where it was raised."""
    places = re.findall(r'File ".*?(\w+/\w+\.py|\w+\.py)", line (\d+)', err)
    ours = [f"{name}:{line}" for name, line in places if f"/{name}" in err and "gpt/" in err]
    last = next(
        (
            line
            for line in reversed(err.splitlines())
            if re.search(r"(Error|Exception|Warning)\b", line)
        ),
        "",
    )
    return f"{last[:200]} ({ours[-1] if ours else 'no place'})"


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    changed = [
        f"changed {name!r}" for name in before if name in after and before[name] != after[name]
    ]
    gone = [f"gone {name!r}" for name in before if name not in after]
    return [*changed, *gone, *(f"new {name}" for name in after if name not in before)]


def _raw(text: str) -> str:
    found = RAW.search(text)
    if not found:
        return ""
    return f"a raw {found[0]!r} in {text[max(0, found.start() - 60) : found.end() + 20]!r}"


def _wrong_report(work: Path) -> str:
    """What is wrong in the reports that a command wrote."""
    for folder in {path.parent for path in work.glob("*/report.*")}:
        for name in ("report.html", "report.md"):
            if _is_small(folder / name) and SCRIPT in (folder / name).read_text("utf-8", "replace"):
                return f"{name} holds {SCRIPT}"
        if _is_small(folder / "cells.csv"):
            with (folder / "cells.csv").open(encoding="utf-8") as file:
                for row in csv.reader(file):
                    if bad := [cell for cell in row if cell.startswith(("=", "+", "@"))]:
                        return f"cells.csv holds the formula {bad[0][:60]!r}"
    return ""


def _is_small(path: Path) -> bool:
    """Whether it is a file small enough to be read at once."""
    return path.is_file() and path.stat().st_size < LONGEST_FILE


# ---------------------------------------------------------------------------------------------
# The kinds of input

SHORT = ["--prompt", "a", "--max-new-tokens", "2"]
FRESH = ["--out-dir", "fresh", "--max-seconds", "3"]
SUBJECTS: dict[str, list[tuple[str, list[str]]]] = {  # part of the fixture -> commands that read it
    "runs/finished": [
        ("sample.py", ["runs/finished", *SHORT]),
        ("sample.py", ["runs/finished", *SHORT, "--checkpoint", "latest"]),
        ("diagnose", ["runs/finished"]),
        ("gpt.checkpoint", ["verify", "runs/finished"]),
        ("train.py", ["config.yaml", "--out-dir", "runs/finished"]),
        ("train.py", ["config.yaml", "--out-dir", "runs/finished", "--training.steps", "6"]),
    ],
    "runs/stopped": [
        ("train.py", ["config.yaml", "--out-dir", "runs/stopped"]),
        ("train.py", ["config.yaml", "--out-dir", "runs/stopped", "--training.steps", "9"]),
        ("train.py", ["config.yaml", "--out-dir", "runs/stopped", "--dry-run"]),
        ("train.py", ["config.yaml", *FRESH, "--resume", "runs/stopped/checkpoints/step-00000001"]),
        ("sample.py", ["runs/stopped", *SHORT, "--checkpoint", "latest"]),
        ("diagnose", ["runs/stopped"]),
    ],
    "compared": [
        ("compare.py", ["compared", "--report-only"]),
        ("compare.py", ["compared", "--report-only", "--beside", "compared"]),
        ("compare.py", ["grid.yaml", "--out-dir", "compared", "--workers", "1"]),
        ("compare.py", ["grid.yaml", "--out-dir", "compared", "--dry-run"]),
        ("sample.py", ["compared/cells/pre_learning-rate-0.01_seed-0", *SHORT]),
    ],
    "cache": [
        ("prepare", ["config.yaml"]),
        ("prepare", ["half.yaml"]),
        ("train.py", ["config.yaml", "--dry-run"]),
        ("train.py", ["half.yaml", *FRESH]),
    ],
    "": [
        ("train.py", ["config.yaml", *FRESH]),
        ("train.py", ["config.yaml", "--print-config"]),
        ("prepare", ["config.yaml", "--data.cache-dir", "cache2"]),
        ("compare.py", ["grid.yaml", "--out-dir", "fresh", "--dry-run"]),
        ("compare.py", ["grid.yaml", "--out-dir", "fresh", "--workers", "1"]),
        ("sample.py", ["runs/finished", "--prompt-file", "prompt.txt"]),
        ("prepare", ["config.yaml", "--data.tokenizer", "file", "--data.vocabulary",
                     "vocabulary.json", "--data.cache-dir", "cache2"]),
    ],
}  # fmt: skip
PLAIN = {  # what the memory of an input is compared with
    "train.py": ["config.yaml", "--out-dir", "fresh"],
    "sample.py": ["runs/finished", *SHORT],
    "compare.py": ["grid.yaml", "--out-dir", "fresh", "--workers", "1"],
    "diagnose": ["runs/finished"],
    "prepare": ["half.yaml"],
    "gpt.checkpoint": ["verify", "runs/finished"],
}
NEW = [
    *("samples/step-00000004.txt", "history.jsonl", ".writing-x", "layers.png", "loss.png"),
    *("checkpoints/step-00000009", "checkpoints/.writing-step-1", "checkpoints/spare", ".lock"),
    *("figures/other.png", "lost.json", "probes.json", "cells/extra", "extra", "result.json"),
    *("metrics.jsonl.lock", "train.bin", "val.bin", "counts.bin", "tokenizer.json", "meta.json"),
]


def links(rng: random.Random, place: Place) -> Input:
    """A hard or symbolic link (to outside, a parent, nowhere or itself), in a new or old place."""
    given, _subject, path = _victim(rng, place, files_only=False)
    how = rng.choice(["moved", "moved", "moved", "file", "folder", "run", "new", "nowhere", "loop",
                      "parent", "chain", "hard"])  # fmt: skip
    target: Path | str
    if how == "moved" and path.exists():
        target = place.outside / f"moved-{path.name}"
        path.rename(target)
    else:
        _remove(path)
        targets: dict[str, Path | str] = {
            "file": place.outside / rng.choice(["notes.txt", "train.bin", "result.json"]),
            "folder": place.outside,
            "run": place.outside / "run/checkpoints",
            "new": place.outside / "not-there-yet",
            "nowhere": Path("/nowhere/at/all"),
            "parent": "..",
            "chain": "chain",
            "hard": place.outside / "train.bin",
        }
        target = targets.get(how, path.name)
    if how == "chain":
        (path.parent / "chain").symlink_to(place.outside / "run")
    if how == "hard":
        os.link(place.outside / "train.bin", path)
    else:
        path.symlink_to(target)
    given.note = f"{path.relative_to(place.work)} is a link: {how}"
    return given


def special(rng: random.Random, place: Place) -> Input:
    """A named pipe, socket, device, sparse or unreadable file, or folder, in place of a file."""
    given, _, path = _victim(rng, place, files_only=True)
    things = ["fifo", "socket", "/dev/zero", "/dev/full", "/dev/null", "/dev/random", "sparse",
              "folder", "unreadable"]  # fmt: skip
    thing = rng.choice(things)
    if rng.random() < 0.4:  # as an argument
        path = place.work / "odd"
        command, arguments = rng.choice([
            ("train.py", ["odd", "--print-config"]),
            ("compare.py", ["odd", "--dry-run"]),
            ("sample.py", ["runs/finished", "--prompt-file", "odd", "--max-new-tokens", "2"]),
            ("sample.py", ["odd"]),
            ("diagnose", ["odd"]),
            ("gpt.checkpoint", ["verify", "odd"]),
            ("prepare", ["config.yaml", "--data.path", "odd"]),
            ("prepare", ["config.yaml", "--data.path", "o*d"]),
            ("prepare", ["config.yaml", "--data.path", "odd", "--data.source", "jsonl"]),
            ("prepare", ["config.yaml", "--data.path", "odd", "--data.source", "parquet"]),
            ("prepare", ["config.yaml", "--data.tokenizer", "file", "--data.vocabulary", "odd"]),
            ("prepare", ["config.yaml", "--data.cache-dir", "odd"]),
            ("train.py", ["config.yaml", "--out-dir", "odd"]),
            ("train.py", ["config.yaml", *FRESH, "--resume", "odd"]),
            ("compare.py", ["compared", "--report-only", "--beside", "odd"]),
        ])  # fmt: skip
        given = Input(command, list(arguments), "")
    _remove(path)
    if thing == "fifo":
        os.mkfifo(path)
    elif thing == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may have at most 107 bytes
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif thing == "sparse":
        with path.open("wb") as file:
            file.truncate(20 * 10**9)
        given.long = given.command in ("prepare", "train.py")
    elif thing == "folder":
        path.mkdir()
    elif thing == "unreadable":
        path.write_bytes(b"x")
        path.chmod(0)
    else:
        path.symlink_to(thing)
    given.note = f"{path.relative_to(place.work)} is {thing}"
    return given


def _victim(rng: random.Random, place: Place, files_only: bool) -> tuple[Input, str, Path]:
    """A command, the part of the fixture that it reads, and a path in it to corrupt."""
    subject = rng.choice(["runs/finished", "runs/stopped", "runs/stopped", "compared", "compared",
                          "cache", "cache", ""])  # fmt: skip
    root = place.work / subject
    if subject:
        paths = sorted(p for p in root.rglob("*") if p.is_file() or not files_only)
        paths += [root / name for name in NEW if (root / name).parent.is_dir()]
    else:
        names = ("config.yaml", "base.yaml", "grid.yaml", "prompt.txt", "vocabulary.json",
                 "corpus/0.txt", "corpus/x.txt", "fresh", "cache2")  # fmt: skip
        paths = [root / name for name in names]
    command, arguments = rng.choice(SUBJECTS[subject])
    draws = rng.random() < 0.05
    return Input(command, list(arguments), "", draws=draws), subject, rng.choice(paths)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


NUMBERS = [
    *("seed", "data.vocab_size", "data.learn_bytes", "data.val_fraction", "data.seed"),
    *("model.layers", "model.heads", "model.width", "model.context", "model.dropout"),
    *("model.logit_soft_cap", "model.norm.eps", "model.attention.soft_cap", "model.mlp.multiple"),
    *("schedule.warmup_steps", "schedule.final_ratio", "schedule.decay_fraction"),
    *("optimizer.learning_rate", "optimizer.beta1", "optimizer.beta2", "optimizer.eps"),
    *("optimizer.momentum", "optimizer.weight_decay", "optimizer.clip", "training.steps"),
    *("training.batch_sequences", "training.batch_tokens", "training.micro_batch"),
    *("training.z_loss", "training.loss_chunk", "training.nonfinite_limit", "training.log_every"),
    *("evaluation.every", "evaluation.sequences", "evaluation.give_up_after"),
    *("evaluation.patience", "schedule.rewarm"),
    *("diagnostics.every", "diagnostics.sequences", "checkpoint.every", "checkpoint.keep"),
    *("checkpoint.keep_every", "sampling.temperature", "sampling.top_k", "sampling.top_p"),
    *("sampling.min_p", "sampling.every", "sampling.tokens"),
]
SMALL = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "0.5",
    "1.5",
    "nan",
    ".inf",
    "-0.0",
    "5e-324",
    "1_0",
    "0x10",
]
HUGE = [
    *(str(10**12), str(10**18), str(2**31), str(2**63 - 1), str(2**63), str(2**64)),
    *("1" + "0" * 308, "1" + "0" * 309, "9" * 5000, "1e301", "1e308", "1e12", "1e400", "-1e300"),
]
BETWEEN = ["100000", "1000000", "100000000"]
SAMPLING = ["--num-samples", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p",
            "--seed", "--checkpoint"]  # fmt: skip


def sizes(rng: random.Random, place: Place) -> Input:
    """Huge, tiny and odd numbers in the config, flags, a run's config and a grid."""
    way = rng.choice(
        ["flags", "flags", "file", "forged", "grid", "grid", "sample", "mix", "compare"]
    )
    really = rng.random() < 0.5
    values = [*SMALL, *HUGE, *HUGE, *([] if really else BETWEEN * 4)]
    heavy = ["model.layers", "model.width", "model.context", "data.vocab_size",
             "training.batch_sequences", "model.mlp.multiple"]  # fmt: skip
    keys = rng.sample(NUMBERS, rng.choice([1, 1, 2, 3]))
    if rng.random() < 0.4:
        keys = [rng.choice(heavy), *keys[1:]]
    chosen = {key: rng.choice(values) for key in keys}
    if "data.vocab_size" in chosen:
        chosen["data.tokenizer"] = "bpe"
    mode = FRESH if really else [rng.choice(["--dry-run", "--dry-run", "--print-config"])]
    note = ", ".join(f"{key} {value[:30]}" for key, value in chosen.items())
    flags = [word for key, value in chosen.items()
             for word in (f"--{key.replace('_', '-')}", value)]  # fmt: skip
    text = "\n".join(_as_yaml(chosen))
    if way == "flags":
        return Input("train.py", ["config.yaml", *flags, *mode], note)
    if way == "file":
        (place.work / "odd.yaml").write_text(f"{_merged(CONFIG, chosen)}")
        return Input("train.py", ["odd.yaml", *mode], f"{text}")
    if way == "forged":
        run = place.work / "runs/finished"
        tree = read_yaml(run / "config.yaml")
        (run / "config.yaml").write_text(_merged(tree, chosen))
        command, arguments = rng.choice(SUBJECTS["runs/finished"])
        return Input(command, list(arguments), f"a run whose config says {note}")
    if way == "sample":
        flag = rng.choice(SAMPLING)
        rest = [] if flag == "--max-new-tokens" else ["--max-new-tokens", "2"]
        value = rng.choice([*SMALL, *HUGE])
        return Input("sample.py", ["runs/finished", "--prompt", "a", *rest, flag, value],
                     f"{flag} {value[:30]}", long=False)  # fmt: skip
    if way == "mix":
        mix = [{"path": "corpus", "weight": rng.choice([1e308, 1e-308, 1, 1e300])} for _ in "123"]
        data = {**CONFIG["data"], "mix": mix}
        del data["path"]
        (place.work / "odd.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data}))
        return Input("train.py", ["odd.yaml", *mode], f"data.mix with weights {mix}")
    if way == "compare":
        flag = rng.choice(["--workers", "--max-seconds", *flags[:1]])
        value = rng.choice([*SMALL, *HUGE])
        rest = [rng.choice(["--dry-run", "--report-only"])]
        return Input("compare.py", ["grid.yaml", "--out-dir", "fresh", flag, value, *rest], flag)
    grid: dict[str, Any] = json.loads(json.dumps(GRID))
    what = rng.choice(["factors", "seeds", "axis", "base", "axes", "hours", "arm"])
    number = rng.choice([10, 24, 40])
    if what == "factors":
        grid["arms"] = {f"f{n}": {"a": {}, "b": {}} for n in range(number)}
        grid |= {"contrasts": [], "pairs": []}
    elif what == "seeds":
        grid["seeds"] = rng.choice([10**5, 10**18, -1, list(range(10**5)), [2**63], [10**400 % 7]])
    elif what == "axis":
        grid["grid"] = {
            "optimizer.learning_rate": [n / 1e6 for n in range(1, 10 ** rng.choice([4, 5]))]
        }
    elif what == "axes":
        names = rng.sample([key for key in NUMBERS if key != "seed"], min(number, 20))
        grid["grid"] = {key: list(range(1, 9)) for key in names}
    elif what == "hours":
        grid["hours"] = rng.choice([1e308, 1e-308, 0, -1, 10**400])
    elif what == "arm":
        grid["arms"]["placement"]["pre"] |= {key: _value(value) for key, value in chosen.items()}
    else:
        grid["options"] = {key: _value(value) for key, value in chosen.items()}
    (place.work / "odd.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return Input(
        "compare.py", ["odd.yaml", "--out-dir", "fresh", "--dry-run"], f"grid: {what}; {note}"
    )


def _value(text: str) -> object:
    return yaml.safe_load(text) if len(text) < 4000 else text


def _merged(tree: dict[str, Any], options: dict[str, str]) -> str:
    """A config's YAML with dotted options on top."""
    tree = json.loads(json.dumps(tree))
    for key, value in options.items():
        *sections, name = key.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[name] = f"mark{value}mark"
    return re.sub(r"mark(.*?)mark", r"\1", yaml.safe_dump(tree, width=9999))


def _as_yaml(options: dict[str, str]) -> list[str]:
    return [f"{key}: {value[:40]}" for key, value in options.items()]


ODD_JSON: list[Any] = [
    *(None, True, -1, 0, 1e299, 10**400, 2**63, -(10**30), 0.5, "", "x", [], {}, [[]], [None]),
    *({"": {}}, "../../outside", "\x1b[2J", float("nan"), float("inf"), "9" * 5000, [0] * 1000),
]
ODD_BYTES = [
    *(b"", b"\n", b"null", b"[]", b"{}", b"\xff\xfe", b"\0" * 100, b"[" * 100_000, b"NaN", b"3"),
    *(b'{"a":' * 50_000, b"\xff" * 8 + b"{}", b"PK\x03\x04", b"9" * 100_000, b'"\\ud800"'),
]


def odd_bytes(rng: random.Random, place: Place) -> Input:
    """Data in an odd format, or random or tampered bytes in a file of the fixture."""
    if rng.random() < 0.5:
        return _odd_data(rng, place)
    given, subject, path = _victim(rng, place, files_only=True)
    raw = path.read_bytes() if path.is_file() else b""
    how = rng.choice(["tamper", "tamper", "tamper", "tamper", "tensors", "odd", "noise", "cut"])
    if how == "tensors" and (
        found := sorted(place.work.glob(f"{subject or '*'}/**/*.safetensors"))
    ):
        path = rng.choice(found)
        given.note = f"{path.relative_to(place.work)}: {_other_tensors(rng, path)}"
    else:
        new, note = _tampered(rng, raw)
        if how == "odd":
            new, note = (choice := rng.choice(ODD_BYTES)), f"{choice[:20]!r}"
        elif how == "cut" and raw:
            new, note = raw[: rng.randrange(len(raw))], "cut"
        path.write_bytes(new)
        given.note = f"{path.relative_to(place.work)}: {note}"
    if rng.random() < 0.6:
        _seal(place.work)
        given.note += ", sealed again"
    return given


def _odd_data(rng: random.Random, place: Place) -> Input:
    source = rng.choice(["text", "text", "jsonl", "parquet", "tokens"])
    names = sorted(path.name for path in place.materials.iterdir())
    fitting = [n for n in names if source in n or (source == "tokens" and n.endswith("bin"))]
    name = rng.choice(rng.choice([names, fitting or names]))
    suffix = rng.choice(["", "", ".txt", ".gz", f".{source}"])
    shutil.copy(place.materials / name, place.work / f"{name}{suffix}")
    flags = ["--data.path", f"{name}{suffix}", "--data.source", source]
    flags += (
        ["--data.tokenizer", rng.choice(["bytes", "chars", "bpe"])] if source != "tokens" else []
    )
    flags += ["--data.invalid-text", "replace"] if rng.random() < 0.2 else []
    flags += ["--data.holdout", "tail"] if rng.random() < 0.6 else []
    if source == "tokens":
        flags += ["--data.dtype", rng.choice(["uint16", "uint32"])]
    if rng.random() < 0.2:
        flags += ["--data.text-field", rng.choice(["doc.text", "doc", "", "\u00e9", "x" * 999])]
    if rng.random() < 0.1:
        arguments = ["runs/finished", "--prompt-file", f"{name}{suffix}", "--max-new-tokens", "2"]
        return Input("sample.py", arguments, f"a prompt: {name}", long=True)
    command, rest = rng.choice([("prepare", []), ("prepare", []), ("train.py", FRESH)])
    return Input(command, ["config.yaml", *flags, *rest], f"{source} data: {name}", long=True)


def _tampered(rng: random.Random, raw: bytes) -> tuple[bytes, str]:
    """Replace or remove a value of JSON or JSON Lines, replace one of YAML, or else some bytes."""
    text = raw.decode("utf-8", "replace")
    lines = text.splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    for whole, part in ((True, text), (False, lines[at] if lines else "")):
        try:
            tree = json.loads(part)
        except ValueError:
            continue
        inside = list(_places(tree))
        if not inside:
            continue
        holder, key = rng.choice(inside)
        value = rng.choice(ODD_JSON)
        if rng.random() < 0.2:
            del holder[key]
            note = f"without {key!r}"
        else:
            holder[key] = value
            note = f"{key!r} = {str(value)[:40]!r}"
        made = json.dumps(tree)
        if not whole:
            lines[at] = made
            made = "\n".join(lines) + "\n"
        return made.encode(), note
    with contextlib.suppress(yaml.YAMLError):
        tree = yaml.safe_load(text)
        if inside := list(_places(tree)):
            holder, key = rng.choice(inside)
            holder[key] = value = rng.choice(ODD_JSON[:13])
            return yaml.safe_dump(tree, sort_keys=False).encode(), f"{key!r} = {str(value)[:40]!r}"
    at = rng.randrange(len(raw) + 1)
    return raw[:at] + rng.randbytes(8) + raw[at + 8 :], f"noise at byte {at}"


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for key, below in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, key
            yield from _places(below)


def _other_tensors(rng: random.Random, path: Path) -> str:
    """Replace a tensor by another of odd type, shape or values."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    changes: dict[str, Callable[[], torch.Tensor]] = {
        "complex": lambda: value.to(torch.complex64),
        "integers": lambda: value.to(torch.int64),
        "booleans": lambda: value.bool(),
        "double": lambda: value.double(),
        "bfloat16": lambda: value.bfloat16(),
        "nan": lambda: torch.full_like(value.float(), float("nan")),
        "inf": lambda: torch.full_like(value.float(), float("inf")),
        "empty": lambda: value[:0] if value.ndim else value.reshape(1)[:0],
        "a scalar": lambda: torch.zeros(()),
        "huge": lambda: torch.zeros(1000, 1000),
    }
    how = rng.choice(sorted(changes))
    tensors[name] = changes[how]().contiguous()
    save_file(tensors, path)
    return f"{name} is {how}"


def _seal(folder: Path) -> None:
    """Rewrite manifests to match the tampered files, as an attacker would."""
    for path in [*folder.rglob("manifest.json"), *folder.rglob("meta.json")]:
        with contextlib.suppress(Exception):
            tree = json.loads(path.read_bytes())
            key = "files" if path.name == "manifest.json" else "others"
            tree[key] = {name: size_and_hash(path.parent / name) for name in tree[key]}
            for file in tree["files"] if key == "others" else ():
                file |= size_and_hash(path.parent / f"{file['name']}.bin")
            path.write_text(json.dumps(tree, indent=2))


NAMES = [
    *("\x1b[31mred\x1b[0m", "a\nb", "a\rb", "\x07bell", "\x9b2J", "\uffff", "\ufffe", "\u202eabc"),
    *("\udcff\udcfe", "$x$", "a$b", "$\\frac{1}{0}$", "$\\bad$", SCRIPT, "<b>&amp;", "%s%n{0}"),
    *('=HYPERLINK("http://x.y")', "+1+1", "@SUM(A1)", "-2+3", "~", "~root", "-x", "--help"),
    *("x" * 255, "x" * 300, "\U0001f600", "CON", "nul.txt", "..", ".", "...", " ", " a ", "'", '"'),
    *("a'b\"c", "a\\b", "a/b", "|a|b|", "`a`", "*", "[a]", "a,b", "a;b", "#", "\u0430", "e\u0301"),
    *("\u2028", "\u00a0", "null", "true", "1e3", "[link](javascript:x)", "![i](http://x)", "__a__"),
]


def odd_names(rng: random.Random, place: Place) -> Input:
    """Odd names of files, folders, runs, arms, factors and levels, titles and questions."""
    name, sure = rng.choice(NAMES), place.work
    plain = name not in ("", ".", "..", "~") and "/" not in name and len(os.fsencode(name)) <= 255
    note, draws = f"the name {ascii(name)[:60]}", rng.random() < 0.15
    way = rng.choice(["out", "run", "config", "compared", "data", "grid", "grid", "grid", "grid",
                      "text", "name", "flag"])  # fmt: skip
    if way in ("run", "config", "compared", "data") and not plain:
        way = "out"
    if way == "out":
        return Input(
            "train.py", ["config.yaml", "--out-dir", name, "--max-seconds", "3"], note, draws=draws
        )
    if way == "run":
        which = rng.choice(["finished", "stopped"])
        (sure / f"runs/{which}").rename(sure / name)
        command, arguments = rng.choice(SUBJECTS[f"runs/{which}"])
        words = [
            word.replace(f"runs/{which}", f"./{name}" if name[0] == "-" else name)
            for word in arguments
        ]
        return Input(command, words, note, draws=draws)
    if way == "config":
        file = f"{name}.yaml" if len(os.fsencode(name)) < 250 else name
        (sure / file).write_text("base: base.yaml\n")
        mode = rng.choice([["--print-config"], ["--dry-run"], ["--max-seconds", "3"]])
        return Input("train.py", [f"./{file}", *mode], note)
    if way == "compared":
        (sure / "compared").rename(sure / name)
        return Input("compare.py", [f"./{name}", "--report-only"], note, draws=draws)
    if way == "data":
        if rng.random() < 0.5:
            (sure / "corpus").rename(sure / name)
            flags = ["--data.path", f"./{name}"]
        else:
            (sure / "corpus/0.txt").rename(sure / f"corpus/{name}")
            flags = []
        return Input("prepare", ["config.yaml", *flags, "--data.cache-dir", "cache2"], note)
    if way == "text":
        return Input(
            "sample.py", ["runs/finished", "--prompt", name, "--max-new-tokens", "2"], note
        )
    if way == "name":
        (sure / "odd.yaml").write_text(json.dumps({"base": "base.yaml", "name": name}))
        return Input("train.py", ["odd.yaml", "--max-seconds", "3"], note)
    if way == "flag":
        flag = rng.choice(["--data.path", "--data.cache-dir", "--data.text-field", "--name",
                           "--data.vocabulary", "--sampling.prompt", "--checkpoint.spare-dir",
                           "--data.source", "--resume"])  # fmt: skip
        return Input("train.py", ["config.yaml", flag, name, *FRESH], f"{flag} {note}")
    grid: dict[str, Any] = json.loads(json.dumps(GRID))
    levels = grid["arms"]["placement"]
    what = rng.choice(["arm", "arm", "factor", "title", "question", "axis"])
    if what == "arm":
        levels[name] = levels.pop("post")
        grid["contrasts"][0]["of"], grid["pairs"] = ["pre", name], [["pre", name]]
    elif what == "factor":
        grid["arms"] = {name: levels}
    elif what == "axis":
        grid["grid"]["sampling.prompt"] = [name, "b"]
    else:
        holder = grid if what == "title" else grid["contrasts"][0]
        holder[what] = name
    text = json.dumps(grid) if "\udcff" in name else yaml.safe_dump(grid, sort_keys=False)
    (sure / "odd.yaml").write_text(text)
    arguments = ["odd.yaml", "--out-dir", "fresh", "--workers", "1"]
    return Input("compare.py twice", arguments, f"{what}: {note}", draws=draws)


def costly_yaml(rng: random.Random, place: Place) -> Input:
    """YAML that is costly to read, deep, wide or long, in a config, base, grid, run or flag."""
    size = rng.choice([10**3, 10**5, 10**6, 2**22 - 100, 2**22 + 100])
    texts: dict[str, Callable[[int], str]] = {
        "sexagesimals": lambda n: "seed: 1" + ":1" * (n // 2),
        "sexagesimal floats": lambda n: "seed: 1" + ":1" * (n // 2) + ".5",
        "digits": lambda n: "seed: " + "9" * n,
        "float digits": lambda n: "seed: 0." + "9" * n,
        "lists": lambda n: "model: " + "[" * n,
        "mappings": lambda n: "{a: " * (n // 4),
        "indentation": lambda n: "\n".join(" " * k + "a:" for k in range(int((2 * n) ** 0.5))),
        "keys": lambda n: "".join(f"k{k}: 1\n" for k in range(n // 10)),
        "the same key": lambda n: "a: 1\n" * (n // 5),
        "items": lambda n: "model: [" + "1," * (n // 2) + "]",
        "long text": lambda n: 'name: "' + "x" * n + '"',
        "escapes": lambda n: 'name: "' + "\\x1b" * (n // 4) + '"',
        "comments": lambda n: "#" * n,
        "line breaks": lambda n: "\n" * n,
        "anchors": lambda n: "".join(f"k{k}: &a{k} x\n" for k in range(n // 14)),
        "aliases": lambda n: "a: &a [x]\nb: [" + "*a," * (n // 3) + "]",
        "merges": lambda n: "{<<: " * (n // 5),
        "tags": lambda n: "a: " + "!!str " * (n // 6),
        "documents": lambda n: "---\n" * (n // 4),
        "base chain": lambda n: "base: next0.yaml",
        "a number for a section": lambda n: "model: 5\ndata: [1]\ntraining: x",
        "a null section": lambda n: "model:\ndata: ~\ntraining: null",
        "spaces": lambda n: "a:" + " " * n + "1",
        "underscores": lambda n: "seed: 1" + "_" * n,
        "timestamps": lambda n: "a: [" + "2001-01-01," * (n // 11) + "]",
        "binary": lambda n: "a: !!binary " + "A" * n,
        "plain lines": lambda n: "name: x\n" + "  y\n" * (n // 4),
        "question marks": lambda n: "? " * (n // 2),
        "dashes": lambda n: "- " * (n // 2),
    }
    name = rng.choice(sorted(texts))
    text = texts[name](size)
    for number in range(300 if name == "base chain" else 0):
        (place.work / f"next{number}.yaml").write_text(f"base: next{number + 1}.yaml")
    where = rng.choice(
        ["config", "config", "base", "grid", "grid base", "run", "comparison", "flag"]
    )
    note = f"{name}, {len(text):,} characters, as {where}"
    if where == "flag":
        flag = rng.choice(["--data.mix", "--data.validation"])
        return Input("train.py", ["config.yaml", flag, text[:100_000], "--print-config"], note)
    file, (command, arguments) = {
        "config": ("config.yaml", ("train.py", ["config.yaml", "--print-config"])),
        "base": ("base.yaml", ("train.py", ["config.yaml", "--dry-run"])),
        "grid": ("grid.yaml", ("compare.py", ["grid.yaml", "--out-dir", "fresh", "--dry-run"])),
        "grid base": (
            "base.yaml",
            ("compare.py", ["grid.yaml", "--out-dir", "fresh", "--dry-run"]),
        ),
        "run": ("runs/finished/config.yaml", rng.choice(SUBJECTS["runs/finished"])),
        "comparison": ("compared/grid.yaml", ("compare.py", ["compared", "--report-only"])),
    }[where]
    (place.work / file).write_text(text)
    return Input(command, list(arguments), note)


Generator = Callable[[random.Random, Place], Input]
KINDS: dict[str, Generator] = {
    "links": links,
    "special": special,
    "sizes": sizes,
    "bytes": odd_bytes,
    "names": odd_names,
    "yaml": costly_yaml,
}

# ---------------------------------------------------------------------------------------------
# Running many inputs

_place: Place
_plain: dict[str, int]


def begin(folder: Path) -> None:
    """In a server: make the fixture, and measure what the plain commands need."""
    global _place, _plain
    torch.set_num_threads(1)
    _place = Place(folder / f"server-{os.getpid()}")
    _place.build()
    _plain = {}
    for command, arguments in PLAIN.items():
        _place.fresh()
        outcome = attempt(Input(command, arguments, "plain"), _place, {}, long=60)
        if outcome.code or set(outcome.failures) - {"time"}:
            raise SystemExit(f"the plain command fails: {outcome}")
        _plain[command] = outcome.memory
    _plain["compare.py twice"] = _plain["compare.py"]


def try_input(kind: str, number: int, seed: int, keep: Path | None) -> Outcome:
    """In a server: make an input, run and judge it."""
    rng = random.Random(f"{seed} {kind} {number}")  # noqa: S311
    _place.fresh()
    given = KINDS[kind](rng, _place)
    outcome = attempt(given, _place, _plain)
    outcome.kind, outcome.number = kind, number
    if outcome.failures and keep is not None:
        for path in (_place.work, _place.outside):
            path.rename(keep / f"{kind}-{number}-{path.name}")
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """Per kind: inputs, how they ended, failures by sort, the worst time and memory."""
    head = ["kind", "inputs", "worked", "refused", "3 or 75", *SORTS, "failed", "worst s", "MiB"]
    rows = [head]
    for kind in [*KINDS, "all"]:
        own = [each for each in outcomes if kind in (each.kind, "all")]
        if not own:
            continue
        codes = Counter(each.code for each in own)
        sorts = Counter(sort for each in own for sort in each.failures)
        numbers = [len(own), codes[0], codes[2], codes[3] + codes[75], *(sorts[s] for s in SORTS)]
        numbers += [sum(bool(each.failures) for each in own)]
        worst = f"{max(each.seconds for each in own):.1f}"
        memory = f"{max(each.memory for each in own) / 2**20:,.0f}"
        rows.append([kind, *map(str, numbers), worst, memory])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def main() -> int:
    """Try the inputs and print the table; returns the exit code."""
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000, help="number of inputs in total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per input, at most")
    parser.add_argument("--minutes", type=float, default=20, help="start no input after this time")
    parser.add_argument("--kind", choices=KINDS, help="try inputs of this kind only")
    parser.add_argument("--only", type=int, help="the input with this number, of --kind")
    parser.add_argument("--keep", type=Path, help="a folder for the files of what failed")
    options = parser.parse_args()
    SECONDS = options.seconds
    if options.only is not None and options.kind is None:
        parser.error("--only: needs --kind")
    kinds = [options.kind] if options.kind else list(KINDS)
    numbers = [(kinds[n % len(kinds)], n // len(kinds)) for n in range(options.inputs)]
    if options.only is not None:
        numbers = [(options.kind, options.only)]
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        context = multiprocessing.get_context("fork")
        workers = min(options.workers, len(numbers))
        with ProcessPoolExecutor(workers, context, begin, (Path(temporary),)) as pool:
            tried = [pool.submit(try_input, *each, options.seed, options.keep) for each in numbers]
            for outcome in _within(options.minutes, tried):
                outcomes.append(outcome)
                for sort, evidence in outcome.failures.items():
                    print(f"FAILED {outcome.kind} {outcome.number} {sort}: {evidence!a}")
                if outcome.failures:
                    print(f"    {ascii(outcome.note)[1:-1]}\n    {ascii(outcome.command)[1:-1]}")
                    print(*(f"    | {ascii(line)[1:-1]}" for line in outcome.said.splitlines()),
                          sep="\n", flush=True)  # fmt: skip
    print(f"\n{table(outcomes)}")
    if len(outcomes) < len(numbers):
        print(f"{len(numbers) - len(outcomes)} of {len(numbers)} inputs did not finish in time")
        return 1
    return 1 if any(outcome.failures for outcome in outcomes) else 0


def _within(minutes: float, tried: list[Future[Outcome]]) -> Iterator[Outcome]:
    """Yield outcomes as they come, for `minutes`; then cancel the inputs that have not begun."""
    try:
        for future in as_completed(tried, timeout=60 * minutes):
            yield future.result()
    except TimeoutError:
        for future in tried:
            future.cancel()


if __name__ == "__main__":
    raise SystemExit(main())

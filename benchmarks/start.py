"""How soon a run starts, and what takes time besides updates: `python benchmarks/start.py`.

    --help          wall time of `train.py`, `sample.py` and `compare.py` with `--help`
    first step      from the command to the first training line of metrics.jsonl, with the data
                    already prepared; measured from outside, by the files that it writes
    imports         of the same command, once more under `-X importtime` (which slows it a little)
    a run's time    share of logging, evaluation, checkpoints, samples and the picture at the end

The first two are measured alternately, `--rounds` times; medians and ranges are printed. For the
last, the methods of a run's loop are timed in a separate process, with the device synchronized
before and after each call; the rest is updates and their batches. The run's settings are the
config's, except for the number of steps (`--steps`). The clock runs from the banner to the result,
so it includes the evaluation before the first update. On a GPU, losses are read every
`training.log_every` steps, so the first line appears after that many.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pkgutil
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpt import metrics, training
from gpt.config import Config, load
from gpt.data.preparation import prepare
from gpt.hardware.device import pick_device
from gpt.run.directory import RunDirectory

ROOT = Path(__file__).parents[1]
COMMANDS = ("train.py", "sample.py", "compare.py")
MARKS = ("set-up", "validation at step 0", "first update")
IMPORTS = ("torch._dynamo", "torch", "matplotlib", "numpy", "pydantic", "yaml", "gpt")
PARTS = {  # of a run's time, and the functions that take it
    "logging": ("gpt.run.run.Run._count_updates",),
    "evaluation": ("gpt.run.run.Run._evaluate",),
    "checkpoints": ("gpt.run.run.Run._save", "gpt.run.run.Run._check_weights"),
    "samples": ("gpt.run.run.Run._sample",),
    "picture and result": ("gpt.run.run.Run.end",),
}
WHOLE = "gpt.training._fit_or_recover"
GOAL = ("logging", "evaluation", "checkpoints")  # parts whose share should stay small


# ---------------------------------------------------------------------------------------------
# Starting


def seconds_of_help(command: str) -> float:
    """Wall time of a command with `--help`."""
    began = time.perf_counter()
    help_command = [sys.executable, str(ROOT / command), "--help"]
    subprocess.run(help_command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def start(config: Path, folder: Path, *options: str) -> tuple[list[float], str]:
    """Train until the first step is logged; returns the seconds until each of MARKS, and stderr.

    Args:
        options: of the Python interpreter.
    """
    run, at = RunDirectory(folder / "run"), []
    train = [str(ROOT / "train.py"), str(config), "--out-dir", str(run.path)]
    with (folder / "stderr").open("wb") as stderr:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *options, *train], stdout=subprocess.DEVNULL, stderr=stderr
        )
        try:
            for reached in (
                run.environment.is_file,
                lambda: _has(run, "val_loss"),
                lambda: _has(run, "loss"),
            ):
                while not reached():
                    if process.poll() is not None and not reached():
                        raise SystemExit(f"{config}: ended before its first step")
                    time.sleep(0.005)
                at.append(time.perf_counter() - began)
        finally:
            process.kill()
            process.wait()
    return at, (folder / "stderr").read_text("utf-8", "replace")


def _has(run: RunDirectory, key: str) -> bool:
    return any(key in record for record in metrics.read(run.metrics))


def seconds_of_imports(report: str) -> dict[str, float]:
    """Seconds of each of IMPORTS and the modules it was first to import, from `-X importtime`.

    A module's line follows those of the modules that it imported, which are indented further, and
    its first number is its own microseconds. What none of IMPORTS imported counts as "other".
    """
    seconds = dict.fromkeys([*IMPORTS, "other"], 0.0)
    above: list[tuple[int, str]] = []  # of each importer: its depth, and what it counts for
    for line in reversed(report.splitlines()):
        if not line.startswith("import time:") or "self [us]" in line:
            continue
        own, _, name = line.removeprefix("import time:").split("|")
        depth = len(name) - len(name.lstrip())
        while above and above[-1][0] >= depth:
            above.pop()
        whose = above[-1][1] if above else "other"
        for each in IMPORTS:
            if f"{name.strip()}.".startswith(f"{each}.") and whose in ("other", "gpt"):
                whose = each
                break
        above.append((depth, whose))
        seconds[whose] += int(own) / 1e6
    return seconds


# ---------------------------------------------------------------------------------------------
# A run's time


def parts_of_a_run(config: Config, folder: Path) -> dict[str, Any]:
    """Train, and time the functions in PARTS: seconds and calls of each, and of the whole run.

    The functions are replaced permanently, so this should run in its own process.
    """
    names = [WHOLE, *(name for names in PARTS.values() for name in names)]
    seconds, calls = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            _wait()
            began = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                _wait()
                seconds[name] += time.perf_counter() - began
                calls[name] += 1

        return call

    for name in names:
        owner, _, attribute = name.rpartition(".")
        home = pkgutil.resolve_name(owner)
        setattr(home, attribute, timed(name, getattr(home, attribute)))
    training.train(config, folder / "run", quiet=True)
    return {"steps": config.training.steps, "seconds": seconds, "calls": calls}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def child(config: Path, steps: int) -> dict[str, Any]:
    """`parts_of_a_run` in a fresh process."""
    command = [sys.executable, __file__, "--config", str(config), "--child", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------
# Command line


def main() -> None:
    """Measure, print the tables last, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="*", help="default: the config's, and 2000")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child is not None:
        with tempfile.TemporaryDirectory() as folder:
            config = load(flags.config, {"training": {"steps": flags.child}})
            print(json.dumps(parts_of_a_run(config, Path(folder))))
        return
    config = load(flags.config)
    prepare(config.data)
    helps: dict[str, list[float]] = {command: [] for command in COMMANDS}
    starts = []
    for number in range(1, flags.rounds + 1):
        for command in COMMANDS:
            helps[command].append(seconds_of_help(command))
        with tempfile.TemporaryDirectory() as folder:
            starts.append(start(flags.config, Path(folder))[0])
        print(f"round {number}: first step after {starts[-1][-1]:.2f} s", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        imports = seconds_of_imports(start(flags.config, Path(folder), "-X", "importtime")[1])
    lengths = [config.training.steps, 2000] if flags.steps is None else flags.steps
    runs = [child(flags.config, steps) for steps in lengths]
    device = pick_device(config.training.device)
    figures = {
        "config": config.name,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "help": helps,
        "starts": starts,
        "imports": imports,
        "runs": runs,
    }
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = [
        f"{figures['config']}; {figures['machine']}, {figures['device']}, {figures['threads']} "
        f"threads; Python {figures['python']}, torch {figures['torch']}",
        "",
        f"| | median of {len(figures['starts'])}, s | range |",
        "|---|---|---|",
    ]
    for command, seconds in figures["help"].items():
        lines.append(f"| `{command} --help` | {_median_and_range(seconds)} |")
    before = [0.0] * len(figures["starts"])
    for mark, at in zip(MARKS, zip(*figures["starts"], strict=True), strict=True):
        own = [later - earlier for later, earlier in zip(at, before, strict=True)]
        lines.append(f"| {mark} | {_median_and_range(own)} |")
        before = list(at)
    lines.append(f"| **command to first step** | {_median_and_range(before)} |")
    lines += ["", "| imports until then, traced | s |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in figures["imports"].items()]
    runs = figures["runs"]
    heads = " | ".join(f"{run['steps']:,} steps" for run in runs)
    lines += ["", f"| share of a run of | {heads} |"]
    lines.append("|---|" + "---|" * len(runs))
    for part in PARTS:
        lines.append(f"| {part} | " + " | ".join(_share(run, part) for run in runs) + " |")
    together = " + ".join(GOAL)
    lines.append(f"| **{together}** | " + " | ".join(_share(run, *GOAL) for run in runs) + " |")
    totals = (f"{run['seconds'][WHOLE]:.1f}" for run in runs)
    lines.append("| whole run, s | " + " | ".join(totals) + " |")
    return "\n".join(lines)


def _median_and_range(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f}"


def _share(run: dict[str, Any], *parts: str) -> str:
    """The parts' share of a run's time; for a single part, also the number of calls."""
    taken = sum(run["seconds"][name] for part in parts for name in PARTS[part])
    times = f" ({run['calls'][PARTS[parts[0]][0]]} times)" if len(parts) == 1 else ""
    return f"{taken / run['seconds'][WHOLE]:.2%}{times}"


if __name__ == "__main__":
    main()

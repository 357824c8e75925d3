"""What looking inside costs: `python benchmarks/diagnostics.py [CONFIG.yaml ...]`.

Each config is trained with and without `diagnostics.every: 50`, in turn, `--rounds` times; the runs
are the same but for the looks. Compared is the time in updates, which leaves out evaluation,
samples and start-up. Printed last: the ratio of each pair's times, its median and range.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpt import metrics
from gpt.config import load
from gpt.training import train

CONFIGS = ["configs/quickstart.yaml", "configs/pre-norm.yaml"]


def seconds(path: str, steps: int, every: int | None, folder: Path) -> float:
    """Time in updates of one run, the first ten left out, in which memory is first touched."""
    options: dict[str, Any] = {
        "diagnostics": {"every": every},
        "training": {"steps": steps},
        "evaluation": {"every": steps, "sequences": 16},
        "sampling": {"tokens": 0},
    }
    train(load(path, options), folder, quiet=True)
    records = metrics.read(folder / "metrics.jsonl")
    return sum(r["step_seconds"] for r in records if "step_seconds" in r and r["step"] > 10)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    rows = []
    for path in flags.configs:
        ratios = []
        for number in range(flags.rounds):
            order = (None, flags.every) if number % 2 == 0 else (flags.every, None)
            taken = {}
            for every in order:
                with tempfile.TemporaryDirectory() as folder:
                    taken[every] = seconds(path, flags.steps, every, Path(folder) / "run")
            ratios.append(taken[flags.every] / taken[None])
            print(f"{path}, round {number + 1}: {taken[None]:.2f} s, {taken[flags.every]:.2f} s")
        rows.append((path, ratios))
    print(f"| config | with a look every {flags.every} steps / without | range |")
    print("|---|---|---|")
    for path, ratios in rows:
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"| `{path}` | {statistics.median(ratios):.3f} | {spread} |")


if __name__ == "__main__":
    main()

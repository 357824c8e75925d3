"""What layer statistics cost: `python benchmarks/diagnostics.py [CONFIG.yaml ...]`.

Each config is trained alternately with and without `diagnostics.every: 50`, `--rounds` times; the
runs are otherwise the same. What is measured is the time in updates, without evaluation, samples
and start-up. The table at the end gives medians and ranges of two numbers: the share of that time
that snapshots of the layers took (how much longer their steps were than the others), and the ratio
of each pair's times, which is as noisy as the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpt import metrics
from gpt.config import load
from gpt.hardware.device import pick_device
from gpt.run.log import READ_EVERY
from gpt.training import train

CONFIGS = ["configs/quickstart.yaml", "configs/pre-norm.yaml"]


def train_once(path: str, steps: int, every: int | None, folder: Path) -> tuple[float, float]:
    """Seconds that one run spent in updates, and the share of them that snapshots took.

    The first ten steps, in which memory is first touched, are left out. The share is what steps
    with a snapshot took beyond the median of the others. Steps whose losses are read together, as
    on a GPU, each count with their mean time.
    """
    options: dict[str, Any] = {
        "diagnostics": {"every": every},
        "training": {"steps": steps},
        "evaluation": {"every": steps, "sequences": 16},
        "sampling": {"tokens": 0},
    }
    config = load(path, options)
    train(config, folder, quiet=True)
    records = metrics.read(folder / "metrics.jsonl")
    times = {
        r["step"]: r["step_seconds"] for r in records if "step_seconds" in r and r["step"] > 10
    }
    together = READ_EVERY.get(pick_device(config.training.device).type, config.training.log_every)
    looked = [s for s in times if every and -s % every < together]
    usual = statistics.median(t for s, t in times.items() if s not in looked)
    total = sum(times.values())
    return total, sum(times[s] - usual for s in looked) / total


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    rows = []
    for path in flags.configs:
        ratios, shares = [], []
        for number in range(flags.rounds):
            taken = {}
            for every in (None, flags.every) if number % 2 == 0 else (flags.every, None):
                with tempfile.TemporaryDirectory() as folder:
                    total, share = train_once(path, flags.steps, every, Path(folder) / "run")
                taken[every] = total
                if every is not None:
                    shares.append(share)
            ratios.append(taken[flags.every] / taken[None])
            print(f"{path}, round {number + 1}: {taken[None]:.2f} s, {taken[flags.every]:.2f} s")
        rows.append((path, shares, ratios))
    print(f"| config | snapshots every {flags.every} steps take | range | with / without | range |")
    print("|---|---|---|---|---|")
    for path, shares, ratios in rows:
        spread = f"{min(shares):.2%} to {max(shares):.2%}"
        others = f"{min(ratios):.3f} to {max(ratios):.3f}"
        middle, ratio = statistics.median(shares), statistics.median(ratios)
        print(f"| `{path}` | {middle:.2%} | {spread} | {ratio:.3f} | {others} |")


if __name__ == "__main__":
    main()

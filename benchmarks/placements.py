"""Every placement at two depths, two rates, with and without warm-up: first and final loss.

    python benchmarks/placements.py [--layers 6 24] [--workers 2]

Bytes of the standard library, 64 wide, `xavier` weights, otherwise configs/pre-norm.yaml: nothing
is clipped and nothing decays. One seed a cell, so this shows the onset of instability and ranks
nobody. Cells are ordinary runs in --out-dir; started again, those that have ended are only read.
The table comes last. "plateaued" is a final loss not 0.05 nats under H₁, that of guessing by byte
frequency; "diverged" a loss that is no longer finite.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpt.config import load

ROOT = Path(__file__).parents[1]
WARMUPS = ("none", "linear")
MARGIN = 0.05  # nats under H₁ that count as having learnt something


@dataclass(frozen=True)
class Cell:
    """One run."""

    placement: str
    layers: int
    rate: float
    warmup: str
    steps: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.placement}-{self.layers}-{self.rate:g}-{self.warmup}-{self.steps}"


def options(cell: Cell) -> dict[str, object]:
    """What the cell changes of configs/pre-norm.yaml."""
    return {
        "name": cell.name,
        "model": {
            "layers": cell.layers,
            "width": 64,
            "heads": 2,
            "norm": {"placement": cell.placement},
            "init": {"regime": "xavier"},
        },
        "schedule": {"warmup": cell.warmup, "warmup_steps": cell.steps // 3},
        "optimizer": {"learning_rate": cell.rate},
        "training": {"steps": cell.steps, "device": "cpu"},
        "evaluation": {"every": cell.steps},
        "sampling": {"tokens": 0},
    }


def run(cell: Cell, out_dir: Path) -> tuple[Cell, str, float, float | None]:
    """Train the cell, or read what it gave: (cell, status, loss at the start, loss at the end)."""
    import torch

    from gpt import metrics
    from gpt.training import train

    torch.set_num_threads(1)
    config = load(ROOT / "configs/pre-norm.yaml", options(cell))
    result = train(config, out_dir / cell.name, quiet=True)
    first = metrics.read(out_dir / cell.name / "metrics.jsonl")[0]["val_loss"]
    return cell, result.status, first, result.val_loss


def main() -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/placements"))
    flags = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    from gpt.data.preparation import prepare
    from gpt.placement import PLACEMENTS

    entropy = prepare(load(ROOT / "configs/pre-norm.yaml").data).unigram_entropy()
    cells = [
        Cell(placement, layers, rate, warmup, flags.steps)
        for layers in flags.layers
        for placement, kind in PLACEMENTS.items()
        if layers >= kind.least_layers
        for rate in flags.rates
        for warmup in WARMUPS
    ]
    began, results = time.monotonic(), {}
    with multiprocessing.get_context("spawn").Pool(flags.workers) as pool:
        waiting = [pool.apply_async(run, (cell, flags.out_dir)) for cell in cells]
        for number, answer in enumerate(waiting, 1):
            cell, status, first, last = answer.get()
            results[cell] = (status, first, last)
            shown = "-" if last is None else f"{last:.3f}"
            print(f"{number}/{len(cells)}  {cell.name}: {status} {shown}", file=sys.stderr)

    print(f"H₁ = {entropy:.3f} nats per byte; {time.monotonic() - began:,.0f} s")
    heads = [f"{rate:g}, {warmup}" for rate in flags.rates for warmup in WARMUPS]
    print("| layers | placement | at the start | " + " | ".join(heads) + " |")
    print("|---|---|---|" + "---|" * len(heads))
    for layers in flags.layers:
        for placement in dict.fromkeys(cell.placement for cell in cells if cell.layers == layers):
            row = []
            for rate in flags.rates:
                for warmup in WARMUPS:
                    cell = Cell(placement, layers, rate, warmup, flags.steps)
                    status, first, last = results[cell]
                    row.append(verdict(status, last, entropy))
            print(f"| {layers} | `{placement}` | {first:.3f} | " + " | ".join(row) + " |")


def verdict(status: str, last: float | None, entropy: float) -> str:
    """A cell of the table."""
    if status == "diverged" or last is None:
        return "diverged"
    return f"{last:.3f}" + (" plateaued" if last >= entropy - MARGIN else "")


if __name__ == "__main__":
    main()

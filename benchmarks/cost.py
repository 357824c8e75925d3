"""How a token's cost depends on the model's size: `python benchmarks/cost.py [--figure PATH]`.

Width, layers and context vary one at a time around a base of 128, 4 and 256, with the same number
of tokens per update. An update does what training does: pre-norm, AdamW, gradient clipping, forward
and backward passes over micro-batches of the size that training would choose; fp32 on a CPU, bf16
on a GPU. Tokens are random, from a vocabulary of 257, so that the head costs little.

Each size runs in its own process, where an update of a small model first loads all code. Peak
memory is what is used beyond that: on a GPU the maximum allocated, on a CPU the growth of the
largest resident set. After each update the process times products of two square matrices. An
update's time multiplied by their rate is the number of operations that matrix products would have
done meanwhile. Divided by the tokens, it is the cost of a token in operations, which depends little
on what else the machine does and can be compared with the FLOPs of `GPT.flops_per_token`,
6 N + 12 L d T. Medians over the updates are reported.

Then the sizes are fitted: power laws for a token's operations, FLOPs and memory (straight lines
through logarithms, with standard errors) and, for the context, a + b T, whose terms are equal at
T* = a/b, where attention's quadratic term takes over. By FLOPs, that is where 12 L d T = 6 N. FLOPs
include the scores of future tokens; an equally efficient kernel that skips them would double T*.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import optimize, stats

VOCABULARY = 257
HEAD = 64  # channels of an attention head
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows of the matrices whose product is timed
TOKENS = {"cpu": 4096, "cuda": 65536}  # per update
MEASURED, ARITHMETIC = "#08519c", "#d95f02"  # distinguishable with color blindness


@dataclass(frozen=True)
class Size:
    """A model's size."""

    layers: int = 4
    width: int = 128
    context: int = 256


FACTORS = {  # each factor's values, tried while the others keep the base's
    "width": (64, 128, 192, 256, 384, 512, 768),
    "layers": (2, 4, 8, 16, 24, 48),
    "context": (64, 128, 256, 512, 1024, 2048, 4096),
}


# ---------------------------------------------------------------------------------------------
# One size, in a process of its own


def measure(size: Size, device_name: str, tokens: int, seconds: float) -> dict[str, Any]:
    """Measure updates of a model of that size, at least two, for that many seconds."""
    import torch

    from gpt.hardware import memory
    from gpt.hardware.device import pick_device

    device = pick_device(device_name)
    update, _, _ = _training(Size(1, HEAD, 8), device, 64)
    update()
    _reset_peak(device)
    before = _peak_bytes(device)
    update, model, config = _training(size, device, tokens)
    for _ in range(2):  # only the second has all at once: activations, gradients, Adam's moments
        update()
    peak = _peak_bytes(device) - before
    _matrix_rate(device)
    times: list[float] = []
    rates: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        began = _now(device)
        update()
        times.append(_now(device) - began)
        rates.append(_matrix_rate(device))
    flops, rate = model.flops_per_token(), tokens / statistics.median(times)
    operations = statistics.median(t * r for t, r in zip(times, rates, strict=True)) / tokens
    cuda = device.type == "cuda"
    return {
        **asdict(size),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "precision": config.training.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": tokens,
        "micro_batch": memory.micro_batch(config, VOCABULARY, device),
        "parameters": model.num_parameters(),
        "flops_per_token": flops,
        "seconds": times,
        "tokens_per_second": rate,
        "flops_per_second": rate * flops,
        "matrix_flops_per_second": statistics.median(rates),
        "operations_per_token": operations,
        "share_of_matrix_rate": flops / operations,
        "peak_bytes": peak,
    }


def _training(size: Size, device: Any, tokens: int) -> tuple[Any, Any, Any]:
    """A function that makes one update, its model and config."""
    import torch

    from gpt.config import Config, validate
    from gpt.hardware import memory
    from gpt.hardware.device import DTYPES
    from gpt.model.gpt2 import GPT
    from gpt.model.init import initialize
    from gpt.optim import Optimizer

    precision = "bf16" if device.type == "cuda" else "fp32"
    tree = {
        "model": {**asdict(size), "heads": size.width // HEAD},
        "optimizer": {"name": "adamw"},
        "training": {"batch_sequences": tokens // size.context, "precision": precision},
    }
    config = validate(Config, tree)
    model = GPT(config.model, VOCABULARY).to(device)
    initialize(model, config.model, seed=0)
    optimizer = Optimizer(model.named_parameters(), config.optimizer)
    shape = (config.batch_sequences, size.context)
    batch = torch.randint(VOCABULARY, shape, device=device)
    micro_batch = memory.micro_batch(config, VOCABULARY, device)

    def update() -> None:
        for x in batch.split(micro_batch):
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                loss, _ = model.loss_fn(x, x)
            (loss * (len(x) / len(batch))).backward()
        norm = torch.nn.utils.get_total_norm(
            p.grad for p in model.parameters() if p.grad is not None
        )
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
        optimizer.step()
        optimizer.zero_grad()

    return update, model, config


def _now(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: Any) -> int:
    """The most memory that has been held so far."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _matrix_rate(device: Any) -> float:
    """FLOP/s of the product of two square matrices, in training's precision; median of 3."""
    import torch

    n, dtype = MATRIX[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(3):
        began = _now(device)
        torch.mm(a, b)
        times.append(_now(device) - began)
    return 2 * n**3 / statistics.median(times)


def measured(size: Size, device: str, tokens: int | None, seconds: float) -> dict[str, Any]:
    """`measure` in a child process. The parent stays small: a child inherits its peak memory."""
    given = json.dumps([asdict(size), device, tokens, seconds])
    command = [sys.executable, __file__, "--child", given]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(given: str) -> dict[str, Any]:
    """Call `measure` with the arguments that `measured` passed on."""
    from gpt.hardware.device import pick_device

    size, device, tokens, seconds = json.loads(given)
    tokens = tokens or TOKENS[pick_device(device).type]
    return measure(Size(**size), device, tokens, seconds)


# ---------------------------------------------------------------------------------------------
# Fits


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """Exponent of a power law, fitted to the logarithms of costs, with its standard error."""
    line = stats.linregress(np.log(sizes), np.log(costs))
    return {"exponent": float(line.slope), "error": float(line.stderr)}


def crossover(contexts: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """Fit a + b T to costs by relative errors: a, b, and T* = a/b with its standard error."""
    (a, b), covariance = optimize.curve_fit(
        lambda T, a, b: a + b * T,
        contexts,
        costs,
        p0=(costs[0], costs[-1] / contexts[-1]),
        sigma=costs,
    )
    gradient = np.array([1 / a, -1 / b])  # of log T*
    error = a / b * math.sqrt(gradient @ covariance @ gradient)
    return {"a": float(a), "b": float(b), "context": float(a / b), "error": float(error)}


def fits(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The fits for each factor that has at least three sizes."""
    found: dict[str, Any] = {}
    for factor, each in rows.items():
        if len(each) < 3:
            continue
        sizes = [row[factor] for row in each]
        operations = [row["operations_per_token"] for row in each]
        flops = [row["flops_per_token"] for row in each]
        found[factor] = {
            "operations": exponent(sizes, operations),
            "flops": exponent(sizes, flops),
            "memory": exponent(sizes, [row["peak_bytes"] for row in each]),
        }
        if factor == "context":
            found["measured T*"] = crossover(sizes, operations)
            found["arithmetic T*"] = crossover(sizes, flops)
    return found


# ---------------------------------------------------------------------------------------------
# What is shown


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    first = next(iter(figures["rows"].values()))[0]
    lines = [
        f"{figures['machine']}; {first['device']}, {first['precision']}, {first['threads']} "
        f"threads; torch {first['torch']}; {first['tokens']:,} tokens an update",
        "",
        "| | parameters | MFLOP/token | sequences at a time | tokens/s | GFLOP/s "
        "| share of matrix rate | peak MB | 16 bytes a parameter, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for factor, rows in figures["rows"].items():
        for row in rows:
            cells = [
                f"{factor} {row[factor]:,}",
                f"{row['parameters']:,}",
                f"{row['flops_per_token'] / 1e6:,.1f}",
                f"{row['micro_batch']:,}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['flops_per_second'] / 1e9:,.1f}",
                f"{row['share_of_matrix_rate']:.0%}",
                f"{row['peak_bytes'] / 1e6:,.0f}",
                f"{16 * row['parameters'] / 1e6:,.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    found = figures["fits"]
    lines += [
        "",
        "| exponent of | a token's operations | FLOPs | peak memory |",
    ]
    lines.append("|---|---|---|---|")
    for factor in figures["rows"]:
        if factor in found:
            cells = [_with_error(found[factor][cost]) for cost in ("operations", "flops", "memory")]
            lines.append(f"| {factor} | {' | '.join(cells)} |")
    if "measured T*" in found:
        ours, theirs = found["measured T*"], found["arithmetic T*"]["context"]
        lines += [
            "",
            f"a + b T: attention's quadratic term takes over at a context of {ours['context']:,.0f}"
            f" ± {ours['error']:,.0f} tokens as measured;",
            f"by FLOPs (12 L d T = 6 N) at {theirs:,.0f}, or at {2 * theirs:,.0f} if future tokens "
            "are skipped",
        ]
    return "\n".join(lines)


def _with_error(fit: dict[str, float]) -> str:
    return f"{fit['exponent']:.2f} ± {fit['error']:.2f}"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Operations per token and peak memory against each factor, with what the arithmetic says."""
    rows, found = figures["rows"], figures["fits"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, len(rows), squeeze=False, sharey="row", sharex="col")
    for (factor, each), (time_axes, memory_axes) in zip(rows.items(), panels.T, strict=True):
        sizes = np.array([row[factor] for row in each])
        operations = np.array([row["operations_per_token"] / 1e6 for row in each])
        flops = [row["flops_per_token"] / 1e6 for row in each]
        time_axes.plot(
            sizes, operations, "o", color=MEASURED, label="time × rate of matrix products"
        )
        time_axes.plot(sizes, flops, color=ARITHMETIC, ls="--", label="FLOPs, 6 N + 12 L d T")
        if factor == "context" and "measured T*" in found:
            star = found["measured T*"]
            fitted = (star["a"] + star["b"] * sizes) / 1e6
            label = f"a + b T, T* = {star['context']:,.0f} ± {star['error']:,.0f}"
            time_axes.plot(sizes, fitted, color=MEASURED, lw=1, label=label)
            time_axes.axvline(star["context"], color=MEASURED, lw=0.8, ls=":")
        elif factor in found:
            fit = found[factor]["operations"]
            scale = np.exp(np.mean(np.log(operations) - fit["exponent"] * np.log(sizes)))
            fitted = scale * sizes ** fit["exponent"]
            label = f"power law, exponent {_with_error(fit)}"
            time_axes.plot(sizes, fitted, color=MEASURED, lw=1, label=label)
        memory = [row["peak_bytes"] / 1e6 for row in each]
        state = [16 * row["parameters"] / 1e6 for row in each]
        memory_axes.plot(sizes, memory, "o-", color=MEASURED, lw=1, label="measured")
        memory_axes.plot(sizes, state, color=ARITHMETIC, ls="--", label="16 bytes a parameter")
        memory_axes.set_xlabel(factor)
        for axes in (time_axes, memory_axes):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=8)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("operations per token (millions)")
    panels[1, 0].set_ylabel("peak memory (MB)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure all sizes, fit, draw and print the tables last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for factor, values in FACTORS.items():
        parser.add_argument(f"--{factor}", type=int, nargs="*", default=values, help="to measure")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tokens", type=int, help="per update; divisible by every context")
    parser.add_argument("--seconds", type=float, default=4.0, help="of updates, for each size")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--figure", type=Path, help="draw them here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child is not None:
        print(json.dumps(child(flags.child)))
        return
    base, done = asdict(Size()), {}  # the base itself is measured once
    wanted = {factor: getattr(flags, factor) for factor in FACTORS}
    rows: dict[str, list[dict[str, Any]]] = {factor: [] for factor in FACTORS if wanted[factor]}
    for factor in rows:
        for value in wanted[factor]:
            size = Size(**{**base, factor: value})
            if size not in done:
                done[size] = measured(size, flags.device, flags.tokens, flags.seconds)
                shown = f"{done[size]['tokens_per_second']:,.0f} tokens/s"
                print(f"{size}: {shown}", file=sys.stderr)
            rows[factor].append(done[size])
    figures = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": rows,
        "fits": fits(rows),
    }
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=2) + "\n")
    if flags.figure:
        draw(figures, flags.figure)
    print(table(figures))


if __name__ == "__main__":
    main()

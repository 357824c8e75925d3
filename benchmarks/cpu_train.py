"""Training on a CPU in nanoGPT's setting: seconds per step, and seconds to a validation loss.

    python benchmarks/cpu_train.py step --text TEXT [--nanogpt CLONE] [--processes 2]
    python benchmarks/cpu_train.py loss --text TEXT [--nanogpt CLONE] [--seeds 3] [--config YAML]

The setting is 4 layers, 4 heads, 128 channels, a context of 64 characters, batches of 12; TEXT is
tiny Shakespeare (1,115,394 bytes). `step` times the steps of steadygpt
(configs/tiny-shakespeare-char.yaml, from its metrics.jsonl), of `transformers` in a plain loop, and
of nanoGPT's model in a loop that does what its train.py does. They take turns, `--rounds` times;
medians are compared with the time of a step's matrix products alone. All compute the exact GELU,
as nanoGPT does; `transformers` is also timed with its own tanh form. `--processes N` also times
steadygpt in N processes of one thread each (DDP). `loss` times whole commands, including start-up:
train.py until it ends, which should reach a loss of at most 1.88 on its validation sequences, and
nanoGPT's train.py, with its README's options for a CPU, until it prints such a loss. The table is
printed last; `--json` writes it to a file.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt import metrics
from gpt.config import Config, load
from gpt.training import train

ROOT = Path(__file__).parents[1]
LOSS = 1.88
BATCH, CONTEXT, VOCABULARY = 12, 64, 65
SKIPPED = 10  # steps of each round, in which memory is first touched
NANOGPT = {  # its README's options for a CPU
    "device": "cpu",
    "compile": "False",
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": CONTEXT,
    "batch_size": BATCH,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "dropout": 0.0,
}


# -- One step ----------------------------------------------------------------------------------


def ours(text: Path, steps: int, processes: int = 1) -> list[float]:
    """Seconds of each step of a steadygpt run, here or in several processes of one thread."""
    options = {
        "data": {"path": [str(text)]},
        "model": {"mlp": {"activation": "gelu"}},
        "training": {"steps": steps, "device": "cpu"},
        "evaluation": {"every": steps, "sequences": BATCH},
        "sampling": {"tokens": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        config = load(ROOT / "configs/tiny-shakespeare-char.yaml", options)
        if processes == 1:
            train(config, Path(folder) / "run", quiet=True)
        else:
            _train_in(processes, config, Path(folder))
        records = metrics.read(Path(folder) / "run/metrics.jsonl")
    return [record["step_seconds"] for record in records if "step_seconds" in record]


def _train_in(processes: int, config: Config, folder: Path) -> None:
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    command = [sys.executable, str(ROOT / "train.py"), f"{folder}/config.yaml"]
    command += ["--out-dir", f"{folder}/run", "--processes", str(processes)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=one_thread)


def loop(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor]
) -> Callable[[Path, int], list[float]]:
    """A plain training loop: random batches, clipping at 1, and every loss is read."""

    def run(text: Path, steps: int) -> list[float]:
        letters = text.read_text("utf-8")
        known = {letter: index for index, letter in enumerate(sorted(set(letters)))}
        data = np.array([known[letter] for letter in letters], dtype=np.uint16)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            starts = torch.randint(len(data) - CONTEXT, (BATCH,)).tolist()
            x, y = (
                torch.stack(
                    [torch.from_numpy(data[i : i + CONTEXT].astype(np.int64)) for i in shifted]
                )
                for shifted in (starts, [i + 1 for i in starts])
            )
            found = loss(x, y)
            found.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found.item()
            seconds.append(time.perf_counter() - began)
        return seconds

    return run


def transformers_loop(activation: str) -> Callable[[Path, int], list[float]]:
    """GPT2LMHeadModel and torch's AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1)
    return loop(model, optimizer, lambda x, y: model(input_ids=x, labels=x).loss)


def nanogpt_loop(clone: Path) -> Callable[[Path, int], list[float]]:
    """The model of nanoGPT and the optimizer that it makes."""
    sys.path.insert(0, str(clone))
    try:
        nano: Any = importlib.import_module("model")
    finally:
        sys.path.pop(0)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "bias": False}
    model = nano.GPT(nano.GPTConfig(block_size=CONTEXT, vocab_size=VOCABULARY, **shape))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    return loop(model, optimizer, lambda x, y: model(x, y)[1])


def matrix_rate() -> float:
    """FLOP/s of fp32 products of a step's size, (768, 128) x (128, 512)."""
    a, b = torch.randn(BATCH * CONTEXT, 128), torch.randn(128, 512)
    best = min(_timed(lambda: a @ b, 50) for _ in range(10))
    return 2 * a.numel() * 512 / best


def _timed(compute: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        compute()
    return (time.perf_counter() - began) / times


def measure_steps(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant."""
    ways: dict[str, Callable[[Path, int], list[float]]] = {"steadygpt": ours}
    own_ways = {"steadygpt": "steadygpt is"}
    if flags.processes > 1:
        together = f"steadygpt, {flags.processes} processes of 1 thread"
        ways[together] = functools.partial(ours, processes=flags.processes)
        own_ways[together] = f"in {flags.processes} processes"
    missing = {}
    try:
        ways["transformers"] = transformers_loop("gelu")
        ways["transformers, gelu_new"] = transformers_loop("gelu_new")
    except ImportError as error:
        missing["transformers"] = str(error)
    if flags.nanogpt is None:
        missing["nanoGPT"] = "--nanogpt is not given"
    else:
        ways["nanoGPT"] = nanogpt_loop(flags.nanogpt)
    rate = matrix_rate()
    tokens = BATCH * CONTEXT
    limit = tokens * 6 * (4 * 12 * 128**2 + VOCABULARY * 128) / rate  # matrix products alone
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(flags.rounds):
        for way, run in ways.items():
            taken[way].append(statistics.median(run(flags.text, flags.steps + SKIPPED)[SKIPPED:]))
        said = ", ".join(f"{way} {1e3 * times[-1]:.1f} ms" for way, times in taken.items())
        print(f"round {number + 1}: {said}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for way, times in taken.items():
        ratios = {
            name: statistics.median(a / b for a, b in zip(times, taken[own], strict=True))
            for own, name in own_ways.items()
        }
        rows.append(
            {
                "way": way,
                "ms a step": 1e3 * statistics.median(times),
                "range": [1e3 * min(times), 1e3 * max(times)],
                "tokens/s": tokens / statistics.median(times),
                "of the matrix rate": limit / statistics.median(times),
                **ratios,
            }
        )
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; those of a step: {1e3 * limit:.1f} ms")
    titles = ["way", "ms a step", "range", "tokens/s", "of the matrix rate", *own_ways.values()]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        low, high = row["range"]
        compared = [
            "" if row["way"] == own else f"{row[name]:.2f}x" for own, name in own_ways.items()
        ]
        print(
            f"| {row['way']} | {row['ms a step']:.1f} | {low:.1f} to {high:.1f} | "
            f"{row['tokens/s']:,.0f} | {row['of the matrix rate']:.0%} | {' | '.join(compared)} |"
        )
    for way, why in missing.items():
        print(f"| {way} | not measured: {why} |{' |' * (len(titles) - 2)}")
    return rows


# -- Seconds to a loss -------------------------------------------------------------------------


def our_seconds(config: Path, text: Path, seed: int) -> dict[str, Any]:
    """The command, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), str(config.absolute())]
        command += ["--data.path", str(text.absolute())]
        command += ["--out-dir", f"{folder}/run", "--seed", str(seed)]
        began = time.monotonic()
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        seconds = time.monotonic() - began
        result = json.loads(Path(folder, "run/result.json").read_text())
    steps, loss = result["step"], result["val_loss"]
    return {"way": f"steadygpt, seed {seed}", "seconds": seconds, "loss": loss, "steps": steps}


def nanogpt_seconds(clone: Path, text: Path) -> dict[str, Any]:
    """Its train.py, from its start until it prints a validation loss of LOSS or less."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(clone, Path(folder) / "nanogpt"))
        _nanogpt_data(copy / "data/shakespeare_char", text)
        command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py"]
        command += [f"--{key}={value}" for key, value in NANOGPT.items()]
        began = time.monotonic()
        with subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, text=True) as process:
            lowest = float("inf")
            for step, loss in _printed(process.stdout or ()):
                lowest = min(lowest, loss)
                if loss <= LOSS:
                    process.terminate()
                    seconds = time.monotonic() - began
                    return {"way": "nanoGPT", "seconds": seconds, "loss": loss, "steps": step}
    return {"way": "nanoGPT", "seconds": time.monotonic() - began, "loss": lowest, "steps": None}


def _nanogpt_data(folder: Path, text: Path) -> None:
    """What its prepare.py makes: 90% and 10% of the characters as numbers, and their meaning."""
    letters = text.read_text("utf-8")
    known = {letter: index for index, letter in enumerate(sorted(set(letters)))}
    numbers = np.array([known[letter] for letter in letters], dtype=np.uint16)
    cut = int(0.9 * len(letters))
    numbers[:cut].tofile(folder / "train.bin")
    numbers[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(known), "stoi": known, "itos": {i: c for c, i in known.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def _printed(lines: Iterator[str] | Sequence[str]) -> Iterator[tuple[int, float]]:
    for line in lines:
        found = re.search(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", line)
        if found:
            yield int(found[1]), float(found[2])


def measure_seconds(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each run."""
    rows = []
    if flags.nanogpt is not None:
        rows.append(nanogpt_seconds(flags.nanogpt, flags.text))
        print(rows[-1], file=sys.stderr)
    for seed in range(flags.seeds):
        rows.append(our_seconds(flags.config, flags.text, seed))
        print(rows[-1], file=sys.stderr)
    print("| way | seconds, start included | steps | validation loss | at most 1.88 |")
    print("|---|---|---|---|---|")
    for row in rows:
        reached = "yes" if row["loss"] <= LOSS else "no"
        print(
            f"| {row['way']} | {row['seconds']:.1f} | {row['steps'] or 'all'} | "
            f"{row['loss']:.3f} | {reached} |"
        )
    if flags.nanogpt is None:
        print("| nanoGPT | not measured: --nanogpt is not given | | | |")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["step", "loss"])
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--processes", type=int, default=1, help="for `step`: also time so many")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="timed in each round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs/tiny-shakespeare-fast.yaml",
        help="for `loss`",
    )
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = measure_steps(flags) if flags.what == "step" else measure_seconds(flags)
    if flags.json is not None:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        flags.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Training speed on one GPU: `python benchmarks/gpu_train.py`, at most 8 minutes.

GPT-2 124M at context 1,024 in bf16 (`configs/gpt2-124m.yaml`, 491,520 tokens per update) is trained
by `gpt.train` itself, with its loop, data and metrics. It is compared with GPT2LMHeadModel of
`transformers` and a plain loop over torch's own modules, on one batch that is already on the GPU.

    micro-batches   which one is fastest on random tokens; all other rows use it
    peers           the same model in other programs, also at the next smaller micro-batch
    tokens          real ones: --data FILE of uint16 ids below 50,257, or the standard library
    switches        one optimization changed at a time
    placements      all others, compared with pre-norm

Every row runs in its own process, so an error or a lack of memory costs only that row. The rows of
a wave start and compile at the same time; then each is timed alone, while the others wait. Rows run
in order of importance, and those that come too late are "not measured: out of time". --only selects
rows by words in their groups and names, and --micro-batch skips the search, so that several
commands can share what takes one too long. "Of the matrix rate" is the model's FLOP/s (6 N + 12
L d T per token) relative to a bf16 product of two matrices of 8,192 rows, measured first. The loss
is that of an early update, which a switch may change only by rounding. The table is printed last;
--out writes it as JSON. --small runs everything at toy size on a CPU, without compilation: it shows
that the commands work, but nothing about speed.

Left out: fp8. `torch._scaled_mm` needs scales for inputs, weights and gradients, and a backward
pass written by hand, which is more than a few lines.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt import metrics, optim, training
from gpt.config import Config, OptimizerConfig, load, merge
from gpt.data import tokenizer
from gpt.data.preparation import prepare
from gpt.errors import InputError, format_error
from gpt.hardware import memory
from gpt.io.files import write_text
from gpt.model import gpt2
from gpt.model.placement import PLACEMENTS
from gpt.run import log as run_log

ROOT = Path(__file__).parents[1]
BEGAN = time.monotonic()
RESERVE = 10.0  # seconds of the budget that are left for ending
WARM = 2  # updates between the first one, which compiles, and the timed ones
OUT_OF_MEMORY, OUT_OF_TIME = "out of memory", "not measured: out of time"
AIM, AIM_RATIO = 520_000, 1.3  # tokens/s on one H200, and their ratio to the best peer's
YARDSTICKS = {"llm.c on several H100s, per GPU": 463_000, "a tuned loop, one A100": 142_000}

Measured = dict[str, Any]  # of one row: tokens_per_second, peak_memory, ..., or only a note


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    options: dict[str, Any]  # on top of configs/gpt2-124m.yaml
    vocabulary: int
    micro_batches: tuple[int, ...]
    updates: int  # timed
    chunk: int  # tokens, for training.loss_chunk
    matrix: int  # rows


FULL = Size({}, 50257, (8, 16, 32, 60), 5, 8192, 8192)
TOY: dict[str, Any] = {
    "model": {"layers": 4, "heads": 2, "width": 32, "context": 32},
    "training": {"batch_tokens": 256, "compile": False},
}
SMALL = Size(TOY, 1000, (4, 8), 2, 64, 128)


@dataclass(frozen=True)
class Row:
    """One line of the table, and what its process trains.

    Attributes:
        trainer: a key of `TRAINERS`.
        options: on top of the config (steadygpt).
        switch: a key of `SWITCHES`, or empty (steadygpt).
    """

    group: str
    name: str
    micro_batch: int
    trainer: str = "steadygpt"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    switch: str = ""


@dataclass(frozen=True)
class Work:
    """What all rows share: the size, the folder for data and runs, and a file of real tokens."""

    small: bool
    folder: str
    file: str | None

    @property
    def size(self) -> Size:
        """Toy or full."""
        return SMALL if self.small else FULL

    def config(self, row: Row, data: dict[str, Any] | None = None) -> Config:
        """The shipped config with the row's options, on `data` or else on random tokens."""
        run = {
            "data": data or self.token_file(f"{self.folder}/random.bin"),
            "training": {
                "steps": 10**6,
                "micro_batch": row.micro_batch,
                "log_every": self.size.updates,
            },
            "evaluation": {"every": 10**6, "sequences": 1},
            "checkpoint": {"every": None},
            "sampling": {"tokens": 0},
        }
        options = merge(merge(run, self.size.options), row.options)
        return load(ROOT / "configs/gpt2-124m.yaml", options)

    def token_file(self, path: str) -> dict[str, Any]:
        """Options that train on a file of token ids; which text they stand for does not matter."""
        return {
            "source": "tokens",
            "path": path,
            "validation": {"path": path},
            "tokenizer": "file",
            "vocabulary": f"{self.folder}/vocabulary.json",
            "cache_dir": f"{self.folder}/cache",
        }

    def prepare_random_tokens(self) -> None:
        """Prepare a file of random tokens, with a vocabulary of all bytes, then pairs of bytes."""
        folder, size = Path(self.folder), self.size.vocabulary
        single = [bytes([byte]) for byte in range(256)]
        pairs = [bytes(divmod(number, 256)) for number in range(size - 257)]
        encoding = tokenizer.Encoding("bpe", [*single, *pairs])
        write_text(folder / "vocabulary.json", tokenizer.to_json(encoding))
        config = self.config(Row("", "", 1))
        count = (self.size.updates + WARM + 2) * config.batch_sequences * config.model.context
        tokens = np.random.default_rng(0).integers(size, size=count, dtype=np.uint16)
        tokens.tofile(folder / "random.bin")
        prepare(config.data)

    def real_tokens(self) -> tuple[dict[str, Any], str]:
        """Options that train on real tokens with a vocabulary of the model's size, and a note."""
        if self.file is not None:
            return self.token_file(self.file), self.file
        size = self.size.vocabulary
        at_hand = all(tokenizer.gpt2_file(name).is_file() for name in tokenizer.GPT2_FILES)
        kind = "gpt2" if at_hand and not self.small else "bpe"
        cache = f"{self.folder}/cache"
        data = {"source": "stdlib", "tokenizer": kind, "vocab_size": size, "cache_dir": cache}
        return data, f"the standard library, {kind} vocabulary of {size:,}"


# ---------------------------------------------------------------------------------------------
# In a row's own process: the clock, and what it times


class Timed(Exception):  # noqa: N818 - ends training, and is not an error
    """All updates are timed."""


class Clock:
    """Called after each update, as `gpt.train` calls its `on_update`.

    Until its first update is done, a row shares the lock with the other rows of its wave; then it
    waits until it has the lock to itself.

    Attributes:
        seconds: of the timed updates.
        start: seconds from the end of this module's imports to the end of the first update.
        peak: peak memory in bytes: torch's during the timed updates on a GPU, otherwise the
            process's.
    """

    def __init__(self, updates: int, lock: TextIO) -> None:
        self.timed, self.lock = updates, lock
        self.updates = 0
        self.start = self.began = self.seconds = 0.0
        self.peak = 0
        fcntl.flock(lock, fcntl.LOCK_SH)

    def __call__(self) -> None:
        self.updates += 1
        on_gpu = torch.cuda.is_available()
        if on_gpu and self.updates in (1, 1 + WARM, 1 + WARM + self.timed):
            torch.cuda.synchronize()
        if self.updates == 1:
            self.start = time.monotonic() - BEGAN
            if on_gpu:
                torch.cuda.empty_cache()
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        elif self.updates == 1 + WARM:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            self.began = time.monotonic()
        elif self.updates == 1 + WARM + self.timed:
            self.seconds = time.monotonic() - self.began
            self.peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident()
            raise Timed


def peak_resident() -> int:
    """The most bytes of memory that this process has had; ru_maxrss counts its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def steadygpt(row: Row, work: Work, clock: Clock) -> Measured:
    """`gpt.train`, ended by the clock."""
    data, note = work.real_tokens() if row.group == "tokens" else (None, "")
    out = Path(work.folder) / f"run-{os.getpid()}"
    config = work.config(row, data)
    prepare(config.data)  # before training, which is timed
    # Neither a retry with smaller micro-batches, nor a search for the one that fits.
    no_retry = mock.patch("gpt.hardware.memory.smaller", return_value=None)
    no_search = mock.patch("gpt.run.recovery.smaller", return_value=None)
    with (
        SWITCHES.get(row.switch, contextlib.nullcontext)(),
        no_retry,
        no_search,
        contextlib.suppress(Timed),
    ):
        training.train(config, out, quiet=True, on_update=clock)
    updates = [line for line in metrics.read(out / "metrics.jsonl") if "loss" in line]
    return {"loss": updates[work.size.updates - 1]["loss"], "note": note}


class Block(nn.Module):
    """A pre-norm block of the plain loop."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, h, d/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, h, T, d/h)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Plain(nn.Module):
    """GPT-2 in half a page; its vocabulary is a multiple of 64 from the start, as is usual."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        shape = config.model
        self.tokens = nn.Embedding(vocabulary + -vocabulary % 64, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        blocks = (Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(shape.width))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss; both (B, T) integers."""
        hidden = self.blocks(self.tokens(x) + self.positions.weight)
        logits = F.linear(hidden, self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


class HuggingFace(nn.Module):
    """GPT2LMHeadModel without dropout; its default is torch's attention, flash on a GPU."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        import transformers

        shape = config.model
        self.gpt2 = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocabulary,
                n_positions=shape.context,
                n_embd=shape.width,
                n_layer=shape.layers,
                n_head=shape.heads,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss on x's own next tokens: the model shifts them itself, so y is not needed."""
        return self.gpt2(input_ids=x, labels=x).loss


def peer(
    make: Callable[[Config, int], nn.Module], compiled: bool, row: Row, work: Work, clock: Clock
) -> Measured:
    """The usual loop: autocast, accumulation, clipping, fused AdamW; losses are never read."""
    config, rule = work.config(row), work.config(row).optimizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = make(config, work.size.vocabulary).to(device)
    loss_of = torch.compile(net) if compiled else net
    betas, decay = (rule.beta1, rule.beta2), rule.weight_decay
    optimizer = torch.optim.AdamW(
        net.parameters(), rule.learning_rate, betas, weight_decay=decay, fused=True
    )
    shape = (config.batch_sequences, config.model.context)
    x, y = (torch.randint(work.size.vocabulary, shape, device=device) for _ in range(2))
    parts = list(zip(x.split(row.micro_batch), y.split(row.micro_batch), strict=True))
    with contextlib.suppress(Timed):
        while True:
            for part in parts:
                with torch.autocast(device, torch.bfloat16):
                    loss = loss_of(*part) / len(parts)
                loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock()
    return {}


PEERS = ("plain PyTorch loop, compiled", "transformers, compiled", "transformers, eager")
TRAINERS: dict[str, Callable[[Row, Work, Clock], Measured]] = {
    "steadygpt": steadygpt,
    PEERS[0]: partial(peer, Plain, True),
    PEERS[1]: partial(peer, HuggingFace, True),
    PEERS[2]: partial(peer, HuggingFace, False),
}


@contextlib.contextmanager
def cuda_graphs() -> Iterator[None]:
    """What torch.compile's mode "reduce-overhead" switches on."""
    import torch._inductor.config as inductor

    with inductor.patch({"triton.cudagraphs": True}):
        yield


def adamw_not_fused(groups: optim.ParamGroups, c: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with the kernels that torch chooses."""
    return torch.optim.AdamW(groups, c.learning_rate, (c.beta1, c.beta2), c.eps)


# Changes for which the config has no option.
SWITCHES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "vocabulary not padded": lambda: mock.patch.dict(gpt2.VOCABULARY_MULTIPLE, clear=True),
    "AdamW not fused": lambda: mock.patch.dict(optim.OPTIMIZERS, adamw=adamw_not_fused),
    "cuDNN attention": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "flash attention": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "CUDA graphs": cuda_graphs,
    "metrics read at every step": lambda: mock.patch.dict(run_log.READ_EVERY, {"cuda": 1}),
}


def matrix_flops(rows: int) -> float:
    """FLOP/s of a bf16 product of two square matrices, the best of five rounds of ten."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(rows, rows, device=device).bfloat16() for _ in range(2))
    rates = []
    for _ in range(6):  # of which the first warms up
        began = time.monotonic()
        for _ in range(10):
            c = a @ b
        c[0, 0].item()  # waits for all of them
        rates.append(10 * 2 * rows**3 / (time.monotonic() - began))
    return max(rates[1:])


def measure(row: Row, work: Work) -> Measured:
    """Train in this process; returns what was measured, or why nothing was."""
    try:
        with open(f"{work.folder}/lock", "a") as lock:
            clock = Clock(work.size.updates, lock)
            found = TRAINERS[row.trainer](row, work, clock)
    except ModuleNotFoundError as error:
        return {"note": f"not measured: {error.name} is not installed"}
    except Exception as error:
        if memory.is_out_of_memory(error):
            return {"note": OUT_OF_MEMORY}
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return {"note": f"failed: {said[:160]}"}
    config = work.config(row)
    tokens = work.size.updates * config.batch_sequences * config.model.context
    times = {"tokens_per_second": tokens / clock.seconds, "start_seconds": clock.start}
    return {**times, "peak_memory": clock.peak, **found}


# ---------------------------------------------------------------------------------------------
# The rows


def searched(size: Size) -> list[Row]:
    """The rows of steadygpt, one for each micro-batch."""
    return [Row("micro-batches", "steadygpt", number) for number in size.micro_batches]


def others(size: Size, best: int) -> list[Row]:
    """All other rows, the most important first, at the best micro-batch."""
    smaller = max((n for n in size.micro_batches if n < best), default=best)
    options: dict[str, dict[str, Any]] = {
        "not compiled": {"training": {"compile": False}},
        f"loss in chunks of {size.chunk:,} tokens": {"training": {"loss_chunk": size.chunk}},
    }
    placements: list[str] = [name for name in PLACEMENTS if name != "pre"]
    return [
        *(Row("peers", name, best, name) for name in PEERS),
        Row("tokens", "real tokens", best),
        *(Row("switches", name, best, switch=name) for name in SWITCHES),
        *(Row("switches", name, best, options=each) for name, each in options.items()),
        *(Row("peers", name, smaller, name) for name in PEERS[:2] if smaller < best),
        *(
            Row("placements", name, best, options={"model": {"norm": {"placement": name}}})
            for name in placements
        ),
    ]


class Budget:
    """Runs rows, wave by wave, as long as there is time."""

    def __init__(self, work: Work, together: int, seconds: float) -> None:
        self.work, self.together = work, together
        self.end = BEGAN + seconds - RESERVE
        cores = max(1, (os.cpu_count() or 1) // together)
        self.environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(cores)}
        if work.small:
            self.environment |= {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def measured(self, rows: list[Row]) -> list[tuple[Row, Measured]]:
        """What each row's process measured; a row that ran out of memory is repeated alone."""
        results: list[tuple[Row, Measured]] = []
        for first in range(0, len(rows), self.together):
            wave = rows[first : first + self.together]
            with ThreadPoolExecutor(self.together) as pool:
                found = list(pool.map(self.one, wave))
            for row, result in zip(wave, found, strict=True):
                if result["note"] == OUT_OF_MEMORY and len(wave) > 1:
                    result = self.one(row)
                results.append((row, result))
        return results

    def one(self, row: Row) -> Measured:
        """Run a row in its own process; returns a note, and what was measured."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            return {"note": OUT_OF_TIME}
        task = json.dumps({"row": dataclasses.asdict(row), "work": dataclasses.asdict(self.work)})
        result, log = (
            Path(tempfile.mkstemp(dir=self.work.folder, suffix=end)[1]) for end in (".json", ".log")
        )
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--row", task, "--out", str(result)],
                    env=self.environment,
                    stdout=file,
                    stderr=file,
                    timeout=seconds,
                )
            except subprocess.TimeoutExpired:
                return {"note": OUT_OF_TIME}
        if done.returncode:
            lines = log.read_text(errors="replace").splitlines() or [""]
            return {"note": f"failed: exit code {done.returncode}: {lines[-1][:160]}"}
        measured: Measured = {"note": "", **json.loads(result.read_text())}
        speed = measured.get("tokens_per_second")
        said = measured["note"] if speed is None else f"{speed:,.0f} tokens/s"
        print(f"{row.name}, {row.micro_batch} at a time: {said}", file=sys.stderr)
        return measured


def table(report: dict[str, Any]) -> str:
    """The rows as a table, and a summary."""
    heads = ("", "micro-batch", "tokens/s", "of matrix rate", "of steadygpt", "peak memory, GiB")
    lines = [
        f"| {' | '.join([*heads, 'start, s', 'loss', 'note'])} |",
        "|" + "---|" * (len(heads) + 3),
    ]
    for row in report["rows"]:
        cells = [f"{row['group']}: {row['name']}", str(row["micro_batch"])]
        if "tokens_per_second" in row:
            loss = row.get("loss")
            cells += [
                f"{row['tokens_per_second']:,.0f}",
                "" if row["of_matrices"] is None else f"{row['of_matrices']:.1%}",
                "" if row["of_steadygpt"] is None else f"{row['of_steadygpt']:.3f}",
                f"{row['peak_memory'] / 2**30:.2f}",
                f"{row['start_seconds']:.0f}",
                "" if loss is None else f"{loss:.4f}",
            ]
        else:
            cells += [""] * 6
        lines.append(f"| {' | '.join([*cells, row['note']])} |")
    return "\n".join([*lines, "", *verdict(report)])


def verdict(report: dict[str, Any]) -> list[str]:
    """A summary of the rows."""
    rows = [row for row in report["rows"] if "tokens_per_second" in row]
    rate = report["matrix_flops"]
    matrices = "not measured" if rate is None else f"{rate / 1e12:,.3g} TFLOP/s"
    lines = [f"{report['device']}, torch {report['torch']}; bf16 matrices: {matrices}"]
    speed = report["tokens_per_second"]
    if speed is None:
        return [*lines, "steadygpt: not measured"]
    lines.append(f"steadygpt: {speed:,.0f} tokens/s, {report['best_micro_batch']} at a time")
    peers = [row for row in rows if row["group"] == "peers"]
    if peers:
        best = max(peers, key=lambda row: row["tokens_per_second"])
        ratio = speed / best["tokens_per_second"]
        lines.append(f"{ratio:.2f}x the best peer, {best['name']}; the aim is {AIM_RATIO}x")
    placements = [row for row in rows if row["group"] == "placements"]
    if placements:
        slowest = min(placements, key=lambda row: row["tokens_per_second"])
        lines.append(f"slowest placement: {slowest['name']}, {slowest['of_steadygpt']:.2f}x pre")
    if report["small"]:
        return [*lines, "toy size on a CPU: these numbers are not speeds"]
    lines.append(f"{speed / AIM:.2f}x the aim of {AIM:,} tokens/s on an H200")
    return [*lines, *(f"{speed / n:.2f}x {name}, {n:,}" for name, n in YARDSTICKS.items())]


def run(flags: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Measure the micro-batches, then all other rows that --only selects."""
    work = Work(flags.small, folder, flags.data)
    budget = Budget(work, flags.together, 60 * flags.minutes)
    work.prepare_random_tokens()
    config = work.config(Row("", "", 1))
    with torch.device("meta"):
        flops = gpt2.GPT(config.model, work.size.vocabulary).flops_per_token()
    matrices = budget.one(Row("matrices", "matrices", 0))
    rate = matrices.get("matrix_flops")
    search = searched(work.size)
    if flags.micro_batch is not None:
        search = [dataclasses.replace(search[0], micro_batch=flags.micro_batch)]
    results = budget.measured(search)
    speeds = {row.micro_batch: found.get("tokens_per_second", 0.0) for row, found in results}
    best = max(speeds, key=lambda number: speeds[number])
    results += budget.measured(
        [
            row
            for row in others(work.size, best)
            if not flags.only or any(word in f"{row.group}: {row.name}" for word in flags.only)
        ]
    )
    rows = []
    for row, found in results:
        line = {"group": row.group, "name": row.name, "micro_batch": row.micro_batch, **found}
        if "tokens_per_second" in found:
            speed = found["tokens_per_second"]
            line["of_matrices"] = speed * flops / rate if rate else None
            line["of_steadygpt"] = speed / speeds[best] if speeds[best] else None
        rows.append(line)
    return {
        "command": [Path(__file__).name, *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%d"),
        "device": "CPU" if work.small else torch.cuda.get_device_name(),
        "machine": platform.platform(),
        "torch": torch.__version__,
        "small": flags.small,
        "matrix_flops": rate,
        "flops_per_token": flops,
        "best_micro_batch": best,
        "tokens_per_second": speeds[best] or None,
        "rows": rows,
        "seconds": time.monotonic() - BEGAN,
    }


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy size on a CPU")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="groups or rows, by their names")
    parser.add_argument("--micro-batch", type=int, help="in place of the search for the best")
    parser.add_argument("--data", metavar="FILE", help="real tokens: uint16 ids, like nanoGPT's")
    parser.add_argument("--minutes", type=float, default=8, help="time limit for everything")
    parser.add_argument("--together", type=int, default=4, help="rows that compile side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-train.json"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.row:
        task = json.loads(flags.row)
        row, work = Row(**task["row"]), Work(**task["work"])
        if row.group == "matrices":
            found: Measured = {"matrix_flops": matrix_flops(work.size.matrix)}
        else:
            found = measure(row, work)
        flags.out.write_text(json.dumps(found))
        return
    try:
        if not flags.small and not torch.cuda.is_available():
            raise InputError(
                "gpu_train.py needs a CUDA GPU with bf16, and finds none here;\n"
                "--small runs all of it at toy size on a CPU"
            )
        if flags.data is not None and not Path(flags.data).is_file():
            raise InputError(f"--data: {flags.data}: no such file")
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            report = run(flags, folder)
    except InputError as error:
        print("\n".join(format_error(error)), file=sys.stderr)
        sys.exit(2)
    write_text(flags.out, json.dumps(report, indent=2) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()

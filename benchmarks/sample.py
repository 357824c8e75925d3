"""Sampling speed: `python benchmarks/sample.py [--nanogpt CLONE]`.

GPT-2's 124M shape with random weights adds 64 tokens to a prompt of 16, at temperature 1 and batch
sizes 1 and 16. The contestants, all with the same number of parameters:

    steadygpt       optimize_for_inference, then generate_tokens: what sample.py does
    transformers    GPT2LMHeadModel.generate; on a GPU also with a static cache, compiled
    nanoGPT         model.generate of the clone that --nanogpt names; it keeps no cache

Tokens per second cover everything from the call to the last token, including reading the prompt,
but not what only a first call does (compiling, capturing). Contestants take turns, so that a busy
machine affects all alike; each one's fastest round counts. A contestant that fails gets a row too.

The limit is memory bandwidth: a step reads every weight once, except the position embeddings. The
bytes of these weights divided by the speed of plain reads (summing as many numbers, timed in the
same rounds) are roughly the minimum time of a step in fp32. "Of the limit" is a contestant's speed
relative to that limit, and may exceed 100% with fewer bits. On a CPU, two more rows time a step's
matrix products alone, in torch's layout and in steadygpt's.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig, Sampling, Weights
from gpt.generation import Decoder, generate_tokens
from gpt.hardware.device import pick_device
from gpt.inference import PackedLinear, SlicedLinear, optimize_for_inference
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize

SAMPLING = Sampling(temperature=1.0)
READS = "limit: plain reads"
STEPS = 20  # in each round of a limit
Step = Callable[[], object]
Run = Callable[[int], object]  # generates this many tokens per sample


# ---------------------------------------------------------------------------------------------
# The contestants: each builds a model and returns a function that generates


class Task:
    """What every contestant does.

    Args:
        flags: shape, prompt, device.
        batch: number of samples.
    """

    def __init__(self, flags: argparse.Namespace, batch: int) -> None:
        self.batch, self.nanogpt = batch, flags.nanogpt
        self.device = pick_device(flags.device)
        self.shape = ModelConfig(
            layers=flags.layers, heads=flags.heads, width=flags.width, context=flags.context
        )
        self.vocab_size, self.tokens = flags.vocab_size, flags.tokens
        self.prompt = torch.randint(
            self.vocab_size, (flags.prompt,), generator=torch.Generator().manual_seed(0)
        ).tolist()

    def prompts(self) -> Tensor:
        """(batch, prompt) token ids."""
        return torch.tensor([self.prompt] * self.batch, device=self.device)


def steadygpt(task: Task, weights: Weights, compiled: bool = False) -> Run:
    """`generate_tokens`, with a Decoder that all calls share, as windows of one long text do."""
    model = plain(task)
    optimize_for_inference(model, weights, task.batch)
    size = len(task.prompt) + task.tokens
    decoder = Decoder(model, task.batch, size=size, compiled=compiled)

    def run(tokens: int) -> object:
        steps = generate_tokens(
            model,
            task.prompt,
            samples=task.batch,
            tokens=tokens,
            sampling=SAMPLING,
            seed=0,
            stop=-1,
            decoder=decoder,
        )
        return list(steps)

    return run


def plain(task: Task) -> GPT:
    """The model before `optimize_for_inference`, with random weights."""
    model = GPT(task.shape, task.vocab_size)
    initialize(model, task.shape, seed=0)
    return model.to(task.device).eval().requires_grad_(False)


def transformers(task: Task, weights: Weights, static: bool = False) -> Run:
    """`generate` with defaults except for sampling; `static` follows its documentation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = task.shape
    config = GPT2Config(
        vocab_size=task.vocab_size,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
    )
    model: Any = GPT2LMHeadModel(config).eval()
    same_size(model, task)
    model = model.to(task.device, torch.bfloat16 if weights == "bf16" else torch.float32)
    prompts = task.prompts()
    options = {"cache_implementation": "static"} if static else {}

    def run(tokens: int) -> object:
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            **options,
        )
        return made.tolist()

    return run


def nanogpt(task: Task, weights: Weights) -> Run:
    """`model.generate` of the clone."""
    sys.path.insert(0, str(task.nanogpt))
    try:
        theirs: Any = importlib.import_module("model")
    finally:
        sys.path.remove(str(task.nanogpt))
    shape = task.shape
    config = theirs.GPTConfig(
        block_size=shape.context,
        vocab_size=task.vocab_size,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
    )
    model = theirs.GPT(config).eval()
    same_size(model, task)
    model = model.to(task.device, torch.bfloat16 if weights == "bf16" else torch.float32)
    prompts = task.prompts()

    def run(tokens: int) -> object:
        with torch.inference_mode():
            return model.generate(prompts, tokens).tolist()

    return run


def same_size(model: nn.Module, task: Task) -> None:
    """Check that a contestant has as many parameters as our model."""
    with torch.device("meta"):
        ours = GPT(task.shape, task.vocab_size).num_parameters()
    theirs = sum(parameter.numel() for parameter in model.parameters())
    assert theirs == ours, f"{theirs:,} parameters instead of {ours:,}"


CONTESTANTS: dict[str, Callable[[Task, Weights], Run]] = {
    "steadygpt": steadygpt,
    "steadygpt, compiled": partial(steadygpt, compiled=True),
    "transformers": transformers,
    "transformers, static cache, compiled": partial(transformers, static=True),
    "nanoGPT": nanogpt,
}


def entries(task: Task) -> list[tuple[str, Weights]]:
    """The contestants on this device, each with the type of its weights."""
    if task.device.type == "cuda":
        pairs: list[tuple[str, Weights]] = [
            (name, weights) for weights in ("fp32", "bf16") for name in CONTESTANTS
        ]
    else:
        pairs = [("steadygpt", "fp32"), ("steadygpt", "bf16"), ("steadygpt", "int8")]
        pairs += [("transformers", "fp32"), ("nanoGPT", "fp32")]
    return [pair for pair in pairs if task.nanogpt or pair[0] != "nanoGPT"]


# ---------------------------------------------------------------------------------------------
# The limit


def step_bytes(task: Task) -> int:
    """Bytes of fp32 weights that one step reads."""
    with torch.device("meta"):
        model = GPT(task.shape, task.vocab_size)
    return 4 * (model.num_parameters() - model.position_embedding.weight.numel())


def reads(task: Task) -> Step:
    """Read as many bytes as a step does, and do nothing else."""
    numbers = torch.ones(step_bytes(task) // 4, device=task.device)
    return lambda: numbers.sum().item()


def products(task: Task, ours: bool) -> Step:
    """A step's matrix products, one after the other, and nothing else."""
    model = plain(task)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(task.batch, layer.in_features) for layer in layers]
    inputs.append(torch.randn(task.batch, task.shape.width))
    if ours:
        optimize_for_inference(model, "fp32", task.batch)
    if model.head is None:  # tied, and no other layout pays off
        model.head = nn.Linear(task.shape.width, task.vocab_size, bias=False)
    kinds = (nn.Linear, PackedLinear, SlicedLinear)
    calls = [m for m in model.modules() if isinstance(m, kinds)]

    @torch.inference_mode()
    def step() -> None:
        for call, x in zip(calls, inputs, strict=True):
            call(x)

    return step


# ---------------------------------------------------------------------------------------------
# Measuring


class Entry:
    """A row: what runs, and how fast it was.

    Attributes:
        rates: tokens per second of each round.
        failure: why there are none.
    """

    def __init__(self, name: str, weights: str, batch: int) -> None:
        self.name, self.weights, self.batch = name, weights, batch
        self.rates: list[float] = []
        self.failure = ""
        self.turn: Callable[[], int] = lambda: 0  # returns the number of tokens generated

    def guard(self, do: Callable[[], None], deadline: float) -> None:
        """Call `do`; an error fails only this row."""
        if self.failure:
            return
        try:
            if time.monotonic() > deadline and not self.rates:
                raise TimeoutError("no time left")
            do()
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            self.failure = said[0][:80]
            self.turn = lambda: 0  # frees its memory

    @property
    def rate(self) -> float:
        """Tokens per second of the fastest round."""
        return max(self.rates, default=math.nan)

    def measure(self) -> None:
        """One round."""
        began = time.perf_counter()
        made = self.turn()
        self.rates.append(made / (time.perf_counter() - began))


def compete(flags: argparse.Namespace, batch: int, deadline: float) -> list[Entry]:
    """All rows of one batch size; the limits come last."""
    task = Task(flags, batch)
    found = []
    for name, weights in entries(task):
        entry = Entry(name, weights, batch)

        def build(entry: Entry = entry, weights: Weights = weights) -> None:
            run = CONTESTANTS[entry.name](task, weights)
            run(task.tokens if task.device.type == "cuda" else 2)

            def turn() -> int:
                run(task.tokens)
                return batch * task.tokens

            entry.turn = turn

        entry.guard(build, deadline)
        say(f"batch {batch}: {name}, {weights}: {entry.failure or 'ready'}")
        found.append(entry)
    limits: dict[str, Callable[[Task], Step]] = {READS: reads}
    if task.device.type == "cpu":
        limits["matrix products, torch's layout"] = partial(products, ours=False)
        limits["matrix products, our layout"] = partial(products, ours=True)
    for name, make in limits.items():
        entry = Entry(name, "fp32", batch)
        once = make(task)

        def several(once: Step = once) -> int:
            for _ in range(STEPS):
                once()
            return STEPS * batch

        entry.turn = several
        found.append(entry)
    for number in range(1, flags.rounds + 1):
        began = time.monotonic()
        for entry in found:
            entry.guard(entry.measure, deadline)
        say(f"batch {batch}, round {number}: " + ", ".join(f"{e.rate:,.1f}" for e in found))
        if time.monotonic() + (time.monotonic() - began) > deadline:
            break
    for entry in found:
        entry.turn = lambda: 0
    gc.collect()
    return found


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# The report


def table(entries: list[Entry]) -> str:
    """Markdown."""
    lines = [
        "| batch | | weights | tokens/s | x transformers | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = [str(entry.batch), entry.name, entry.weights]
        if entry.failure:
            cells += [f"failed: {entry.failure}", "", ""]
        else:
            against = f"{entry.rate / rate_of(entries, 'transformers', entry):.2f}"
            limit = f"{entry.rate / rate_of(entries, READS, entry):.0%}"
            cells += [f"{entry.rate:,.1f}", against, limit]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_of(entries: list[Entry], name: str, beside: Entry) -> float:
    """Tokens per second of `name` in the same batch, with the same weights if it has them."""
    rows = [e for e in entries if e.name == name and e.batch == beside.batch]
    same = [e for e in rows if e.weights == beside.weights]
    return (same or rows)[0].rate


def machine(task: Task) -> dict[str, object]:
    """Where and with what this was measured."""
    names = ("torch", "transformers")
    gpu = torch.cuda.get_device_name() if task.device.type == "cuda" else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def main() -> None:
    """Measure all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--rounds", type=int, default=5, help="at most, for each batch size")
    parser.add_argument("--seconds", type=float, default=420, help="start no round after that")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark-sample.json"))
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    began, found = time.monotonic(), []
    for number, batch in enumerate(flags.batch, 1):
        deadline = began + flags.seconds * number / len(flags.batch)
        found += compete(flags, batch, deadline)
    task = Task(flags, 1)
    where = machine(task)
    report = {
        "machine": where,
        "options": {name: str(value) for name, value in vars(flags).items()},
        "step_bytes": step_bytes(task),
        "entries": [
            {
                "batch": entry.batch,
                "name": entry.name,
                "weights": entry.weights,
                "tokens_per_second": entry.rates,
                "failure": entry.failure,
            }
            for entry in found
        ],
    }
    flags.json.parent.mkdir(parents=True, exist_ok=True)
    flags.json.write_text(json.dumps(report, indent=2) + "\n")
    gigabytes = max(e.rate for e in found if e.name == READS and e.batch == flags.batch[0])
    gigabytes *= step_bytes(task) / flags.batch[0] / 1e9
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{step_bytes(task) / 1e6:,.0f} MB of fp32 weights a step, read at {gigabytes:.1f} GB/s")
    print(table(found))


if __name__ == "__main__":
    main()

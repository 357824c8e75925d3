"""Training in several processes against one: speed, memory and bytes communicated.

    python benchmarks/distributed.py [--processes 2] [--rounds 7] [--minutes 8] [--json FILE]

On a CPU, one process of one thread, one process with all threads, and one process a core under DDP
and FSDP2 (over gloo) take turns in training the same model; on GPUs (over NCCL), one process and
one process a GPU. DDP also takes turns without summing gradients, which shows what that costs. With
`--processes 1`, DDP and FSDP2 run in a group of one process: on a machine with one GPU, that tries
their code over NCCL. All compute the same batches of random tokens.

Each way's processes start before the first turn and wait between turns. Steps/s, CPU time and the
ratios to one process with all threads are medians over the turns. CPU time and memory are those of
every process. Bytes per step are counted twice in rank 0: those of the collective operations on
gradients and weights, from torch's profiler, times what a ring sends per byte; and what the process
wrote, from Linux's /proc/self/io, which includes gloo's sockets but not NCCL's. The loss, which all
ways must share up to rounding, is that of a fourth step, after a checkpoint was copied and loaded.

The tables are printed last. `--small` shows at toy size that the command works.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import re
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from gpt.checkpoint import Checkpoint
from gpt.config import Config, load
from gpt.distributed.group import Group, connected
from gpt.distributed.trainer import ParallelTrainer
from gpt.errors import InputError
from gpt.hardware.device import flush_denormals, pick_device
from gpt.hardware.processes import check_processes, cores
from gpt.trainer import Trainer

ROOT = Path(__file__).parents[1]
NUMBER = 4  # bytes of a weight or gradient; both are communicated in fp32
WARM = 3  # steps before the first turn
COUNTED = 3  # steps whose bytes are counted
COUNT = 0  # the turn in which bytes are counted
MB = 1e6
RESERVE = 30.0  # seconds of the time that are left for ending


@dataclass(frozen=True)
class Size:
    """What is trained.

    Attributes:
        config: the name of a file in configs/.
        options: that replace some of its values.
    """

    name: str
    config: str
    vocabulary: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """How it is trained: by one process, or by a group of them with `parallel` ddp or fsdp.

    Attributes:
        sums: whether the processes of a group sum their gradients, as training needs; without it,
            their time is the least that summing could leave.
    """

    name: str
    processes: int
    threads: int
    parallel: str = ""
    sums: bool = True


_CHARS_ON_GPU = {"layers": 6, "heads": 6, "width": 384, "context": 256}  # nanoGPT's
_CHARS = "tiny-shakespeare-char"
_EAGER = {"batch_tokens": None, "compile": False}
SIZES = {  # on GPUs, with micro-batches so small that all ways fit on a GPU at once
    "cpu": [
        Size("nanoGPT's for a CPU", _CHARS, 65),
        Size("quickstart", "quickstart", 4096),
        Size(
            "nanoGPT's for a GPU, 8 sequences",
            _CHARS,
            65,
            {"model": _CHARS_ON_GPU, "training": {"batch_sequences": 8}},
        ),
    ],
    "cuda": [
        Size(
            "nanoGPT's for a GPU",
            _CHARS,
            65,
            {
                "model": _CHARS_ON_GPU,
                "training": {"batch_sequences": 64, "micro_batch": 64, "precision": "bf16"},
            },
        ),
        Size(
            "GPT-2 124M",
            "gpt2-124m",
            50257,
            {"training": {**_EAGER, "batch_sequences": 64, "micro_batch": 16}},
        ),
        Size(
            "GPT-2 355M",
            "gpt2-124m",
            50257,
            {
                "model": {"layers": 24, "heads": 16, "width": 1024},
                "training": {**_EAGER, "batch_sequences": 64, "micro_batch": 8},
            },
        ),
    ],
    "small": [
        Size(
            "toy",
            _CHARS,
            65,
            {"model": {"layers": 2, "width": 64, "context": 32}, "training": {"micro_batch": 3}},
        )
    ],
}


# -- The processes of one way ------------------------------------------------------------------


def config_of(size: Size, parallel: str, device: str) -> Config:
    """The config of a size, to be trained on `device`."""
    training = {**size.options.get("training", {}), "device": device}
    if parallel:
        training["parallel"] = parallel
    return load(ROOT / "configs" / f"{size.config}.yaml", {**size.options, "training": training})


def work(given: str) -> None:
    """One process of a way: rank 0 takes its turns, the others follow."""
    size_fields, way_fields, device_name = json.loads(given)
    size, way = Size(**size_fields), Way(**way_fields)
    config, device = config_of(size, way.parallel, device_name), pick_device(device_name)
    with flush_denormals():
        if not way.parallel:
            torch.set_num_threads(way.threads)
            take_turns(Trainer(config, size.vocabulary, device), config, None)
            return
        with connected(config, device) as group:
            trainer = ParallelTrainer(config, size.vocabulary, group)
            unsummed = contextlib.nullcontext if way.sums else _ddp(trainer).no_sync
            with unsummed():
                if group.leads:
                    take_turns(trainer, config, group)
                    group.send("over")
                    return
                while group.receive() == ["turn"]:
                    trainer.follow(lambda: False)
                    usage(trainer, group)


def _ddp(trainer: Trainer) -> DistributedDataParallel:
    assert isinstance(trainer.loss_fn, DistributedDataParallel)  # it is not compiled
    return trainer.loss_fn


@contextlib.contextmanager
def turn(group: Group | None) -> Iterator[None]:
    """A context in which the other processes follow rank 0."""
    if group is not None:
        group.send("turn")
    yield
    if group is not None:
        group.send("end")


def take_turns(trainer: Trainer, config: Config, group: Group | None) -> None:
    """Read numbers of steps from stdin, make them, and print what they took."""
    step = updates(trainer, config)
    with turn(group):
        trainer.reset()
        for _ in range(WARM):
            step()
    before = usage(trainer, group)
    facts = {
        "parameters": trainer.model.num_parameters(),
        "micro_batches": -(-trainer.config.batch_sequences // trainer.micro_batch),
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        steps = int(line)
        with turn(group):
            if steps == COUNT:
                found = counted(trainer, config)
            else:
                began = time.perf_counter()
                for _ in range(steps):
                    step()
                found = {"seconds": (time.perf_counter() - began) / steps}
        after = usage(trainer, group)
        if steps != COUNT:
            used = [now[0] - then[0] for now, then in zip(after, before, strict=True)]
            found |= {"cpu_seconds": sum(used) / steps, "peaks": [each[1] for each in after]}
        before = after
        print(json.dumps(found), flush=True)


def updates(trainer: Trainer, config: Config) -> Callable[[], float]:
    """A function that makes the next update on a batch of random tokens, and returns its loss."""
    made = 0
    random = torch.Generator().manual_seed(0)

    def update() -> float:
        nonlocal made
        made += 1
        high = trainer.model.token_embedding.weight.shape[0]
        shape = (config.batch_sequences, config.model.context + 1)
        tokens = torch.randint(high, shape, generator=random)
        loss, grad_norm = trainer.backward(made, tokens[:, :-1], tokens[:, 1:])
        trainer.update(1.0, loss, grad_norm)
        return float(loss)

    return update


def usage(trainer: Trainer, group: Group | None) -> list[list[float]]:
    """Of each process: the seconds of CPU time, and the peak of its memory in bytes."""
    own = torch.tensor([time.process_time(), peak_bytes(trainer.device)], dtype=torch.float64)
    if group is None:
        return [own.tolist()]
    each = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(each, own)
    return [one.tolist() for one in each]


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: a GPU's, or the machine's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _host_peak()


def _host_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def counted(trainer: Trainer, config: Config) -> dict[str, Any]:
    """The bytes that rank 0 sends in a step; its memory while a checkpoint is copied; a loss.

    The loss is that of the next step after COUNTED steps from the initial weights, after which a
    checkpoint was copied and loaded.
    """
    trainer.reset()
    step = updates(trainer, config)
    before = _written()
    for _ in range(COUNTED):
        step()
    after, held = _written(), psutil.Process().memory_info().rss
    checkpoint = Checkpoint(*trainer.tensors(), {}, "").copy()
    peak = _host_peak()
    trainer.load(checkpoint, {}, COUNTED)
    assert trainer.weights_are_finite()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        loss = step()
    operations = [(event.name, event.input_shapes) for event in profiled.events()]
    return {
        "ring_bytes": ring_bytes(operations, trainer.processes),
        "written_bytes": (after - before) / COUNTED if after else None,
        "held": held,
        "saving_peak": peak,
        "loss": loss,
    }


def _written() -> int:
    """Bytes that this process has written, to sockets as well; 0 where Linux does not say."""
    try:
        return int(re.findall(r"wchar: (\d+)", Path("/proc/self/io").read_text("ascii"))[0])
    except OSError:
        return 0


def ring_bytes(operations: Sequence[tuple[str, Sequence[Any]]], processes: int) -> float:
    """What a process sends in rings for these operations.

    Args:
        operations: their names in the profile, such as "nccl:_reduce_scatter_base", and the shapes
            of their inputs. All inputs are fp32.
    """
    each_other = {"all_reduce": 2 / processes, "reduce_scatter": 1 / processes, "all_gather": 1.0}
    sent = 0.0
    for name, shapes in operations:
        found = re.match(r"(?:gloo|nccl):_?(all_reduce|all_gather|reduce_scatter)", name)
        if found:
            numbers = sum(math.prod(shape) for shape in shapes)
            sent += NUMBER * numbers * each_other[found[1]] * (processes - 1)
    return sent


def formula_bytes(way: Way, parameters: int, micro_batches: int, *, reduces_to_all: bool) -> float:
    """What a process sends in a step, by rings.

    DDP all-reduces the gradients once. FSDP2 gathers the weights for the forward and again for the
    backward pass, and reduce-scatters the gradients, in every micro-batch.

    Args:
        reduces_to_all: whether a reduce-scatter is implemented as an all-reduce, as in gloo.
    """
    once = (way.processes - 1) / way.processes * NUMBER * parameters
    if way.parallel == "ddp":
        return 2 * once
    return (4 if reduces_to_all else 3) * once * micro_batches


# -- The turns ---------------------------------------------------------------------------------


def ways(processes: int, device: str) -> list[Way]:
    """What is compared; the ratios are to the last way without a group."""
    every = cores()
    threads = max(1, every // processes)
    each = f"{processes} processes" if processes > 1 else "a group of 1 process"
    plain = [Way("1 process", 1, threads)]
    if device == "cpu":
        each += f", {_threads(threads)} each"
        alone = [1, every] if every > 1 else [1]
        plain = [Way(f"1 process, {_threads(n)}", 1, n) for n in alone]
    return [
        *plain,
        Way(f"DDP without sums, {each}", processes, threads, "ddp", sums=False),
        Way(f"DDP, {each}", processes, threads, "ddp"),
        Way(f"FSDP2, {each}", processes, threads, "fsdp"),
    ]


def _threads(number: int) -> str:
    return f"{number} thread" + ("s" if number > 1 else "")


class Contestant:
    """The processes of a way, which wait until their rank 0 is asked to take a turn."""

    def __init__(self, size: Size, way: Way, device: str) -> None:
        self.way = way
        port = free_port()
        command = [sys.executable, __file__, "--child"]
        command.append(json.dumps([asdict(size), asdict(way), device]))
        self.processes = [
            subprocess.Popen(
                command,
                env=environment(way, rank, port),
                stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                text=True,
            )
            for rank in range(way.processes)
        ]
        self.turns: list[dict[str, Any]] = []

    def answer(self) -> dict[str, Any]:
        """What rank 0 says of its start, or of its turn."""
        assert self.processes[0].stdout is not None
        line = self.processes[0].stdout.readline()
        if not line:
            raise SystemExit(f"{self.way.name}: failed, see above")
        return cast(dict[str, Any], json.loads(line))

    def turn(self, steps: int) -> dict[str, Any]:
        """Make `steps` steps, or count bytes, while all other contestants wait."""
        print(steps, file=self.processes[0].stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """End its processes."""
        for stream in (self.processes[0].stdin, self.processes[0].stdout):
            assert stream is not None
            stream.close()
        for process in self.processes:
            process.wait()


def free_port() -> int:
    """A port on this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(way: Way, rank: int, port: int) -> dict[str, str]:
    """The environment of a process; if it is in a group, with what torchrun would set."""
    found = {**os.environ, "OMP_NUM_THREADS": str(way.threads), "KINETO_LOG_LEVEL": "99"}
    if way.parallel:
        found |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(way.processes),
            "LOCAL_WORLD_SIZE": str(way.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }
    return found


def compete(
    size: Size, contestants: Sequence[Way], device: str, rounds: int, seconds: float, until: float
) -> list[dict[str, Any]]:
    """A row for each way.

    Args:
        seconds: of each turn.
        until: by `time.monotonic`, when the last round must have ended.
    """
    with contextlib.ExitStack() as stack:
        all_ways = [Contestant(size, way, device) for way in contestants]
        for each in all_ways:
            stack.callback(each.close)
        facts = [each.answer() for each in all_ways]
        steps = [max(1, round(seconds / each.turn(1)["seconds"])) for each in all_ways]
        for number in range(rounds):
            began = time.monotonic()
            for each, count in zip(all_ways, steps, strict=True):
                each.turns.append(each.turn(count))
            said = [f"{1e3 * each.turns[-1]['seconds']:,.1f}" for each in all_ways]
            print(f"{size.name}, round {number + 1}: {', '.join(said)} ms", file=sys.stderr)
            if 2 * time.monotonic() - began > until:
                break
        counts = [each.turn(COUNT) for each in all_ways]
    (*_, base) = [each.turns for each in all_ways if not each.way.parallel]
    rows = []
    for each, fact, count in zip(all_ways, facts, counts, strict=True):
        way, turns = each.way, each.turns
        row = {"size": size.name, **asdict(way), **fact, **count, "rounds": len(turns)}
        for key in ("seconds", "cpu_seconds"):
            row[key] = statistics.median(turn[key] for turn in turns)
            pairs = zip(turns, base, strict=True)
            row[f"{key}_ratio"] = statistics.median(own[key] / other[key] for own, other in pairs)
        row["peaks"] = turns[-1]["peaks"]
        if way.parallel and way.sums:
            row["formula_bytes"] = formula_bytes(
                way, fact["parameters"], fact["micro_batches"], reduces_to_all=device == "cpu"
            )
        rows.append(row)
    return rows


# -- What is shown -----------------------------------------------------------------------------


def tables(rows: Sequence[dict[str, Any]], base: str) -> str:
    """The rows as Markdown tables."""
    lines = [
        f"ratios to {base}",
        "",
        "| size | way | steps/s | time: ratio | CPU s a step | ratio | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["size"],
            row["name"],
            f"{1 / row['seconds']:.2f}",
            f"{row['seconds_ratio']:.2f}",
            f"{row['cpu_seconds']:.3f}",
            f"{row['cpu_seconds_ratio']:.2f}",
            f"{row['loss']:.5f}" if row["sums"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| size | parameters | way | micro-batches | MB sent a step: by formula | operations "
        "| written | peak MB of each rank | rank 0, MB: before saving | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sent = ["", "", ""]
        if "formula_bytes" in row:
            sent = [_mb(row[key]) for key in ("formula_bytes", "ring_bytes", "written_bytes")]
        cells = [
            row["size"],
            f"{row['parameters']:,}",
            row["name"],
            str(row["micro_batches"]),
            *sent,
            ", ".join(f"{peak / MB:,.0f}" for peak in row["peaks"]),
            f"{row['held'] / MB:,.0f}",
            f"{row['saving_peak'] / MB:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mb(number: float | None) -> str:
    return "unknown" if number is None else f"{number / MB:,.3f}"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all sizes, and print the tables last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=_count, help="of a group; by default one a core or GPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=_count, default=7, help="fewer if time is short")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each turn")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all")
    parser.add_argument("--small", action="store_true", help="a toy size on a CPU, one round")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.child is not None:
        work(flags.child)
        return
    until = time.monotonic() + 60 * flags.minutes - RESERVE
    try:
        device = "cpu" if flags.small else pick_device(flags.device).type
        gpus = torch.cuda.device_count()
        processes = flags.processes or (gpus if device == "cuda" else cores())
        if device == "cuda" and processes > gpus:
            raise InputError(f"--processes: {processes}, but there are {gpus} GPUs")
        sizes = SIZES["small" if flags.small else device]
        for size in sizes:
            check_processes(config_of(size, "", device), processes)
    except InputError as error:
        parser.error(str(error))
    contestants = ways(processes, device)[-4 if flags.small else 0 :]
    began = _load()
    rows: list[dict[str, Any]] = []
    for number, size in enumerate(sizes):
        now = time.monotonic()
        end = now + (until - now) / (len(sizes) - number)
        rounds, seconds = (1, 0.1) if flags.small else (flags.rounds, flags.seconds)
        rows += compete(size, contestants, device, rounds, seconds, end)
    (*_, base) = [way.name for way in contestants if not way.parallel]
    load_averages = [began, _load()]
    facts = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cores": cores(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "load": load_averages,
    }
    if flags.json is not None:
        flags.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    print(
        f"{facts['machine']}, {cores()} cores; torch {torch.__version__}; {facts['date']}; medians "
        f"of {min(row['rounds'] for row in rows)} to {max(row['rounds'] for row in rows)} rounds; "
        f"load average {' to '.join(load_averages)}, of which this benchmark is a part\n"
    )
    print(tables(rows, base))
    if flags.small:
        print("toy size: these numbers are not speeds")


if __name__ == "__main__":
    main()

"""What many GPUs and nodes would take: arithmetic, not measurement.

    python benchmarks/projection.py

A step takes 6 N D operations, at an assumed share of the peak, and sends what
docs/scale.md counts, at assumed bandwidths. Everything assumed is in `ASSUMED`
and `CELLS`, which are printed first. docs/scale.md shows the tables.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

VOCABULARY, CONTEXT = 50257, 1024
NUMBER = 4  # bytes: weights, gradients and optimizer state are fp32, and so is communication
ASSUMED = {
    "peak": (989e12, "FLOP/s of a GPU in bf16, an H100's by its data sheet"),
    "mfu": (0.40, "share of the peak that computing reaches, whatever the micro-batch"),
    "inside": (360e9, "bytes/s of a ring inside a node: 80% of NVLink's 450 GB/s each way"),
    "400G": (320e9, "bytes/s between nodes with eight ports of 400 Gb/s each, at 80%"),
    "100G": (10e9, "bytes/s between nodes with one port of 100 Gb/s each, at 80%"),
    "micro_batch": (32, "sequences of a micro-batch at most"),
    "tcp": (1e9, "bytes/s that rank 0 sends over TCP, through gloo"),
    "message": (50e-6, "seconds that a message takes over TCP"),
    "copy": (20e9, "bytes/s from a GPU to the machine's memory, and within it"),
    "disk": (1e9, "bytes/s to the file system"),
    "evaluation": (1024, "sequences of an evaluation"),
}
CELLS = {
    "cells": (10_000, "cells"),
    "nodes": (100, "nodes"),
    "cores": (64, "cores of a node, one cell a core"),
    "seconds": (300.0, "seconds that a cell takes on a core"),
    "start": (5.0, "seconds until a process has imported torch"),
    "elements": (1_000, "elements of a Slurm array that run at once, unless --workers says more"),
    "slurm": (20.0, "elements that Slurm starts a second"),
    "ray": (1_000.0, "tasks that Ray starts a second"),
    "metadata": (10_000.0, "operations a second of the file server that the nodes share"),
    "looks": (5.0, "times a second that each Ray task checks whether it should stop"),
    "polls": (0.5, "times a second that the waiting command checks each of its tasks"),
    "files": (16, "files of a cell, with its checkpoints"),
    "operations": (4, "operations to create a file: open, write, flush, rename"),
    "report": (0.01, "seconds of the report for each cell, at most"),
}


def assumed(name: str) -> float:
    """An assumption's value."""
    return (ASSUMED | CELLS)[name][0]


# -- One run on many GPUs ----------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A size of GPT-2."""

    name: str
    layers: int
    width: int

    @property
    def parameters(self) -> int:
        """12 L d² + 13 L d in the blocks, embeddings of V + T rows, and the final norm."""
        L, d = self.layers, self.width
        return 12 * L * d**2 + 13 * L * d + (VOCABULARY + CONTEXT) * d + 2 * d


MODELS = [
    Model("124M", 12, 768),
    Model("355M", 24, 1024),
    Model("774M", 36, 1280),
    Model("1.5B", 48, 1600),
]


@dataclass(frozen=True)
class Machines:
    """Nodes of eight GPUs.

    Attributes:
        network: between nodes, a key of ASSUMED.
    """

    nodes: int
    network: str

    @property
    def gpus(self) -> int:
        """In all nodes."""
        return 8 * self.nodes

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the rings over all GPUs, which the slowest link limits."""
        inside = assumed("inside")
        return inside if self.nodes == 1 else min(inside, assumed(self.network))


@dataclass(frozen=True)
class Step:
    """Seconds of an update of `sequences` sequences, by what they are spent on.

    Attributes:
        compute, ddp, fsdp: of computing; and of communication, before any of it is hidden.
        lead: of rank 0's messages and tokens, on the CPU, while the GPUs compute.
    """

    model: Model
    machines: Machines
    sequences: int

    @property
    def compute(self) -> float:
        """6 N D floating-point operations, divided among the GPUs."""
        operations = 6 * self.model.parameters * self.sequences * CONTEXT
        return operations / (self.machines.gpus * assumed("peak") * assumed("mfu"))

    @property
    def micro_batches(self) -> int:
        """Of each GPU."""
        return math.ceil(self.sequences / self.machines.gpus / assumed("micro_batch"))

    @property
    def _pass(self) -> float:
        n = self.machines.gpus
        return (n - 1) / n * NUMBER * self.model.parameters / self.machines.bandwidth

    @property
    def ddp(self) -> float:
        """An all-reduce is two passes of a ring."""
        return 2 * self._pass

    @property
    def fsdp(self) -> float:
        """Two all-gathers and a reduce-scatter in each micro-batch."""
        return 3 * self._pass * self.micro_batches

    @property
    def lead(self) -> float:
        """Two broadcasts in a tree, and inputs and targets of 8 bytes a token to each in turn."""
        n = self.machines.gpus
        tokens = (n - 1) / n * self.sequences * CONTEXT * 2 * 8
        messages = 2 * math.ceil(math.log2(n)) + n - 1
        return messages * assumed("message") + tokens / assumed("tcp")

    def seconds(self, parallel: str) -> float:
        """Of the whole update.

        DDP hides communication behind the backward pass of the last micro-batch, two thirds of its
        time; FSDP2 behind all computing. Kernels are queued, so rank 0's CPU work is hidden until
        it takes longer than the GPUs.
        """
        if parallel == "ddp":
            hidden = 2 / 3 * self.compute / self.micro_batches
            shown = max(0.0, self.ddp - hidden)
        else:
            shown = max(0.0, self.fsdp - self.compute)
        return max(self.compute + shown, self.lead)

    def efficiency(self, parallel: str) -> float:
        """The share of the time in which GPUs compute."""
        return self.compute / self.seconds(parallel)

    def limit(self, parallel: str) -> str:
        """What takes the time that is not computing."""
        total = self.seconds(parallel)
        if total == self.lead:
            return "rank 0"
        return "communication" if total > 1.02 * self.compute else "computing"


SYSTEMS = [Machines(1, "400G"), Machines(64, "400G"), Machines(64, "100G")]
BATCHES = [512, 4096]  # sequences; 512 GPUs cannot share fewer than 512


def table_of_steps() -> str:
    """A row for each model, batch and system."""
    lines = [
        "| model | tokens a step | GPUs, network | ms: computing | DDP sends | FSDP2 sends "
        "| rank 0 | DDP: step | efficiency, limited by | FSDP2: step | efficiency, limited by |",
        f"|{'---|' * 11}",
    ]
    for model in MODELS:
        for sequences in BATCHES:
            for machines in SYSTEMS:
                step = Step(model, machines, sequences)
                network = "" if machines.nodes == 1 else f", {machines.network}"
                cells = [
                    model.name,
                    f"{sequences * CONTEXT:,}",
                    f"{machines.gpus}{network}",
                    *(_ms(s) for s in (step.compute, step.ddp, step.fsdp, step.lead)),
                ]
                for parallel in ("ddp", "fsdp"):
                    cells.append(_ms(step.seconds(parallel)))
                    cells.append(f"{step.efficiency(parallel):.0%}, {step.limit(parallel)}")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def table_of_stalls() -> str:
    """A row for each model: memory, checkpoints and evaluations."""
    lines = [
        "| model | GB of weights, gradients, AdamW on each GPU: DDP | FSDP2 on 8 | on 512 "
        "| checkpoint, GB | stall, s: DDP | FSDP2 | writing, s | rank 0 holds for FSDP2, GB "
        "| evaluation, s: 8 GPUs | 512 GPUs |",
        f"|{'---|' * 11}",
    ]
    for model in MODELS:
        numbers = NUMBER * model.parameters
        saved = 3 * numbers  # weights and AdamW's two moments
        forward = 2 * model.parameters * assumed("evaluation") * CONTEXT
        evaluations = [
            forward / (min(gpus, assumed("evaluation")) * assumed("peak") * assumed("mfu"))
            for gpus in (8, 512)
        ]
        cells = [
            model.name,
            *(f"{4 * numbers / gpus / 1e9:.2f}" for gpus in (1, 8, 512)),
            f"{saved / 1e9:.1f}",
            f"{saved / assumed('copy'):.2f}",
            f"{2 * saved / assumed('copy'):.2f}",  # gathered, then copied for the writer
            f"{saved / assumed('disk'):.0f}",
            f"{2 * saved / 1e9:.1f}",
            *(f"{seconds:.3f}" for seconds in evaluations),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- Many cells on many nodes ------------------------------------------------------------------


def grid_seconds(at_once: float) -> float:
    """To train all cells, so many at once: whole rounds, each with its start."""
    return math.ceil(assumed("cells") / at_once) * (assumed("start") + assumed("seconds"))


def table_of_cells() -> str:
    """What each part of a large comparison takes."""
    cells, slots = assumed("cells"), assumed("nodes") * assumed("cores")
    ideal = cells * assumed("seconds") / slots
    files = cells * assumed("files")
    most = assumed("metadata") / assumed("looks")
    rows = [
        ("training, if all cores were always busy", f"{ideal:,.0f} s"),
        (f"in whole rounds of {slots:,.0f} cells", f"{grid_seconds(slots):,.0f} s"),
        (
            f"Slurm, {assumed('elements'):,.0f} at once",
            f"{grid_seconds(assumed('elements')):,.0f} s",
        ),
        ("Slurm starts all elements in", f"{cells / assumed('slurm'):,.0f} s"),
        ("Ray starts all tasks in", f"{cells / assumed('ray'):,.0f} s"),
        ("Ray's tasks check whether they should stop", f"{slots * assumed('looks'):,.0f} times/s"),
        ("the file server can answer these checks of", f"{most:,.0f} tasks at once"),
        ("the waiting command looks for results", f"{cells * assumed('polls'):,.0f} times/s"),
        ("files", f"{files:,.0f}"),
        ("creating them", f"{files * assumed('operations') / assumed('metadata'):,.0f} s"),
        ("the report", f"{cells * assumed('report'):,.0f} s"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def table_of_assumptions() -> str:
    """All of them."""
    rows = (f"| {value:,g} | {meaning} |" for value, meaning in (ASSUMED | CELLS).values())
    return "\n".join(["| assumed | |", "|---|---|", *rows])


def tables() -> list[str]:
    """All tables."""
    return [table_of_assumptions(), table_of_steps(), table_of_stalls(), table_of_cells()]


def main() -> None:
    """Print the tables."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    print("\n\n".join(tables()))


if __name__ == "__main__":
    main()

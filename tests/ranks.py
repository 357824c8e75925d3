"""What the processes of test_distributed.py do: several trainings in one start, each observed.

    torchrun --nproc-per-node 2 tests/ranks.py JOBS.json

Without torchrun, `work(jobs)` does the same in one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gpt import training
from gpt.config import Config, validate
from gpt.distributed import group
from gpt.distributed.trainer import ParallelTrainer
from gpt.errors import InputError
from gpt.model.gpt2 import GPT
from gpt.model.placement import ReZero
from gpt.trainer import Trainer

Job = dict[str, Any]
"""A training, with the keys

    tree, out: the config and the run directory
    stop: stop after this many updates
    bad: {step: factor}: multiply what the last process minimizes in that step, once
    count: the step whose collective operations rank 0 counts
    scalar: give ReZero's blocks a parameter without dimensions
    differs: "config" or "code": of what the last process has another version
"""


def work(jobs: Sequence[Job]) -> None:
    """Do the jobs one after another; each leaves rank-R.json in its run directory."""
    rank = int(os.environ.get("RANK", "0"))
    last = rank == int(os.environ.get("WORLD_SIZE", "1")) - 1
    for job in jobs:
        out, tree = Path(job["out"]), job["tree"]
        if last and job.get("differs") == "config":
            tree = {**tree, "seed": 7}
        with observed(job, last=last) as seen:
            made: list[None] = []
            options: dict[str, Any] = {}
            if "stop" in job:
                stop = job["stop"]
                options = {"on_update": lambda made=made: made.append(None)}
                options["stop"] = lambda made=made, stop=stop: len(made) >= stop
            try:
                training.train(validate(Config, tree), out, quiet=True, **options)
            except (InputError, SystemExit) as error:
                seen["error"] = f"{type(error).__name__}: {error}"
        out.mkdir(parents=True, exist_ok=True)
        (out / f"rank-{rank}.json").write_text(json.dumps(seen))


@contextlib.contextmanager
def observed(job: Job, *, last: bool) -> Iterator[dict[str, Any]]:
    """A context in which the trainer does what the job says, and notes what it sees.

    Args:
        last: whether this is the process of the highest rank.
    """
    seen: dict[str, Any] = {"shares": [], "evaluated": 0, "messages": {}, "scales": []}
    bad = {int(step): factor for step, factor in job.get("bad", {}).items()} if last else {}
    factors = [1.0]
    backward, loss_fn = Trainer.backward, GPT.loss_fn

    def observed_backward(self: Trainer, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen["shares"].append([step, *(part.numpy().tobytes().hex() for part in (x, y))])
        factors[0] = bad.pop(step, 1.0)
        seen["scales"].append(self.scaler.get_scale())
        return backward(self, step, x, y)

    def observed_loss(self: GPT, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        if not self.training:
            seen["evaluated"] += len(x)
        total_loss, cross_entropy = loss_fn(self, x, *rest)
        return total_loss * factors[0], cross_entropy

    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, function: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, function))

        replace(Trainer, "backward", observed_backward)
        replace(GPT, "loss_fn", observed_loss)
        for name in ("backward", "update") if "count" in job else ():
            replace(ParallelTrainer, name, _counted(name, job["count"], seen))
        if last and job.get("differs") == "code":
            replace(group, "_code_digest", lambda: "another")
        if "scalar" in job:
            replace(ReZero, "__init__", _with_scalar(ReZero.__init__))
        yield seen


def _counted(name: str, step: int, seen: dict[str, Any]) -> Any:
    """The method of rank 0, which counts the collective operations of its `step`th call."""
    method, calls = getattr(ParallelTrainer, name), [0]

    def counted(self: ParallelTrainer, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] != step:
            return method(self, *arguments)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            result = method(self, *arguments)
        names = [e.name for e in profiled.events() if e.name.startswith("gloo:")]
        seen["messages"][name] = Counter(names)
        return result

    return counted


def _with_scalar(construct: Any) -> Any:
    def constructed(self: ReZero, *arguments: Any) -> None:
        construct(self, *arguments)
        self.b = nn.Parameter(torch.zeros(()))

    return constructed


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()))

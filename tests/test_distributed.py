"""Several processes train what one process trains: same batches, losses, failures, checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, VERSE
from ranks import Job, work
from safetensors.torch import load_file
from test_cli import called
from test_training import records, tensors

from gpt.config import Config, merge
from gpt.errors import InputError
from gpt.model.placement import PLACEMENTS
from gpt.optim import OPTIMIZERS
from gpt.training import train

Make = Callable[..., Config]
Options = dict[str, Any]
TOLERANCE = 1e-5  # of a loss in fp32: sums in another order
TIMES = {"seconds", "tokens_per_second", "step_seconds", "directory"}  # of records and results
FSDP: Options = {"training": {"parallel": "fsdp"}}
BATCH = 12  # sequences; 1, 2, 3 and 4 processes divide it


def launch(processes: int, jobs: Mapping[str, Job], folder: Path, env: dict[str, str]) -> None:
    """Do the jobs in one start of several processes, each in a directory of its name."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([{"out": str(folder / name), **jobs[name]} for name in jobs]))
    options = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *options, str(ROOT / "tests/ranks.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def alone(jobs: Mapping[str, Job], folder: Path) -> None:
    """Do the jobs in this process."""
    work([{"out": str(folder / name), **jobs[name]} for name in jobs])


def seen(directory: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((directory / f"rank-{rank}.json").read_text())


def result(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def assert_close(a: Any, b: Any, tolerance: float = TOLERANCE, where: str = "") -> None:
    """Two JSON values are equal except for times, and for numbers within the tolerance."""
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - TIMES:
            assert_close(a[key], b[key], tolerance, f"{where} {key}")
    elif isinstance(a, float) and isinstance(b, float):
        assert math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance), (where, a, b)
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b), where
        for index, (mine, other) in enumerate(zip(a, b, strict=True)):
            assert_close(mine, other, tolerance, f"{where} {index}")
    else:
        assert a == b, (where, a, b)


def assert_same_training(several: Path, one: Path, tolerance: float = TOLERANCE) -> None:
    """Every loss, gradient norm and measurement, and the result, agree."""
    assert_close(records(several), records(one), tolerance, several.name)
    assert_close(result(several), result(one), tolerance, several.name)


def assert_same_bits(a: Path, b: Path, step: int) -> None:
    """Weights and optimizer state are equal to the last bit."""
    for name in ("model", "optimizer"):
        one, other = (
            load_file(path / f"checkpoints/step-{step:08d}/{name}.safetensors") for path in (a, b)
        )
        assert one.keys() == other.keys()
        assert [key for key in one if not one[key].equal(other[key])] == []


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Options]:
    """`trees(options, ...)` are the options of a run of 20 steps, the later ones on top."""
    folder = tmp_path_factory.mktemp("shared")
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(VERSE.format(index) * (index % 5 + 2))
    base: Options = {
        "data": {
            "source": "text",
            "path": [str(folder)],
            "tokenizer": "bytes",
            "val_fraction": 0.2,
            "cache_dir": str(folder / "cache"),
        },
        "model": {"layers": 2, "heads": 2, "width": 16, "context": 16},
        "schedule": {"warmup_steps": 5},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": 20, "batch_sequences": BATCH, "device": "cpu", "log_every": 1},
        "evaluation": {"every": 10, "sequences": 7},  # which no number of processes divides
        "sampling": {"tokens": 0},
    }

    def make(*changes: Options) -> Options:
        tree = base
        for each in changes:
            tree = merge(tree, each)
        return tree

    return make


# Accumulation, clipping that acts, and every option of the loss, in one run.
MIXED: Options = {
    "model": {"dropout": 0.1, "tied_head": False},
    "optimizer": {"clip": 0.1},
    "training": {"steps": 50, "micro_batch": 3, "z_loss": 1e-3, "loss_chunk": 20},
    "evaluation": {"every": 25},
}
ADAFACTOR: Options = {
    "model": {"norm": {"placement": "post"}},
    "optimizer": {"name": "adafactor", "learning_rate": 0.01},
    "training": {"micro_batch": 2},
}
DIVERGING: Options = {
    "model": {"norm": {"placement": "none"}},
    "optimizer": {"name": "sgd", "learning_rate": 3e4, "clip": None},
}


@pytest.fixture(scope="module")
def two(
    trees: Callable[..., Options],
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """Folders of runs by two processes, and of the same runs by one."""
    jobs: dict[str, Job] = {
        "ddp": {"tree": trees(MIXED), "count": 3},
        "stopped": {"tree": trees(MIXED, {"training": {"steps": 6}}), "stop": 3},
        "fsdp": {"tree": trees(ADAFACTOR, FSDP)},
        "fsdp stopped": {"tree": trees(ADAFACTOR, FSDP), "stop": 10},
        "diverged": {"tree": trees(DIVERGING)},
        "fp16": {
            "tree": trees({"training": {"precision": "fp16", "steps": 4}}),
            "bad": {2: math.inf},
        },
        "single number": {
            "tree": trees(FSDP, {"model": {"norm": {"placement": "rezero"}}}),
            "scalar": True,
        },
    }
    several, one = (tmp_path_factory.mktemp(name) for name in ("several", "one"))
    again = {"out": str(several / "stopped"), "tree": jobs["stopped"]["tree"]}
    whole = {"tree": jobs["stopped"]["tree"]}
    launch(2, {**jobs, "resumed": again, "whole": whole}, several, environment)
    compared = ("ddp", "fsdp", "diverged", "fp16")
    alone({name: jobs[name] for name in compared}, one)
    return several, one


def test_every_process_gets_its_share_of_the_same_batches(two: Any):
    several, one = (path / "ddp" for path in two)
    whole, shares = seen(one)["shares"], [seen(several, rank)["shares"] for rank in (0, 1)]
    assert len(whole) == 50
    for (step, *batch), *parts in zip(whole, *shares, strict=True):
        assert {part[0] for part in parts} == {step}
        assert ["".join(texts) for texts in zip(*(p[1:] for p in parts), strict=True)] == batch


@pytest.mark.parametrize("run", ["ddp", "fsdp"])
def test_losses_are_those_of_one_process(two: Any, run: str):
    several, one = (path / run for path in two)
    assert_same_training(several, one)
    assert any(line.get("grad_norm", 0) > 0.1 for line in records(one))  # so MIXED is clipped


def test_an_evaluation_is_shared(two: Any):
    for run in ("ddp", "fsdp"):
        counts = [seen(two[0] / run, rank)["evaluated"] for rank in (0, 1)]
        assert counts == [3 * 4, 3 * 3]  # three evaluations of 7 sequences


def test_a_step_needs_few_messages(two: Any):
    """Two texts (backward, update), the batch, the gradients of DDP's one bucket, and the loss."""
    for rank in (0, 1):
        assert seen(two[0] / "ddp", rank)["messages"] == {
            "_backward_share": {"gloo:scatter": 1, "gloo:all_reduce": 2},
            "_update": {},
        }


def test_a_divergence_is_located_as_in_one_process(two: Any):
    several, one = (path / "diverged" for path in two)
    assert result(one)["failure"]["place"] is not None
    assert_same_training(several, one)


def test_all_processes_agree_on_the_loss_scale(two: Any):
    scales = [seen(two[0] / "fp16", rank)["scales"] for rank in (0, 1)]
    assert scales[0] == scales[1] == seen(two[1] / "fp16")["scales"]
    assert scales[0][1] == 2 * scales[0][2]  # the last process overflowed in step 2
    assert result(two[0] / "fp16")["skipped_updates"] == 1


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(two: Any):
    assert result(two[0] / "stopped")["status"] == "finished"
    assert_same_bits(two[0] / "stopped", two[0] / "whole", step=6)


def test_one_process_resumes_what_two_have_divided(two: Any, tmp_path: Path, capsys: Any):
    """Adafactor's state of rows and columns, too; and the text of a checkpoint can be sampled."""
    several, one = two
    resumed = tmp_path / "resumed"
    shutil.copytree(several / "fsdp stopped", resumed)
    code, text, _ = called(capsys, "sample", resumed, "--max-new-tokens", "3", "--prompt", "The")
    assert code == 0
    assert text.startswith("The")
    config = json.loads((several / "jobs.json").read_text())[3]["tree"]
    from gpt.config import validate

    assert train(validate(Config, config), resumed, quiet=True).step == 20
    assert_close(records(resumed), records(one / "fsdp"))


def test_what_cannot_be_divided_is_named(two: Any):
    errors = [seen(two[0] / "single number", rank)["error"] for rank in (0, 1)]
    assert any("blocks.0.b is a single number, which cannot be divided; use ddp" in e for e in errors)
    assert not (two[0] / "single number" / "config.yaml").exists()

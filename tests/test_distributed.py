"""Several processes train what one process trains: same batches, losses, failures, checkpoints."""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from ranks import Job, work
from safetensors.torch import load_file
from test_cli import called
from test_training import records
from torch import Tensor

from gpt.checkpoint import newest_intact
from gpt.cli import launch as launch_command
from gpt.config import Config, load_resolved, merge
from gpt.distributed import lead
from gpt.errors import InputError
from gpt.hardware.processes import after_restart
from gpt.model.placement import PLACEMENTS
from gpt.optim import OPTIMIZERS
from gpt.run.cautions import cautions
from gpt.run.opening import restore
from gpt.trainer import Trainer
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


BASE: Options = {
    "optimizer": {"learning_rate": 3e-3},
    "training": {"batch_sequences": BATCH, "log_every": 1},
    "evaluation": {"sequences": 7},  # which no number of processes divides
    "sampling": {"tokens": 0},
}


@pytest.fixture(scope="session")
def trees(tree: Options) -> Callable[..., Options]:
    """`trees(options, ...)` are the options of a run of 20 steps, the later ones on top."""
    return lambda *changes: functools.reduce(merge, changes, merge(tree, BASE))


# Accumulation, clipping that acts, and every option of the loss, in one run.
MIXED: Options = {
    "model": {"dropout": 0.1, "tied_head": False},
    "optimizer": {"clip": 0.1},
    "training": {"steps": 50, "micro_batch": 3, "z_loss": 1e-3, "loss_chunk": 20},
    "evaluation": {"every": 25},
}
SHORT: Options = {"training": {"steps": 6}}
MUON: Options = {"model": {"dropout": 0.1}, "optimizer": {"name": "muon", "clip": 0.1}}
POST: Options = {"model": {"norm": {"placement": "post"}}, "training": {"micro_batch": 2}}
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
    rezero: Options = {"model": {"norm": {"placement": "rezero"}}}
    jobs: dict[str, Job] = {
        "ddp": {"tree": trees(MIXED), "count": 3},
        "fsdp": {"tree": trees(POST, FSDP), "stop": 10},
        "diverged": {"tree": trees(DIVERGING)},
        "fp16": {"tree": trees(SHORT, {"training": {"precision": "fp16"}}), "bad": {2: 1e38}},
        "whole": {"tree": trees(MIXED, SHORT)},
        "parts": {"tree": trees(MIXED, SHORT), "stop": 3},
        "number": {"tree": trees(FSDP, rezero), "scalar": True},
        "batch": {"tree": trees(of("training", batch_sequences=9))},
        "config": {"tree": trees(SHORT), "differs": "config"},
        "code": {"tree": trees(SHORT), "differs": "code"},
    }
    several, one = (tmp_path_factory.mktemp(name) for name in ("several", "one"))
    again = {"tree": trees(MIXED, SHORT), "out": str(several / "parts")}
    launch(2, {**jobs, "parts again": again}, several, environment)
    alone({name: jobs[name] for name in ("ddp", "diverged", "fp16")}, one)
    alone({"fsdp": {"tree": trees(POST)}}, one)
    return several, one


def joined(shares: list[list[list[Any]]]) -> list[list[Any]]:
    """Step, inputs and targets of whole batches, from those of each process."""
    batches = []
    for parts in zip(*shares, strict=True):
        steps, *texts = zip(*parts, strict=True)
        assert len(set(steps)) == 1
        batches.append([steps[0], *map("".join, texts)])
    return batches


def test_every_process_gets_its_share_of_the_same_batches(two: Any):
    several, one = (path / "ddp" for path in two)
    shares = [seen(several, rank)["shares"] for rank in (0, 1)]
    assert len(shares[0]) == 50
    assert len(shares[0][0][1]) == BATCH // 2 * 16 * 8 * 2  # digits of integers of 8 bytes
    assert joined(shares) == joined([seen(one)["shares"]])


def test_losses_are_those_of_one_process(two: Any):
    several, one = (path / "ddp" for path in two)
    assert_same_training(several, one)
    assert min(line["grad_norm"] for line in records(one) if "loss" in line) > 0.1  # clipped


def test_an_evaluation_is_shared(two: Any):
    assert [seen(two[0] / "fsdp", rank)["evaluated"] for rank in (0, 1)] == [4, 3]


def test_a_step_needs_few_messages(two: Any):
    """Two requests, the batch, the gradients (which fit in one bucket of DDP), and the loss."""
    assert seen(two[0] / "ddp")["messages"] == {
        "backward": {"gloo:broadcast": 1, "gloo:scatter": 1, "gloo:all_reduce": 2},
        "update": {"gloo:broadcast": 1},
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
    assert result(two[0] / "parts")["status"] == "finished"
    assert_same_bits(two[0] / "parts", two[0] / "whole", step=6)


def test_one_process_samples_and_resumes_what_two_have_divided(
    two: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    several, one = (path / "fsdp" for path in two)
    resumed = tmp_path / "resumed"
    shutil.copytree(several, resumed)
    code, text, _ = called(capsys, "sample", resumed, "--max-new-tokens", "3", "--prompt", "The")
    assert code == 0
    assert text.startswith("The")
    config = Config.model_validate(yaml.safe_load((resumed / "config.yaml").read_text()))
    assert result(resumed)["step"] == 10
    assert train(config, resumed, quiet=True).step == 20
    assert_same_training(resumed, one)


def test_what_cannot_be_divided_is_named(two: Any):
    errors = [seen(two[0] / "number", rank)["error"] for rank in (0, 1)]
    assert any(
        "blocks.0.b is a single number, which cannot be divided; use ddp" in e for e in errors
    )
    assert not (two[0] / "number" / "config.yaml").exists()


@pytest.mark.parametrize("what", ["config", "code"])
def test_processes_that_differ_are_refused_by_the_first(two: Any, what: str):
    errors = [seen(two[0] / what, rank)["error"] for rank in (0, 1)]
    assert errors == [
        f"InputError: the {what} of the process of rank 1 differs from rank 0's; start all with "
        "the same command, on the same version of steadygpt",
        "SystemExit: 2",
    ]


def test_a_batch_that_cannot_be_shared_is_refused_once(two: Any):
    errors = [seen(two[0] / "batch", rank)["error"] for rank in (0, 1)]
    assert errors == [
        "InputError: training.processes: 2 cannot share a batch of 9 sequences equally; use 1, 3, "
        "9, or another training.batch_sequences",
        "SystemExit: 2",
    ]


# -- Every option, and other numbers of processes ----------------------------------------------


def of(section: str, /, **options: Any) -> Options:
    """A section of options, nested as `a.b` says."""
    for key in reversed(section.split(".")):
        options = {key: options}
    return options


RATES = {"sgd": 0.05, "adafactor": 0.01}
OF_OPTIMIZER: dict[str, Options] = {
    name: of("optimizer", name=name, learning_rate=RATES.get(name, 3e-3)) for name in OPTIMIZERS
}
OF_PLACEMENT: dict[str, Options] = {
    name: {"model": {"layers": 4 if name == "mix" else 2, "norm": {"placement": name}}}
    for name in PLACEMENTS
}
OTHERS: dict[str, Options] = {
    "mup": of("model", parametrization="mup", mup_base_width=8),
    "qk-norm": of("model", attention={"qk_norm": True}, mlp={"activation": "swiglu"}),
    "rms": of("model.norm", type="rms", embedding=True),
    "dyt": of("model.norm", type="dyt"),
    "scale": of("model.norm", type="scale"),
    "random": of("data", windows="random"),
    "fixed": of("data", windows="fixed"),
    "diagnostics": {
        **of("diagnostics", every=10, sequences=2, sharpness=4, noise_scale=True),
        **of("training", micro_batch=2),
    },
    "bf16": of("training", precision="bf16"),
    "skip": of("training", nonfinite="skip"),
    "rollback": {**of("training", nonfinite="rollback"), **of("evaluation", every=5)},
}
TOLERANCES = {
    "bf16": 1e-2,  # of gradient norms; numbers of 8 bits round otherwise in other micro-batches
    "diagnostics": 1e-3,  # the iterations that find the sharpness stop at this relative error
}
BAD: dict[str, dict[int, float]] = {"skip": {7: math.nan}, "rollback": {7: math.nan}}


def every_option(trees: Callable[..., Options]) -> dict[str, Job]:
    """Runs of 20 or 50 steps for DDP, and of 8 for FSDP2, whose steps take longer on a CPU."""
    changes = {**OF_OPTIMIZER, **OF_PLACEMENT, **OTHERS}
    mix = [{"path": trees()["data"]["path"], "weight": weight} for weight in (2, 1)]
    changes["sources"] = of("data", path=[], mix=mix)
    jobs: dict[str, Job] = {}
    for name, change in changes.items():
        steps = 20 if name in OTHERS else 50
        jobs[f"ddp {name}"] = {"tree": trees(change, of("training", steps=steps))}
    for name in (*OF_OPTIMIZER, "admin", "dlcl", "residual", "qk-norm", *BAD, "bf16"):
        jobs[f"fsdp {name}"] = {"tree": trees(changes[name], of("training", steps=8), FSDP)}
    for name, bad in BAD.items():
        jobs[f"ddp {name}"]["bad"] = jobs[f"fsdp {name}"]["bad"] = bad
    return jobs


@pytest.mark.slow
def test_every_option_trains_as_in_one_process(
    tiny_run: Path, trees: Callable[..., Options], environment: dict[str, str], tmp_path: Path
):
    jobs, several, one = every_option(trees), tmp_path / "several", tmp_path / "one"
    jobs["ddp init_from"] = {"tree": trees({"init_from": str(tiny_run)})}
    several.mkdir()
    launch(2, jobs, several, environment)
    alone(jobs, one)
    for name in jobs:
        _, _, option = name.partition(" ")
        assert_same_training(several / name, one / name, TOLERANCES.get(option, TOLERANCE))
    for parallel in ("ddp", "fsdp"):
        assert result(several / f"{parallel} skip")["skipped_updates"] == 1
        assert result(several / f"{parallel} rollback")["rollbacks"] == 1


@pytest.fixture(scope="module")
def three(
    two: Any,
    trees: Callable[..., Options],
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of runs by three processes, of which some began with two or one, or end with one."""
    folder = tmp_path_factory.mktemp("three")
    jobs: dict[str, Job] = {}
    for name, options in {"ddp": (MIXED, SHORT), "fsdp": (MUON, SHORT, FSDP)}.items():
        jobs[f"{name} whole"] = {"tree": trees(*options)}
        jobs[f"{name} parts"] = {"tree": trees(*options), "stop": 3}
        jobs[f"{name} again"] = {"tree": trees(*options), "out": str(folder / f"{name} parts")}
    for parallel in ("ddp", "fsdp"):
        shutil.copytree(two[0] / "fsdp", folder / f"post {parallel}")
        jobs[f"post {parallel}"] = {"tree": trees(POST, of("training", parallel=parallel))}
    by_one = {"adafactor": trees(OF_OPTIMIZER["adafactor"]), "muon": trees(MUON)}
    alone({name: {"tree": tree, "stop": 5} for name, tree in by_one.items()}, folder)
    for name, tree in by_one.items():
        jobs[name] = {"tree": merge(tree, FSDP), "stop": 5}
    launch(3, jobs, folder, environment)
    alone({name: {"tree": tree} for name, tree in by_one.items()}, folder)
    return folder


@pytest.mark.slow
def test_checkpoints_fit_any_number_of_processes(
    three: Path, trees: Callable[..., Options], tmp_path: Path
):
    """Two -> three, with DDP and FSDP2; one -> three -> one, Adafactor's rows and columns too."""
    wholes = {"post": POST, "adafactor": OF_OPTIMIZER["adafactor"], "muon": MUON}
    alone({name: {"tree": trees(change)} for name, change in wholes.items()}, tmp_path)
    for name in ("post ddp", "post fsdp", "adafactor", "muon"):
        assert result(three / name)["status"] == "finished"
        assert_same_training(three / name, tmp_path / name.partition(" ")[0])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_three_processes_resume_to_the_bit(three: Path, parallel: str):
    """With three, the order of a sum matters; DDP must not change it in the middle of a run."""
    assert result(three / f"{parallel} parts")["status"] == "finished"
    assert_same_bits(three / f"{parallel} parts", three / f"{parallel} whole", step=6)


@pytest.mark.slow
def test_three_processes_share_the_same_batches(two: Any, three: Path):
    shares = [seen(three / "ddp whole", rank)["shares"] for rank in range(3)]
    assert joined(shares) == joined([seen(two[1] / "ddp")["shares"][:6]])


# -- Refused before anything starts ------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--processes 5",
            "--training.processes: 5 cannot share a batch of 4 sequences equally; use 1, 2, 4, or "
            "another --training.batch-sequences",
        ),
        (
            "--processes 2 --model.norm.type batch",
            "--training.processes: 2, but the statistics of --model.norm.type batch are over the "
            "sequences of one process; use 1",
        ),
        (
            "--processes 2 --training.parallel fsdp --training.precision fp16",
            "--training.parallel: fsdp conflicts with --training.precision fp16, whose scale all "
            "must agree on; use ddp",
        ),
        (
            "--processes 2 --training.parallel fsdp --diagnostics.every 5",
            "--training.parallel: fsdp conflicts with --diagnostics.every 5, which measures whole "
            "weights and gradients; use ddp",
        ),
        (
            "--processes 2 --training.parallel fsdp --training.compile",
            "--training.parallel: fsdp conflicts with --training.compile true, which is not "
            "supported; use ddp",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused(
    tiny_file: Path, tmp_path: Path, capsys: Any, flags: str, message: str
):
    arguments = (tiny_file, *flags.split(), "--out-dir", tmp_path / "run")
    code, _, error = called(capsys, "train", *arguments)
    assert (code, error) == (2, f"train.py: {message}\n")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_it_too(tiny_file: Path, tmp_path: Path, capsys: Any):
    flags = ("--processes", "5", "--dry-run", "--out-dir", tmp_path / "run")
    code, _, error = called(capsys, "train", tiny_file, *flags)
    assert code == 2
    assert "5 cannot share a batch of 4 sequences equally" in error


def test_python_does_not_start_processes(tiny: Make, tmp_path: Path):
    with pytest.raises(InputError, match=r"processes: 2, but this is one process; start them with"):
        train(tiny(training={"processes": 2}), tmp_path / "run")


def test_the_number_that_torchrun_has_started_wins(tiny: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = ["training.processes is 4, but torchrun has started 2, which train it"]
    assert cautions(tiny(training={"processes": 4}), None) == expected
    for agreeing in (1, 2, "auto"):
        assert cautions(tiny(training={"processes": agreeing}), None) == []


def test_a_plan_is_of_one_process(tiny_file: Path, capsys: Any):
    code, text, _ = called(capsys, "plan", tiny_file, "--training.processes", "2")
    assert code == 0
    assert text.endswith("  processes  2; the memory and the time are those of one alone\n")
    code, _, error = called(capsys, "plan", tiny_file, "--training.processes", "3")
    assert code == 2
    assert "3 cannot share a batch of 4 sequences equally; use 1, 2, 4" in error


def test_cells_of_a_comparison_are_trained_in_one_process_each(run_grid: Any):
    code, _, error = run_grid("--training.processes", "2")
    assert code == 2
    assert "training.processes: 2, but each cell is trained in one process" in error


@pytest.mark.parametrize(("seconds", "processes"), [((1.0, 3.0), 2), ((2.0, 1.9), 1)])
def test_auto_takes_what_takes_less_time(
    seconds: tuple[float, float], processes: int, monkeypatch: pytest.MonkeyPatch
):
    """Seconds of a micro-batch of 2: by both processes at once, which is half of 8, and by one."""
    clock = [0.0]
    monkeypatch.setattr(lead.time, "monotonic", lambda: clock[0])

    def trainer(number: int) -> Any:
        def backward(step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            assert len(inputs) == 2 * number
            clock[0] += seconds[0] if number == 2 else seconds[1] / 2  # twice as many batches
            return torch.zeros(()), torch.zeros(())

        share = SimpleNamespace(batch_sequences=8 // number, model=SimpleNamespace(context=4))
        return SimpleNamespace(
            micro_batch=2,
            processes=number,
            config=share,
            model=SimpleNamespace(vocab_size=5),
            backward=backward,
            update=lambda *args: None,
            reset=lambda: None,
        )

    said: list[str] = []
    sharing = lead._sharing_is_faster(trainer(2), lambda: trainer(1), 1, said.append)
    assert sharing == (processes == 2)
    shared, whole = 2 * seconds[0], 2 * seconds[1]
    assert f"{shared:.3g} s for an update by 2 processes" in said[0]
    assert f"{whole:.3g} s by 1 process" in said[0]


def test_how_many_processes_auto_may_start(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch_command, "cores", lambda: 8)
    monkeypatch.setattr(launch_command, "machine_memory", lambda: 2**40)
    batch = {"training": {"batch_sequences": 12, "processes": "auto"}}
    config = tiny(**batch)
    assert launch_command.count(config, tmp_path) == 6
    assert launch_command.count(tiny(**batch, model={"norm": {"type": "batch"}}), tmp_path) == 1
    facts = tmp_path / "environment.json"
    for recorded, started in ((2, 2), (1, 1), (12, 6)):  # the last is of a larger machine
        facts.write_text(json.dumps({"processes": recorded}))
        assert launch_command.count(config, tmp_path) == started
    facts.unlink()
    large = tiny(**batch, model={"width": 2048, "layers": 4})  # training takes over 3.2 GB
    monkeypatch.setattr(launch_command, "machine_memory", lambda: 10 * 2**30)
    assert launch_command.count(large, tmp_path) == 3


def test_after_a_restart_a_fresh_directory_is_no_longer_required(monkeypatch: pytest.MonkeyPatch):
    assert [after_restart(each) for each in ("never", "auto", "best")] == ["never", "auto", "best"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [after_restart(each) for each in ("never", "auto", "best")] == ["auto", "auto", "best"]


def test_one_process_of_torchrun_trains_whatever_the_config_says(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(training={"steps": 1, "processes": 2})
    with pytest.raises(InputError, match="but this is one process; start them with"):
        train(config, tmp_path / "a", quiet=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train(config, tmp_path / "b", quiet=True).status == "finished"


def test_a_lost_connection_is_not_a_checkpoint_that_does_not_fit(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
):
    """It would end the run for good, though a restart helps."""

    def lost(self: Trainer, tensors: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(Trainer, "set_weights", lost)
    config = load_resolved(tiny_run / "config.yaml")
    trainer = Trainer(config, 257, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Connection closed"):
        restore(trainer, newest_intact(tiny_run / "checkpoints")[0], lambda: torch.zeros(1, 1))

"""`benchmarks/distributed.py` and `benchmarks/projection.py`, and that docs/scale.md shows them."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import distributed
import projection
from distributed import Way
from projection import Machines, Model, Step


def test_bytes_that_a_ring_of_four_sends():
    """A tensor of 100 numbers is four parts of 100 bytes; a process sends part after part."""
    operations = [
        ("gloo:all_reduce", [[10, 10]], 6 * 100),
        ("nccl:_all_gather_base", [[25]], 3 * 100),
        ("nccl:_reduce_scatter_base", [[100]], 3 * 100),
        ("gloo:broadcast", [[1024]], 0),
        ("c10d::allreduce_", [[], []], 0),
    ]
    for name, shapes, sent in operations:
        assert distributed.ring_bytes([(name, shapes)], 4) == sent


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes")
def test_two_processes_compute_the_same_and_send_what_the_formulas_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "table.json"
    distributed.main(["--small", "--processes", "2", "--json", str(out)])
    rows = {row["parallel"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows[""]["loss"] == pytest.approx(rows["ddp"]["loss"], abs=1e-5)
    assert rows[""]["loss"] == pytest.approx(rows["fsdp"]["loss"], abs=1e-5)
    assert rows["ddp"]["micro_batches"] == rows["fsdp"]["micro_batches"] == 2
    numbers = 4 * rows["ddp"]["parameters"]
    assert rows["ddp"]["formula_bytes"] == numbers
    assert rows["fsdp"]["formula_bytes"] == 2 * 2 * numbers  # gloo's reduce-scatters cost twice
    for parallel in ("ddp", "fsdp"):
        row = rows[parallel]
        assert len(row["peaks"]) == 2
        for counted in ("ring_bytes", "written_bytes"):
            assert row[counted] == pytest.approx(row["formula_bytes"], rel=0.03)
    for row in rows.values():
        assert min(row["seconds"], row["cpu_seconds"], *row["peaks"], row["held"]) > 0
    printed, _ = capsys.readouterr()
    assert "| toy | FSDP2, 2 processes, " in printed
    assert printed.endswith("toy size: these numbers are not speeds\n")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_group_of_one_process(
    parallel: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As on a machine with one GPU, but over gloo: nothing is sent, and the loss is the same."""
    (size,) = distributed.SIZES["small"]
    losses = []
    for way in (Way("alone", 1, 1), Way("in a group", 1, 1, parallel)):
        for name, value in distributed.environment(way, 0, distributed.free_port()).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"2\n{distributed.COUNT}\n"))
        distributed.work(json.dumps([asdict(size), asdict(way), "cpu"]))
        facts, turn, counts = map(json.loads, capsys.readouterr().out.splitlines())
        assert facts["micro_batches"] == 4
        assert turn["seconds"] > 0
        assert counts["ring_bytes"] == 0
        losses.append(counts["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--small", "--processes", "5"], "5 cannot share a batch of 12"),
        (["--processes", "0"], "argument --processes: 0 is not at least 1"),
        (["--rounds", "-1"], "argument --rounds: -1 is not at least 1"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        distributed.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", distributed.SIZES)
@pytest.mark.parametrize("parallel", ["", "ddp", "fsdp"])
def test_all_sizes_are_configs(device: str, parallel: str):
    for size in distributed.SIZES[device]:
        training = distributed.config_of(size, parallel, "cpu").training
        assert training.parallel == (parallel or "ddp")
        assert not training.compile  # which FSDP2 refuses
        assert device != "cuda" or training.precision == "bf16"


def test_sizes_of_gpt2():
    sizes = [model.parameters for model in projection.MODELS]
    assert sizes == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


def test_a_step_by_hand(monkeypatch: pytest.MonkeyPatch):
    """A million parameters, 16 sequences on 8 GPUs that share 1 GB/s."""
    given = {"peak": 1e12, "mfu": 0.5, "inside": 1e9, "tcp": 1e12, "message": 0.0, "micro_batch": 1}
    monkeypatch.setattr(projection, "assumed", given.__getitem__)
    monkeypatch.setattr(Model, "parameters", 1_000_000)
    step = Step(Model("", 1, 1), Machines(1, "400G"), 16)
    compute = 6e6 * 16 * 1024 / 8 / 0.5e12
    assert step.compute == pytest.approx(compute)
    assert step.micro_batches == 2
    assert step.ddp == pytest.approx(2 * 7 / 8 * 4e6 / 1e9)  # 7 ms
    assert step.fsdp == pytest.approx(2 * 3 * 7 / 8 * 4e6 / 1e9)  # 21 ms
    assert compute == pytest.approx(24.6e-3, rel=1e-3)
    assert step.seconds("ddp") == pytest.approx(compute)  # a micro-batch's backward is 8.2 ms
    assert step.seconds("fsdp") == pytest.approx(compute)
    given["inside"] = 0.5e9
    assert step.seconds("ddp") == pytest.approx(compute + 14e-3 - compute / 3)
    assert step.seconds("fsdp") == pytest.approx(42e-3)
    assert step.limit("fsdp") == "communication"
    given["message"] = 10e-3
    assert step.seconds("fsdp") == pytest.approx(0.13, rel=1e-3)  # 7 messages and 2 x 3
    assert step.limit("fsdp") == "rank 0"


def test_machines_are_as_fast_as_their_slowest_link():
    assert Machines(1, "100G").bandwidth == 360e9
    assert Machines(64, "100G").bandwidth == 10e9
    assert Machines(64, "400G").gpus == 512


def test_cells_run_in_whole_rounds():
    assert projection.grid_seconds(10_000) == 305
    assert projection.grid_seconds(9_999) == 610


def test_the_page_shows_the_projection():
    page = (ROOT / "docs/scale.md").read_text("utf-8")
    for table in projection.tables():
        assert table in page

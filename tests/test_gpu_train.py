"""The short form of `benchmarks/gpu_train.py`: the same script at toy size, with a few rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "benchmarks/gpu_train.py")]
ROWS = ["plain PyTorch loop", "loss in chunks", "cuDNN", "b2t"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="it locks files as Unix does"),
]


def test_a_table_and_its_json(tmp_path: Path, environment: dict[str, str]):
    out = tmp_path / "speed.json"
    command = [*COMMAND, "--small", "--micro-batch", "4", "--out", str(out), "--only", *ROWS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows.keys() == {
        "steadygpt",
        "plain PyTorch loop, compiled",
        "loss in chunks of 64 tokens",
        "cuDNN attention",
        "b2t",
    }
    assert report["matrix_flops"] > 0
    failed = rows.pop("cuDNN attention")  # a CPU has no such kernel: a row, and not the end
    assert failed["note"].startswith("failed: RuntimeError")
    for name, row in rows.items():
        assert row["note"] == ""
        assert row["tokens_per_second"] > 0
        assert row["peak_memory"] > 2**20
        share = row["tokens_per_second"] * report["flops_per_token"] / report["matrix_flops"]
        assert row["of_matrices"] == pytest.approx(share)
        ratio = row["tokens_per_second"] / rows["steadygpt"]["tokens_per_second"]
        assert row["of_steadygpt"] == pytest.approx(ratio)
        line = next(line for line in done.stdout.splitlines() if f": {name} | 4 |" in line)
        assert f"| {row['tokens_per_second']:,.0f} |" in line
    loss = rows["steadygpt"]["loss"]
    assert rows["loss in chunks of 64 tokens"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert rows["b2t"]["loss"] != pytest.approx(loss, rel=1e-4)
    assert "cuDNN attention | 4 |  |  |  |  |  |  | failed: RuntimeError" in done.stdout
    assert done.stdout.endswith("toy size on a CPU: these numbers are not speeds\n")


def test_without_time_nothing_is_measured_and_all_rows_say_so(
    tmp_path: Path, environment: dict[str, str]
):
    out = tmp_path / "speed.json"
    command = [*COMMAND, "--small", "--minutes", "0.1", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) > 25
    assert {row["note"] for row in rows} == {"not measured: out of time"}
    assert "steadygpt: not measured" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_it_needs(environment: dict[str, str]):
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "gpu_train.py needs a CUDA GPU with bf16, and finds none here;",
        "--small runs all of it at toy size on a CPU",
    ]


def test_a_file_of_tokens_that_is_not_there(environment: dict[str, str]):
    command = [*COMMAND, "--small", "--data", "nowhere.bin"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["--data: nowhere.bin: no such file"]

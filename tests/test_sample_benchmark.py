"""`benchmarks/sample.py` at a tiny size: every row is there, and a failure is one row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("benchmark")
    tiny = "--layers 2 --heads 2 --width 32 --context 64 --vocab-size 300 --tokens 8 --batch 1 2"
    command = (
        f"--device cpu --threads 1 --rounds 1 {tiny} --nanogpt {folder} --json {folder}/a.json"
    )
    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks/sample.py", *command.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, json.loads((folder / "a.json").read_text())


def test_all_contestants_and_limits_have_a_row(done: tuple[str, dict]):
    stdout, report = done
    rows = [line for line in stdout.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == len(report["entries"]) == 16
    assert stdout.rstrip().endswith(rows[-1])
    for entry in report["entries"]:
        failed = entry["name"] == "nanoGPT"
        assert bool(entry["failure"]) == failed
        assert [rate > 0 for rate in entry["tokens_per_second"]] == ([] if failed else [True])


def test_ratios_are_to_transformers_and_the_limit(done: tuple[str, dict]):
    stdout, _ = done
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in stdout.splitlines()]
    rows = {(c[0], c[1], c[2]): c[3:] for c in cells if len(c) == 6}
    for batch in ("1", "2"):
        assert rows[batch, "transformers", "fp32"][1] == "1.00"
        assert rows[batch, "limit: plain reads", "fp32"][2] == "100%"
        ours, theirs = (
            float(rows[batch, name, "fp32"][0].replace(",", ""))
            for name in ("steadygpt", "transformers")
        )
        assert float(rows[batch, "steadygpt", "fp32"][1]) == pytest.approx(ours / theirs, abs=0.02)


def test_a_contestant_that_fails_is_a_row(done: tuple[str, dict]):
    stdout, _ = done
    assert "| 1 | nanoGPT | fp32 | failed: No module named 'model' |  |  |" in stdout

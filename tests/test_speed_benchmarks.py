"""The speed benchmarks that run at any size, tried at the smallest."""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from gpt.config import Config

sys.path.insert(0, str(ROOT / "benchmarks"))
import cpu_train
import gpu_grid

Make = Callable[..., Config]


@pytest.mark.slow
def test_many_runs_on_one_gpu(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two shapes of two cells: every way has a row, and the grid is projected from them."""
    base = tiny(sampling={"tokens": 0}).model_dump(mode="json")
    tree: dict[str, Any] = {
        "base": {key: value for key, value in base.items() if key not in ("name", "seed")},
        "arms": {"placement": {"pre": {}, "post": {"model.norm.placement": "post"}}},
        "grid": {"optimizer.learning_rate": [1e-3, 3e-3]},
        "seeds": 1,
    }
    grid, table = tmp_path / "grid.yaml", tmp_path / "table.json"
    grid.write_text(yaml.safe_dump(tree, sort_keys=False))
    gpu_grid.main(["--grid", str(grid), "--small", "--steps", "4", "--json", str(table)])
    out, _ = capsys.readouterr()
    found = json.loads(table.read_text())
    assert found["missing"] == []
    ways = [(row["way"], row["arm"], row["cells"]) for row in found["rows"]]
    assert sorted(ways) == [
        ("batched", "post", 2),
        ("batched", "pre", 1),
        ("batched", "pre", 2),
        ("in processes", "pre", 2),
        ("one after another", "pre", 2),
    ]
    assert all(row["update_seconds"] > 0 for row in found["rows"])
    assert set(found["projected_seconds"]) == {"one after another", "batched"}
    assert "| 2 (post) | batched |" in out
    assert "4 cells of 20 updates, batched:" in out


def test_without_a_gpu_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        gpu_grid.main([])
    assert ended.value.code == 2
    assert "needs a GPU; --small" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # where the token files are prepared
    letters = random.Random(0).choices(string.ascii_letters + string.digits + " .\n", k=20_000)
    text, table = tmp_path / "text.txt", tmp_path / "table.json"
    text.write_text("".join(letters))
    arguments = ["step", "--text", str(text), "--rounds", "1", "--steps", "2"]
    cpu_train.main([*arguments, "--processes", "2", "--json", str(table)])
    out, _ = capsys.readouterr()
    rows = {row["way"]: row for row in json.loads(table.read_text())["rows"]}
    together = "steadygpt, 2 processes of 1 thread"
    assert rows.keys() == {"steadygpt", together, "transformers", "transformers, gelu_new"}
    theirs = rows["transformers"]
    for way, name in (("steadygpt", "steadygpt is"), (together, "in 2 processes")):
        assert theirs[name] == pytest.approx(theirs["ms a step"] / rows[way]["ms a step"])
    assert "| nanoGPT | not measured: --nanogpt is not given |" in out


def test_validation_losses_are_read_from_what_nanogpt_prints():
    lines = ["iter 0: loss 4.2, time 9ms\n", "step 250: train loss 2.4012, val loss 2.4265\n"]
    assert list(cpu_train._printed(lines)) == [(250, 2.4265)]

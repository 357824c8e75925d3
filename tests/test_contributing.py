"""CONTRIBUTING.md's fifteenth placement works as it says: one file, two insertions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from gpt.config import Config

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program with the example's two blocks in gpt/placement.py."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "gpt", folder / "gpt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "sample.py"):
        shutil.copy(ROOT / name, folder)
    source, entry = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    path = folder / "gpt/placement.py"
    before, table, after = path.read_text("utf-8").partition("PLACEMENTS: ")
    first, brace, rest = after.partition("{\n")
    path.write_text(f"{before}{source}\n\n{table}{first}{brace}{entry}{rest}", "utf-8")
    return folder


def test_it_trains_samples_and_is_looked_into(
    extended: Path, tiny: Callable[..., Config], environment: dict[str, str], tmp_path: Path
):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        here = {**environment, "PYTHONPATH": str(extended)}
        return subprocess.run(
            [sys.executable, *words], cwd=extended, env=here, capture_output=True, text=True
        )

    config = tmp_path / "config.yaml"
    config.write_text(tiny(diagnostics={"every": 10}, checkpoint={"every": 10}).to_yaml())
    (command,) = re.findall(r"^python train\.py configs/pre-norm\.yaml (.*)$", TEXT, re.MULTILINE)
    done = run("train.py", str(config), *command.split(), "--out-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "2 x layer_scale; layer norm, with a final one" in done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert result["val_loss"] < records[0]["val_loss"] - 0.1
    assert {"attention_beta", "mlp_beta"} <= set(next(r for r in records if r.get("layer") == 1))
    assert run("sample.py", str(tmp_path / "run"), "--max-new-tokens", "3").returncode == 0

    mistaken = run("train.py", str(config), "--model.norm.placement", "layer_scal")
    assert mistaken.returncode == 2
    assert "perhaps you meant layer_scale" in mistaken.stderr
    assert "layer_scale" in run("train.py", "--help").stdout


def test_its_equation(extended: Path, environment: dict[str, str]):
    code = """
import torch
from gpt.config import ModelConfig
from gpt.init import initialize
from gpt.model import GPT
tree = {"layers": 2, "heads": 1, "width": 8, "norm": {"placement": "layer_scale", "type": "rms"}}
model = GPT(ModelConfig.model_validate(tree), 11)
initialize(model, model.config, seed=0)
block = model.blocks[0]
x = torch.randn(2, 5, 8)
rms = lambda z: z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()
h = x + 0.1 * block.attention(rms(x))
torch.testing.assert_close(block(x), h + 0.1 * block.mlp(rms(h)))
"""
    here = {**environment, "PYTHONPATH": str(extended)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=extended, env=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""CONTRIBUTING.md's fifteenth placement works as described: one file, two insertions."""

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
from gpt.model.placement import PLACEMENTS

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_every_module_and_every_test_file_is_in_the_table():
    (table,) = re.findall(r"^\| a change in .*?\n\n", TEXT, re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`(gpt\.[\w.]+)`", table))
    files = set(re.findall(r"`(test_\w+\.py)`", table))
    assert files == {path.name for path in (ROOT / "tests").glob("test_*.py")}
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "gpt").rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    modules = {name for name in names if "." in name and not name.endswith(".__main__")}
    assert named <= modules
    for module in modules:  # itself, or what it is a part of, or, of a package, a part of it
        assert any(f"{module}.".startswith(f"{n}.") or n.startswith(f"{module}.") for n in named)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the example's blocks inserted."""
    if "layer_scale" in PLACEMENTS:
        pytest.skip("the example is in the table already")
    folder = tmp_path_factory.mktemp("extended")
    for name in ("gpt", "tests", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("train.py", "sample.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    code, entry, reference, its_entry = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    insert(folder / "gpt/model/placement.py", "PLACEMENTS: ", code, entry)
    insert(folder / "tests/test_placement.py", "STACKS = ", reference, its_entry)
    return folder


def insert(path: Path, table: str, code: str, entry: str) -> None:
    """`code` before the `table`, and `entry` as its last line."""
    before, start, after = path.read_text("utf-8").partition(f"\n{table}")
    inside, _, rest = after.partition("\n}\n")
    path.write_text(f"{before}\n{code}\n{start}{inside}\n{entry}}}\n{rest}", "utf-8")


@pytest.mark.slow
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
    assert "layer_scale" in run("train.py", "--help-all").stdout


@pytest.mark.slow
def test_the_tests_cover_it(extended: Path, environment: dict[str, str]):
    """The tests of placements, options and the command line, with the schema made again."""
    here = {**environment, "PYTHONPATH": str(extended)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=extended, env=here, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (extended / "configs/schema.json").write_text(run("gpt.config"), "utf-8")
    chosen = "layer_scale or placements or reference or config or help"
    files = [f"tests/test_{name}.py" for name in ("placement", "config", "cli", "init", "optim")]
    output = run("pytest", "-q", "-n0", "-p", "no:cacheprovider", "-k", chosen, *files, "-rA")
    for norm in ("layer", "rms", "batch", "dyt", "scale", "none"):
        assert f"test_equal_to_its_equations_in_float64[layer_scale-{norm}]" in output

"""The README is true: its commands run, and the files that it names exist."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from gpt import cli
from gpt.compare import grid as grids
from gpt.config import Config
from gpt.training import train

README = (ROOT / "README.md").read_text("utf-8")
COMPARING = (ROOT / "docs/comparing.md").read_text("utf-8")
BLOCKS = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_it_opens_with_the_two_commands():
    first, second = COMMANDS[:2]
    setup = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "
    assert first == setup + ". && .venv/bin/python train.py configs/quickstart.yaml"
    assert second == setup + "'.[dev]' && .venv/bin/python -m pytest"
    assert second in (ROOT / ".ci/run").read_text().splitlines()
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in pinned
    assert [line for line in pinned if "==" not in line and not line.startswith("#")] == []


PROGRAMS = ("train", "train.py", "gpt.data")  # the last one has the options of the others


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r" (train|gpt\.data)", c)])
def test_train_and_prepare_commands(command: str, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    start = next(i for i, word in enumerate(words) if word in PROGRAMS) + 1
    arguments = [word for word in words[start:] if word != "--print-config"]
    assert cli.run("train", [*arguments, "--print-config"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "compare.py configs/" in c])
def test_compare_commands(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(ROOT)
    _, _, rest = command.partition("compare.py ")
    arguments = [word for word in shlex.split(rest, comments=True) if word != "--dry-run"]
    arguments += [] if "--out-dir" in arguments else ["--out-dir", str(tmp_path / "new")]
    assert cli.run("compare", [*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out


def test_it_lists_every_command():
    table = README[README.index("| command | what it does |") :].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(cli.COMMANDS)


def test_the_grid_in_comparing_loads(tmp_path: Path):
    (example,) = re.findall(r"```yaml\n(base: .*?)```", COMPARING, re.DOTALL)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/mine.yaml").write_text(example)
    shutil.copy(ROOT / "configs/pre-norm.yaml", tmp_path)
    grid, cells = grids.load(tmp_path / "compare/mine.yaml")
    assert len(grid.all_arms()) == 4
    assert len(cells) == (4 * 3 - 2) * 2 * 5


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"\bsample(\.py)? ", c)])
def test_sample_commands(
    command: str,
    tiny: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
):
    train(tiny(name="quickstart"), tmp_path / "runs/quickstart", quiet=True)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.rpartition(" | ")[2], comments=True)
    start = next(i for i, word in enumerate(words) if word in ("sample", "sample.py")) + 1
    assert cli.run("sample", [*words[start:], "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if " eval " in c])
def test_eval_commands(
    command: str,
    tiny: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
):
    context = {"context": 32}  # at least the stride
    config = tiny(name="quickstart", model=context, training={"steps": 1})
    train(config, tmp_path / "runs/quickstart", quiet=True)
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "docs"):
        (tmp_path / name).write_text("A short text.")
    assert cli.run("eval", shlex.split(command)[2:]) == 0
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if " export " in c])
def test_export_commands(
    command: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    shutil.copytree(tiny_run, tmp_path / "runs/quickstart")
    monkeypatch.chdir(tmp_path)
    assert cli.run("export", shlex.split(command)[2:]) == 0
    assert (tmp_path / "exported/model.safetensors").is_file()


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if re.search(r"\bsteadygpt (runs|plot)", c)]
)
def test_runs_and_plot_commands(
    command: str,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
):
    for name in ("quickstart", "lower-rate"):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    _, name, *words = shlex.split(command)
    assert cli.run(name, words) == 0
    assert ("lower-rate" if name == "runs" else "curves.svg") in capsys.readouterr().out


def test_files_that_it_names_exist():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    named |= {f"docs/{name}" for name in re.findall(r"\]\(([^)#:]+)\)", COMPARING)}
    named |= set(re.findall(r"`((?:configs|gpt|tests|benchmarks)/[\w./-]+)`", README))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []

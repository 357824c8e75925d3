"""Configs and grids found by name, and what a file or folder of the same name means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import NEEDS_A_RUN, ROOT

from gpt import cli
from gpt.compare import grid as grids
from gpt.config import load
from gpt.config.shipped import find, names
from gpt.errors import InputError

QUICKSTART = ROOT / "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of every test here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_names_are_those_of_the_files():
    assert names("config") == sorted(path.stem for path in ROOT.glob("configs/*.yaml"))
    top = {path.stem for path in ROOT.glob("configs/compare/*.yaml")}
    literature = {path.stem for path in ROOT.glob("configs/compare/literature/*.yaml")}
    assert literature
    assert names("grid") == sorted(top | {f"literature/{name}" for name in literature})


@pytest.mark.parametrize("name", [name for name in names("config") if name != NEEDS_A_RUN])
def test_every_config_is_found_by_its_name(name: str):
    assert load(name) == load(ROOT / f"configs/{name}.yaml")
    assert load(Path(name)).name == name


@pytest.mark.parametrize("name", names("grid"))
def test_every_grid_is_found_by_its_name(name: str):
    assert grids.load(name) == grids.load(ROOT / f"configs/compare/{name}.yaml")


def test_the_commands_take_a_name(capsys: pytest.CaptureFixture[str]):
    assert cli.run("train", ["quickstart", "--print-config"]) == 0
    assert capsys.readouterr().out == load(QUICKSTART).to_yaml()


@pytest.mark.parametrize(("command", "kind"), [("train", "config"), ("compare", "grid")])
def test_help_lists_the_names(command: str, kind, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.run(command, ["--help"])
    words = re.findall(r"[\w/-]+", capsys.readouterr().out)
    assert set(names(kind)) <= set(words)


def test_a_file_wins_over_a_name(tmp_path: Path):
    (tmp_path / "quickstart").write_text("name: mine")
    assert find("quickstart", "config") == Path("quickstart")
    assert load("quickstart").name == "mine"


def test_a_folder_does_not_hide_a_config(tmp_path: Path):
    """`steadygpt train quickstart --out-dir quickstart` can be started again."""
    (tmp_path / "quickstart").mkdir()
    assert find("quickstart", "config") == QUICKSTART
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine: is a folder"):
        load("mine")


def test_a_comparison_directory_wins_over_a_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "quick").mkdir()
    with pytest.raises(SystemExit) as end:
        cli.run("compare", ["quick", "--report-only"])
    assert end.value.code == 2
    assert "quick: is not a comparison directory" in capsys.readouterr().err


def test_a_name_that_may_mean_two_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "quickstart.yaml").write_text("name: mine")
    with pytest.raises(InputError, match=r"shipped config, and quickstart\.yaml exists too"):
        load("quickstart")
    assert load("quickstart.yaml").name == "mine"
    monkeypatch.chdir(ROOT / "configs")
    assert load("quickstart") == load("quickstart.yaml")  # one file


@pytest.mark.parametrize(
    ("name", "kind", "near"),
    [
        ("quikstart", "config", "quickstart"),
        ("Pre_Norm", "config", "pre-norm"),
        ("quickstart.yaml", "config", "quickstart"),
        ("configs/quickstart.yaml", "config", "quickstart"),
        ("placement", "grid", "placements"),
        ("../quickstart", "config", "quickstart"),
        ("zzz", "config", None),
        ("zzz", "grid", None),
        ("a\0", "config", None),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all(name: str, kind, near: str | None):
    with pytest.raises(InputError) as caught:
        find(name, kind)
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"{name}: no such file (looked in {Path.cwd()}), and no shipped {kind}")
    assert first.endswith(f"; perhaps you meant {near}" if near else "has that name")
    assert second == f"shipped {kind}s: {', '.join(names(kind))}"


def test_an_error_of_the_file_system_is_left_to_the_reader():
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        load("x" * 300)


def test_a_base_may_be_a_name(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.yaml").write_text("base: pre-norm\nseed: 7")
    config = load("folder/mine.yaml")
    assert config.differences(load("pre-norm")) == {"name": ("mine", "pre-norm"), "seed": (7, 0)}
    (tmp_path / "folder/pre-norm").write_text("model: {layers: 3}")  # a path wins here too
    assert load("folder/mine.yaml").model.layers == 3
    (tmp_path / "folder/mine.yaml").write_text("base: pre-nrm")
    with pytest.raises(InputError, match=r"mine\.yaml: base: pre-nrm: .* you meant pre-norm\n"):
        load("folder/mine.yaml")

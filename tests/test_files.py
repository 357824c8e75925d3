"""Files outside a directory stay unchanged, whatever links lead into or out of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from bad_input import call, contents, is_clear
from matplotlib.figure import Figure
from test_training import stop_after

from gpt import training
from gpt.compare import report as reports
from gpt.compare.comparison import compare, report
from gpt.compare.figures.base import Plot
from gpt.compare.grid import load
from gpt.config import Config
from gpt.data import encode, preparation
from gpt.errors import InputError, StoppedError
from gpt.io.console import Console
from gpt.io.files import open_for_update, read_json, refuse_links, write_bytes, write_text
from gpt.run import layer_plot, plot

Make = Callable[..., Config]
Link = Callable[[Path, Path], None]


def to_file(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "file")


def to_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "folder", target_is_directory=True)


def to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "nothing")


def to_the_same(path: Path, outside: Path) -> None:
    """A link to the original contents, moved outside."""
    kept = path.with_name(f"{path.name}.kept")
    shutil.move(kept, outside / "moved") if kept.exists() else (outside / "moved").mkdir()
    path.symlink_to(outside / "moved")


LINKS = [to_file, to_folder, to_nothing, to_the_same]


def two_links(names: list[str]) -> list[tuple[str, Link]]:
    """Each name with a link to its own content, moved elsewhere, and with another kind in turn."""
    return [
        (name, link)
        for number, name in enumerate(names)
        for link in (to_the_same, LINKS[number % 3])
    ]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that the program must not touch."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("precious\n")
    for name in ("figure.png", "figure.svg", "latest", "train.bin", "step-00000001.txt"):
        (folder / "folder" / name).write_text("precious\n")
    return folder


def put(link: Link, path: Path, outside: Path) -> None:
    """Replace `path` by a link."""
    kept = path.with_name(f"{path.name}.kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(kept)
    link(path, outside)
    shutil.rmtree(kept) if kept.is_dir() else kept.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Pictures take most of the time: here they are files, but empty."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (plot, layer_plot):
            patch.setattr(module, "save", lambda figure, path: write_bytes(path, b"picture"))
        patch.setattr(reports, "draw", lambda data: {})
        yield


# ---------------------------------------------------------------------------------------------
# A run directory


@pytest.fixture(scope="module")
def small(tiny: Make) -> Config:
    return tiny(
        model={"layers": 1, "heads": 1, "width": 8, "context": 8},
        schedule={"warmup_steps": 1},
        training={"steps": 6, "batch_sequences": 2},
        evaluation={"every": 2, "sequences": 4},
        diagnostics={"every": 2, "sequences": 2},
        sampling={"tokens": 2},
        checkpoint={"every": 1, "keep": 2},
    )


@pytest.fixture(scope="module")
def original(small: Config, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """A run that was stopped twice, so that it has every file of a run."""
    path = tmp_path_factory.mktemp("original") / "run"
    for steps in (2, 1):
        training.train(small, path, quiet=True, **stop_after(steps))
    (path / "layers.png").write_bytes(b"picture")
    shutil.copytree(path / "checkpoints/step-00000002", path / "checkpoints/damaged-step-00000002")
    return path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


RUN = [
    *("config.yaml", "environment.json", "tokenizer.json", "metrics.jsonl", "history.jsonl"),
    *("result.json", "loss.png", "layers.png", "samples", "samples/step-00000002.txt"),
    *("samples/step-00000004.txt", "samples/.writing-x", "checkpoints", "checkpoints/latest"),
    *("checkpoints/best", "checkpoints/step-00000003", "checkpoints/step-00000004"),
    *(f"checkpoints/step-00000003/{name}" for name in ("manifest.json", "model.safetensors")),
    *("checkpoints/.writing-x", "checkpoints/damaged-step-00000003", ".lock", ".writing-x"),
    *("notes", "folder/notes"),
]


@pytest.mark.parametrize(("name", "link"), two_links(RUN))
def test_a_run_does_not_write_through_a_link(
    name: str, link: Link, run: Path, small: Config, outside: Path
):
    put(link, run / name, outside)
    (run.parent / "c.yaml").write_text(small.to_yaml())
    before = contents(outside), contents(run)
    answer = call("train.py", run.parent / "c.yaml", "--out-dir", run)
    assert not is_clear(answer)
    assert str(run / name) in answer.err or name in ("config.yaml", "result.json")
    assert (contents(outside), contents(run)) == before


@pytest.mark.parametrize("link", LINKS)
def test_a_plot_of_layers_replaces_a_link(link: Link, run: Path, outside: Path):
    put(link, run / "layers.png", outside)
    before = contents(outside)
    assert call("diagnose", run).code == 0
    assert (run / "layers.png").read_bytes() == b"picture"
    assert contents(outside) == before


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", ["samples", "checkpoints", ".lock", ".writing-x", "config.yaml"])
def test_a_fresh_run_does_not_write_through_a_link(
    name: str, link: Link, tmp_path: Path, small: Config, outside: Path
):
    put(link, tmp_path / "run" / name, outside)
    (tmp_path / "c.yaml").write_text(small.to_yaml())
    before = contents(tmp_path)
    assert not is_clear(call("train.py", tmp_path / "c.yaml", "--out-dir", tmp_path / "run"))
    assert contents(tmp_path) == before


def test_a_run_does_not_change_files_with_other_hard_links(
    run: Path, small: Config, tmp_path: Path, quick: None
):
    """Such as a snapshot of a run that `cp -al` made."""
    (run / ".lock").touch()
    (run / ".writing-x").write_text("x")
    snapshot = tmp_path / "snapshot"
    shutil.copytree(run, snapshot, copy_function=os.link)
    before = contents(snapshot)
    (tmp_path / "c.yaml").write_text(small.to_yaml())
    assert call("train.py", tmp_path / "c.yaml", "--out-dir", run).code == 0
    assert call("diagnose", run).code == 0
    assert contents(snapshot) == before
    assert (run / "history.jsonl").read_bytes().startswith(before["history.jsonl"])
    assert len((run / "history.jsonl").read_text().splitlines()) == 2
    assert not (run / ".writing-history.jsonl").exists()


def test_a_run_directory_may_itself_be_a_link(
    run: Path, small: Config, tmp_path: Path, quick: None
):
    (tmp_path / "c.yaml").write_text(small.to_yaml())
    (tmp_path / "link").symlink_to(run)
    assert call("train.py", tmp_path / "c.yaml", "--out-dir", tmp_path / "link").code == 0
    assert (run / "result.json").is_file()


@pytest.mark.parametrize("target", ["..", "link", "folder", "no such file", "/dev/zero"])
def test_every_symbolic_link_is_rejected_wherever_it_leads(target: str, tmp_path: Path):
    (tmp_path / "a/folder").mkdir(parents=True)
    refuse_links(tmp_path)
    (tmp_path / "a/link").symlink_to(target)
    with pytest.raises(InputError, match="a/link: is a symbolic link"):
        refuse_links(tmp_path)


def test_ten_thousand_cells_are_searched_for_links_in_a_second(tmp_path: Path):
    for number in range(1_000):
        folder = tmp_path / "cells" / f"{number:04}" / "samples"
        folder.mkdir(parents=True)
        for name in ("config.yaml", "metrics.jsonl", "result.json"):
            (folder / name).touch()
    began = time.process_time()
    refuse_links(tmp_path)
    assert time.process_time() - began < 0.3  # measured: 0.03 s
    (tmp_path / "cells/0999/samples/x").symlink_to("config.yaml")
    with pytest.raises(InputError, match="samples/x: is a symbolic link"):
        refuse_links(tmp_path)


# ---------------------------------------------------------------------------------------------
# A comparison


@pytest.fixture(scope="module")
def compared(small: Config, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "small"
    tree = small.model_dump(mode="json")
    grid = {
        "base": {key: value for key, value in tree.items() if key not in ("name", "seed")},
        "arms": {"placement": {p: {"model.norm.placement": p} for p in ("pre", "post")}},
        "seeds": 1,
        "probes": False,
        "contrasts": [{"question": "Is it?", "measure": "failure", "of": ["pre", "post"]}],
        "pairs": [["pre", "post"]],
    }
    folder.mkdir()
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    resolved, cells = load(path)
    path.write_text(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False))
    for cell in cells:
        training.train(cell.config, folder / "cells" / cell.id, quiet=True)
    assert compare(
        resolved, cells, folder, workers=1, console=Console(quiet=True), stop=lambda: False
    )
    (folder / "probes.json").write_text("[]")
    (folder / "lost.json").write_text("{}")
    return folder


@pytest.fixture
def comparison(compared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compared, tmp_path / "small"))


COMPARISON = [
    *("grid.yaml", "command.json", "lost.json", "probes.json", "cells.csv", "summary.json"),
    *("report.html", "report.md", "figures", "figures/x.png", "cells", "cells/CELL"),
    *("cells/CELL/checkpoints", "cells/CELL/metrics.jsonl", "cells/other", ".lock", ".writing-x"),
]


@pytest.mark.parametrize("flags", [(), ("--report-only",)], ids=["run", "report"])
@pytest.mark.parametrize(("name", "link"), two_links(COMPARISON))
def test_a_comparison_does_not_write_or_delete_through_a_link(
    name: str, link: Link, flags: tuple[str, ...], comparison: Path, outside: Path
):
    cell = min((comparison / "cells").iterdir()).name
    path = comparison / name.replace("CELL", cell)
    put(link, path, outside)
    before = contents(outside), contents(comparison)
    answer = call("compare.py", comparison, *flags)
    assert not is_clear(answer)
    assert str(path) in answer.err or name == "grid.yaml" or name.startswith("cells")
    assert (contents(outside), contents(comparison)) == before


@pytest.mark.parametrize("flags", [(), ("--report-only",)], ids=["run", "report"])
def test_a_comparison_does_not_change_files_with_other_hard_links(
    flags: tuple[str, ...], comparison: Path, tmp_path: Path
):
    (comparison / "figures/old.png").write_text("old")
    snapshot = tmp_path / "snapshot"
    shutil.copytree(comparison, snapshot, copy_function=os.link)
    before = contents(snapshot)
    assert call("compare.py", comparison, *flags).code == 0
    assert contents(snapshot) == before
    assert not (comparison / "figures/old.png").exists()


def test_a_comparison_shown_alongside_may_contain_links(comparison: Path, tmp_path: Path):
    """It is only read."""
    grid, cells = load(comparison / "grid.yaml")
    other = Path(shutil.copytree(comparison, tmp_path / "other"))
    (other / "cells").rename(tmp_path / "elsewhere")
    (other / "cells").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere"), contents(other)
    shown = Plot("losses", "title", "caption", "alt", Figure(figsize=(1, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "draw", lambda data: {"beside": shown})
        report(grid, cells, comparison, beside=other)
    assert (contents(tmp_path / "elsewhere"), contents(other)) == before


# ---------------------------------------------------------------------------------------------
# A prepared corpus


@pytest.fixture
def building(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Path]:
    """A corpus that was stopped while it was prepared, and its config."""
    data = small.data.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    with monkeypatch.context() as patch:
        patch.setattr(encode, "JOB", 100)
        stops = iter([False] * 5)
        with pytest.raises(StoppedError):
            preparation.prepare(data, stop=lambda: next(stops, True))
    (folder,) = (tmp_path / "cache").glob(".*.building")
    assert (folder / "train.bin").stat().st_size
    return small.model_copy(update={"data": data}), folder


BUILDING = [
    *("train.bin", "val.bin", "counts.bin", "tokenizer.json", "progress.json", "revisions.json"),
    *("meta.json", ".writing-train.bin", "other"),
]


def prepared(config: Config, tmp_path: Path) -> str:
    """The error of `train.py` about data that it cannot prepare."""
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    answer = call("train.py", tmp_path / "c.yaml", "--out-dir", tmp_path / "run")
    assert not is_clear(answer)
    return answer.err


@pytest.mark.parametrize(("name", "link"), two_links(BUILDING))
def test_preparation_does_not_write_through_a_link(
    name: str, link: Link, building: tuple[Config, Path], tmp_path: Path, outside: Path
):
    config, folder = building
    put(link, folder / name, outside)
    before = contents(outside), contents(folder)
    assert str(folder / name) in prepared(config, tmp_path)
    assert (contents(outside), contents(folder)) == before


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", [".NAME.building", ".NAME.lock", "NAME"])
def test_a_folder_of_the_cache_must_not_be_a_link(
    name: str, link: Link, building: tuple[Config, Path], tmp_path: Path, outside: Path
):
    config, folder = building
    final = folder.name.removeprefix(".").removesuffix(".building")
    put(link, folder.with_name(name.replace("NAME", final)), outside)
    before = contents(outside)
    assert final in prepared(config, tmp_path)
    assert contents(outside) == before


def test_preparation_does_not_change_files_with_other_hard_links(
    building: tuple[Config, Path], tmp_path: Path
):
    config, folder = building
    (folder / "counts.bin").write_bytes(b"of an earlier start")
    snapshot = tmp_path / "snapshot"
    shutil.copytree(folder, snapshot, copy_function=os.link)
    before = contents(snapshot)
    made = preparation.prepare(config.data)
    assert contents(snapshot) == before
    afresh = config.data.model_copy(update={"cache_dir": str(tmp_path / "another")})
    assert made.fingerprint == preparation.prepare(afresh).fingerprint


# ---------------------------------------------------------------------------------------------
# Reading and writing


def test_a_file_is_changed_in_place_only_if_it_is_not_a_link(tmp_path: Path):
    (tmp_path / "file").write_text("abc")
    os.link(tmp_path / "file", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("file")
    with open_for_update(tmp_path / "hard") as file:
        assert file.read(1) == b"a"
        file.write(b"x")
    assert (tmp_path / "hard").read_text() == "axc"
    assert (tmp_path / "file").read_text() == "abc"
    with pytest.raises(InputError, match="soft: is a symbolic link"):
        open_for_update(tmp_path / "soft")
    with open_for_update(tmp_path / "new") as file:
        assert file.read() == b""


def test_a_small_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "result.json"
    write_text(path, "before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"a": "1"}', '{"a": 1e999}', "9" * 5000])
def test_json_of_another_type_is_damaged(text: str, tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"x\.json: is damaged; delete it"):
        read_json(path, dict[str, int], "delete it")
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path, dict[str, int]) == {"a": 1}

"""Watching runs: what a folder holds, the table of runs, and the curves of several."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rendering
from test_cli import called

import gpt
from gpt.config import Config
from gpt.errors import InputError
from gpt.io.files import is_locked
from gpt.run.directory import RunDirectory
from gpt.run.plot import COLORS, literal_text
from gpt.watch import picture
from gpt.watch.curves import Curve
from gpt.watch.picture import Curves
from gpt.watch.survey import RunSummary, read_options, summarize
from gpt.watch.table import RunTable


def write_run(path: Path, losses: list[float | None], **options: Any) -> Path:
    """A run directory without a result, from its training losses."""
    path.mkdir(parents=True)
    config = Config.model_validate({"training": {"steps": 9, "batch_sequences": 2}, **options})
    (path / "config.yaml").write_text(config.to_yaml())
    rate = config.optimizer.learning_rate
    records: list[dict[str, Any]] = [{"step": 0, "val_loss": 5.0, "val_bits_per_byte": 7.2}]
    for step, loss in enumerate(losses, 1):
        record = {"step": step, "tokens": 256 * step, "loss": loss, "learning_rate": rate}
        records.append({**record, "grad_norm": 0.5, "batches": "ab", "step_seconds": 0.25})
        records.append({"step": step, "layer": 1, "grad_norm": 99.0})
    records.append({"step": len(losses), "val_loss": 4.0, "val_bits_per_byte": 5.8})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def finish(path: Path, **changes: Any) -> Path:
    """Give a run a result."""
    result = {
        "status": "finished",
        "step": 9,
        "tokens": 2304,
        "train_loss": 1.5,
        "val_loss": 2.5,
        "best_val_loss": 2.25,
        "val_bits_per_byte": 3.5,
        "seconds": 3725.0,
        "tokens_per_second": 10.0,
        "reason": "completed all 9 steps",
    }
    (path / "result.json").write_text(json.dumps({**result, **changes}))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a finished, an interrupted and a diverged run, one of them deeper."""
    folder = tmp_path / "runs"
    finish(write_run(folder / "seed-9", [3.0, 2.0, 1.5], seed=9))
    write_run(folder / "seed-10", [3.0, 2.5], seed=10, model={"norm": {"placement": "post"}})
    deep = write_run(folder / "more/bad", [3.0, None], optimizer={"learning_rate": 0.5})
    finish(deep, status="diverged", step=2, tokens=512, train_loss=None)
    return folder


# -- The table -----------------------------------------------------------------------------------


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = called(capsys, "runs", runs)
    assert (code, err) == (0, "")
    sections, names, *lines = out.splitlines()
    assert sections.split()[-1] == "model.norm."
    assert names.split()[-2:] == ["seed", "placement"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert list(rows) == ["more/bad", "seed-9", "seed-10"]  # not seed-10 before seed-9
    assert rows["seed-9"] == [
        *("finished", "9/9", "1.5000", "2.5000", "2.2500", "0.001", "2,304", "1:02:05"),
        *("9", "pre"),
    ]
    assert rows["seed-10"] == [
        *("interrupted", "2/9", "2.5000", "4.0000", "4.0000", "0.001", "512", "0:00", "10", "post"),
    ]
    assert rows["more/bad"][:4] == ["diverged", "2/9", "2.5000", "2.2500"]
    assert "0.5" in rows["more/bad"]


def test_csv_has_every_number_and_every_option_that_differs(
    runs: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, _ = called(capsys, "runs", runs, "--csv")
    assert code == 0
    bad, nine, _ = csv.DictReader(io.StringIO(out))
    assert (nine["seconds"], nine["best_val_loss"], nine["steps"]) == ("3725.0", "2.25", "9")
    assert (bad["train_loss"], bad["learning_rate"], bad["seed"]) == ("", "0.5", "0")
    assert list(nine)[-2:] == ["seed", "model.norm.placement"]
    assert gpt.list_runs(runs).records()[1]["tokens"] == 2304


def test_columns_that_do_not_fit_are_counted(runs: Path):
    table = gpt.list_runs(runs)
    wide = table.format(200)
    assert wide == str(table)
    narrow = table.format(max(map(len, wide.splitlines())) - 1)
    assert "placement" not in narrow
    assert "seed" in narrow.splitlines()[1].split()
    assert narrow.splitlines()[-1] == "The runs differ in 1 more option; csv lists them."
    html = table._repr_html_()
    assert html.count("<tr>") == 4
    assert "<th>model.norm.placement</th>" in html


def test_a_run_in_training_is_running(runs: Path):
    run = runs / "seed-10"
    with RunDirectory(run).lock():
        assert summarize(run, "x").status == "running"
    assert summarize(run, "x").status == "interrupted"
    (run / ".lock").touch()  # left by a killed process
    assert summarize(run, "x").status == "interrupted"
    assert not is_locked(run)
    with RunDirectory(run).lock():  # finding that out has left nothing behind
        pass


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("config.yaml", "a: [\n", "config.yaml: line 2: "),
        ("config.yaml", "\n\n- 3\n", "config.yaml: must be a mapping"),
        ("config.yaml", "training: {steps: many}\n", "config.yaml: is damaged"),
        ("config.yaml", None, "is not a run (no config.yaml)"),
        ("result.json", "{", "result.json: is damaged"),
        ("result.json", '{"status": "finished"}', "result.json: is damaged"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl: line 1 is damaged"),
        ("environment.json", "[", "environment.json: is damaged"),
    ],
)
def test_a_damaged_run_is_a_line(runs: Path, file: str, content: str | None, note: str):
    path = runs / "seed-10" / file
    path.write_text(content) if content is not None else path.unlink()
    damaged = gpt.list_runs(runs).rows[2]
    assert (damaged.name, damaged.status) == ("seed-10", "damaged")
    assert damaged.note.startswith(note)
    assert f"seed-10   damaged   {damaged.note}" in str(gpt.list_runs(runs))
    assert len(gpt.list_runs(runs)) == 3


def test_names_are_escaped_and_links_are_followed_only_to_runs(runs: Path):
    os.symlink(runs, runs / "loop")
    os.symlink(runs / "seed-9", runs / "again")
    (runs / "seed-10").rename(runs / "x\x1b[31m")
    table = gpt.list_runs(runs)
    assert [row.name for row in table] == ["again", "more/bad", "seed-9", "x\x1b[31m"]
    assert "\x1b" not in str(table) + table._repr_html_()


def test_a_comparison_is_a_line_and_its_cells_are_runs(
    smallest_comparison: Path, capsys: pytest.CaptureFixture[str]
):
    folder = smallest_comparison.parent
    cells = len(list((smallest_comparison / "cells").iterdir()))
    (row,) = gpt.list_runs(folder)
    assert (row.name, row.options) == ("small", {})
    assert row.note.startswith(f"{cells} cells: ")
    results = [RunDirectory(p).read_result() for p in (smallest_comparison / "cells").iterdir()]
    losses = [r.best_val_loss for r in results if r is not None and r.best_val_loss is not None]
    assert f"best losses {min(losses):.4f} to {max(losses):.4f}" in row.note
    assert len(gpt.list_runs(folder, cells=True)) == cells
    code, out, _ = called(capsys, "runs", smallest_comparison)
    assert code == 0
    assert out.count("cells/") == cells


def test_options_are_read_as_load_reads_them(tiny_run: Path, smallest_runs: dict[str, Path]):
    for path in (tiny_run, *smallest_runs.values()):
        run = RunDirectory(path)
        assert read_options(run) == flat(run.read_config().model_dump(mode="json"))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        below = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        found |= below
    return found


def test_the_number_of_parameters_is_the_models(tiny_run: Path):
    model, _, _ = gpt.load_run(tiny_run)
    assert summarize(tiny_run, "x").parameters == model.num_parameters()


def test_missing_and_empty_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = called(capsys, "runs", tmp_path / "no")
    assert (code, out) == (2, "")
    assert err == f"steadygpt runs: {tmp_path / 'no'}: no such directory\n"
    code, out, err = called(capsys, "runs", tmp_path)
    assert (code, out) == (0, "")
    assert err == f"steadygpt runs: {tmp_path} contains no runs\n"
    assert called(capsys, "runs", "a", "b")[0] == 2


def test_many_runs_are_listed_without_torch(runs: Path, environment: dict[str, str]):
    for index in range(200):
        shutil.copytree(runs / "seed-9", runs / f"copy-{index}")
    code = (
        "import sys, time, gpt; gpt.list_runs(sys.argv[1]); start = time.process_time();"
        "print(len(gpt.list_runs(sys.argv[1])), time.process_time() - start);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, runs], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    count, seconds = done.stdout.split()
    assert int(count) == 203
    assert float(seconds) < 1.5  # 0.3 s; reading each config in full would take 2 s


# -- The curves ----------------------------------------------------------------------------------


def test_metrics_are_columns(runs: Path):
    columns = gpt.read_metrics(runs / "seed-10")
    assert {len(column) for column in columns.values()} == {3}
    nan = np.nan
    for name, values in {
        "step": [0, 1, 2],
        "tokens": [0, 256, 512],
        "seconds": [0, 0.25, 0.5],
        "loss": [nan, 3.0, 2.5],
        "val_loss": [5.0, nan, 4.0],
        "grad_norm": [nan, 0.5, 0.5],  # not those of layers
    }.items():
        np.testing.assert_array_equal(columns[name], values)
    assert "batches" not in columns
    assert np.isnan(gpt.read_metrics(runs / "more/bad")["loss"][2])
    with pytest.raises(InputError, match="is not a run"):
        gpt.read_metrics(runs)


def test_the_training_loss_is_a_mean_of_the_updates_around_each(tmp_path: Path):
    losses = np.random.default_rng(0).normal(size=200).tolist()
    losses[7] = None
    (curve,) = gpt.plot(write_run(tmp_path / "a", losses))
    steps, means = curve.points("step", "loss_mean")
    known = [loss for loss in losses if loss is not None]
    assert len(means) == 199
    assert 8 not in steps
    assert means == pytest.approx(
        [known[0], *(np.mean(known[n - 1 : n + 2]) for n in range(1, 199))]
    )


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{}, {"seed": 1}], ["seed 0", "seed 1"]),
        (
            [{}, {"optimizer": {"learning_rate": 3e-4}}, {"model": {"bias": False}}],
            [
                "bias true, learning_rate 0.001",
                "bias true, learning_rate 0.0003",
                "bias false, learning_rate 0.001",
            ],
        ),
        ([{"seed": 1}, {"data": {"seed": 2}}], ["seed 1, data.seed null", "seed 0, data.seed 2"]),
        ([{}, {"diagnostics": {"every": 5}}], ["run-0", "run-1"]),
        ([{}, {}], ["run-0", "run-1"]),
        ([{}, {"model": {"layers": 1, "heads": 1, "width": 8, "context": 8}}], ["run-0", "run-1"]),
        ([{}], ["run-0"]),
    ],
)
def test_labels_say_what_differs(
    changes: list[dict[str, Any]], labels: list[str], tmp_path: Path
):  # fmt: skip
    paths = [write_run(tmp_path / f"run-{n}", [1.0], **c) for n, c in enumerate(changes)]
    assert [curve.label for curve in gpt.plot(*paths)] == labels


def test_which_runs_are_plotted(
    runs: Path, smallest_comparison: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(runs)
    nine, ten, bad = Path("seed-9"), Path("seed-10"), Path("more/bad")
    for given, expected in {
        ("seed-10",): [ten],
        ("seed-*",): [ten, nine],
        (nine, "seed-9/", runs / "seed-9", "seed-10"): [nine, ten],
        (".",): [bad, nine, ten],
    }.items():
        assert [curve.path for curve in gpt.plot(*given)] == expected
    cells = {curve.path.name for curve in gpt.plot(smallest_comparison)}
    assert cells == {path.name for path in (smallest_comparison / "cells").iterdir()}
    for given, message in {
        (): "no runs given",
        ("no",): "no: no such directory",
        ("no*",): r"no\*: no such directory",
        ("seed-9/result.json",): "seed-9/result.json: is not a run",
        ("seed-9/..", "more/bad/samples"): "more/bad/samples: no such directory",
    }.items():
        with pytest.raises(InputError, match=message):
            gpt.plot(*given)
    (runs / "empty").mkdir()
    with pytest.raises(InputError, match="empty: contains no runs"):
        gpt.plot("empty")
    with pytest.raises(InputError, match=r"x: 'tokns' is not one of .*; perhaps you meant tokens"):
        gpt.plot("seed-9", x="tokns")


@pytest.fixture
def drawn() -> Iterator[None]:
    with rendering(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("name", ["out.png", "out.svg"])
def test_the_picture(runs: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / name
    code, shown, _ = called(capsys, "plot", runs, "--x", "tokens", "--out", out)
    assert (code, shown) == (0, f"{out}\n")
    first = out.read_bytes()
    assert first.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert called(capsys, "plot", runs, "--out", out)[0] == 0  # an earlier picture is replaced
    assert out.read_bytes() != first


@pytest.mark.usefixtures("drawn")
def test_what_the_picture_shows(runs: Path):
    figure = picture.draw(gpt.plot(runs / "seed-9", runs / "more/bad", x="seconds"))
    loss, rate, norm = figure.axes
    nine, nine_val, bad, bad_val, cross = loss.lines
    np.testing.assert_array_equal(nine.get_xydata(), [[0.25, 3.0], [0.5, 2.0], [0.75, 1.5]])
    np.testing.assert_array_equal(nine_val.get_xydata(), [[0, 5.0], [0.75, 4.0]])
    np.testing.assert_array_equal(bad.get_xydata(), [[0.25, 3.0]])
    np.testing.assert_array_equal(cross.get_xydata(), [[0.25, 3.0]])  # where it diverged
    assert cross.get_marker() == "x"
    assert nine.get_color() == nine_val.get_color() == COLORS[0] != bad.get_color()
    assert bad.get_color() == bad_val.get_color() == cross.get_color()
    assert [line.get_ydata()[0] for line in rate.lines] == [0.001, 0.5]
    assert (rate.get_yscale(), norm.get_yscale()) == ("log", "log")
    assert norm.get_xlabel() == "seconds of updates"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["seed 9, learning_rate 0.001", "seed 0, learning_rate 0.5 (diverged)"]
    with literal_text():  # in which it is saved
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > 0
    assert (box.x1, box.y1) < (width, height)


@pytest.mark.usefixtures("drawn")
def test_a_run_that_explodes_does_not_hide_the_others():
    steps = np.arange(1.0, 5.0)

    def curve(losses: list[float], *, diverged: bool) -> Curve:
        nothing, loss = np.full(4, np.nan), np.array(losses)
        keys = ("val_loss", "learning_rate", "grad_norm")
        columns = {"step": steps, "loss_mean": loss, **dict.fromkeys(keys, nothing)}
        return Curve(Path("x"), "x", columns, diverged)

    curves = [curve([4, 3, 2, 1], diverged=False), curve([4, 3, 9e9, 1e12], diverged=True)]
    loss, *_ = picture.draw(Curves(curves)).axes
    low, high = loss.get_ylim()
    assert (low, high) == pytest.approx((0.85, 4.15))
    assert loss.lines[-1].get_xydata().tolist() == [[4.0, high]]


def test_distinct_styles_up_to_the_limit(tmp_path: Path):
    paths = [
        write_run(tmp_path / f"{n:02}", [2.0, 1.0], seed=n) for n in range(picture.MOST_RUNS + 1)
    ]
    figure = picture.draw(gpt.plot(*paths[:-1]))
    lines = figure.axes[1].lines
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(styles) == len(lines) == picture.MOST_RUNS >= 10
    with pytest.raises(InputError, match="15 runs: a picture shows at most 14"):
        picture.draw(gpt.plot(*paths))
    assert len(gpt.plot(*paths).records()) == 15 * 3


def test_csv_has_the_plotted_numbers(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path):
    code, out, _ = called(capsys, "plot", runs / "seed-9", runs / "seed-10", "--csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 4 + 3
    assert rows[3] == {
        "run": str(runs / "seed-9"),
        "label": "seed 9, placement pre",
        "step": "3",
        "tokens": "768",
        "seconds": "0.75",
        "loss": "1.5",
        "loss_mean": "1.5",
        "val_loss": "4.0",
        "learning_rate": "0.001",
        "grad_norm": "0.5",
    }
    assert rows[0]["loss"] == ""
    assert not list(tmp_path.glob("*.png"))


def test_what_a_picture_may_not_replace(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "mine.png").write_bytes(b"\x89PNG my holidays")
    os.symlink(tmp_path / "nowhere", tmp_path / "link.svg")
    (tmp_path / "folder.png").mkdir()
    for name, message in {
        "mine.png": "exists and is not a picture of runs; name another file",
        "link.svg": "cannot be read: No such file or directory",
        "folder.png": "is a folder, not a regular file",
        "x.pdf": "is neither a .png nor an .svg file",
        "no/x.png": "no is not a folder that can be written to",
    }.items():
        code, out, err = called(capsys, "plot", runs, "--out", tmp_path / name)
        assert (code, out) == (2, "")
        assert message in err
    assert (tmp_path / "mine.png").read_bytes() == b"\x89PNG my holidays"
    assert called(capsys, "plot", runs, "--x", "time")[0] == 2
    assert called(capsys, "plot")[0] == 2


def test_a_notebook_shows_the_picture(runs: Path):
    with rendering():
        assert gpt.plot(runs / "seed-9")._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_thousands_of_runs_take_seconds(runs: Path):
    text = (runs / "seed-9/config.yaml").read_text()
    for index in range(3000):
        shutil.copytree(runs / "seed-9", runs / f"copy-{index}")
        changed = text.replace("\nseed: 9\n", f"\nseed: {index}\n")
        (runs / f"copy-{index}/config.yaml").write_text(changed)
    start = time.process_time()
    table = gpt.list_runs(runs)
    assert len(table) == 3003
    assert len({row.options["seed"] for row in table}) == 3000
    assert str(table).count("\n") == 3004
    assert time.process_time() - start < 15  # 4 s


def test_wide_letters_keep_the_columns_aligned():
    names = ["ｎ前", "plain", "e\u0301te\u0301"]
    rows = [RunSummary(name, Path(name), "finished", step=1, steps=2) for name in names]
    lines = RunTable(rows).format().splitlines()[-3:]
    assert lines[0] == "ｎ前   finished   1/2"
    assert lines[1] == "plain  finished   1/2"
    assert lines[2] == "e\u0301te\u0301    finished   1/2"

"""`steadygpt scaling`: ladders, their runs, the report, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparing import Stub
from conftest import ROOT, rendering
from test_cli import called

from gpt import cli, metrics
from gpt.compare.grid import Cell
from gpt.config import Config
from gpt.config.shipped import names
from gpt.run.directory import RunDirectory
from gpt.scaling import ladder as ladders
from gpt.scaling import results
from gpt.scaling.law import Law
from gpt.scaling.study import plan

LAW = Law(E=0.1, A=6.0, B=9.0, alpha=0.35, beta=0.33)
WIDTHS = (8, 12, 16, 24, 32)
VOCABULARY, CONTEXT, LAYERS = 257, 16, 2
WIDE = {"tokens_per_parameter": [0.1, 300]}  # every size has every budget of 2e9 FLOPs or more
RUN = "width-8_steps-1321_warmup-steps-132_seed-0"

Start = Callable[..., tuple[int, str, str]]


def parameters(width: int) -> int:
    """N of GPT-2: two tables, two norms and four matrices with biases per block, and a norm."""
    block = 12 * width**2 + 9 * width + 4 * width
    return (VOCABULARY + CONTEXT) * width + LAYERS * block + 2 * width


@pytest.fixture
def rungs(tiny: Callable[..., Config]) -> dict[str, Any]:
    base = tiny(model={"heads": 1}, sampling={"tokens": 0}).model_dump(mode="json")
    return {
        "title": "Tiny | *ladder*",
        "base": {key: value for key, value in base.items() if key not in ("name", "seed")},
        "sizes": {f"width {width}": {"model.width": width} for width in WIDTHS},
        "flops": [2e9, 6e9, 2e10],
        "tokens_per_parameter": [1, 300],
        "seeds": 2,
    }


class Trainer(Stub):
    """Its runs' losses follow LAW."""

    def __init__(self, template: Path) -> None:
        super().__init__(template)
        self.diverged: set[str] = set()

    def change(self, cell: Cell, run: RunDirectory, records: list[metrics.Record]) -> None:
        config = cell.config
        width, total = config.model.width, parameters(config.model.width)
        embeddings = (VOCABULARY + CONTEXT) * width
        shapes = {"token_embedding": [VOCABULARY, width], "position_embedding": [CONTEXT, width]}
        shapes["rest"] = [total - embeddings]
        environment = json.loads(run.environment.read_text())
        environment["initial_weights"] = {
            f"{name}.weight": {"shape": shape, "sha256": "", "signs": ""}
            for name, shape in shapes.items()
        }
        run.environment.write_text(json.dumps(environment))
        tokens = config.training.steps * config.batch_sequences * CONTEXT
        for number, record in enumerate(records):
            if "loss" in record:
                record["loss"] = 2.0 - 0.01 * number
            if "val_loss" in record:
                record["val_loss"] = float(LAW.loss(total, tokens))
        if cell.id in self.diverged:
            result = json.loads(run.result.read_text())
            run.result.write_text(json.dumps({**result, "status": "diverged", "reason": "loss"}))


@pytest.fixture
def trainer(
    tiny_run: Path, in_this_process: None, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    stub = Trainer(tiny_run)
    stub.install(monkeypatch)
    monkeypatch.setattr(results, "RESAMPLES", 3)
    return stub


@pytest.fixture
def start(rungs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Start:
    """Run the command on `rungs` with changes; returns the exit code, stdout and stderr."""

    def run(*flags: str, path: Path | None = None, **changes: Any) -> tuple[int, str, str]:
        file = tmp_path / "ladder.yaml"
        file.write_text(yaml.safe_dump({**rungs, **changes}, sort_keys=False))
        where = [] if path else ["--out-dir", str(tmp_path / "study")]
        try:
            code = cli.run("scaling", [str(path or file), *where, *flags])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_runs_and_their_budgets(rungs: dict[str, Any], tmp_path: Path):
    path = tmp_path / "ladder.yaml"
    path.write_text(yaml.safe_dump(rungs, sort_keys=False))
    ladder, configs = ladders.load(path, {"optimizer": {"beta2": 0.9}}, "3")
    grid, cells = plan(ladder, configs, path)
    expected = {}
    for width in WIDTHS:
        for flops in (2e9, 6e9, 2e10):
            tokens = flops / 6 / parameters(width)
            if 1 <= tokens / parameters(width) <= 300:
                expected[width, flops] = tokens
    assert 8 < len(expected) < 15
    assert len(cells) == 3 * len(expected)
    of_seed = [cell.config for cell in cells if cell.config.seed == 2]
    for config, (width, tokens) in zip(
        of_seed, [(width, tokens) for (width, _), tokens in expected.items()], strict=True
    ):
        assert config.model.width == width
        assert config.training.steps * 64 == pytest.approx(tokens, rel=0.01)
        assert config.schedule.warmup_steps == round(0.1 * config.training.steps)
        assert config.optimizer.beta2 == 0.9
    assert not grid.probes


def test_from_ladder_to_report(trainer: Trainer, start: Start, tmp_path: Path):
    trainer.diverged = {"width-32_steps-1523_warmup-steps-152_seed-1"}
    with rendering():
        code, out, _ = start()
    assert code == 0
    folder = tmp_path / "study"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["planned"] == len(trainer.seen) == 2 * 12
    assert summary["failed"] == dict.fromkeys(trainer.diverged, "diverged")
    constants = summary["fit"]["constants"]
    for name in ("E", "A", "B", "alpha", "beta", "a"):
        assert constants[name]["value"] == pytest.approx(getattr(LAW, name), rel=1e-3)
    assert len(summary["curves"]) == 3
    best = summary["fit"]["best"][-1]["parameters"]["value"]
    assert best == pytest.approx(LAW.best_size(2e10), rel=0.01)
    report = (folder / "report.md").read_text()
    assert report.startswith("# Tiny \\| \\*ladder\\*\n")
    for text in (out, report):
        assert f"grows as C^{LAW.a:.2f}" in text
        assert "1 of 24 runs failed (1 diverged; cells.csv names them)" in text
    for sentence in ("Nothing is known outside", "0.001 for all sizes", "seen once"):
        assert sentence in report
    for row in (
        "| constant | estimate | 95% interval | meaning |",
        f"| width 8 | {parameters(8):,} |",
    ):
        assert f"\n{row}" in report
    assert report.count("\n\n|") == 3  # tables, each after an empty line
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{ending}" for name in ("isoflop", "best-size") for ending in ("png", "svg")
    }
    assert (folder / "cells.csv").read_text().count("\n") == 25

    trainer.seen.clear()
    (folder / "report.md").unlink()
    again = start(path=folder)  # from its directory alone
    assert again[:2] == (0, out)
    assert trainer.seen == []
    assert (folder / "report.md").read_text() == report
    assert start("--report-only")[:2] == (0, out)


def test_lost_runs_are_retried_and_a_study_can_grow(trainer: Trainer, start: Start, tmp_path: Path):
    trainer.lost = {RUN}
    code, out, _ = start(flops=[2e9], **WIDE)
    assert code == 0
    assert "There is no parametric law" in out
    assert "1 of 10 runs have no result (1 out of memory)" in out
    assert (tmp_path / "study/report.md").is_file()
    trainer.lost, trainer.seen = set(), []
    assert "have no result" not in start(flops=[2e9], **WIDE)[1]
    assert trainer.seen == [RUN]
    code, _, err = start(**WIDE)
    assert code == 2
    assert "--extend adds 20 cells" in err
    trainer.seen = []
    assert start("--extend", **WIDE)[0] == 0
    assert len(trainer.seen) == 20


def test_a_dry_run_lists_runs_and_writes_nothing(start: Start, tmp_path: Path):
    code, out, _ = start("--dry-run")
    assert code == 0
    for text in (RUN, "24: 5 arms, 2 seeds\n", "FLOPs"):
        assert text in out
    assert "question" not in out
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("flags", "changes", "words"),
    [
        ([], {"sizes": {"a": {"model.widht": 8}}}, ["sizes: a: model.widht: no such option"]),
        (
            [],
            {"sizes": {"a": {"model.width": 9}, "b": None}, "options": {"model.heads": 2}},
            ["a:"],
        ),
        ([], {"sizes": {"a": {"training.steps": 9}}}, ["training.steps: must be the same"]),
        ([], {"sizes": {"a": {"data.tokenizer": "chars"}}}, ["data.tokenizer: must be the same"]),
        ([], {"sizes": {}}, ["sizes: "]),
        ([], {"flops": [6e9, 2e9]}, ["2e+09 comes after 6e+09", "1.1 times"]),
        ([], {"flops": ["much"]}, ["flops", "'much'"]),
        ([], {"tokens_per_parameter": [9, 3]}, ["9 is not below 3"]),
        ([], {"tokens_per_parameter": [1000, 1001]}, ["width 8: with 3,", "no budget gives"]),
        ([], {"flops": [7e7]} | WIDE, ["width 8: 7e+07 FLOPs are 46 steps", "at least 50"]),
        ([], {"warmup": 3}, ["warmup: no such option"]),
        ([], {"base": "nowhere"}, ["base: nowhere: no such file"]),
        (["--model.width", "8"], {}, ["--model.width", "edit that file"]),
        (["--training.steps", "8"], {}, ["--training.steps", "edit that file"]),
        (["--seed", "8"], {}, ["--seed", "edit that file"]),
        (["--seeds", "x"], {}, ["--seeds: 'x'"]),
        (["--workers", "0"], {}, ["--workers: '0' is not between"]),
        (["--dry-run", "--report-only"], {}, ["not both"]),
        (["--report-only"], {}, ["no cell has a result yet"]),
    ],
)
def test_wrong_input_is_exit_2(
    start: Start, tmp_path: Path, flags: list[str], changes: dict[str, Any], words: list[str]
):
    code, _, err = start(*flags, **changes)
    assert code == 2
    assert 1 <= len(err.splitlines()) <= 3
    for word in words:
        assert word in err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("scaling", "config.yaml", "is a config, not a ladder; to train it: {train}"),
        ("scaling", "quickstart", "is a shipped config; to train it: {train}"),
        ("scaling", "grid.yaml", "is a grid; to run it: {compare}"),
        ("scaling", "quick", "is a shipped grid; to run it: {compare}"),
        ("scaling", "quick-1", "is a comparison; to continue it: {compare}"),
        ("scaling", "tiny --out-dir quick-1", "quick-1: is a comparison; to continue it: "),
        ("compare", "tiny-1", "is a scaling study; to continue it: {scaling}"),
        ("compare", "quick --out-dir tiny-1", "tiny-1: is a scaling study; to continue it: "),
        ("compare", "ladder.yaml", "is a ladder; to run it: {scaling}"),
        ("compare", "tiny", "is a shipped ladder; to run it: {scaling}"),
        ("compare", "quick --model.heads 7", "heads (7) must divide"),  # not that it is a grid
        ("train", "ladder.yaml", "is a ladder; to run it: {scaling}"),
        ("train", "tiny-1", "is a scaling study; to continue it: {scaling}"),
        ("train", "tiny", "is a shipped ladder; to run it: {scaling}"),
        ("sample", "ladder.yaml", "is a ladder, not a run; to run it: {scaling}"),
        ("sample", "tiny-1", "is a scaling study; each of its cells is a run, such as "),
    ],
)
def test_a_path_of_another_kind_is_named(
    command: str,
    given: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    files = {"config": "quickstart", "grid": "compare/quick", "ladder": "scaling/tiny"}
    for name, shipped in files.items():
        shutil.copy(ROOT / f"configs/{shipped}.yaml", f"{name}.yaml")
    for folder, docs in (("tiny-1", "scaling"), ("quick-1", "quick")):
        Path(folder).mkdir()
        shutil.copy(ROOT / f"docs/results/{docs}/grid.yaml", folder)
    nothing = [] if command == "sample" else ["--dry-run"]
    code, out, err = called(capsys, command, *given.split(), *nothing)
    assert (code, out) == (2, "")
    before, _, name = words.partition("{")
    assert before in err
    assert f"{name.rstrip('}')} {given}\n" in err or not name
    assert len(err.splitlines()) <= 3


def test_a_folder_that_is_not_a_study(start: Start, tmp_path: Path):
    code, _, err = start(path=tmp_path)
    assert code == 2
    assert "is not the directory of a scaling study" in err
    (tmp_path / "study").mkdir()
    (tmp_path / "study/mine.txt").write_text("")
    code, _, err = start()
    assert code == 2
    assert "exists and is not a comparison" in err


@pytest.mark.parametrize("name", names("ladder"))
def test_shipped_ladders(name: str):
    path = ROOT / f"configs/scaling/{name}.yaml"
    assert path.read_text("utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
    ladder, configs = ladders.load(name)
    grid, cells = plan(ladder, configs, path)
    assert len(grid.all_arms()) == len(configs)
    assert {cell.config.seed for cell in cells} == set(ladder.seeds)


def test_the_shipped_schema_is_current():
    shipped = (ROOT / "configs/scaling/schema.json").read_text("utf-8")
    assert shipped == ladders.schema(), "python -m gpt.scaling.ladder > configs/scaling/schema.json"

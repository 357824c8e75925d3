"""Damaged and forged runs. What a clear error is: see `bad_input.py`."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from bad_input import (
    DEEP,
    SHORT,
    WRONG_JSON,
    call,
    contents,
    corrupted_copy,
    is_clear,
    must_be_clear,
    newest,
    put,
    refused,
    resumed,
    tries,
)
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import Config

# -- By the thousand ---------------------------------------------------------------------------


@tries(0.04)
@given(data=st.data())
def test_a_corrupted_run(smallest_runs: dict[str, Path], data: st.DataObject, no_pictures: None):
    name = data.draw(st.sampled_from(["stopped", "stopped", "finished"]))
    with corrupted_copy(data.draw, smallest_runs[name]) as run:
        which = data.draw(st.sampled_from(["best", "latest", "2"]))
        short = ("--prompt", "a", "--max-new-tokens", "2", "--checkpoint", which)
        must_be_clear("sample.py", run, *short, folder=run)
        must_be_clear("diagnose", run, folder=run)
        must_be_clear("compare.py", run, "--report-only", folder=run)
        must_be_clear("train.py", smallest_runs[name] / "config.yaml", "--out-dir", run, folder=run)


# -- One by one --------------------------------------------------------------------------------


@pytest.fixture
def run(smallest_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(smallest_runs["finished"], tmp_path / "run"))


@pytest.fixture
def stopped(smallest_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(smallest_runs["stopped"], tmp_path / "run"))


def test_a_link_to_itself_for_a_run(tmp_path: Path, smallest: Config):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "c.yaml").write_text(smallest.to_yaml())
    for prog in ("sample.py", "diagnose", "compare.py"):
        assert "loop" in refused(prog, tmp_path / "loop", folder=tmp_path)
    flags = ("--out-dir", tmp_path / "loop" / "x")
    assert "loop" in refused("train.py", tmp_path / "c.yaml", *flags, folder=tmp_path)


def test_more_than_any_memory(run: Path):
    assert "--num-samples" in refused("sample.py", run, "--num-samples", 10**9)
    assert "/dev/zero: is a device" in refused("sample.py", run, "--prompt-file", "/dev/zero")


BAD_RECORDS = [
    '{"step": 1, "layer": "<b>", "grad_norm": 1}',
    '{"step": 1, "layer": 1000000000, "grad_norm": 1}',
    '{"step": 1, "layer": null, "grad_norm": 1}',
    '{"step": 1, "layer": 1, "grad_norm": "x"}',
    '{"step": 1, "layer": 1, "grad_norm": [1]}',
    '{"step": 1, "layer": 1, "grad_norm": 1e999}',
    '{"step": 1, "val_loss": {}}',
    '{"step": 1, "loss": 1}',
    '{"step": 1, "loss": 1, "grad_norm": 1, "batches": 3}',
    f'{{"step": 1, "loss": {10**400}, "grad_norm": 1, "batches": ""}}',
]


@pytest.mark.parametrize("record", BAD_RECORDS)
def test_metrics_of_wrong_types(record: str, run: Path, smallest_comparison: Path, tmp_path: Path):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(record + "\n")
    line = r"metrics.jsonl: line \d+ is damaged"
    assert re.search(line, refused("diagnose", run, folder=run))
    folder = Path(shutil.copytree(smallest_comparison, tmp_path / "compared"))
    for path in folder.glob("cells/*/metrics.jsonl"):
        path.write_text(path.read_text() + record + "\n")
    error = refused("compare.py", folder, "--report-only", folder=folder)
    assert re.search(line, error)


@pytest.mark.parametrize("line", [
    '{"step": -1, "val_loss": 1}', '{"step": 1, "val_loss": 1e299}', f'{{"step": {2**60}}}',
    '{"step": 1, "batches": "' + "x" * 2**17 + '"}', f'{{"step": {"9" * 5000}}}',
], ids=lambda line: line[:30])  # fmt: skip
def test_metrics_out_of_their_range(line: str, run: Path):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    assert re.search(r"metrics.jsonl: line \d+ is damaged", refused("diagnose", run, folder=run))


@pytest.mark.parametrize("record", [{}, {"grad_norm": None, "log_z": None}, {"other": 1.0}])
def test_layer_statistics_without_values(record: dict[str, Any], run: Path):
    line = json.dumps({"step": 1, "layer": 0, **record})
    (run / "metrics.jsonl").write_text(line + "\n")
    assert "has no layer statistics" in refused("diagnose", run, folder=run)


RESULTS: list[dict[str, Any]] = [
    *({key: None} for key in ("val_loss", "best_val_loss", "val_bits_per_byte", "seconds", "step")),
    *({key: -1} for key in ("step", "tokens", "seconds", "tokens_per_second", "rollbacks")),
    *({key: 10**400} for key in ("step", "tokens", "seconds", "val_loss")),
    *({key: 1e299} for key in ("val_loss", "seconds", "tokens_per_second")),
    *({"step": 0}, {"status": "done"}, {"reason": 3}, {"failure": {"step": 1}}),
    {"failure": {"step": 1, "quantity": "x", "advice": [],
                 "place": {"quantity": "x", "layer": 10**9, "name": "x"}}},
]  # fmt: skip


@pytest.mark.parametrize("change", RESULTS, ids=lambda change: repr(change)[:40])
def test_a_result_that_no_run_has(change: dict[str, Any], run: Path):
    path = run / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    error = refused("train.py", run / "config.yaml", "--out-dir", run, folder=run)
    assert f"{path}: is damaged" in error


READ_FILES = [
    *("config.yaml", "metrics.jsonl", "history.jsonl", "environment.json", "checkpoints/latest"),
    *("checkpoints/best", "tokenizer.json", "CHECKPOINT/manifest.json", "CHECKPOINT/state.json"),
    *("CHECKPOINT/tokenizer.json", "CHECKPOINT/model.safetensors"),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [  # for every file, a device that fills the memory and a pipe that blocks
        *((name, kind) for name in READ_FILES for kind in ("/dev/zero", "pipe")),
        *(("metrics.jsonl", kind) for kind in ("folder", "sparse")),
        *(("CHECKPOINT/model.safetensors", kind) for kind in ("folder", "sparse")),
    ],
)
def test_what_is_not_a_file_in_a_run(
    name: str, kind: str, smallest: Config, stopped: Path, no_pictures: None
):
    """It is ignored or refused at once; it neither blocks nor fills the memory."""
    put(kind, stopped / name.replace("CHECKPOINT", f"checkpoints/{newest(stopped).name}"))
    (stopped.parent / "c.yaml").write_text(smallest.to_yaml())
    began = time.process_time()
    is_clear(call("sample.py", stopped, *SHORT[:-1], "best"))
    is_clear(call("sample.py", stopped, *SHORT))
    is_clear(call("diagnose", stopped))
    answer = call("train.py", stopped.parent / "c.yaml", "--out-dir", stopped)
    if not is_clear(answer):
        assert Path(name).name in answer.err or name == "config.yaml"
    else:  # another checkpoint than this one was taken, or one of an earlier step
        assert name.startswith("CHECKPOINT") or kind == "sparse", answer
    assert time.process_time() - began < 10  # measured: 0.4 s


@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:8])
def test_a_file_that_is_not_a_result(text: str, smallest: Config, stopped: Path):
    (stopped / "result.json").write_text(text)
    assert f"{stopped / 'result.json'}: is damaged" in resumed(smallest, stopped)


METRICS = ["[", '{"a": 1}', "null", '{"step": "x"}', '{"step": 1, "loss": "x"}', "[" * DEEP]


@pytest.mark.parametrize("line", METRICS, ids=lambda line: line[:30])
def test_a_file_that_is_not_metrics(line: str, smallest: Config, stopped: Path):
    path = stopped / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    assert f"{path}: " in resumed(smallest, stopped)
    assert f"{path}: " in refused("diagnose", stopped, folder=stopped)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples", "checkpoints", "result.json"])
@pytest.mark.parametrize("thing", ["folder", "file", "link to itself"])
def test_another_thing_in_its_place(name: str, thing: str, smallest: Config, stopped: Path):
    """A folder for a file, a file for a folder, a link to itself: an error, or it works."""
    path = stopped / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if thing == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif thing == "file":
        path.write_bytes(b"")
    else:
        path.symlink_to(name)
    (stopped.parent / "c.yaml").write_text(smallest.to_yaml())
    before = contents(stopped)
    answer = call("train.py", stopped.parent / "c.yaml", "--out-dir", stopped)
    assert is_clear(answer) or contents(stopped) == before

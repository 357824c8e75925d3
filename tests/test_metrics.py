from __future__ import annotations

import json
import math
from pathlib import Path

from gpt.metrics import MetricsLog, read, read_up_to

REST = {"grad_norm": 1.0, "learning_rate": 0.1, "batches": "0"}


def test_lines_are_appended_and_read_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write([{"step": 1, "loss": 2.5, **REST}, {"step": 2, "loss": 2.0, **REST}])
    log.write([{"step": 2, "val_loss": 2.1}])
    log.close()
    assert read(path) == [
        {"step": 1, "loss": 2.5, **REST},
        {"step": 2, "loss": 2.0, **REST},
        {"step": 2, "val_loss": 2.1},
    ]


def test_non_finite_numbers_stay_valid_json(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write([{"step": 1, "loss": math.nan, "grad_norm": math.inf}])
    log.close()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_a_resumed_log_is_truncated_to_its_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 3, "val_')
    log = MetricsLog(path, read_up_to(path, 2))
    log.write([{"step": 3, "again": True}])
    log.close()
    assert read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_fresh_log_keeps_nothing(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    MetricsLog(path).close()
    assert read(path) == []


def test_a_missing_file_has_no_records(tmp_path: Path):
    assert read(tmp_path / "none.jsonl") == []

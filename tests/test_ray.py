"""A comparison on a Ray cluster: of this machine, and of three nodes of which one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparing import Make, called, grid_tree, tables, write

from gpt.compare.execution import remote
from gpt.compare.execution.ray import Ray
from gpt.compare.execution.tasks import Task
from gpt.errors import InputError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=10**8)
    yield cluster
    cluster.shutdown()


def grid_of(tiny: Make, folder: Path, steps: int, **changes: Any) -> Path:
    base = tiny(
        training={"steps": steps},
        evaluation={"every": steps // 2},
        checkpoint={"every": 20},
        sampling={"tokens": 0},
    )
    return write(folder / "grid.yaml", grid_tree(base, probes=False, **changes))


def test_an_error_of_ray_while_connecting_is_a_line(monkeypatch: pytest.MonkeyPatch):
    def init(*arguments: object, **options: object) -> None:
        raise ray.exceptions.AuthenticationError("No token. See the docs.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match=r"^--address: auto: No token"), Ray("auto"):
        pass


def test_an_address_that_does_not_answer_ends_within_20_seconds(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = grid_of(tiny, tmp_path, 4, grid={"optimizer.learning_rate": [0.01]}, seeds=1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(SystemExit) as end:
            called(
                capsys, path, "--out-dir", tmp_path / "ray", "--engine", "ray", "--address", address
            )
    assert time.monotonic() - began < 20
    assert end.value.code == 2
    (*_, last) = capsys.readouterr().err.splitlines()
    assert f"--address: {address}: no Ray cluster answers" in last


def test_a_token_that_is_deleted_stops_tasks_that_have_not_begun(
    cluster: Any,
    tiny: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def train(session: remote.Session, task: Task) -> Any:
        session.stop()
        return remote.Session.train(session, task)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(remote.Session, "train", train)
    path = grid_of(tiny, tmp_path, 4, grid={"optimizer.learning_rate": [0.01]}, seeds=1)
    flags = ("--engine", "ray", "--address", cluster.address)
    with pytest.raises(SystemExit) as end:
        called(capsys, path, "--out-dir", tmp_path / "ray", *flags)
    assert end.value.code == 75


def test_a_node_that_is_killed_loses_nothing(
    cluster: Any,
    tiny: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    no_pictures: None,
):
    path = grid_of(tiny, tmp_path, 700, grid={"optimizer.learning_rate": [0.01, 0.03]}, seeds=1)
    victim = next(iter(cluster.worker_nodes))
    directory = tmp_path / "ray"

    def kill_when_three_cells_train() -> set[str]:
        names: set[str] = set()
        while len(names) < 3:
            time.sleep(0.1)
            running = {each.name for each in directory.glob("cluster/updates/*")}
            saved = {each.parents[1].name for each in directory.glob("cells/*/checkpoints/latest")}
            names = running & saved
        cluster.remove_node(victim, allow_graceful=False)
        return names

    with ThreadPoolExecutor() as threads:
        killed = threads.submit(kill_when_three_cells_train)
        flags = ("--engine", "ray", "--address", cluster.address)
        code, _, err = called(capsys, path, "--out-dir", directory, *flags)
        training = killed.result(5)
    assert code == 0
    (again,) = [line for line in err.splitlines() if "is run again" in line]
    name = again.partition(":")[0]
    assert name in training
    assert "resumed" in (directory / "cells" / name / "history.jsonl").read_text()
    assert not (directory / "lost.json").exists()
    assert not (directory / "cluster").exists()

    request.getfixturevalue("in_this_process")
    code, _, _ = called(capsys, path, "--out-dir", tmp_path / "local")
    assert code == 0
    assert tables(directory) == tables(tmp_path / "local")


def test_a_cell_that_kills_its_process_three_times_is_recorded(
    cluster: Any,
    tiny: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_pictures: None,
):
    starts = tmp_path / "starts"

    def train(session: remote.Session, task: Task) -> Any:
        if task.name.startswith("pre_"):
            with starts.open("a") as file:
                file.write("started\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return remote.Session.train(session, task)  # in the worker, the real one

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(remote.Session, "train", train)
    path = grid_of(tiny, tmp_path, 4, grid={"optimizer.learning_rate": [0.01]}, seeds=1)
    directory = tmp_path / "ray"
    flags = ("--engine", "ray", "--address", cluster.address)
    code, out, _ = called(capsys, path, "--out-dir", directory, *flags)
    assert code == 0
    assert "1 of 2 cells have no result (1 killed)" in out
    assert starts.read_text().count("started") == 3
    (error,) = json.loads((directory / "lost.json").read_text()).values()
    assert error["status"] == "killed"
    assert "died 3 times" in error["reason"]


def test_a_node_that_sees_another_directory_ends_the_comparison(
    cluster: Any,
    tiny: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def train(session: remote.Session, task: Task) -> Any:
        return remote.Session.train(replace(session, token="of another directory"), task)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(remote.Session, "train", train)
    path = grid_of(tiny, tmp_path, 4, grid={"optimizer.learning_rate": [0.01]}, seeds=1)
    directory = tmp_path / "ray"
    flags = ("--engine", "ray", "--address", cluster.address)
    with pytest.raises(SystemExit) as end:
        called(capsys, path, "--out-dir", directory, *flags)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"node {socket.gethostname()} has another directory at {directory}" in last

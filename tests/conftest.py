"""Shared by the tests: a tiny corpus, configs that train in a second, and stubs of what is slow."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from gpt import checkpoint as checkpoints
from gpt.config import Config, merge, validate
from gpt.io.files import size_and_hash, write_bytes
from gpt.run import plot

if TYPE_CHECKING:
    from comparing import Trainer

ROOT = Path(__file__).parents[1]
pytest.register_assert_rewrite("bad_input")
# torch's compiler caches kernels by source alone; those for one instruction set fail on another.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"inductor-{torch.backends.cpu.get_cpu_capability()}"),
)
VERSE = "The quick brown fox jumps over the lazy dog, {} times; then it sleeps.\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(VERSE.format(index) * (index % 5 + 2))
    return folder


@pytest.fixture(scope="session")
def tree(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run of 20 steps on the tiny corpus."""
    return {
        "name": "tiny",
        "data": {
            "source": "text",
            "path": [str(corpus)],
            "tokenizer": "bytes",
            "val_fraction": 0.2,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
        "model": {"layers": 2, "heads": 2, "width": 16, "context": 16},
        "schedule": {"warmup_steps": 5},
        "training": {"steps": 20, "batch_sequences": 4, "device": "cpu"},
        "evaluation": {"every": 10, "sequences": 8},
        "sampling": {"tokens": 8},
    }


@pytest.fixture(scope="session")
def tiny(tree: dict[str, Any]) -> Callable[..., Config]:
    """`tiny(model={...}, ...)` is the tiny config with these options changed."""

    def make(**overrides: Any) -> Config:
        return validate(Config, merge(tree, overrides))

    return make


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of a subprocess that runs a command: one thread, as the models are tiny."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def few_probes() -> Iterator[None]:
    """A context in which initialization is probed with one seed instead of five or sixteen."""
    from gpt.compare import init_probes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init_probes, "SEEDS", (0,))
        patch.setattr(init_probes, "TOKEN_SEEDS", (0,))
        yield


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons train their cells in this process: workers take seconds to start."""
    from gpt.compare.execution import local

    def run(self: local.Pool, jobs: Sequence[local.Job], workers: int) -> bool:
        shared = local.Shared(self.shared.stop, self.shared.steps, os.getppid())
        monkeypatch.setattr(local, "_shared", shared, raising=False)
        for job in jobs:
            if self.stop():
                shared.stop.value = True
            answer: Future[Any] = Future()
            try:
                answer.set_result(job.function(*job.arguments))
            except Exception as error:
                answer.set_exception(error)
            job.done(answer)
        return not shared.stop.value

    monkeypatch.setattr(local.Pool, "run", run)


def vouch(folder: Path) -> None:
    """Rewrite a checkpoint's manifest to match its files as they are now."""
    path = folder / checkpoints.MANIFEST
    step = json.loads(path.read_text())["step"]
    files = {name: size_and_hash(folder / name) for name in checkpoints.FILES}
    path.write_text(checkpoints.manifest_text({"step": step, "files": files}))


NEEDS_A_RUN = "finetune"  # a shipped config that loads only beside a run; see test_pretrained.py

EMPTY = {
    "png": b"\x89PNG\r\n\x1a\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt"/>',
}


def _save_empty(self: Figure, target: Any, *, format: str | None = None, **options: Any) -> None:
    content = EMPTY[format or Path(target).suffix.removeprefix(".")]
    target.write(content) if hasattr(target, "write") else Path(target).write_bytes(content)


# Drawing takes longer than training a tiny run. So loss.png is written without being drawn, and
# other figures are built but saved empty.
STUBS: list[tuple[object, str, Callable[..., None]]] = [
    (plot, "plot_run", lambda records, path, **options: write_bytes(path, EMPTY["png"])),
    (Figure, "savefig", _save_empty),
    (Figure, "draw_without_rendering", lambda self: None),
]
ORIGINALS = [(owner, name, getattr(owner, name)) for owner, name, _ in STUBS]


@pytest.fixture(scope="session", autouse=True)
def _plots_are_empty() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for stub in STUBS:
            patch.setattr(*stub)
        yield


@pytest.fixture(scope="session")
def smallest(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of four steps, as small as possible."""
    data = {
        "source": "text",
        "path": [str(corpus)],
        "tokenizer": "bytes",
        "val_fraction": 0.2,
        "cache_dir": str(tmp_path_factory.mktemp("cache")),
    }
    tree = {
        "name": "small",
        "data": data,
        "model": {"layers": 1, "heads": 1, "width": 8, "context": 8},
        "schedule": {"warmup_steps": 1},
        "training": {"steps": 4, "batch_sequences": 2, "device": "cpu"},
        "evaluation": {"every": 2, "sequences": 4},
        "diagnostics": {"every": 2, "sequences": 2},
        "sampling": {"tokens": 2},
    }
    return validate(Config, tree)


@pytest.fixture(scope="session")
def smallest_runs(smallest: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, and the same run stopped halfway."""
    from gpt import training

    folder = tmp_path_factory.mktemp("runs")
    made: list[None] = []
    options = {"on_update": lambda: made.append(None), "stop": lambda: len(made) == 2}
    training.train(smallest, folder / "stopped", quiet=True, **options)
    training.train(smallest, folder / "finished", quiet=True)
    return {name: folder / name for name in ("stopped", "finished")}


@pytest.fixture(scope="session")
def smallest_comparison(smallest: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two arms at two learning rates, with one cell lost."""
    from gpt import training
    from gpt.compare.grid import load
    from gpt.compare.init_probes import measure_init_probes, write_init_probes

    folder = tmp_path_factory.mktemp("compared") / "small"
    folder.mkdir()
    tree = smallest.model_dump(mode="json")
    grid = {
        "base": {key: value for key, value in tree.items() if key not in ("name", "seed")},
        "arms": {"placement": {p: {"model.norm.placement": p} for p in ("pre", "post")}},
        "grid": {"optimizer.learning_rate": [0.01, 3e4]},
        "seeds": 1,
        "contrasts": [{"question": "Is it?", "measure": "failure", "of": ["pre", "post"]}],
        "pairs": [["pre", "post"]],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    resolved, cells = load(path)
    path.write_text(resolved.to_yaml())
    for cell in cells[:-1]:
        training.train(cell.config, folder / "cells" / cell.id, quiet=True)
        shutil.rmtree(folder / "cells" / cell.id / "checkpoints", ignore_errors=True)
    lost = {cells[-1].id: {"status": "killed", "reason": "its process ended early"}}
    (folder / "lost.json").write_text(json.dumps(lost))
    with few_probes():
        write_init_probes(folder, measure_init_probes(cells[:1]) or [])
    command = {"argv": ["compare.py", "x.yaml"], "began": "2026-01-01T00:00:00"}
    (folder / "command.json").write_text(json.dumps([command]))
    return folder


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the pictures, which take most of the time."""
    nothing = lambda *args, **options: None  # noqa: E731
    monkeypatch.setattr(plot, "plot_run", nothing)
    monkeypatch.setattr("gpt.run.plot.save", nothing)
    monkeypatch.setattr("gpt.compare.report.draw", lambda data: {})


@pytest.fixture(scope="session")
def tiny_file(tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny config, as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(tiny().to_yaml())
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny config."""
    from gpt.training import train

    path = tmp_path_factory.mktemp("run") / "tiny"
    train(tiny(), path, quiet=True)
    return path


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """A context in which plots are drawn, for tests of their content."""
    with pytest.MonkeyPatch.context() as patch:
        for original in ORIGINALS:
            patch.setattr(*original)
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A single test file runs in this process, as workers would take longer to start."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """End the run at once when a test kills its worker; the others would finish their files."""
    pytest.exit(f"{crashitem} crashed its worker", returncode=1)


@pytest.fixture
def small_grid(tiny: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Two arms, one rate, two seeds, no probes."""
    from comparing import grid_tree

    base = tiny(training={"steps": 2}, evaluation={"every": 2}, sampling={"tokens": 0})
    axis = {"optimizer.learning_rate": [0.01]}
    question = {"question": "Is it worse?", "of": ["deepnorm", "pre"]}
    return grid_tree(base, grid=axis, seeds=2, probes=False, contrasts=[question], pairs=[])


@pytest.fixture(scope="module")
def finished_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `run_grid` keeps a copy of the plain comparison, which many tests begin with."""
    return tmp_path_factory.mktemp("finished") / "small"


@pytest.fixture
def run_grid(
    small_grid: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    finished_grid: Path,
    in_this_process: None,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str, str]]:
    """Run a grid that differs from `small_grid`, by default in `tmp_path / "small"`."""
    from comparing import called, write

    from gpt.compare import estimate

    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)

    def start(*flags: object, out: str = "small", **changes: Any) -> tuple[int, str, str]:
        path = write(tmp_path / "grid.yaml", {**small_grid, **changes})
        plain, directory = not flags and not changes, tmp_path / out
        if plain and not directory.exists() and finished_grid.exists():
            shutil.copytree(finished_grid, directory)
            return 0, "", ""
        try:
            ended = called(capsys, path, "--out-dir", directory, *flags)
        except SystemExit as end:
            return int(end.code or 0), "", capsys.readouterr().err
        if plain and ended[0] == 0 and not finished_grid.exists():
            shutil.copytree(directory, finished_grid)
        return ended

    return start


@pytest.fixture
def trainer(
    tiny_run: Path, in_this_process: None, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    """Cells are not trained, but end as its `edges` say."""
    from comparing import Trainer

    stub = Trainer(tiny_run)
    stub.install(monkeypatch)
    return stub

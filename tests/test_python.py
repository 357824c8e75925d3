"""From Python: the public names, what notebooks show, and messages without flags."""

from __future__ import annotations

import ast
import inspect
import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, rendering
from test_cli import called

import gpt
from gpt import InputError, TrainedRun, generate, load_run, train
from gpt.config import Config, Generation
from gpt.errors import option
from gpt.io.console import Console
from gpt.run.directory import RunDirectory, RunResult

# What only commands call, and advice that result.json stores as flags.
COMMANDS_ONLY = ("gpt/cli", "gpt/compare", "gpt/coordinates.py", "gpt/diagnostics/failure.py")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]+")


def test_public_names_are_listed_sorted_and_documented():
    classes_first = lambda name: (not name.isupper(), name.islower(), name)  # noqa: E731
    assert gpt.__all__ == sorted(gpt.__all__, key=classes_first)
    assert set(gpt.__all__) <= set(dir(gpt))
    page = (ROOT / "docs/python.md").read_text("utf-8")
    for name in gpt.__all__:
        assert inspect.getdoc(getattr(gpt, name)), name
        assert f"`{name}" in page, name


def test_a_public_function_is_not_hidden_by_a_module():
    """A submodule becomes an attribute of the package as soon as anything imports it."""
    modules = {path.stem for path in (ROOT / "gpt").iterdir()}
    assert not modules & set(gpt.__all__)


def strings(path: Path) -> list[str]:
    """The string constants of a module, without its docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [c.value for c in constants if isinstance(c.value, str) and id(c) not in bare]


def test_messages_to_python_name_options():
    for path in (ROOT / "gpt").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(COMMANDS_ONLY):
            texts = [text for text in strings(path) if text not in ("--always", "--dirty")]
            flags = [text for text in texts if FLAG.search(text)]
            assert flags == ["--abbrev=40", "--exclude=*"] * (name == "gpt/run/directory.py"), name


def test_the_same_message_in_python_and_in_a_command(
    tiny: Callable[..., Config], tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny(seed=1)
    with pytest.raises(InputError) as caught:
        train(config, tiny_run, quiet=True)
    assert "choose another out_dir or name" in str(caught.value)
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    _, _, err = called(capsys, "train", path, "--out-dir", tiny_run)
    shown = str(caught.value).replace("out_dir", "--out-dir")
    assert err == "".join(f"train.py: {line}\n" for line in shown.splitlines())
    assert option("out_dir") == "out_dir"  # also after a command


# -- Loading and generating ----------------------------------------------------------------------


def test_a_checkpoint_by_name_number_or_text(tiny_run: Path):
    for checkpoint, step in (("best", 20), ("latest", 20), (10, 10), ("10", 10), ("0010", 10)):
        model, encoding, found = load_run(str(tiny_run), checkpoint)
        assert found == step
    run = load_run(tiny_run, 10)
    assert isinstance(run, TrainedRun)
    assert (run.step, run.encoding.n_vocab) == (10, encoding.n_vocab)
    assert run.model.num_parameters() == model.num_parameters()
    with pytest.raises(
        InputError, match=r"^checkpoint 7: no such checkpoint; .* best, latest, 10, "
    ):
        load_run(tiny_run, 7)


def test_generate_takes_a_run_in_any_form(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    options = {"max_new_tokens": 5, "temperature": 0.5, "top_k": 20, "seed": 3}
    text = generate(load_run(tiny_run), "The quick", **options)
    assert text.startswith("The quick")
    result = RunDirectory(tiny_run).read_result()
    assert generate(tiny_run, "The quick", **options) == text
    assert generate(str(tiny_run), "The quick", **options) == text
    assert generate(result, "The quick", **options) == text
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    _, out, _ = called(capsys, "sample", tiny_run, "--prompt", "The quick", *flags)
    assert out == text + "\n"  # as the command
    assert generate(tiny_run, max_new_tokens=3, seed=1) != generate(tiny_run, max_new_tokens=3)


def test_generate_has_the_defaults_of_the_command():
    defaults = {name: field.default for name, field in Generation.model_fields.items()}
    parameters = inspect.signature(generate).parameters
    assert {n: p.default for n, p in parameters.items() if n not in ("run", "prompt")} == defaults


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: -1 is not between 0 and 1000"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not between"),
        ({"top_p": "all"}, "top_p: must be a number, found 'all'"),
        ({"prompt": "a\ud800"}, "prompt: contains an invalid character at position 1"),
    ],
)
def test_generate_refuses(options: dict[str, Any], message: str, tiny_run: Path):
    with pytest.raises(InputError) as caught:
        generate(tiny_run, **options)
    assert str(caught.value).startswith(message)


def test_a_checkpoint_to_start_from_may_be_a_path(
    tiny: Callable[..., Config], tiny_run: Path, tmp_path: Path
):
    config = tiny(training={"steps": 11})
    result = train(
        config, tmp_path / "a", resume=tiny_run / "checkpoints/step-00000010", quiet=True
    )
    assert (result.status, result.step) == ("finished", 11)


def test_the_examples_run(
    tiny: Callable[..., Config], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(tiny_run, tmp_path / "runs/quickstart")
    monkeypatch.chdir(tmp_path)
    configs: list[Config] = []

    def load_tiny(name: str, overrides: dict[str, Any]) -> Config:
        configs.append(gpt.config.load(name, overrides))  # it is valid, but takes a minute to train
        return tiny(training={"steps": 50})

    monkeypatch.setattr(gpt, "load", load_tiny, raising=False)
    for page in ("README.md", "docs/python.md"):
        text = (ROOT / page).read_text("utf-8")
        names: dict[str, Any] = {"read_metrics": gpt.read_metrics, "list_runs": gpt.list_runs}
        names["load_run"] = gpt.load_run
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, names)
        assert configs.pop().training.steps == 100
        assert names["result"].step == 50
    assert len(names["texts"]) == 3
    assert len(names["metrics"]) == 51
    assert set(names["runs"]["name"]) == {"quickstart", "short"}


# -- Notebooks -----------------------------------------------------------------------------------


def test_a_result_shows_its_numbers_and_its_curve(tiny_run: Path):
    result = RunDirectory(tiny_run).read_result()
    assert result is not None
    html = result._repr_html_()
    for number in (f"{result.val_loss:.4f}", f"{result.val_bits_per_byte:.4f}", "completed all 20"):
        assert number in html
    assert 'src="data:image/png;base64,' in html
    with rendering():
        assert len(result._repr_html_()) > 10_000


def test_a_result_whose_directory_is_gone_shows_its_numbers(tiny_run: Path, tmp_path: Path):
    result = gpt.RunResult(
        status="diverged",
        step=3,
        tokens=96,
        train_loss=None,
        val_loss=None,
        best_val_loss=5.5,
        val_bits_per_byte=None,
        seconds=61.0,
        tokens_per_second=2.0,
        reason="the loss became <nan>",
        directory=tmp_path / "gone",
        failure=gpt.run.directory.Failure(
            3, "training loss", None, ("--a.b-c linear --d 6  (why)", "--optimizer.clip 1.0  (x)")
        ),
    )
    html = result._repr_html_()
    assert "<img" not in html
    assert "the loss became &lt;nan&gt;" in html
    assert "<li>a.b_c: linear, d: 6  (why)</li><li>optimizer.clip: 1.0  (x)</li>" in html
    assert "5.5000" in html
    assert "None" not in html


def in_notebook(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """From here on, stderr is that of a notebook's cell."""

    class OutStream(io.StringIO):
        pass

    OutStream.__module__ = "ipykernel.iostream"
    stream = OutStream()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_notebook_shows_a_bar(monkeypatch: pytest.MonkeyPatch):
    notebook = in_notebook(monkeypatch)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    console = Console()
    console.start(10)
    console.progress(5, "loss 2.5")
    console.say("a message")
    console.close()
    shown = notebook.getvalue()
    assert "\r" in shown
    assert "5/10" in shown
    assert "loss 2.5" in shown
    assert "a message\n" in shown


def test_with_widgets_a_notebook_shows_a_widget(monkeypatch: pytest.MonkeyPatch):
    in_notebook(monkeypatch)
    made: list[dict[str, Any]] = []

    class Widget:
        def __init__(self, **options: Any) -> None:
            made.append(options)

        def close(self) -> None:
            made.append({})

    widgets, bars = ModuleType("ipywidgets"), ModuleType("tqdm.notebook")
    widgets.__spec__ = ast.parse("")  # type: ignore[assignment] # anything but None
    bars.tqdm_notebook = Widget  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setitem(sys.modules, "tqdm.notebook", bars)
    console = Console()
    console.start(10, 3)
    console.close()
    assert [made[0]["total"], made[0]["initial"], made[1]] == [10, 3, {}]


def test_quiet_prints_nothing(
    tiny: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    notebook = in_notebook(monkeypatch)
    config = tiny(data={"cache_dir": str(tmp_path / "cache")}, training={"steps": 2})
    result = train(config, tmp_path / "run", quiet=True)
    train(config, tmp_path / "run", quiet=True)
    generate(result, max_new_tokens=2)
    gpt.plot(result)
    assert notebook.getvalue() == ""
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def result(tiny_run: Path) -> RunResult:
    """The result of a finished run."""
    found = RunDirectory(tiny_run).read_result()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda run: gpt.train("quickstart"), "config: must come from load"),
        (lambda run: gpt.train(Config(), resume=True), "resume: must be auto, never or a check"),
        (lambda run: gpt.load({"seed": 1}), "path: must name a config file, found dict"),
        (lambda run: gpt.load("quickstart", ["seed=1"]), "overrides: must be a dict of options"),
        (lambda run: gpt.load_run(run.directory, device="gpu"), "device: 'gpu' is not a device"),
        (lambda run: gpt.generate(run, 3), "prompt: must be text, found 3"),
        (lambda run: gpt.generate(Config()), "must be a directory or a result of train, found a C"),
        (lambda run: gpt.plot([run]), "must be a directory or a result of train, found a list"),
        (lambda run: gpt.plot(gpt.load_run(run)), "a result of train, found a TrainedRun"),
        (lambda run: gpt.read_metrics(3), "a result of train, found 3"),
        (lambda run: gpt.list_runs(None), "a result of train, found None"),
    ],
)
def test_an_argument_of_a_wrong_type(result: RunResult, wrong: Any, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        wrong(result)


def test_every_function_takes_the_result_of_a_run(result: RunResult):
    assert gpt.load_run(result).step == result.step
    assert [row.path for row in gpt.list_runs(result)] == [result.directory]
    assert len(gpt.plot(result)) == 1
    assert gpt.read_metrics(result)["step"][-1] == result.step


def test_dir_lists_what_is_public():
    assert dir(gpt) == sorted([*gpt.__all__, "__version__"])

"""Bad input by the thousand: every command works or ends in a clear error.

A clear error is exit code 2 and one to three lines on stderr that begin with the command's name and
name a key, a flag or a file, and no byte on disk has changed. It is never a traceback.

The ordinary run makes a few hundred examples, always the same ones. STEADYGPT_EXAMPLES sets how
many; `.ci/run` makes thousands.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import html
import io
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, few_probes, rendering
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpt import checkpoint as checkpoints
from gpt import cli, training
from gpt.cli.flags import as_flag
from gpt.cli.sample import Arguments as SampleArguments
from gpt.compare import figures
from gpt.compare import report as reports
from gpt.compare.grid import Grid, load
from gpt.compare.init_probes import measure_init_probes, write_init_probes
from gpt.config import Config, SourceConfig, option_paths, validate
from gpt.data.preparation import find
from gpt.errors import InputError, format_error, printable
from gpt.io.files import describe
from gpt.run import plot

EXAMPLES = int(os.environ.get("STEADYGPT_EXAMPLES", "200"))


def tries(share: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of a test that makes this fraction of the examples."""
    made = settings(
        max_examples=max(1, round(EXAMPLES * share)),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # what fails is small, and making it smaller takes minutes
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.fuzz(made(test))


# ---------------------------------------------------------------------------------------------
# Commands in this process

SUCCESS = {"train.py": {0, 3, 75}, "sample.py": {0}, "compare.py": {0}, "diagnose": {0}}
KEYS = {
    "run",  # the argument run-dir
    *(part for section in (Config, SampleArguments) for key in option_paths(section)
      for part in key.split(".")),
    *(key for section in (Grid, SourceConfig) for key in section.model_fields),
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The output of a command, and its exit code."""

    prog: str
    arguments: list[str]
    code: object
    out: str
    err: str


def call(prog: str, *arguments: object) -> Answer:
    """Run a command in this process. An exception that it does not handle fails the test."""
    out, err = io.StringIO(), io.StringIO()
    given = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = cli.run(prog.removesuffix(".py"), given, prog=prog)
        except SystemExit as end:
            code = end.code
    return Answer(prog, given, code, out.getvalue(), err.getvalue())


def is_clear(answer: Answer) -> bool:
    """Whether the command succeeded; otherwise its error must be a clear one."""
    if answer.code in SUCCESS[answer.prog]:
        return True
    assert answer.code == 2, answer
    start = f"{answer.prog}: "
    lines = answer.err.removesuffix("\n").split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith(start)), len(lines))
    complaint = lines[first:]
    assert 1 <= len(complaint) <= 3, answer
    for line in complaint:
        assert line.startswith(start), answer
        assert printable(line) == line, answer
        assert len(line) < 5000, answer
    text = "\n".join(complaint).removeprefix(start)
    assert "Traceback" not in answer.out + answer.err, answer
    words = {
        word
        for argument in answer.arguments
        for given in (argument, argument.partition("=")[2], Path(argument).name)
        for word in (format_error(InputError(given))[0], repr(given)[:30], ascii(given)[1:30])
        if word
    }
    named = set(re.findall(r"\w+", text)) & KEYS or any(word in text for word in words)
    assert named or "--" in text or re.search(r"[\w-]+\.\w+", text), f"names nothing: {answer}"
    encoded = answer.err.encode()  # what a terminal can show
    assert encoded
    return False


def contents(folder: Path) -> dict[str, object]:
    """Everything in a folder, except locks."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file() and path.suffix != ".lock":
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif path.is_dir():
            found[str(path.relative_to(folder))] = None
    return found


def must_be_clear(prog: str, *arguments: object, folder: Path) -> Answer:
    """Run a command; if it does not succeed, nothing in `folder` has changed."""
    before = contents(folder)
    answer = call(prog, *arguments)
    if not is_clear(answer):
        assert contents(folder) == before, answer
    return answer


def refused(prog: str, *arguments: object, folder: Path | None = None) -> str:
    """Run a command that must fail; returns what it printed on stderr."""
    before = contents(folder) if folder else None
    answer = call(prog, *arguments)
    assert not is_clear(answer), answer
    assert folder is None or contents(folder) == before, answer
    return answer.err


# ---------------------------------------------------------------------------------------------
# Junk

DEEP = 10_000
ODD_YAML = [
    *("", "null", "~", "true", "off", ".nan", "nan", ".inf", "-.inf", "1e999", "-1", "0", "1.5"),
    *("9" * 400, "9" * 5000, "1e400", "1_000", "0x1F", "0o7", "1:30", "2001-99-99", "2001-01-01"),
    *("[]", "{}", "[[[]]]", "{a: {b: {c: 1}}}", "[1, [2], {a: 3}]", '""', "' '", "x" * 5000),
    *(r'"\0"', r'"\e[31mred\e[0m"', r'"a\nb\nc\nd\ne"', r'"\u2028\u202e"', r'"\ud800"', r'"\a"'),
    *("!!python/object/apply:os.system ['echo owned']", "!!python/name:os.system", "!unknown 1"),
    *("!!binary aGk=", "!!binary '?'", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]"),
    *("!!timestamp x", "!!int x", "!!float []", "!!bool 3", "!!null 7", "!!str [1]", "!!map 1"),
    *("*nowhere", "&a [*a]", "&a 1", "<<", "=", "@", "`", "%", "? [1]", "{<<: 1}", "{? [1] : 2}"),
    *("{<<: {a: 1}}", "[", "}", "'", '"', "|", ">", "---", "...", "- 1", "a: b: c", "#", "\t"),
    *("[" * 150 + "]" * 150, "{a: " * 150 + "1" + "}" * 150, "{a: " * DEEP, "[" * 50),
    *("../../etc/passwd", "/dev/null", ".", "/", "~/x", "a/../../b", "<script>alert(1)</script>"),
    *("'*'", "{name: x}", "[a, b]", "[[a, b], [b, a]]", "{a: {b: null}}", "{1: 2}", "{null: 1}"),
]
ODD_TEXT = ["", " ", "\0", "a\nb", "\x1b[31m", "\u202e", "../x", "<b>", "x" * 5000, "-", "--", "é"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats(allow_subnormal=False)
    | st.text(max_size=12)
    | st.sampled_from(ODD_TEXT)
)
trees: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=6), below),
    max_leaves=8,
)
known_keys = st.sampled_from(sorted(KEYS)) | st.sampled_from(ODD_TEXT) | st.text(max_size=8)
config_like: st.SearchStrategy[Any] = st.dictionaries(
    known_keys, st.dictionaries(known_keys, trees, max_size=3) | trees, max_size=4
)
odd_yaml = st.sampled_from(ODD_YAML) | trees.map(json.dumps)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in a tree, as the mapping or list that holds it, and where in it."""
    if isinstance(tree, dict | list):
        for key, below in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, key
            yield from places(below)


@st.composite
def spoilt_yaml(draw: st.DrawFn, tree: dict[str, Any]) -> bytes:
    """A YAML file with one to three places of it replaced by junk."""
    tree, marks = copy.deepcopy(tree), {}
    for number in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(places(tree))))
        mark = f"mark{number}mark"
        how = draw(st.sampled_from(["value", "value", "value", "key", "beside"]))
        if isinstance(holder, list) or how == "value":
            holder[key] = mark
        elif how == "key":
            holder[mark] = holder.pop(key)
        else:
            holder[mark] = 1
        misspelt = f"{key}s" if draw(st.booleans()) else str(key)[1:]
        marks[mark] = draw(odd_yaml | st.just(misspelt) if how != "value" else odd_yaml)
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=draw(st.booleans()), width=9999)
    for mark, junk in marks.items():
        text = text.replace(mark, junk)
    if draw(st.integers(0, 9)) == 0:  # a key twice, where the first is at the margin
        text += f"\n{next(iter(tree))}: {draw(odd_yaml)}\n"
    raw = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(min_size=1, max_size=4)) + raw[at:]
    return raw


any_yaml = (
    config_like.map(lambda tree: json.dumps(tree).encode())
    | trees.map(lambda tree: json.dumps(tree).encode())
    | odd_yaml.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=60)
)


# ---------------------------------------------------------------------------------------------
# What is spoilt


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
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


@pytest.fixture(scope="module")
def quick(monkeypatch_module: pytest.MonkeyPatch) -> None:
    """Skip the pictures, which take most of the time."""
    nothing = lambda *args, **options: None  # noqa: E731
    monkeypatch_module.setattr(plot, "plot_run", nothing)
    monkeypatch_module.setattr("gpt.run.plot._save", nothing)
    monkeypatch_module.setattr(reports, "draw", lambda data: {})


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def runs(config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, and the same run stopped half-way."""
    folder = tmp_path_factory.mktemp("runs")
    made: list[None] = []
    options = {"on_update": lambda: made.append(None), "stop": lambda: len(made) == 2}
    training.train(config, folder / "stopped", quiet=True, **options)
    training.train(config, folder / "finished", quiet=True)
    return {name: folder / name for name in ("stopped", "finished")}


@pytest.fixture(scope="module")
def compared(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two arms at two rates, with one cell lost."""
    folder = tmp_path_factory.mktemp("compared") / "small"
    folder.mkdir()
    tree = config.model_dump(mode="json")
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


# ---------------------------------------------------------------------------------------------
# Damage

PICKLE = pickle.dumps({"model": print})
HUGE_HEADER = b"\xff" * 8 + b"{}"
ODD_HEADER = (
    struct.pack("<Q", 61) + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,9999999]}} '
)
ODD_FILES = [
    *(b"", b"\n", b"null", b"[]", b"{}", b"1", b'"x"', b"NaN", b"[null]", b'{"format": 1}'),
    *(b"\x00" * 50, b"\xff\xfe", PICKLE, HUGE_HEADER, ODD_HEADER, b"PK\x03\x04" + PICKLE),
    *(b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"step-00000002\n", b"../x"),
    *(b'{"step": 1}\n', b'{"step": 1, "loss": "x"}\n', b'{"step": true, "val_loss": [1]}\n'),
]
odd_json = trees | st.sampled_from(
    [10**30, -(10**400), 1e308, "../../x", "NaN", [[[[]]]], {"": {}}]
)


def tampered(draw: st.DrawFn, raw: bytes) -> bytes:
    """JSON, or lines of it, with one value replaced; anything else with its middle replaced."""
    lines = raw.decode("utf-8", "replace").splitlines()
    number = draw(st.integers(0, max(0, len(lines) - 1)))
    whole = not raw.startswith(b'{"step"')
    try:
        tree = json.loads(raw if whole else lines[number])
        inside = list(places(tree))
        if not inside:
            raise ValueError
        holder, key = draw(st.sampled_from(inside))
    except (ValueError, IndexError, RecursionError):
        half = len(raw) // 2
        return raw[:half] + draw(st.binary(max_size=8)) + raw[half + 4 :]
    if draw(st.integers(0, 3)):
        holder[key] = draw(odd_json)
    else:
        del holder[key]
    if whole:
        return json.dumps(tree).encode()
    lines[number] = json.dumps(tree)
    return "".join(f"{line}\n" for line in lines).encode()


def seal_again(folder: Path) -> None:
    """Make manifests and descriptions fit the files, as an attacker would."""
    for path in folder.rglob("manifest.json"):
        with contextlib.suppress(Exception):
            tree = json.loads(path.read_bytes())
            tree["files"] = {name: describe(path.parent / name) for name in tree["files"]}
            path.write_text(checkpoints.manifest_text(tree))
    for path in folder.rglob("meta.json"):
        with contextlib.suppress(Exception):
            tree = json.loads(path.read_bytes())
            tree["others"] = {name: describe(path.parent / name) for name in tree["others"]}
            for file in tree["files"]:
                file |= describe(path.parent / f"{file['name']}.bin")
            path.write_text(json.dumps(tree))


def damage(draw: st.DrawFn, folder: Path, outside: Path) -> None:
    """Damage one to three files of a directory."""
    for _ in range(draw(st.integers(1, 3))):
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file()
            and not path.is_symlink()
            and path.suffix not in (".lock", ".png", ".svg", ".html")
        )
        if not files:
            return
        path = draw(st.sampled_from(files))
        raw = path.read_bytes()
        how = draw(
            st.sampled_from(
                [
                    *("tamper", "tamper", "tamper", "tamper", "cut", "flip", "delete", "swap"),
                    *("replace", "replace", "folder", "link out", "link to itself"),
                ]
            )
        )
        if how == "swap":
            other = draw(st.sampled_from(files))
            theirs = other.read_bytes()
            other.write_bytes(raw)
            path.write_bytes(theirs)
        elif how == "tamper":
            path.write_bytes(tampered(draw, raw))
        elif how == "cut":
            path.write_bytes(raw[: draw(st.integers(0, len(raw)))])
        elif how == "flip":
            at = draw(st.integers(0, max(0, len(raw) - 1)))
            path.write_bytes(raw[:at] + bytes(255 - b for b in raw[at : at + 1]) + raw[at + 1 :])
        elif how == "replace":
            path.write_bytes(draw(st.sampled_from(ODD_FILES) | st.binary(max_size=40)))
        else:
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how == "link out":
                path.symlink_to(outside)
            elif how == "link to itself":
                path.symlink_to(path.name)
    if draw(st.booleans()):
        seal_again(folder)


@contextlib.contextmanager
def spoilt_copy(draw: st.DrawFn, original: Path) -> Iterator[Path]:
    """A damaged copy of a directory; a file outside, which links may point to, must not change."""
    with tempfile.TemporaryDirectory() as name:
        folder, outside = Path(name) / original.name, Path(name) / "outside"
        outside.write_bytes(b'{"step": 1}\n')
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.svg", "*.lock"))
        damage(draw, folder, outside)
        yield folder
        assert outside.read_bytes() == b'{"step": 1}\n'


# ---------------------------------------------------------------------------------------------
# By the thousand


@tries(0.15)
@given(data=st.data())
def test_train_with_junk_in_its_yaml(config: Config, data: st.DataObject):
    tree = config.model_dump(mode="json") | {"base": "base.yaml"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base.yaml").write_text("model: {layers: 2}\n")
        raw = data.draw(spoilt_yaml(tree) | spoilt_yaml(tree) | any_yaml)
        (folder / "c.yaml").write_bytes(raw)
        if data.draw(st.integers(0, 4)) == 0:
            (folder / "base.yaml").write_bytes(data.draw(any_yaml))
        must_be_clear("train.py", folder / "c.yaml", "--print-config", folder=folder)


@tries(0.1)
@given(data=st.data())
def test_compare_with_junk_in_its_grid(config: Config, data: st.DataObject):
    base = config.model_dump(mode="json")
    grid = {
        "title": "t",
        "base": {key: base[key] for key in ("data", "model", "training")},
        "options": {"training.steps": 3},
        "arms": {
            "placement": {p: {"model.norm.placement": p} for p in ("pre", "post")},
            "warm-up": {"cold": {"schedule.warmup": "none"}, "warm": None},
        },
        "grid": {"optimizer.learning_rate": [0.1, 0.2], "model.layers, model.width": [[1, 8]]},
        "seeds": [0],
        "exclude": [{"placement": "post", "optimizer.learning_rate": 0.2}],
        "contrasts": [
            {
                "question": "?",
                "of": ["pre, cold", "post, cold"],
                "against": ["pre, warm", "post, warm"],
                "measure": "loss",
            }
        ],
        "pairs": [["pre, cold", "pre, warm"]],
        "hours": 1,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "g.yaml").write_bytes(data.draw(spoilt_yaml(grid) | spoilt_yaml(grid) | any_yaml))
        nowhere = folder / "nowhere"
        arguments = (folder / "g.yaml", "--report-only", "--out-dir", nowhere)
        must_be_clear("compare.py", *arguments, folder=folder)


own_flags = {
    "train.py": ["--out-dir", "--resume", "--dry-run", "--config", "--help"],
    "compare.py": ["--out-dir", "--workers", "--beside", "--grid", "--hours", "--dry-run"],
    "sample.py": [as_flag(key) for key in option_paths(SampleArguments)],
    "diagnose": ["--run-dir", "--every"],
}
odd_values = (
    st.sampled_from(
        [*ODD_TEXT, *ODD_YAML[:60], "/", "/dev/null", "/nowhere/x", "=", "--", "-1", "-x", "\udcff"]
    )
    | st.text(max_size=10)
    | st.integers().map(str)
    | st.floats(allow_subnormal=False).map(str)
)


def odd_flags(prog: str, options: list[str]) -> st.SearchStrategy[list[str]]:
    """Valid and invalid flags, followed by junk, by `=` and junk, or by nothing."""
    real = st.sampled_from([*own_flags[prog] * 3, *map(as_flag, options)])
    wrong = st.text(max_size=8).map("--{}".format) | real.map(lambda flag: flag[:-1])
    flag = real | real | real | wrong | real.map(lambda flag: flag.replace("-", "_")[2:])
    part = (
        st.tuples(flag, odd_values)
        | st.tuples(flag, odd_values).map(lambda pair: ("=".join(pair),))
        | st.tuples(flag)
        | st.tuples(odd_values)
    )
    return st.lists(part, min_size=1, max_size=4).map(lambda parts: [w for p in parts for w in p])


@tries(0.12)
@given(data=st.data())
def test_train_with_junk_for_flags(
    config: Config, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.getbasetemp() / "flags"
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(config.to_yaml())
    flags = data.draw(odd_flags("train.py", option_paths(Config)))
    first = data.draw(st.sampled_from([[str(folder / "c.yaml")]] * 6 + [[], [str(folder)]]))
    must_be_clear("train.py", "--print-config", *first, *flags, folder=folder)


@tries(0.35)
@given(data=st.data())
def test_sample_with_junk_for_flags(
    runs: dict[str, Path], data: st.DataObject, monkeypatch_module: pytest.MonkeyPatch
):
    from gpt import generate

    few = lambda *args, **options: (row for row in ())  # noqa: E731 - no text of 10^9 tokens
    monkeypatch_module.setattr(generate, "generate", few)
    flags = data.draw(odd_flags("sample.py", option_paths(SampleArguments)))
    first = data.draw(st.sampled_from([[runs["finished"]]] * 6 + [[], ["nowhere"], ["/dev/null"]]))
    must_be_clear("sample.py", *first, *flags, folder=runs["finished"])


@tries(0.05)
@given(data=st.data())
def test_compare_with_junk_for_flags(compared: Path, data: st.DataObject):
    flags = data.draw(odd_flags("compare.py", option_paths(Config)))
    grid = compared / "grid.yaml"
    first = data.draw(st.sampled_from([[grid]] * 6 + [[compared]] * 2 + [[], ["nowhere"]]))
    rest = [*first, *flags]
    if not any(str(word).startswith("--out-dir") for word in rest):  # none has a result there
        rest += ["--out-dir", compared.parent / "nowhere"]
    must_be_clear("compare.py", "--report-only", *rest, folder=compared)


@tries(0.04)
@given(data=st.data())
def test_a_spoilt_run(runs: dict[str, Path], data: st.DataObject, quick: None):
    name = data.draw(st.sampled_from(["stopped", "stopped", "finished"]))
    with spoilt_copy(data.draw, runs[name]) as run:
        which = data.draw(st.sampled_from(["best", "latest", "2"]))
        short = ("--prompt", "a", "--max-new-tokens", "2", "--checkpoint", which)
        must_be_clear("sample.py", run, *short, folder=run)
        must_be_clear("diagnose", run, folder=run)
        must_be_clear("compare.py", run, "--report-only", folder=run)
        must_be_clear("train.py", runs[name] / "config.yaml", "--out-dir", run, folder=run)


@tries(0.02)
@given(data=st.data())
def test_train_from_a_spoilt_checkpoint(runs: dict[str, Path], data: st.DataObject, quick: None):
    with spoilt_copy(data.draw, runs["stopped"]) as run:
        start = next((run / "checkpoints").glob("step-*"), run / "checkpoints/step-00000001")
        fresh = run.parent / "fresh"
        arguments = (runs["stopped"] / "config.yaml", "--out-dir", fresh, "--resume", start)
        must_be_clear("train.py", *arguments, folder=run)


@tries(0.03)
@given(data=st.data())
def test_a_spoilt_comparison(compared: Path, data: st.DataObject, quick: None):
    with spoilt_copy(data.draw, compared) as folder:
        must_be_clear("compare.py", folder, "--report-only", folder=folder)


@tries(0.14)
@given(data=st.data())
def test_a_spoilt_corpus(config: Config, data: st.DataObject):
    prepared = find(config.data)
    assert prepared is not None
    with spoilt_copy(data.draw, prepared) as folder:
        arguments = ("--data.cache-dir", folder.parent, "--dry-run")
        path = folder.parent / "c.yaml"
        path.write_text(config.to_yaml())
        must_be_clear("train.py", path, *arguments, folder=folder.parent)


# ---------------------------------------------------------------------------------------------
# One by one: malicious files

LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n"
HOSTILE_YAML = {
    "billion laughs": (LAUGHS, "line 2: aliases are not supported"),
    "nested lists": ("a: " + "[" * DEEP + "]" * DEEP, "nested too deeply"),
    "nested mappings": ("{a: " * DEEP + "1" + "}" * DEEP, "nested too deeply"),
    "python object": (
        "name: !!python/object/apply:os.mkdir [owned]",
        "line 1: could not determine",
    ),
    "python name": ("!!python/name:os.system", "line 1: could not determine"),
    "no text": (b"name: \xff", "is not UTF-8 text: byte 6 is 0xff"),
    "UTF-16": ("name: a".encode("utf-16"), "is UTF-16 text, not UTF-8 text; convert it"),
    "NUL": ("name: \0", "c.yaml"),
    "key twice": ("seed: 1\nseed: 2", "line 2: duplicate key 'seed'"),
    "list": ("- 1", "must be a mapping of options"),
    "terminal": ('"\\e[2J": 1', r"c.yaml: \x1b[2J: no such option"),
    "many lines": ('"a\\nb\\nc\\nd\\ne": 1', "no such option"),
    "pickle": (PICKLE, "c.yaml"),
    "long": ("# " + "x" * 2**22, "is larger than 131,072 bytes"),
    "base itself": ("base: c.yaml", "base: the chain of base files loops back to this file"),
    "base in a circle": (
        "base: sub/../sub/../c.yaml",
        "base: the chain of base files loops back to this file",
    ),
    "base a device": ("base: /dev/zero", "/dev/zero: is a device, not a regular file"),
    "base NUL": ('base: "a\\0"', r"a\x00: no such file"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
@pytest.mark.parametrize("prog", ["train.py", "compare.py", "sample.py", "diagnose"])
def test_hostile_yaml(prog: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a config, a grid, and the config of a run."""
    text, message = HOSTILE_YAML[name]
    path = tmp_path / "c.yaml"
    run = tmp_path / "run"
    if prog in ("sample.py", "diagnose"):
        run.mkdir()
        path = run / "config.yaml"
        text, message = (
            each if isinstance(each, bytes) else each.replace("c.yaml", "config.yaml")
            for each in (text, message)
        )
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    target = {"train.py": path, "compare.py": path}.get(prog, run)
    error = refused(prog, target, folder=tmp_path)
    grid = prog == "compare.py" and name in ("terminal", "many lines", "key twice")
    assert message in error or name.startswith("base") or grid
    assert path.name in error or name == "base a device"
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("prog", ["train.py", "compare.py"])
def test_something_other_than_a_config(prog: str, tmp_path: Path):
    loop = tmp_path / "loop.yaml"
    loop.symlink_to("loop.yaml")
    assert "loop.yaml" in refused(prog, loop)
    assert "/dev/zero: is a device, not a regular file" in refused(prog, "/dev/zero")
    assert "contains a NUL character" in refused(prog, "a\0b")
    assert "is empty, and must name a file or folder" in refused(prog, "")
    assert str(tmp_path / "no.yaml") in refused(prog, tmp_path / "no.yaml")
    assert str(tmp_path) in refused(prog, tmp_path)


@pytest.mark.parametrize("flag", ["--data.path", "--data.cache-dir", "--out-dir"])
def test_an_empty_path_is_named(flag: str, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {source: text}" if flag == "--data.path" else "{}")
    error = refused("train.py", path, flag, "", "--dry-run", folder=tmp_path)
    assert flag.removeprefix("--").replace("cache-dir", "cache_dir") in error
    assert "is empty, and must name a file or folder" in error


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "", "<b>x</b>", "a\nb", "x" * 101])
def test_a_runs_name_stays_in_its_folder(name: str, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"name": name}))
    error = refused("train.py", path, "--print-config", folder=tmp_path)
    assert f"{path}: name: must " in error


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"seeds": 10**12}, "seeds: 1000000000000 is not between 1 and 10,000"),
        ({"seeds": "1e300"}, "seeds: '1e300' is not between 1 and 10,000"),
        ({"seeds": True}, "seeds: True is neither a list of seeds nor their number, between 1 and"),
        ({"seeds": 2.5}, "seeds: 2.5 is neither a list of seeds nor their number"),
        ({"seeds": 10_000, "arms": {"a": {"x": {}, "y": {}}}}, "describes 20,000 cells"),
        ({"seeds": -1}, "seeds"),
        ({"grid": {"optimizer.learning_rate": list(range(1, 20_000))}}, "describes"),
        ({"arms": {"a": {"../x": {}}}, "pairs": [["../x", "../x"]]}, "compared with itself"),
        ({"arms": {"a": {"x,y": {}}}}, "arms"),
        ({"arms": {"": {"x": {}}}}, "arms"),
        ({"arms": {"a": {}}}, "arm"),
        ({"exclude": [{"arm": "x"}]}, "leaves no cells"),
        ({"exclude": [{"nothing": 1}]}, "exclude.0"),
        ({"contrasts": [{"question": "?", "of": ["x", "nobody"]}]}, "nobody"),
        ({"grid": {"seed": [1]}}, "grid"),
        ({"base": {"model": {"layers": "x"}}}, "model.layers"),
        ({"base": {"data": {"hub": {"streaming": {"\ud842": 1}}}}}, "data.hub.streaming"),
        ({"base": "../../../../etc/passwd"}, "base"),
    ],
)
def test_hostile_grids(tree: dict[str, Any], message: str, tmp_path: Path):
    whole = {"base": {}, "arms": {"a": {"x": {}}}, "seeds": 1, **tree}
    path = tmp_path / "g.yaml"
    path.write_text(json.dumps(whole))
    error = refused("compare.py", path, "--report-only", "--out-dir", tmp_path / "o")
    assert message in error


def test_arms_cannot_name_a_folder_outside(tmp_path: Path):
    tree = {"base": {}, "arms": {"a": {"../../x": {}, "/etc": {}}}, "seeds": 1}
    path = tmp_path / "g.yaml"
    path.write_text(json.dumps(tree))
    _, cells = load(path)
    for cell in cells:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cell.id)


# In a run ------------------------------------------------------------------------------------


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(runs["finished"], tmp_path / "run"))


@pytest.fixture
def stopped(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(runs["stopped"], tmp_path / "run"))


class Touch:
    """What loading a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


SHORT = ("--prompt", "a", "--max-new-tokens", "2", "--checkpoint", "latest")


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("what", ["pickle", "huge header", "odd header", "empty", "JSON", "zip"])
def test_a_checkpoint_without_tensors(what: str, sealed: bool, run: Path, tmp_path: Path):
    odd = {
        "pickle": pickle.dumps(Touch(tmp_path / "owned")),
        "huge header": HUGE_HEADER,
        "odd header": ODD_HEADER,
        "empty": b"",
        "JSON": b"{}",
        "zip": b"PK\x03\x04" + PICKLE,
    }
    (newest(run) / "model.safetensors").write_bytes(odd[what])
    if sealed:
        seal_again(run)
    error = refused("sample.py", run, *SHORT, folder=run)
    assert f"{newest(run)}" in error
    assert "damaged" in error
    assert not (tmp_path / "owned").exists()


TOKENIZERS = {
    "deep": b"[" * DEEP,
    "list": b"[]",
    "no tokens": b'{"format": 1}',
    "tokens of numbers": b'{"format": 1, "end_of_text": 1, "name": "chars", "tokens": [1]}',
    "name": b'{"format": 1, "end_of_text": 1, "name": ["chars"], "pattern": "a", "tokens": ["a"]}',
    "pattern": b'{"format": 1, "end_of_text": 1, "name": "chars", "pattern": "(", "tokens": ["a"]}',
    "twice": b'{"format":1,"end_of_text":2,"name":"chars","pattern":".","tokens":["a","a"]}',
    "pattern of numbers": b'{"format":1,"end_of_text":1,"name":"chars","pattern":3,"tokens":["a"]}',
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_file_that_is_not_a_tokenizer(what: str, run: Path, config: Config, tmp_path: Path):
    """In a checkpoint with a matching manifest, and as data.vocabulary."""
    path = newest(run) / "tokenizer.json"
    path.write_bytes(TOKENIZERS[what])
    seal_again(run)
    assert "is not a tokenizer file" in refused("sample.py", run, *SHORT, folder=run)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    flags = ("--data.tokenizer", "file", "--data.vocabulary", path, "--dry-run")
    assert str(path) in refused("train.py", tmp_path / "c.yaml", *flags, folder=tmp_path)


@pytest.mark.parametrize("target", ["../../outside", "/etc", "step-00000002/..", "x\0", "\x1b[2J"])
def test_latest_leads_nowhere_else(target: str, run: Path):
    """If it does not name a checkpoint, the newest is used."""
    (run / "checkpoints" / "latest").write_text(target)
    assert call("sample.py", run, *SHORT).code == 0


def test_a_link_to_other_weights(run: Path, tmp_path: Path):
    (tmp_path / "other").write_bytes(b"secret")
    path = newest(run) / "model.safetensors"
    path.unlink()
    path.symlink_to(tmp_path / "other")
    error = refused("sample.py", run, *SHORT, folder=run)
    assert f"{path}: is damaged" in error
    assert (tmp_path / "other").read_bytes() == b"secret"


def test_a_link_to_itself_for_a_run(tmp_path: Path, config: Config):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
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
def test_metrics_of_wrong_types(record: str, run: Path, compared: Path, tmp_path: Path):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(record + "\n")
    line = r"metrics.jsonl: line \d+ is damaged"
    assert re.search(line, refused("diagnose", run, folder=run))
    folder = Path(shutil.copytree(compared, tmp_path / "compared"))
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


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool", "float64", "float16"])
def test_weights_of_another_type(dtype: str, config: Config, stopped: Path):
    path = newest(stopped) / "model.safetensors"
    wrong = {key: value.to(getattr(torch, dtype)) for key, value in load_file(path).items()}
    save_file(wrong, path)
    seal_again(stopped)
    error = refused("sample.py", stopped, *SHORT, folder=stopped)
    assert f"its dtype is torch.{dtype}, not torch.float32" in error
    assert f"its dtype is torch.{dtype}, not torch.float32" in resumed(config, stopped)


@pytest.mark.parametrize("step", ["9" * 5000, "-1", "1.0", "5", "٤", "step-00000004", "worst"])
def test_a_checkpoint_that_is_not_there(step: str, run: Path):
    error = refused("sample.py", run, "--checkpoint", step, "--prompt", "a", folder=run)
    assert f"{run} has best, latest, " in error


def as_step(folder: Path, step: int) -> Path:
    """A copy of a checkpoint, as another step's."""
    copy = Path(shutil.copytree(folder, folder.with_name(f"step-{step:08d}")))
    for name in ("state.json", "manifest.json"):
        tree = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**tree, "step": step}))
    seal_again(copy)
    return copy


def test_sampling_retries_when_its_checkpoint_is_pruned(run: Path, monkeypatch: pytest.MonkeyPatch):
    folder, load, pruned = newest(run), checkpoints.load, []

    def meddle(path: Path, **options: Any) -> checkpoints.Checkpoint:
        if not pruned:
            pruned.append(path)
            checkpoints.write_pointers(folder.parent, as_step(folder, 9).name, best=True)
            checkpoints.prune(folder.parent, ())
        return load(path, **options)

    monkeypatch.setattr(checkpoints, "load", meddle)
    answer = call("sample.py", run, *SHORT)
    assert answer.code == 0, answer
    assert f"{run}, step 9" in answer.err
    assert not folder.exists()


def test_sampling_from_a_step_that_is_pruned_names_those_that_are_left(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    as_step(newest(run), 9)
    load = checkpoints.load

    def meddle(path: Path, **options: Any) -> checkpoints.Checkpoint:
        if path.exists():
            shutil.rmtree(path)
        return load(path, **options)

    monkeypatch.setattr(checkpoints, "load", meddle)
    error = call("sample.py", run, "--checkpoint", "9", "--prompt", "a").err
    assert f"--checkpoint 9: no such checkpoint; {run} has best, latest, " in error
    assert "damaged" not in error


def test_the_checkpoint_that_is_advised_is_not_the_damaged_one(run: Path):
    latest = newest(run)
    for path in (run / "checkpoints").glob("step-*"):
        if path != latest:
            shutil.rmtree(path)
    other = as_step(latest, 2)
    (latest / "state.json").write_text("[]")
    seal_again(latest)
    error = refused("sample.py", run, *SHORT, folder=run)
    assert f"{latest.name}: is damaged" in error
    assert "--checkpoint 2 is intact" in error
    (other / "state.json").write_text("[]")
    seal_again(other)
    assert "is intact" not in refused("sample.py", run, *SHORT, folder=run)


def put(kind: str, path: Path) -> None:
    """Replace a file by something that is not a file, is endless, or has ten gigabytes."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("xb") as file:
            file.truncate(10**10)
    else:
        path.symlink_to(kind)


ODD_KINDS = ["/dev/zero", "pipe", "folder", "sparse"]
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
    name: str, kind: str, config: Config, stopped: Path, quick: None
):
    """It is ignored or refused at once; it neither blocks nor fills the memory."""
    put(kind, stopped / name.replace("CHECKPOINT", f"checkpoints/{newest(stopped).name}"))
    (stopped.parent / "c.yaml").write_text(config.to_yaml())
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


# In a comparison -----------------------------------------------------------------------------

WRONG_JSON = [
    "",
    "null",
    "[]",
    "3",
    '"x"',
    '{"a": 1}',
    "[[1]]",
    "{",
    "[" * DEEP,
    '{"a": {"b": []}}',
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("lost.json", text) for text in WRONG_JSON),
        *(
            (name, text)
            for name in ("probes.json", "command.json", "environment.json")
            for text in ("", "[]", '{"a": 1}', "[[1]]")
        ),
    ],
    ids=lambda text: text[:12],
)
def test_json_of_the_wrong_types(name: str, text: str, compared: Path, tmp_path: Path, quick: None):
    folder = Path(shutil.copytree(compared, tmp_path / "compared"))
    path = folder / name
    if name == "environment.json":
        path = next(folder.glob("cells/*/environment.json"))
    path.write_text(text)
    if text == "[]" and name in ("probes.json", "command.json"):
        return  # none of them
    assert f"{path}: is damaged" in refused("compare.py", folder, "--report-only", folder=folder)


ODD_STARTS: list[tuple[str, Any]] = [
    *(("text", []), ("token", []), ("arms", []), ("arms", ["nobody"])),
    *(("text.0.layers", 0), ("text.0.layers", 10**9), ("text.0.gradient_norms", [])),
    *(("text.0.stream_rms", [1.0]), ("text.0.betas", []), ("token.1.gradient_norms", [1.0] * 99)),
]


@pytest.mark.parametrize(("where", "value"), ODD_STARTS, ids=repr)
def test_starts_that_were_not_measured(where: str, value: Any, compared: Path, tmp_path: Path):
    """Without `quick`, so that values that are accepted are also drawn."""
    folder = Path(shutil.copytree(compared, tmp_path / "compared"))
    path = folder / "probes.json"
    tree = json.loads(path.read_text())
    *way, last = where.split(".")
    place: Any = tree[0]
    for part in way:
        place = place[int(part) if part.isdecimal() else part]
    place[last] = value
    path.write_text(json.dumps(tree))
    error = refused("compare.py", folder, "--report-only", folder=folder)
    assert f"{path}: is damaged; delete it to measure again" in error


@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize("name", [
    "grid.yaml", "command.json", "lost.json", "probes.json", "CELL/environment.json",
    "CELL/metrics.jsonl", "CELL/result.json", "CELL/config.yaml",
])  # fmt: skip
def test_what_is_not_a_file_in_a_comparison(
    name: str, kind: str, compared: Path, tmp_path: Path, quick: None
):
    folder = Path(shutil.copytree(compared, tmp_path / "compared"))
    cell = min((folder / "cells").iterdir())
    put(kind, folder / name.replace("CELL", f"cells/{cell.name}"))
    began = time.process_time()
    is_clear(call("compare.py", folder, "--report-only"))
    assert time.process_time() - began < 10  # measured: 0.1 s


HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_html_in_a_comparison_is_text(compared: Path, tmp_path: Path):
    """In arms, title, question, reasons, commands and the environment."""
    folder = Path(shutil.copytree(compared, tmp_path / "compared"))
    grid = yaml.safe_load((folder / "grid.yaml").read_text())
    arm = "</title><b>post</b>"
    grid["arms"]["placement"][arm] = grid["arms"]["placement"].pop("post")
    grid["title"] = grid["contrasts"][0]["question"] = HTML
    grid["contrasts"][0]["of"], grid["pairs"] = ["pre", arm], [["pre", arm]]
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    for path in folder.glob("cells/pre*/environment.json"):
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(tree | {HTML: HTML, "device": HTML}))
    for path in folder.glob("cells/pre*/result.json"):
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(tree | {"reason": f"given up: {HTML}"}))
    lost = {cell.id: {"status": "killed", "reason": HTML} for cell in load(folder / "grid.yaml")[1]}
    (folder / "lost.json").write_text(json.dumps(lost))
    (folder / "command.json").write_text(json.dumps([{"argv": [HTML], "began": HTML}]))
    answer = call("compare.py", folder, "--report-only")
    assert answer.code == 0, answer
    html = (folder / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in html
    for raw in ("<script>alert", "<img", "<b>post", "</title><b>"):
        assert raw not in html


# In a prepared corpus ------------------------------------------------------------------------


@pytest.fixture
def prepared(runs: dict[str, Path], config: Config, tmp_path: Path) -> Path:
    """A copy of the corpus that the runs were trained on."""
    folder = find(config.data)
    assert folder is not None
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    return Path(shutil.copytree(folder, tmp_path / "cache" / folder.name))


def refused_corpus(prepared: Path, seal: bool = True) -> str:
    if seal:
        seal_again(prepared)
    config, cache = prepared.parents[1] / "c.yaml", prepared.parent
    error = refused("train.py", config, "--data.cache-dir", cache, "--dry-run", folder=cache)
    assert f"{prepared}: is damaged (" in error
    assert "delete the folder to prepare it again" in error
    return error


@pytest.mark.parametrize("change", [
    {"files": []}, {"files": {}}, {"files": 3}, {"others": {}}, {"others": []}, {"others": None},
    {"dtype": "object"}, {"dtype": "O"}, {"dtype": "int8"}, {"dtype": ["uint16"]}, {"dtype": None},
    {"others": {"tokenizer.json": {}, "counts.bin": {}}},
], ids=repr)  # fmt: skip
def test_a_corpus_of_wrong_types(change: dict[str, Any], prepared: Path):
    meta = json.loads((prepared / "meta.json").read_text())
    (prepared / "meta.json").write_text(json.dumps(meta | change))
    refused_corpus(prepared, seal=False)


@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:8])
def test_a_corpus_whose_description_is_junk(text: str, prepared: Path):
    (prepared / "meta.json").write_text(text)
    refused_corpus(prepared, seal=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", "train/../val", "x\0"])
def test_a_corpus_reads_no_file_outside(name: str, prepared: Path):
    shutil.copy(prepared / "train.bin", prepared.parent / "outside.bin")
    meta = json.loads((prepared / "meta.json").read_text())
    meta["files"][0]["name"] = name
    (prepared / "meta.json").write_text(json.dumps(meta))
    assert "meta.json describes different files" in refused_corpus(prepared)


@pytest.mark.parametrize("name", ["tokenizer.json", "counts.bin", "train.bin", "val.bin"])
@pytest.mark.parametrize("target", ["/dev/zero", "itself", "folder"])
def test_a_corpus_with_a_link_in_a_files_place(name: str, target: str, prepared: Path):
    path = prepared / name
    path.unlink()
    if target == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if target == "itself" else target)
    refused_corpus(prepared, seal=False)


@pytest.mark.parametrize("value", [0, -1, 1, 10**15, 10**400, None, "1"], ids=repr)
@pytest.mark.parametrize("key", ["documents", "tokens", "bytes", "longest", "size"])
def test_a_corpus_of_wrong_numbers(key: str, value: object, prepared: Path):
    meta = json.loads((prepared / "meta.json").read_text())
    meta["files"][-1][key] = value
    (prepared / "meta.json").write_text(json.dumps(meta))
    if (key, value) not in [("longest", 0), ("longest", 1)]:  # which is only shown
        refused_corpus(prepared, seal=False)


def test_a_corpus_of_tokens_outside_the_vocabulary(prepared: Path):
    with (prepared / "train.bin").open("r+b") as file:
        file.seek(10)
        file.write(b"\xff\xfe")
    assert "train.bin contains the id 65279, outside the vocabulary" in refused_corpus(prepared)


@pytest.mark.parametrize("counts", [b"", b"\xff", b"\0"])
def test_a_corpus_of_forged_counts(counts: bytes, prepared: Path):
    path = prepared / "counts.bin"
    path.write_bytes(counts * path.stat().st_size)
    assert "counts.bin" in refused_corpus(prepared)


@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize("name", ["meta.json", "counts.bin", "tokenizer.json", "train.bin"])
def test_what_is_not_a_file_in_a_corpus(name: str, kind: str, prepared: Path):
    put(kind, prepared / name)
    config, cache = prepared.parents[1] / "c.yaml", prepared.parent
    began = time.process_time()
    answer = call("train.py", config, "--data.cache-dir", cache, "--dry-run")
    if name == "meta.json" and kind != "sparse":
        assert is_clear(answer)  # as if it were not prepared
    else:
        assert not is_clear(answer)
        assert name in answer.err
    assert time.process_time() - began < 10


# In a run that was stopped, and is resumed ----------------------------------------------------


def resumed(config: Config, run: Path) -> str:
    """Resuming a damaged run must fail and leave it unchanged; returns stderr."""
    (run.parent / "c.yaml").write_text(config.to_yaml())
    return refused("train.py", run.parent / "c.yaml", "--out-dir", run, folder=run)


@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:8])
def test_a_file_that_is_not_a_result(text: str, config: Config, stopped: Path):
    (stopped / "result.json").write_text(text)
    assert f"{stopped / 'result.json'}: is damaged" in resumed(config, stopped)


@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:8])
def test_a_file_that_is_not_a_manifest(text: str, config: Config, stopped: Path):
    (newest(stopped) / "manifest.json").write_text(text)
    error = refused("sample.py", stopped, *SHORT, folder=stopped)
    assert f"{newest(stopped) / 'manifest.json'}: is damaged" in error
    assert "manifest.json" in resumed(config, stopped)


@pytest.mark.parametrize("prog", ["sample.py", "train.py"])
@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:8])
def test_a_state_of_the_wrong_types(text: str, prog: str, config: Config, stopped: Path):
    """A state of the wrong types with a manifest that matches it."""
    (newest(stopped) / "state.json").write_text(text)
    seal_again(stopped)
    if prog == "train.py":
        error = resumed(config, stopped)
    else:
        error = refused(prog, stopped, *SHORT, folder=stopped)
    assert newest(stopped).name in error


STATES = [
    {"format": None}, {"format": "3"}, {"step": "x"}, {"step": -1}, {"step": 10**30},
    {"progress": None}, {"progress": {"a": 1}}, {"progress": {"step": "x"}}, {"micro_batch": 0},
    {"micro_batch": "x"}, {"scaler": 3}, {"data_fingerprint": 3},
]  # fmt: skip


@pytest.mark.parametrize("change", STATES, ids=repr)
def test_a_state_with_a_wrong_value(change: dict[str, Any], config: Config, stopped: Path):
    path = newest(stopped) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    seal_again(stopped)
    if change == {"scaler": 3}:  # only fp16 reads it
        assert call("train.py", stopped / "config.yaml", "--out-dir", stopped).code in (0, 2)
    else:
        resumed(config, stopped)


@pytest.mark.parametrize("key", ["format", "step", "progress", "micro_batch", "data_fingerprint"])
def test_a_state_without_a_part(key: str, config: Config, stopped: Path):
    path = newest(stopped) / "state.json"
    tree = json.loads(path.read_text())
    del tree[key]
    path.write_text(json.dumps(tree))
    seal_again(stopped)
    assert newest(stopped).name in resumed(config, stopped)


@pytest.mark.parametrize("other", ["model", "optimizer"])
@pytest.mark.parametrize("what", ["other shapes", "other names", "none"])
def test_tensors_of_another_model(what: str, other: str, config: Config, stopped: Path):
    """Intact safetensors files of another model, with a matching manifest, when resuming."""
    path = newest(stopped) / f"{other}.safetensors"
    tensors = load_file(path)
    if what == "other shapes":
        tensors = {key: value.flatten().repeat(2) for key, value in tensors.items()}
    elif what == "other names":
        tensors = {f"x{key}": value for key, value in tensors.items()}
    else:
        tensors = {}
    save_file(tensors, path)
    seal_again(stopped)
    resumed(config, stopped)


METRICS = ["[", '{"a": 1}', "null", '{"step": "x"}', '{"step": 1, "loss": "x"}', "[" * DEEP]


@pytest.mark.parametrize("line", METRICS, ids=lambda line: line[:30])
def test_a_file_that_is_not_metrics(line: str, config: Config, stopped: Path):
    path = stopped / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    assert f"{path}: " in resumed(config, stopped)
    assert f"{path}: " in refused("diagnose", stopped, folder=stopped)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples", "checkpoints", "result.json"])
@pytest.mark.parametrize("thing", ["folder", "file", "link to itself"])
def test_another_thing_in_its_place(name: str, thing: str, config: Config, stopped: Path):
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
    (stopped.parent / "c.yaml").write_text(config.to_yaml())
    before = contents(stopped)
    answer = call("train.py", stopped.parent / "c.yaml", "--out-dir", stopped)
    assert is_clear(answer) or contents(stopped) == before


def test_a_checkpoint_that_is_a_link(config: Config, stopped: Path):
    """A run resumes from a checkpoint elsewhere, and deletes nothing there."""
    step = newest(stopped)
    elsewhere = step.rename(stopped.parent / "elsewhere")
    step.symlink_to(elsewhere)
    kept = contents(elsewhere)
    changed = config.model_copy(update={"checkpoint": config.checkpoint.model_copy()})
    (stopped.parent / "c.yaml").write_text(changed.to_yaml())
    is_clear(call("train.py", stopped.parent / "c.yaml", "--out-dir", stopped))
    assert contents(elsewhere) == kept


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_an_endless_file(name: str, stopped: Path):
    """A link to /dev/zero in a checkpoint, in a process whose memory is limited."""
    path = newest(stopped) / name
    path.unlink()
    path.symlink_to("/dev/zero")
    command = f"ulimit -v 8000000; exec {sys.executable} {ROOT}/sample.py {stopped} --prompt a"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=15)
    assert done.returncode == 2, done.stderr[-500:]
    assert name in done.stderr


# Odd names -----------------------------------------------------------------------------------

ODD_NAMES = [
    *("..", "-", "_", "$1", "$x_$", r"\frac{a}", "%s", "{}", "{{ 1 }}", "=1+1", "@x", "+b"),
    *("-a", "-1", "<script>", "</svg>", "a|b", "`a`", "[x](javascript:y)", "**a**", "1. a"),
    *("# a", "a&amp;b", "日本", "👍", "e\u0301", "שלום", "a\u00a0b", "'a\"", "x" * 40, "|" * 40),
]


def test_every_name_that_is_accepted_has_a_report(
    compared: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(reports, "draw", figures.draw)  # which `quick` leaves out
    folder = Path(shutil.copytree(compared, tmp_path / "$x$ \u202e\n%s"))
    grid = yaml.safe_load((folder / "grid.yaml").read_text())
    grid["arms"] = {"f": {name: {"model.norm.placement": "pre"} for name in ODD_NAMES}}
    grid["grid"] = {"optimizer.learning_rate": [0.01]}
    grid["title"] = grid["contrasts"][0]["question"] = " ".join(ODD_NAMES[:20])
    grid["contrasts"][0]["of"] = ODD_NAMES[:2]
    grid["pairs"] = list(map(list, itertools.pairwise(ODD_NAMES)))
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    (run,) = folder.glob("cells/pre_learning-rate-0.01_*")
    for cell in load(folder / "grid.yaml")[1]:
        shutil.copytree(run, folder / "cells" / cell.id)
        (folder / "cells" / cell.id / "config.yaml").write_text(cell.config.to_yaml())
    starts = json.loads((folder / "probes.json").read_text())
    (folder / "probes.json").write_text(json.dumps([s | {"arms": ODD_NAMES} for s in starts]))

    with rendering():
        answer = call("compare.py", folder, "--report-only")
    assert answer.code == 0, answer
    assert printable(answer.out, "\n\t") == answer.out
    assert not [str(w.message) for w in recwarn if "font" in str(w.message)]
    page = html.unescape((folder / "report.html").read_text("utf-8"))
    svg = "".join(html.unescape(path.read_text("utf-8")) for path in folder.glob("figures/*.svg"))
    for name in ODD_NAMES:
        assert f"<tr><td>{name}</td>" in re.sub(' class="arm-[0-9]+"', "", page), name
        assert f">{name}</text>" in svg, name
    with (folder / "cells.csv").open(encoding="utf-8", newline="") as file:
        arms = [row["arm"] for row in csv.DictReader(file)]
    formulas = {"-", "=1+1", "@x", "+b", "-a"}
    assert arms == [f"'{name}" if name in formulas else name for name in ODD_NAMES]
    text = (folder / "report.md").read_text("utf-8")
    assert not re.search(r"<script|[^\\]\]\(javascript|[^\\]`a|[^\\]\*a", text)
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {8, 7, 6}


def test_escapes_in_forged_files_do_not_reach_the_terminal(compared: Path, tmp_path: Path):
    folder = Path(shutil.copytree(compared, tmp_path / "a\x1b[2J\u202eb"))
    for path in folder.glob("cells/pre*/result.json"):
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(tree | {"reason": "given up: \x1b[31m\uffff"}))
    command = {"argv": ["x\ny", "\x1b"], "began": "\uffff"}
    (folder / "command.json").write_text(json.dumps([command]))
    for prog, where in (
        ("compare.py", folder),
        ("sample.py", folder),
        ("diagnose", next(folder.glob("cells/pre*0.01*"))),
    ):
        answer = call(prog, where, *(["--report-only"] if prog == "compare.py" else []))
        assert answer.code == (2 if prog == "sample.py" else 0), answer
        assert printable(answer.out + answer.err, "\n\t") == answer.out + answer.err
    for name in ("report.html", "report.md", "cells.csv"):
        text = (folder / name).read_text("utf-8")
        assert printable(text, "\n\t") == text

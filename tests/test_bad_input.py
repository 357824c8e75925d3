"""Junk for flags, in configs and in grids. What a clear error is: see `bad_input.py`."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from bad_input import (
    DEEP,
    ODD_TEXT,
    ODD_YAML,
    PICKLE,
    any_yaml,
    corrupted_yaml,
    must_be_clear,
    refused,
    tries,
)
from hypothesis import given
from hypothesis import strategies as st

from gpt.cli.flags import as_flag
from gpt.cli.sample import Arguments as SampleArguments
from gpt.compare.grid import load
from gpt.config import Config, option_paths

# -- By the thousand ---------------------------------------------------------------------------


@tries(0.15)
@given(data=st.data())
def test_train_with_junk_in_its_yaml(smallest: Config, data: st.DataObject):
    tree = smallest.model_dump(mode="json") | {"base": "base.yaml"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base.yaml").write_text("model: {layers: 2}\n")
        raw = data.draw(corrupted_yaml(tree) | corrupted_yaml(tree) | any_yaml)
        (folder / "c.yaml").write_bytes(raw)
        if data.draw(st.integers(0, 4)) == 0:
            (folder / "base.yaml").write_bytes(data.draw(any_yaml))
        must_be_clear("train.py", folder / "c.yaml", "--print-config", folder=folder)


@tries(0.1)
@given(data=st.data())
def test_compare_with_junk_in_its_grid(smallest: Config, data: st.DataObject):
    base = smallest.model_dump(mode="json")
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
        (folder / "g.yaml").write_bytes(
            data.draw(corrupted_yaml(grid) | corrupted_yaml(grid) | any_yaml)
        )
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
    smallest: Config, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.getbasetemp() / "flags"
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(smallest.to_yaml())
    flags = data.draw(odd_flags("train.py", option_paths(Config)))
    first = data.draw(st.sampled_from([[str(folder / "c.yaml")]] * 6 + [[], [str(folder)]]))
    must_be_clear("train.py", "--print-config", *first, *flags, folder=folder)


@tries(0.35)
@given(data=st.data())
def test_sample_with_junk_for_flags(
    smallest_runs: dict[str, Path], data: st.DataObject, monkeypatch: pytest.MonkeyPatch
):
    from gpt import generation

    few = lambda *args, **options: (row for row in ())  # noqa: E731 - no text of 10^9 tokens
    monkeypatch.setattr(generation, "generate_tokens", few)
    flags = data.draw(odd_flags("sample.py", option_paths(SampleArguments)))
    first = data.draw(
        st.sampled_from([[smallest_runs["finished"]]] * 6 + [[], ["nowhere"], ["/dev/null"]])
    )
    must_be_clear("sample.py", *first, *flags, folder=smallest_runs["finished"])


@tries(0.05)
@given(data=st.data())
def test_compare_with_junk_for_flags(smallest_comparison: Path, data: st.DataObject):
    flags = data.draw(odd_flags("compare.py", option_paths(Config)))
    grid = smallest_comparison / "grid.yaml"
    first = data.draw(
        st.sampled_from([[grid]] * 6 + [[smallest_comparison]] * 2 + [[], ["nowhere"]])
    )
    rest = [*first, *flags]
    if not any(str(word).startswith("--out-dir") for word in rest):  # none has a result there
        rest += ["--out-dir", smallest_comparison.parent / "nowhere"]
    must_be_clear("compare.py", "--report-only", *rest, folder=smallest_comparison)


# -- One by one --------------------------------------------------------------------------------


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
    assert f"{flag}: " in error
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
        ({"seeds": True}, "seeds: true is neither a list of seeds nor their number, between 1 and"),
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

"""Bad input by the thousand: every command works or ends in a clear error.

A clear error is exit code 2 and one to three lines on stderr that begin with the command's name and
name a key, a flag or a file, and no byte on disk has changed. It is never a traceback.

The ordinary run makes a few hundred examples, always the same ones. STEADYGPT_EXAMPLES sets how
many; `.ci/run` makes a thousand. The tests are in `test_bad_*.py`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from gpt import checkpoint as checkpoints
from gpt import cli
from gpt.cli.sample import Arguments as SampleArguments
from gpt.compare.grid import Grid
from gpt.config import Config, SourceConfig, option_paths
from gpt.errors import InputError, format_error, printable
from gpt.io.files import size_and_hash

EXAMPLES = int(os.environ.get("STEADYGPT_EXAMPLES", "200"))


def tries(share: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a test this fraction of all examples."""
    made = settings(
        max_examples=max(1, round(EXAMPLES * share)),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # failing examples are small, and shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.fuzz(made(test))


# -- Commands in this process ------------------------------------------------------------------


SUCCESS = {"train.py": {0, 3, 75}, "sample.py": {0}, "compare.py": {0}, "diagnose": {0}}
KEYS = {
    "RUN_DIR",
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
    encoded = answer.err.encode()  # fails on what no terminal can show: lone surrogates
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


# -- Junk --------------------------------------------------------------------------------------


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
    """Each place in a tree: the mapping or list that contains it, and its key or index."""
    if isinstance(tree, dict | list):
        for key, below in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, key
            yield from places(below)


@st.composite
def corrupted_yaml(draw: st.DrawFn, tree: dict[str, Any]) -> bytes:
    """A YAML file in which one to three places are replaced by junk."""
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
        misspelled = f"{key}s" if draw(st.booleans()) else str(key)[1:]
        marks[mark] = draw(odd_yaml | st.just(misspelled) if how != "value" else odd_yaml)
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=draw(st.booleans()), width=9999)
    for mark, junk in marks.items():
        text = text.replace(mark, junk)
    if draw(st.integers(0, 9)) == 0:  # a duplicate of the first key, in block style
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


# -- Damage ------------------------------------------------------------------------------------


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
    """JSON or JSON Lines with one value replaced or removed; anything else, with a new middle."""
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
            tree["files"] = {name: size_and_hash(path.parent / name) for name in tree["files"]}
            path.write_text(checkpoints.manifest_text(tree))
    for path in folder.rglob("meta.json"):
        with contextlib.suppress(Exception):
            tree = json.loads(path.read_bytes())
            tree["others"] = {name: size_and_hash(path.parent / name) for name in tree["others"]}
            for file in tree["files"]:
                file |= size_and_hash(path.parent / f"{file['name']}.bin")
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
def corrupted_copy(draw: st.DrawFn, original: Path) -> Iterator[Path]:
    """A damaged copy of a directory; a file outside, which links may point to, must not change."""
    with tempfile.TemporaryDirectory() as name:
        folder, outside = Path(name) / original.name, Path(name) / "outside"
        outside.write_bytes(b'{"step": 1}\n')
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.svg", "*.lock"))
        damage(draw, folder, outside)
        yield folder
        assert outside.read_bytes() == b'{"step": 1}\n'


# -- Corrupted runs -------------------------------------------------------------------------------


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


SHORT = ("--prompt", "a", "--max-new-tokens", "2", "--checkpoint", "latest")


def resumed(config: Config, run: Path) -> str:
    """Resuming a damaged run must fail and leave it unchanged; returns stderr."""
    (run.parent / "c.yaml").write_text(config.to_yaml())
    return refused("train.py", run.parent / "c.yaml", "--out-dir", run, folder=run)


def put(kind: str, path: Path) -> None:
    """Replace a file with something that is not a file, is endless, or is ten gigabytes long."""
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

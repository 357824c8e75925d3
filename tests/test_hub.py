"""Sources and vocabularies from the network, tested with local servers.

The libraries read their server's address on import, so each case runs in its own process.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from gpt.config import DataConfig, SourceConfig
from gpt.data import preparation, tokenizer
from gpt.data.sources import SOURCES
from gpt.data.sources import hub as hub_source
from gpt.data.tokenizer import GPT2_FILES, GPT2_URL
from gpt.errors import UnreachableError

COMMIT = "a" * 40
TRAIN = "".join(json.dumps({"text": f"row {n} of the hub"}) + "\n" for n in range(300)).encode()
TEST = b'{"text": "held out"}\n'
README = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl.gz}
  - {split: test, path: test.jsonl}
---
"""
FILES = {"README.md": README, "train.jsonl.gz": gzip.compress(TRAIN), "test.jsonl": TEST}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that `datasets` requests: one dataset, me/data, at one commit."""

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        api = "/api/datasets/me/data"
        if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            files = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "me/data", "sha": COMMIT, "siblings": files}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
                for name, content in FILES.items()
            ]
            self.answer(json.dumps(files).encode())
        elif path.startswith(f"{api}/revision/"):
            self.answer(b"", 404, "RevisionNotFound")
        elif path.rpartition("/")[2] in FILES and COMMIT in path:
            self.answer(FILES[path.rpartition("/")[2]])
        else:
            self.answer(b"", 404, "EntryNotFound" if "me/data" in path else "RepoNotFound")

    do_HEAD = do_GET

    def answer(self, content: bytes, code: int = 200, error: str = "") -> None:
        ranged, total = self.headers.get("Range"), len(content)
        if ranged and code == 200:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last or total - 1) + 1]
            code = 206
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last or total - 1}/{total}")
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts connections but never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Prepare:
    """Runs `python -m gpt.data` with separate caches."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        (folder / "tiktoken").mkdir()
        (folder / "c.yaml").write_text("data: {tokenizer: bytes, val_fraction: 0.2}\n")
        self.environment = {
            **environment,
            "HF_HOME": str(folder / "hf"),
            "TIKTOKEN_CACHE_DIR": str(folder / "tiktoken"),
        }

    def __call__(self, *arguments: str, **variables: str) -> tuple[int, str, str, float]:
        """Exit code, stdout, stderr and seconds."""
        command = [sys.executable, "-m", "gpt.data", self.folder / "c.yaml", *arguments]
        command += ["--data.cache-dir", self.folder / "cache"]
        began = time.monotonic()
        done = subprocess.run(
            command, env={**self.environment, **variables}, cwd=ROOT, timeout=100,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr, time.monotonic() - began

    def left(self) -> list[str]:
        folder = self.folder / "cache"
        return [path.name for path in folder.iterdir()] if folder.exists() else []


@pytest.fixture
def prepare(tmp_path: Path, environment: dict[str, str]) -> Prepare:
    return Prepare(tmp_path, environment)


DATASET = ("--data.source", "hub", "--data.hub.name", "me/data")


def test_a_dataset_is_streamed_and_then_needs_no_network(prepare: Prepare, hub: str):
    code, streamed, err, _ = prepare(*DATASET, HF_ENDPOINT=hub)
    assert code == 0, err
    table = [line.split() for line in streamed.splitlines()]
    documents = sum(int(row[1]) for row in table if row[0] in ("train", "val"))
    assert documents == 300
    (folder,) = (prepare.folder / "cache").iterdir()
    assert json.loads((folder / "meta.json").read_text())["revisions"] == [COMMIT]
    again = prepare(*DATASET, HF_ENDPOINT="http://127.0.0.1:9")  # prepared: nothing is asked
    assert again[:2] == (0, streamed)


@pytest.mark.slow
def test_a_dataset_is_downloaded_and_then_needs_no_network(prepare: Prepare, hub: str):
    code, streamed, err, _ = prepare(*DATASET, HF_ENDPOINT=hub)
    assert code == 0, err
    download = (*DATASET, "--data.hub.streaming", "false")
    validation = ("--data.validation", "{hub: {split: test}}")
    code, out, err, _ = prepare(*download, *validation, HF_ENDPOINT=hub)
    assert code == 0, err
    assert " 300 " in out
    assert " 8 " in out  # bytes of "held out"
    code, out, err, _ = prepare(*download, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert code == 0, err
    assert streamed.splitlines()[1:] == out.splitlines()[1:]


LACKING = {
    ("--data.hub.name", "me/nothing"): "'me/nothing' is neither a local folder nor a dataset",
    ("--data.hub.name", "no folder/a/b"): "is neither a local folder nor a dataset",
    ("--data.hub.revision", "v9"): "me/data has no 'v9'",
    ("--data.hub.split", "dev"): "dev",
    ("--data.hub.config", "de"): "default",
    ("--data.text-field", "body"): "me/data: row 1: has no field 'body'",
}
IN_TURN = """
import contextlib, io, json, sys, time
from gpt import cli

answers = []
for arguments in json.loads(sys.argv[1]):
    began, out, err = time.monotonic(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.run("prepare", arguments)
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), err.getvalue(), time.monotonic() - began])
print(json.dumps(answers))
"""


def test_errors_name_what_the_hub_does_not_have(prepare: Prepare, hub: str):
    """One after the other in one process, which imports the library once."""
    calls = []
    for arguments in LACKING:
        base = DATASET[: 2 if "--data.hub.name" in arguments else 4]
        cache = ("--data.cache-dir", f"{prepare.folder}/cache")
        calls.append([f"{prepare.folder}/c.yaml", *base, *arguments, *cache])
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(calls)],
        env={**prepare.environment, "HF_ENDPOINT": hub},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for answer, message in zip(json.loads(done.stdout), LACKING.values(), strict=True):
        code, out, err, seconds = answer
        assert (code, out) == (2, "")
        assert message in err
        assert len([line for line in err.splitlines() if "preparing" not in line]) <= 3
        assert seconds < 20
    assert prepare.left() == []


SERVERS = [pytest.param("silent", marks=pytest.mark.slow), "refusing"]  # the first one takes 10 s


@pytest.mark.parametrize("server", SERVERS)
def test_an_unreachable_hub_is_noticed_soon(prepare: Prepare, silent: str, server: str):
    address = silent if server == "silent" else "http://127.0.0.1:9"
    code, _, err, seconds = prepare(*DATASET, HF_ENDPOINT=address)
    assert code == 2
    lines = [line for line in err.splitlines() if "preparing" not in line]
    assert len(lines) <= 3
    assert f"me/data cannot be read from {address}" in lines[0]
    for way in ("data.source: parquet", "HF_HUB_OFFLINE=1", "data.source: text", "bpe"):
        assert way in err
    assert seconds < 10 + 5  # of which up to 5 are for Python and the library to start
    assert prepare.left() == []


def test_the_size_of_a_vocabulary_is_not_sought_on_an_unreachable_hub(
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(config: SourceConfig) -> str:
        raise UnreachableError("no answer")

    monkeypatch.setattr(preparation, "resolve_commit", refuse)
    config = DataConfig(source="hub", hub={"name": "me/data"}, tokenizer="chars")
    with pytest.raises(UnreachableError, match="no answer"):  # and no retries of the library
        preparation.vocab_size(config)


@pytest.mark.slow
def test_an_unreachable_hub_is_noticed_soon_when_continuing(
    prepare: Prepare, hub: str, silent: str
):
    assert prepare(*DATASET, HF_ENDPOINT=hub)[0] == 0
    (folder,) = (prepare.folder / "cache").iterdir()
    building = folder.rename(folder.with_name(f".{folder.name}.building"))
    (building / "meta.json").unlink()
    (building / "revisions.json").write_text(json.dumps([COMMIT]))
    (building / "progress.json").write_text('{"items": 3, "train": 0, "val": 0}')
    code, _, err, seconds = prepare(*DATASET, HF_ENDPOINT=silent)
    assert code == 2
    assert "cannot be read from" in err
    assert seconds < 10 + 5
    assert prepare.left() == [building.name]
    code, _, err, _ = prepare(*DATASET, HF_ENDPOINT=hub)
    assert code == 0
    assert "resuming an interrupted preparation" in err


@pytest.mark.parametrize("silent_in", ["load_dataset", "a row"])
def test_a_hub_that_stops_responding_is_noticed(silent_in: str, monkeypatch: pytest.MonkeyPatch):
    never = threading.Event()

    class Rows:
        def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
            yield {"text": ["one", "two"]}
            never.wait()

    def load_dataset(*arguments: object, **options: object) -> Rows:
        if silent_in == "load_dataset":
            never.wait()
        return Rows()

    monkeypatch.setattr(hub_source, "ROW_TIMEOUT", 0.2)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    config = SourceConfig.model_validate({"source": "hub", "hub": {"name": "me/data"}})
    found: list[str] = []

    def read() -> None:
        for document in SOURCES["hub"].documents(config, [], lambda count: None, 0):
            found.extend(map(str, document.pieces))

    with pytest.raises(UnreachableError) as caught:
        read()
    never.set()
    assert found == ([] if silent_in == "load_dataset" else ["one", "two"])
    assert ("beyond row 2" in str(caught.value)) == bool(found)


def test_a_local_folder_is_a_dataset_too(prepare: Prepare):
    folder = prepare.folder / "mine"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    arguments = ("--data.source", "hub", "--data.hub.name", str(folder))
    code, out, err, _ = prepare(*arguments, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0, err
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(TRAIN + TEST * 4))
    changed = prepare(*arguments, HF_ENDPOINT="http://127.0.0.1:9")[1]
    assert out != changed


# -- GPT-2's vocabulary ------------------------------------------------------------------------

GPT2 = ("--data.tokenizer", "gpt2")


@pytest.mark.parametrize("server", SERVERS)
def test_a_missing_vocabulary_is_noticed_soon(prepare: Prepare, silent: str, server: str):
    proxy = silent if server == "silent" else "http://127.0.0.1:9"
    code, _, err, seconds = prepare(*GPT2, HTTPS_PROXY=proxy, https_proxy=proxy)
    assert code == 2
    lines = [line for line in err.splitlines() if "preparing" not in line]
    assert len(lines) <= 3
    assert str(prepare.folder / "tiktoken") in lines[0]
    assert GPT2_URL in lines[0]
    for name, digest in GPT2_FILES.items():
        assert f"{name} as {tokenizer.gpt2_file(name).name} (SHA-256 {digest})" in lines[1]
    assert "data.tokenizer: bpe" in lines[2]
    assert "data.source: stdlib" in lines[2]
    assert seconds < 10 + 5
    assert prepare.left() == []


def test_a_wrong_vocabulary_file_is_reported_and_kept(prepare: Prepare):
    path = prepare.folder / "tiktoken" / tokenizer.gpt2_file("vocab.bpe").name
    path.write_text("something else")
    code, _, err, _ = prepare(*GPT2, HTTPS_PROXY="http://127.0.0.1:9")
    assert code == 2
    assert f"{path}: is not GPT-2's vocab.bpe" in err
    assert GPT2_FILES["vocab.bpe"] in err
    assert path.read_text() == "something else"


def test_file_names_in_the_cache_are_those_of_tiktoken():
    names = {tokenizer.gpt2_file(name).name for name in GPT2_FILES}
    assert names == {
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    }

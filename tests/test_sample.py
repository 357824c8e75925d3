"""`sample.py` as a user meets it: prompts, options, checkpoints, wrong input."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from test_cli import called, script

from gpt.cli.sample import load as load_prompt
from gpt.config import Config
from gpt.errors import InputError

Make = Callable[..., Config]


def test_the_prompt_comes_from_a_flag_a_file_or_a_pipe(
    tiny_run: Path,
    tmp_path: Path,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "prompt.txt").write_text("The lazy")
    common = ["--max-new-tokens", 12, "--seed", 4]
    flag = called(capsys, "sample", tiny_run, "--prompt", "The lazy", *common)
    file = called(capsys, "sample", tiny_run, "--prompt-file", tmp_path / "prompt.txt", *common)
    pipe = script(
        "sample", tiny_run, *common, environment=environment, input="The lazy", stdin=None
    )
    assert flag[0] == file[0] == pipe.returncode == 0
    assert flag[1] == file[1] == pipe.stdout
    assert flag[1].startswith("The lazy")


def test_a_pipe_without_text_is_refused(tiny_run: Path, environment: dict[str, str]):
    command = [sys.executable, str(ROOT / "sample.py"), str(tiny_run)]
    done = subprocess.run(command, input=b"a\xff", capture_output=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert b"stdin: is not UTF-8 text: byte 1 is 0xff" in done.stderr
    assert done.stdout == b""


def prompt_of(*arguments: object) -> str:
    return load_prompt(["run", *map(str, arguments)])[1]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_prompt_is_read_as_training_text_is(tmp_path: Path, pack: Callable[[bytes], bytes]):
    path = tmp_path / "prompt.txt"
    path.write_bytes(pack(b"\xef\xbb\xbfThe lazy"))
    assert prompt_of("--prompt-file", path) == "The lazy"
    assert prompt_of("--prompt", "\ufeffThe lazy") == "The lazy"
    path.write_bytes(pack("The lazy".encode("utf-16")))
    with pytest.raises(InputError, match=r"--prompt-file .*: is UTF-16 text, not UTF-8 text"):
        prompt_of("--prompt-file", path)
    path.write_bytes(pack(b"PAR1\0"))
    with pytest.raises(InputError, match=r"is a Parquet file, not UTF-8 text$"):
        prompt_of("--prompt-file", path)


def test_a_prompt_file_that_is_a_named_pipe_is_refused_and_one_of_the_shell_is_read(
    tmp_path: Path,
):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a named pipe"):
        prompt_of("--prompt-file", tmp_path / "pipe")
    read, write = os.pipe()
    os.write(write, b"The lazy")
    os.close(write)
    assert prompt_of("--prompt-file", f"/dev/fd/{read}") == "The lazy"
    os.close(read)


def test_text_is_shown_as_it_is_made(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    code, _, _ = called(capsys, "sample", tiny_run, "--prompt", "abc", "--max-new-tokens", "5")
    assert code == 0
    assert written[0] == "abc"
    assert len(written) > 5


def test_weights_of_fewer_bits_write_text_too(capsys: pytest.CaptureFixture[str], tiny_run: Path):
    arguments = ["--num-samples", 2, "--max-new-tokens", 40, "--prompt", "a", "--temperature", 0]
    for weights in ("bf16", "int8"):
        code, out, err = called(capsys, "sample", tiny_run, *arguments, "--weights", weights)
        assert code == 0, err
        assert out.startswith("a")
        assert len(out) > 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--weights", "int4"],
            "found 'int4'; perhaps you meant int8",
        ),
        (
            ["--device", "cpu", "--compile"],
            "--compile: needs a CUDA GPU, and the device is cpu",
        ),
    ],
)
def test_what_sampling_cannot_do_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_run: Path, flags: list[str], message: str
):
    code, out, err = called(capsys, "sample", tiny_run, "--prompt", "a", *flags)
    assert (code, out) == (2, "")
    assert message in err


def test_several_samples_and_the_sliding_window(capsys: pytest.CaptureFixture[str], tiny_run: Path):
    arguments = ["--num-samples", 3, "--max-new-tokens", 40, "--prompt", "a", "--temperature", 1.5]
    code, out, err = called(capsys, "sample", tiny_run, *arguments)
    assert code == 0
    assert out.count("-" * 60) == 2
    assert "the text exceeds the context of 16 tokens" in err
    code, single, _ = called(capsys, "sample", tiny_run, *arguments[2:])
    assert out.startswith(single.rstrip("\n"))


def test_greedy_sampling_ignores_the_seed(capsys: pytest.CaptureFixture[str], tiny_run: Path):
    texts = {
        called(capsys, "sample", tiny_run, "--temperature", 0, "--seed", seed, "--prompt", "T")[1]
        for seed in (1, 2)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("checkpoint", ["best", "latest", "10"])
def test_a_checkpoint_can_be_chosen(
    capsys: pytest.CaptureFixture[str], tiny_run: Path, checkpoint: str
):
    code, _, err = called(capsys, "sample", tiny_run, "--checkpoint", checkpoint, "--prompt", "T")
    assert code == 0
    assert ("step 10" if checkpoint == "10" else "step 20") in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "11"], "has best, latest, 10, 20"),
        (["--temperature", "-1"], "--temperature: '-1' is not between 0 and 1000"),
        (["--top-p", "0"], "--top-p: '0' is not between 1e-06 and 1"),
        (["--top-k", "0"], "--top-k: '0' is not between 1 and 1,000,000,000"),
        (["--topk", "5"], "perhaps you meant --top-k"),
        (["--prompt", "a", "--prompt-file", "b"], "not both"),
        (["--prompt-file", ""], "--prompt-file: '' is empty, and must name a file or folder"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: No such file"),
        (["--device", "tpu"], "--device: must be auto, cpu, cuda or mps"),
    ],
)
def test_wrong_sampling_input(
    capsys: pytest.CaptureFixture[str], tiny_run: Path, arguments: list[str], message: str
):
    code, out, err = called(capsys, "sample", tiny_run, *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) <= 3
    assert out == ""


@pytest.mark.parametrize("damage", ["no run", "no checkpoint", "weights", "tokenizer", "config"])
def test_a_damaged_run_is_named(
    capsys: pytest.CaptureFixture[str], tiny_run: Path, tmp_path: Path, damage: str
):
    copy = tmp_path / "copy"
    if damage != "no run":
        shutil.copytree(tiny_run, copy)
    weights = copy / "checkpoints/step-00000020/model.safetensors"
    if damage == "no checkpoint":
        shutil.rmtree(copy / "checkpoints")
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "tokenizer":
        (weights.parent / "tokenizer.json").write_text("{}")
    elif damage == "config":
        text = (copy / "config.yaml").read_text()
        (copy / "config.yaml").write_text(text.replace("width: 16", "width: 32"))
    code, _, err = called(capsys, "sample", copy, "--prompt", "T")
    assert code == 2
    assert str(copy) in err
    assert len(err.splitlines()) <= 3

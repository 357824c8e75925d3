"""The commands as a user meets them: arguments, output, exit codes."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT

from gpt import cli
from gpt.cli import common
from gpt.cli.sample import load as load_prompt
from gpt.config import Config
from gpt.data.preparation import prepare
from gpt.errors import InputError
from gpt.trainer import Trainer
from gpt.training import train

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def config_file(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(tiny().to_yaml())
    return path


@pytest.fixture(scope="module")
def run_dir(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("run") / "tiny"
    train(tiny(), path, quiet=True)
    return path


def script(
    name: str, *arguments: object, environment: dict[str, str], **options: Any
) -> subprocess.CompletedProcess[str]:
    options.setdefault("stdin", subprocess.DEVNULL)
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, **options
    )


def called(
    capsys: pytest.CaptureFixture[str], name: str, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that runs in this process."""
    try:
        code = cli.run(name, list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


# -- train -------------------------------------------------------------------------------------


def test_train_then_sample_as_a_user_does(
    config_file: Path,
    tmp_path: Path,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    done = script("train", config_file, "--out-dir", out, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "finished: completed all 20 steps" in done.stdout
    assert "nats per token" in done.stdout
    assert "bits per byte" in done.stdout
    assert str(out / "loss.png") in done.stdout
    assert "sample.py" in done.stdout
    for word in ("device", "parameters", "without embeddings", "tokens per step", "directory"):
        assert word in done.stderr
    assert "step 20/20  loss" in done.stderr

    code, again, _ = called(capsys, "train", config_file, "--out_dir", out)
    assert code == 0
    assert again == done.stdout

    text = script("sample", out, "--prompt", "The quick", environment=environment)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("The quick")
    assert "step 20" in text.stderr


def test_help_comes_without_torch(environment: dict[str, str]):
    code = (
        "import sys; from gpt import cli\n"
        "for name in cli.COMMANDS:\n"
        "    try: cli.run(name, ['--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == done.stdout.count("--help") == len(cli.COMMANDS)


def test_training_starts_without_what_only_its_end_needs(environment: dict[str, str]):
    code = "import sys, gpt.training; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize("dry", [[], ["--dry-run"], ["--print-config"]])
def test_a_combination_that_makes_no_sense_is_refused_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch, dry: list[str]
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.norm.placement", "rezero", "--model.norm.type", "rms", *dry]
    code, out, err = called(capsys, "train", str(ROOT / "configs/pre-norm.yaml"), *flags)
    assert (code, out) == (2, "")
    message = "rms conflicts with placement rezero, which has no norms; leave it at its default"
    assert err == f"train.py: --model.norm.type: {message}\n"
    assert not list(tmp_path.glob("~*"))


def test_help_names_every_option_and_its_values(capsys: pytest.CaptureFixture[str]):
    code, out, _ = called(capsys, "train", "--help")
    assert code == 0
    for flag in ("--model.norm.placement", "--out-dir", "--optimizer.learning-rate"):
        assert flag in out
    assert "--model.norm.placement {pre,post,peri," in out


def test_print_config_prints_yaml_to_stdout_alone(
    capsys: pytest.CaptureFixture[str], config_file: Path
):
    code, out, err = called(
        capsys, "train", config_file, "--print-config", "--model.width", "1e2",
        "--optimizer.clip", "null", "--model.norm.placement=post", "--training.batch_sequences=6",
    )  # fmt: skip
    tree = yaml.safe_load(out)
    assert (code, err) == (0, "")
    assert tree["model"]["width"] == 100
    assert tree["optimizer"]["clip"] is None
    assert tree["model"]["norm"]["placement"] == "post"
    assert tree["training"]["batch_sequences"] == 6


def test_several_paths(capsys: pytest.CaptureFixture[str], config_file: Path):
    code, out, _ = called(
        capsys, "train", config_file, "--print-config", "--data.path", "a.txt", "b.txt"
    )
    assert code == 0
    assert yaml.safe_load(out)["data"]["path"] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("name", ["train", "sample"])
def test_ctrl_c_before_there_is_anything_to_save(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"gpt.cli.{name}.parse", interrupt)
    assert called(capsys, name, "x")[0] == 130


def test_dry_run_of_a_longer_run_describes_how_its_learning_rate_changes(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = ("train", config_file, "--out-dir", tmp_path / "run")
    assert called(capsys, *run)[0] == 0
    code, out, _ = called(capsys, *run, "--training.steps", 40, "--dry-run")
    assert code == 0
    assert out.startswith("changed: training.steps: 20 -> 40\nthe cosine schedule now spans 40")


def test_dry_run_writes_nothing(
    capsys: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path
):
    cache = tmp_path / "cache"
    code, out, _ = called(
        capsys, "train", config_file, "--dry-run", "--out-dir", tmp_path / "run",
        "--data.cache-dir", cache,
    )  # fmt: skip
    assert code == 0
    assert "not prepared yet" in out
    assert "parameters" in out
    assert not (tmp_path / "run").exists()
    assert not cache.exists()
    assert not list(tmp_path.glob("~*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.widht", "3"], "--model.widht: no such option; perhaps you meant --model.width"),
        (["--learning-rate", "3"], "perhaps you meant --optimizer.learning-rate"),
        (["--model.width", "wide"], "--model.width: must be a valid integer, found 'wide'"),
        (["--model.width"], "--model.width: needs a value; one that begins with two dashes"),
        (["--dry-run=yes"], "--dry-run: takes no value"),
        (["--out-dri", "x"], "--out-dri: no such option; perhaps you meant --out-dir"),
        (["--model.heads", "5"], "heads (5) must divide width (16)"),
        (["--optimizer.name", "mion"], "perhaps you meant muon"),
        (["--seed", "1", "--seed=2"], "--seed: given twice"),
        (["surplus"], "'surplus': unexpected argument"),
        (["--data.path", "/no/such/place"], "/no/such/place: no such file, folder or pattern"),
        (["--resume", "sometimes"], "--resume sometimes: is neither auto, never nor"),
        (["--model.context", "4096"], "model.context: 4096 needs more than"),
    ],
)
def test_wrong_input_is_described_in_at_most_three_lines(
    capsys: pytest.CaptureFixture[str],
    config_file: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
):
    out = tmp_path / "run"
    code, stdout, stderr = called(capsys, "train", config_file, "--out-dir", out, *arguments)
    assert code == 2
    assert message in stderr
    complaints = [line for line in stderr.splitlines() if line.startswith("train.py: ")]
    assert 1 <= len(complaints) <= 3
    assert stdout == ""
    assert not out.exists()


@pytest.mark.parametrize("checkpoint", ["/", ".", "runs", "step-00000001"])
def test_resume_wants_a_checkpoint_folder(
    capsys: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path, checkpoint: str
):
    out = tmp_path / "run"
    code, _, stderr = called(capsys, "train", config_file, "--out-dir", out, "--resume", checkpoint)
    assert code == 2
    assert "is neither auto, never nor a checkpoint folder" in stderr
    code, _, stderr = called(capsys, "train", config_file, "--out-dir", out, "--resume", "")
    assert (code, stderr) == (
        2,
        "train.py: --resume: '' is empty, and must name a file or folder\n",
    )


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "step-00000001"])
def test_weights_in_a_pickle_are_not_read(
    capsys: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path, name: str
):
    path = tmp_path / name
    torch.save({"weight": torch.ones(1)}, path)
    for command in (
        ("train", config_file, "--out-dir", tmp_path / "run", "--resume", path),
        ("sample", path),
    ):
        code, _, stderr = called(capsys, *command)
        assert code == 2
        assert name in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", b"{"),
        ("result.json", b"[]"),
        ("result.json", b'{"status": "weird"}'),
        ("metrics.jsonl", b"5\n{}\n"),
        ("metrics.jsonl", b'{"step": "x"}\n'),
        ("metrics.jsonl", b"\xff\n"),
        ("config.yaml", b"model: ["),
        ("config.yaml", b"\xff"),
    ],
)
def test_a_damaged_file_is_named_when_a_run_is_resumed(
    capsys: pytest.CaptureFixture[str],
    config_file: Path,
    run_dir: Path,
    tmp_path: Path,
    file: str,
    content: bytes,
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    if file != "result.json":
        (copy / "result.json").unlink()
    (copy / file).write_bytes(content)
    code, stdout, stderr = called(capsys, "train", config_file, "--out-dir", copy)
    assert code == 2
    assert Path(file).name in stderr
    assert stdout == ""
    assert (copy / file).read_bytes() == content


@pytest.mark.parametrize("file", ["meta.json", "train.bin", "val.bin", "tokenizer.json"])
def test_a_damaged_cache_is_named(
    capsys: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path, file: str
):
    arguments = [config_file, "--data.cache-dir", tmp_path / "cache", "--training.steps", "1"]
    assert called(capsys, "train", *arguments, "--out-dir", tmp_path / "one")[0] == 0
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / file).write_bytes(b"{" if file.endswith("json") else b"")
    code, _, stderr = called(capsys, "train", *arguments, "--out-dir", tmp_path / "two")
    assert code == 2
    assert f"{folder}: is damaged" in stderr
    assert "delete the folder to prepare it again" in stderr


@pytest.mark.parametrize("arguments", [[], ["none.yaml"], ["--seed", "1"]])
def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    code, _, stderr = called(capsys, "train", *arguments)
    assert code == 2
    assert "CONFIG.yaml" in stderr or "none.yaml: no such file (looked in " in stderr


def test_divergence_is_exit_code_3(
    capsys: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path
):
    arguments = [
        config_file, "--out-dir", tmp_path / "run", "--optimizer.name", "sgd",
        "--optimizer.learning-rate", "1e30", "--optimizer.clip", "null",
    ]  # fmt: skip
    for _ in range(2):  # and again when it is asked for a second time
        code, stdout, _ = called(capsys, "train", *arguments)
        assert code == 3
        assert stdout.startswith("diverged: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_can_be_resumed(
    tiny: Make, tmp_path: Path, environment: dict[str, str], number: signal.Signals
):
    long = {
        "training": {"steps": 3000},
        "evaluation": {"every": 3000},
        "checkpoint": {"every": 3000},
    }
    path = tmp_path / "long.yaml"
    path.write_text(tiny(**long).to_yaml())
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", path, "--out-dir", out]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    metrics = out / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 30,' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert f"{number.name}: stopping; a second signal kills the process" in stderr
    assert stdout.startswith("interrupted: stopped after step")
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert (out / f"checkpoints/step-{result['step']:08d}/manifest.json").is_file()
    assert len(list((out / "checkpoints").glob("step-*"))) == 1


def test_an_interrupt_ends_sampling_at_once(run_dir: Path, environment: dict[str, str]):
    command = [sys.executable, ROOT / "sample.py", run_dir, "--max-new-tokens", "1000000"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "step" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_an_interrupt_is_not_lost_where_an_import_would_swallow_it():
    """As `except:` around an optional import does with KeyboardInterrupt."""
    script = (
        "import os, signal\nfrom gpt.cli.common import command\nwith command('x'):\n    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n    except BaseException:\n        pass"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"")


def test_the_callers_own_signal_handlers_come_back(capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(signal.SIGINT)
    called(capsys, "sample", "nowhere")
    assert signal.getsignal(signal.SIGINT) is before


def test_after_max_seconds_it_saves_and_the_run_can_be_resumed(
    capsys: pytest.CaptureFixture[str], tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(tiny().to_yaml())
    made: list[None] = []
    clock, update = time.monotonic, Trainer.update

    def counted(self: Trainer, *args: Any) -> bool:
        made.append(None)
        return update(self, *args)

    monkeypatch.setattr(Trainer, "update", counted)
    monkeypatch.setattr(common.time, "monotonic", lambda: clock() + (100 if len(made) > 4 else 0))
    code, stdout, stderr = called(capsys, "train", path, "--out-dir", out, "--max-seconds", "50")
    monkeypatch.undo()
    assert code == 75
    assert stderr.count("reached the time limit of 50 s: stopping") == 1
    step = json.loads((out / "result.json").read_text())["step"]
    assert 0 < step < 20
    assert stdout.startswith(f"interrupted: stopped after step {step}; state saved")
    assert called(capsys, "train", path, "--out-dir", out, "--max-seconds", "50")[0] == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "1e301", "inf"])
@pytest.mark.parametrize("name", ["train", "compare"])
def test_max_seconds_is_a_time(
    capsys: pytest.CaptureFixture[str], name: str, seconds: str, config_file: Path, tmp_path: Path
):
    file = {"train": config_file, "compare": ROOT / "configs/compare/quick.yaml"}[name]
    problem = f"{seconds!r} is not between 0.001 and 1e+09"
    if seconds == "soon":
        problem = "must be a valid number, found 'soon'"
    command = [name, file, "--out-dir", tmp_path / "run", f"--max-seconds={seconds}"]
    code, _, stderr = called(capsys, *command)
    assert (code, stderr) == (
        2,
        f"{name}.py: --max-seconds: {problem}\n",
    )
    assert not (tmp_path / "run").exists()


def test_a_second_start_in_one_directory_is_refused(
    tiny: Make, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also while the first one evaluates, samples or saves: it holds the lock until it ends."""
    out = tmp_path / "run"
    answers: list[tuple[int, str, str]] = []
    asked = itertools.count()

    def start_another() -> bool:
        if next(asked) % 12 == 0:
            answers.append(called(capsys, "train", config_file, "--out-dir", out))
        return False

    prepare(tiny().data)  # which asks in a thread
    train(tiny(), out, quiet=True, stop=start_another)
    assert len(answers) > 3
    assert set(answers) == {(2, "", f"train.py: {out}: another process is training there\n")}


# -- checkpoint --------------------------------------------------------------------------------


def test_verify_reports_every_checkpoint(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    ten, twenty = (copy / f"checkpoints/step-{step:08d}" for step in (10, 20))
    intact = f"{ten}: intact\n{twenty}: intact\n"
    assert called(capsys, "checkpoint", "verify", copy) == (0, intact, "")
    assert called(capsys, "checkpoint", "verify", copy / "checkpoints") == (0, intact, "")
    path = twenty / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for given, of in ((copy, 2), (twenty, 1)):
        code, stdout, stderr = called(capsys, "checkpoint", "verify", given)
        assert code == 2
        assert stdout.splitlines()[-1] == f"{path}: is damaged: it has changed since it was written"
        assert stderr == f"python -m gpt.checkpoint: {given}: 1 of {of} checkpoints are damaged\n"
    code, _, stderr = called(capsys, "checkpoint", "verify", tmp_path)
    assert (code, stderr) == (2, f"python -m gpt.checkpoint: {tmp_path}: contains no checkpoint\n")


# -- sample ------------------------------------------------------------------------------------


def test_the_prompt_comes_from_a_flag_a_file_or_a_pipe(
    run_dir: Path,
    tmp_path: Path,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "prompt.txt").write_text("The lazy")
    common = ["--max-new-tokens", 12, "--seed", 4]
    flag = called(capsys, "sample", run_dir, "--prompt", "The lazy", *common)
    file = called(capsys, "sample", run_dir, "--prompt-file", tmp_path / "prompt.txt", *common)
    pipe = script("sample", run_dir, *common, environment=environment, input="The lazy", stdin=None)
    assert flag[0] == file[0] == pipe.returncode == 0
    assert flag[1] == file[1] == pipe.stdout
    assert flag[1].startswith("The lazy")


def test_a_pipe_without_text_is_refused(run_dir: Path, environment: dict[str, str]):
    command = [sys.executable, str(ROOT / "sample.py"), str(run_dir)]
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
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    code, _, _ = called(capsys, "sample", run_dir, "--prompt", "abc", "--max-new-tokens", "5")
    assert code == 0
    assert written[0] == "abc"
    assert len(written) > 5


def test_weights_of_fewer_bits_write_text_too(capsys: pytest.CaptureFixture[str], run_dir: Path):
    arguments = ["--num-samples", 2, "--max-new-tokens", 40, "--prompt", "a", "--temperature", 0]
    for weights in ("bf16", "int8"):
        code, out, err = called(capsys, "sample", run_dir, *arguments, "--weights", weights)
        assert code == 0, err
        assert out.startswith("a")
        assert len(out) > 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "int4"], "--weights: must be 'fp32', 'bf16' or 'int8'"),
        (
            ["--device", "cpu", "--compile"],
            "--compile: needs a CUDA GPU, and the device is cpu",
        ),
    ],
)
def test_what_sampling_cannot_do_is_refused(
    capsys: pytest.CaptureFixture[str], run_dir: Path, flags: list[str], message: str
):
    code, out, err = called(capsys, "sample", run_dir, "--prompt", "a", *flags)
    assert (code, out) == (2, "")
    assert message in err


def test_several_samples_and_the_sliding_window(capsys: pytest.CaptureFixture[str], run_dir: Path):
    arguments = ["--num-samples", 3, "--max-new-tokens", 40, "--prompt", "a", "--temperature", 1.5]
    code, out, err = called(capsys, "sample", run_dir, *arguments)
    assert code == 0
    assert out.count("-" * 60) == 2
    assert "the text exceeds the context of 16 tokens" in err
    code, single, _ = called(capsys, "sample", run_dir, *arguments[2:])
    assert out.startswith(single.rstrip("\n"))


def test_greedy_sampling_ignores_the_seed(capsys: pytest.CaptureFixture[str], run_dir: Path):
    texts = {
        called(capsys, "sample", run_dir, "--temperature", 0, "--seed", seed, "--prompt", "T")[1]
        for seed in (1, 2)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("checkpoint", ["best", "latest", "10"])
def test_a_checkpoint_can_be_chosen(
    capsys: pytest.CaptureFixture[str], run_dir: Path, checkpoint: str
):
    code, _, err = called(capsys, "sample", run_dir, "--checkpoint", checkpoint, "--prompt", "T")
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
        (["--device", "tpu"], "--device: must be 'auto', 'cpu', 'cuda' or 'mps'"),
    ],
)
def test_wrong_sampling_input(
    capsys: pytest.CaptureFixture[str], run_dir: Path, arguments: list[str], message: str
):
    code, out, err = called(capsys, "sample", run_dir, *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) <= 3
    assert out == ""


@pytest.mark.parametrize("damage", ["no run", "no checkpoint", "weights", "tokenizer", "config"])
def test_a_damaged_run_is_named(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tmp_path: Path, damage: str
):
    copy = tmp_path / "copy"
    if damage != "no run":
        shutil.copytree(run_dir, copy)
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


# -- The installed command ---------------------------------------------------------------------


def test_prepare_describes_the_corpus(
    capsys: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path, monkeypatch
):
    arguments = [str(config_file), "--data.cache-dir", str(tmp_path / "cache")]
    code, out, err = called(capsys, "prepare", *arguments)
    assert code == 0
    assert "preparing 40 files with the bytes tokenizer" in err
    (folder,) = (tmp_path / "cache").iterdir()
    assert out.startswith(f"{folder}\n")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:]}
    meta = json.loads((folder / "meta.json").read_text())
    for file in meta["files"]:
        numbers = [file["documents"], file["bytes"], file["tokens"]]
        longest = f"{file['longest']:,}"
        assert rows[file["name"]][1:] == [*(f"{n:,}" for n in numbers), "1.00", longest, "tokens"]
    assert rows["vocabulary"][1:3] == ["257", "tokens"]
    assert 2 < float(rows["unigram"][2]) < 5
    assert meta["fingerprint"] in out
    monkeypatch.setattr(sys, "argv", ["steadygpt", "prepare", *arguments])
    assert cli.main() == 0
    assert capsys.readouterr() == (out, "")


def test_preparing_wrong_input(capsys: pytest.CaptureFixture[str], config_file: Path):
    code, out, err = called(capsys, "prepare", config_file, "--data.path", "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("python -m gpt.data: data.path: nowhere: no such file, folder or pattern")


def test_the_installed_command_runs_the_same_commands(
    capsys: pytest.CaptureFixture[str], config_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["steadygpt", "train", str(config_file), "--print-config"])
    assert cli.main() == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "tiny"
    monkeypatch.setattr(sys, "argv", ["steadygpt", "trian"])
    assert cli.main() == 2
    assert "perhaps you meant train" in capsys.readouterr().err


# -- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("sample", ["run", "--prompt", "--top-k", "3"], "--prompt=--value"),
        ("sample", ["run", "--prompt", "--", "-x"], "--prompt=--value"),
        ("sample", ["-run"], "./-name"),
        ("sample", ["run", "-x"], "./-x"),
        ("train", ["c.yaml", "--out-dir", "--dry-rnu"], "--out-dir=--value"),
        ("train", ["c.yaml", "--dry-run", "-x"], "./-x"),
        ("sample", ["--", "-run"], "-run: no such directory"),
    ],
)
def test_a_dash_that_does_not_begin_a_value_is_explained(
    capsys: pytest.CaptureFixture[str], name: str, arguments: list[str], words: str
):
    code, out, err = called(capsys, name, *arguments)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["~/c.yaml"]),
        ("prepare", ["~/c.yaml"]),
        ("sample", ["~/c.yaml"]),
        ("sample", ["run", "--prompt-file", "~/c.yaml"]),
        ("compare", ["~/c.yaml"]),
        ("checkpoint", ["verify", "~/c.yaml"]),
        ("diagnose", ["~/c.yaml"]),
    ],
)
def test_a_tilde_is_a_home_directory(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    arguments: list[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    code, _, err = called(capsys, name, *arguments)
    assert code == 2
    assert str(tmp_path / "home" / "c.yaml") in err
    code, _, err = called(capsys, name, *(a.replace("~", "~no-such-user") for a in arguments))
    assert code == 2
    assert "there is no user no-such-user" in err
    assert not list(tmp_path.glob("~*"))


def test_out_dir_and_resume_take_a_tilde(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config_file: Path,
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    code, out, _ = called(capsys, "train", config_file, "--out-dir", "~/run", "--dry-run")
    assert code == 0
    assert str(tmp_path / "run") in out
    code, _, err = called(capsys, "train", config_file, "--resume", "~/step", "--dry-run")
    assert code == 2
    assert f"--resume {tmp_path / 'step'}" in err

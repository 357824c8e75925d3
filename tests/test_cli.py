"""The commands as a user meets them: arguments, output, exit codes."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT

import gpt
from gpt import cli
from gpt.cli.common import StopSignals, typed
from gpt.cli.flags import parse
from gpt.config import Config, option_paths
from gpt.data.preparation import prepare
from gpt.errors import as_flag
from gpt.scaling.ladder import AXIS, FACTOR
from gpt.training import train

Make = Callable[..., Config]


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
    tiny_file: Path,
    tmp_path: Path,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    done = script("train", tiny_file, "--out-dir", out, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "finished: completed all 20 steps" in done.stdout
    assert "nats per token" in done.stdout
    assert "bits per byte" in done.stdout
    assert str(out / "loss.png") in done.stdout
    assert "sample.py" in done.stdout
    for word in ("device", "parameters", "without embeddings", "tokens per step", "directory"):
        assert word in done.stderr
    assert "step 20/20  loss" in done.stderr

    code, again, _ = called(capsys, "train", tiny_file, "--out_dir", out)
    assert code == 0
    assert again.splitlines()[:-1] == done.stdout.splitlines()[:-1]  # sample.py by another path

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
    assert done.stdout.count("usage: ") == done.stdout.count("--help-all") == len(cli.COMMANDS)
    assert re.findall(r"^  (\w+) ", cli.USAGE, re.MULTILINE) == list(cli.COMMANDS)
    assert done.stdout.count("\nExamples:\n  ") == len(cli.COMMANDS)
    assert "None" not in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_version(name: str, capsys: pytest.CaptureFixture[str]):
    assert called(capsys, name, "--version") == (0, f"steadygpt {gpt.__version__}\n", "")
    assert called(capsys, name, "-V") == (0, f"steadygpt {gpt.__version__}\n", "")


def test_the_examples_in_help_are_valid(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("train", "prepare", "coordcheck"):
        _, text, _ = called(capsys, name, "--help")
        examples, all_options = text.partition("\nExamples:\n")[2].split("\n\n")
        assert all_options.endswith("--help-all\n")
        for line in examples.replace("\\\n", "").splitlines():
            words = shlex.split(line.removeprefix(f"  {cli.COMMANDS[name]} "))
            drop = [word for word in words if word.startswith(("--out", "--widths"))]
            for flag in drop:
                del words[words.index(flag) : words.index(flag) + 2]
            assert called(capsys, "train", *words, "--print-config")[0] == 0, line


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_arguments_of_examples_exist(name: str, capsys: pytest.CaptureFixture[str]):
    module, prog = importlib.import_module(f"gpt.cli.{name}"), cli.COMMANDS[name]
    config = getattr(module, "_Options", getattr(module, "Config", None))
    text = called(capsys, name, "--help")[1].partition("\nExamples:\n")[2].split("\n\n")[0]
    examples = re.findall(rf"{re.escape(prog)}((?: [^)|>\n]*)?)", text.replace("\\\n", ""))
    assert len(examples) == len(text.replace("\\\n", "").strip("\n").splitlines()) >= 1
    for example in examples:
        parse(module.Arguments, prog, shlex.split(example), config)


def test_an_interrupted_run_ends_with_the_command_that_resumes_it(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    out = tmp_path / "run"
    words = [*map(str, (tiny_file, "--out-dir", out)), "--sampling.prompt", "a b"]
    asked = itertools.count()
    monkeypatch.setattr(StopSignals, "__call__", lambda self: next(asked) > 60)
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--resume", "never"])
    code, printed, _ = called(capsys, "train", *words, "--resume", "never")
    first, *rest = printed.splitlines()
    assert code == 75
    assert first.startswith("interrupted: stopped ")
    command = f"python train.py {tiny_file} --out-dir {out} --sampling.prompt 'a b'"
    heading, resume = rest  # no sample and no picture, which are older
    assert heading == "  to resume:"
    assert resume.endswith(command)  # the interpreter may be .venv/bin/python
    monkeypatch.undo()
    assert called(capsys, "train", *shlex.split(resume)[2:])[0] == 0


@pytest.mark.parametrize(
    ("script", "path", "expected"),
    [
        (".venv/bin/steadygpt", "", ".venv/bin/steadygpt"),
        ("/x/.venv/bin/steadygpt", "", "/x/.venv/bin/steadygpt"),
        ("/x/.venv/bin/steadygpt", "on PATH", "steadygpt"),  # as the shell found it
        ("-c", "", "steadygpt"),
    ],
)
def test_another_command_is_named_as_this_one_was_typed(
    script: str, path: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if path:
        (tmp_path / "steadygpt").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [script, "train"])
    assert typed("sample", "steadygpt train") == [expected, "sample"]


def test_paths_of_another_kind(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    """What each is, and a command that takes it, in every command that does not."""
    monkeypatch.chdir(tmp_path)
    run, grid, step = Path("runs/tiny"), Path("g.yaml"), "runs/tiny/checkpoints/step-00000010"
    run.parent.mkdir()
    run.symlink_to(tiny_run)
    grid.write_text("base: quickstart\narms: {a: {b: {}}}\nx: 1\n")
    Path("c.yaml").write_text("model: {layers: 2}\n")
    Path("texts").mkdir()
    cell = Path("runs/compared/cells/one")
    cell.mkdir(parents=True)
    (cell / "config.yaml").write_text("{}")
    (cell.parents[1] / "grid.yaml").write_text(grid.read_text())
    sized = Path("runs/sizes/cells/one")
    sized.mkdir(parents=True)
    (sized / "config.yaml").write_text("{}")
    study = {"arms": {FACTOR: {"s": {}}}, "grid": {AXIS: [1]}}
    (sized.parents[1] / "grid.yaml").write_text(json.dumps(study))
    for command, path, words in (
        (
            "train",
            run,
            f"is a run directory;\ntrain.py: to resume it: python train.py {run}/config",
        ),
        ("train", step, f"python train.py {run}/config.yaml --resume {step} --out-dir runs/NEW"),
        ("train", grid, "g.yaml: is a grid; to run it: python compare.py g.yaml"),
        ("train", "quick", "is a shipped grid; to run it: python compare.py quick"),
        ("train", cell.parents[1], "to continue it: python compare.py runs/compared"),
        ("train", "texts", "python train.py own-text --data.path texts"),
        ("train", "quickstrat.yaml", "perhaps you meant quickstart\n"),
        ("train", "x/c.yaml", "no such file"),
        ("train", cell, "to continue the comparison: python compare.py runs/compared;\n"),
        ("train", run / "checkpoints", "is a part of the run runs/tiny, not a config"),
        ("train", run / "metrics.jsonl", "is a part of the run runs/tiny, not a config"),
        ("train", "runs", "is a folder of runs, such as runs/tiny, not a config"),
        ("prepare", run, "to use its config: python -m gpt.data runs/tiny/config.yaml\n"),
        ("plan", step, "to use its config: steadygpt plan runs/tiny/config.yaml\n"),
        ("compare", run, f"to sample from it: python sample.py {run}"),
        ("compare", cell, "is a run of a comparison; to continue the comparison: python comp"),
        ("train", sized, "to continue the scaling study: python scaling runs/sizes;\n"),
        ("sample", sized, "is a run of a scaling study, which keeps checkpoints only with"),
        ("compare", "c.yaml", "is a config, not a grid; to train it: python train.py c.yaml"),
        ("compare", "quickstart", "is a shipped config; to train it: python train.py quickstart"),
        ("compare", "gg.yaml", "perhaps you meant g.yaml"),
        ("sample", cell.parents[1], f"each of its cells is a run, such as {cell}"),
        ("sample", cell, f"to train it by itself: python train.py {cell}/config.yaml --out-dir r"),
        (
            "sample",
            "c.yaml",
            "is a config, not a run directory; to train it: python train.py c.yaml",
        ),
        ("sample", grid, "is a grid, not a run; to run it: python compare.py g.yaml"),
        ("sample", "runs/tyni", "runs/tyni: no such directory; perhaps you meant runs/tiny"),
        ("sample", "tiny", "perhaps you meant runs/tiny"),
        (
            "sample",
            run / "checkpoints/step-9",
            "runs/tiny/checkpoints holds best, latest, step-00000010, step-00000020\n",
        ),
        ("sample", run / "config.yaml", "is a part of a run; name the run: runs/tiny"),
        ("sample", run / "checkpoints", "is a part of a run; name the run: runs/tiny"),
        ("sample", "quickstart", "it is a shipped config; to train it: python train.py quickstart"),
        ("diagnose", step, "runs/tiny: has no layer statistics"),
        ("checkpoint", run, f"write: python -m gpt.checkpoint verify {run}"),
    ):
        code, out, err = called(capsys, command, path)
        assert (code, out) == (2, ""), (command, path)
        assert words in err.replace("python -m gpt ", "python "), err


def test_every_name_of_a_checkpoint(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    short = ("--max-new-tokens", 1, "--prompt", "a")
    folder = tiny_run / "checkpoints"
    for name, step in (
        ("10", 10), ("00010", 10), ("step-10", 10), ("step-00000010", 10), ("latest", 20),
        (folder / "step-00000010", 10), (folder / "latest", 20),
    ):  # fmt: skip
        code, _, err = called(capsys, "sample", tiny_run, "--checkpoint", name, *short)
        assert (code, err.splitlines()[-1]) == (0, f"sample.py: {tiny_run}, step {step}")
    code, _, err = called(capsys, "sample", folder / "step-00000010", *short)
    assert (code, err.splitlines()[-1]) == (0, f"sample.py: {tiny_run}, step 10")
    for name in ("5", "step-5", tiny_run.parent, tiny_run / "checkpoints"):
        code, _, err = called(capsys, "sample", tiny_run, "--checkpoint", name, *short)
        assert code == 2
        assert f"{tiny_run} has best, latest, 10, 20" in err
    code, _, err = called(capsys, "sample", folder / "latest", "--checkpoint", "10", *short)
    assert (code, err) == (2, f"sample.py: --checkpoint: {folder}/latest is already a checkpoint\n")
    code, out, _ = called(capsys, "checkpoint", "verify", folder / "latest")
    assert (code, out) == (0, f"{folder}/step-00000020: intact\n")


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
    code, out, _ = called(capsys, "train", "--help-all")
    assert code == 0
    shown = re.findall(r"^  (--[a-z][\w.-]*)", out, re.MULTILINE)
    assert {as_flag(path) for path in option_paths(Config)} < set(shown)
    assert "--out-dir" in shown
    assert "--model.norm.placement {pre,post,peri," in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_a_terminal_and_shows_what_it_names_as_common(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = called(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert called(capsys, name, "-h")[1] == out
    assert len(out.splitlines()) <= 42
    assert max(map(len, out.splitlines())) <= 80
    whole = called(capsys, name, "--help-all")[1]
    assert max(map(len, whole.splitlines())) <= 80
    common = getattr(importlib.import_module(f"gpt.cli.{name}"), "COMMON", ())
    flags = re.findall(r"^  (--[a-z][\w.-]*)", out, re.MULTILINE)
    every = re.findall(r"^  (--[a-z][\w.-]*)", whole, re.MULTILINE)
    if common:
        assert sorted(flags) == sorted(map(as_flag, common))
        assert len(common) <= 10
        hidden = {"--help-all"}
        stated = out.splitlines()[-1]
        assert stated == f"All {len({*every} - hidden)} options: {cli.COMMANDS[name]} --help-all"
    else:
        assert flags == every


def test_print_config_prints_yaml_to_stdout_alone(
    capsys: pytest.CaptureFixture[str], tiny_file: Path
):
    code, out, err = called(
        capsys, "train", tiny_file, "--print-config", "--model.width", "1e2",
        "--optimizer.clip", "null", "--model.norm.placement=post", "--training.batch_sequences=6",
    )  # fmt: skip
    tree = yaml.safe_load(out)
    assert (code, err) == (0, "")
    assert tree["model"]["width"] == 100
    assert tree["optimizer"]["clip"] is None
    assert tree["model"]["norm"]["placement"] == "post"
    assert tree["training"]["batch_sequences"] == 6


def test_several_paths(capsys: pytest.CaptureFixture[str], tiny_file: Path):
    code, out, _ = called(
        capsys, "train", tiny_file, "--print-config", "--data.path", "a.txt", "b.txt"
    )
    assert code == 0
    assert yaml.safe_load(out)["data"]["path"] == ["a.txt", "b.txt"]


def test_dry_run_of_a_longer_run_describes_how_its_learning_rate_changes(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = ("train", tiny_file, "--out-dir", tmp_path / "run")
    assert called(capsys, *run)[0] == 0
    code, out, _ = called(capsys, *run, "--training.steps", 40, "--dry-run")
    assert code == 0
    assert out.startswith("changed: training.steps: 20 -> 40\nthe cosine schedule now spans 40")


def test_dry_run_writes_nothing(
    capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path
):
    cache = tmp_path / "cache"
    code, out, _ = called(
        capsys, "train", tiny_file, "--dry-run", "--out-dir", tmp_path / "run",
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
        (["--model.width", "wide"], "--model.width: must be a whole number, found 'wide'"),
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
    tiny_file: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
):
    out = tmp_path / "run"
    code, stdout, stderr = called(capsys, "train", tiny_file, "--out-dir", out, *arguments)
    assert code == 2
    assert message in stderr
    complaints = [line for line in stderr.splitlines() if line.startswith("train.py: ")]
    assert 1 <= len(complaints) <= 3
    assert stdout == ""
    assert not out.exists()


@pytest.mark.parametrize("checkpoint", ["/", ".", "runs", "step-00000001"])
def test_resume_wants_a_checkpoint_folder(
    capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path, checkpoint: str
):
    out = tmp_path / "run"
    code, _, stderr = called(capsys, "train", tiny_file, "--out-dir", out, "--resume", checkpoint)
    assert code == 2
    assert "is neither auto, never nor a checkpoint folder" in stderr
    code, _, stderr = called(capsys, "train", tiny_file, "--out-dir", out, "--resume", "")
    assert (code, stderr) == (
        2,
        "train.py: --resume: '' is empty, and must name a file or folder\n",
    )


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "step-00000001"])
def test_weights_in_a_pickle_are_not_read(
    capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path, name: str
):
    path = tmp_path / name
    torch.save({"weight": torch.ones(1)}, path)
    for command in (
        ("train", tiny_file, "--out-dir", tmp_path / "run", "--resume", path),
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
    tiny_file: Path,
    tiny_run: Path,
    tmp_path: Path,
    file: str,
    content: bytes,
):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    if file != "result.json":
        (copy / "result.json").unlink()
    (copy / file).write_bytes(content)
    code, stdout, stderr = called(capsys, "train", tiny_file, "--out-dir", copy)
    assert code == 2
    assert Path(file).name in stderr
    assert stdout == ""
    assert (copy / file).read_bytes() == content


@pytest.mark.parametrize("file", ["meta.json", "train.bin", "val.bin", "tokenizer.json"])
def test_a_damaged_cache_is_named(
    capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path, file: str
):
    arguments = [tiny_file, "--data.cache-dir", tmp_path / "cache", "--training.steps", "1"]
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
    capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path
):
    arguments = [
        tiny_file, "--out-dir", tmp_path / "run", "--optimizer.name", "sgd",
        "--optimizer.learning-rate", "1e30", "--optimizer.clip", "null",
    ]  # fmt: skip
    for _ in range(2):  # and again when it is asked for a second time
        code, stdout, _ = called(capsys, "train", *arguments)
        assert code == 3
        assert stdout.startswith("diverged: ")


def test_a_second_start_in_one_directory_is_refused(
    tiny: Make, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also while the first one evaluates, samples or saves: it holds the lock until it ends."""
    out = tmp_path / "run"
    answers: list[tuple[int, str, str]] = []
    asked = itertools.count()

    def start_another() -> bool:
        if next(asked) % 12 == 0:
            answers.append(called(capsys, "train", tiny_file, "--out-dir", out))
        return False

    prepare(tiny().data)  # which asks in a thread
    train(tiny(), out, quiet=True, stop=start_another)
    assert len(answers) > 3
    assert set(answers) == {(2, "", f"train.py: {out}: another process is training there\n")}


# -- checkpoint --------------------------------------------------------------------------------


def test_verify_reports_every_checkpoint(
    capsys: pytest.CaptureFixture[str], tiny_run: Path, tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
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


# -- The installed command ---------------------------------------------------------------------


def test_prepare_describes_the_corpus(
    capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path, monkeypatch
):
    arguments = [str(tiny_file), "--data.cache-dir", str(tmp_path / "cache")]
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
    again = capsys.readouterr()
    assert again.out == out
    assert "preparing" not in again.err


def test_preparing_wrong_input(capsys: pytest.CaptureFixture[str], tiny_file: Path):
    code, out, err = called(capsys, "prepare", tiny_file, "--data.path", "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("python -m gpt.data: data.path: nowhere: no such file, folder or pattern")


def test_the_installed_command_runs_the_same_commands(
    capsys: pytest.CaptureFixture[str], tiny_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["steadygpt", "train", str(tiny_file), "--print-config"])
    assert cli.main() == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "tiny"
    monkeypatch.setattr(sys, "argv", ["steadygpt", "help"])
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("usage: steadygpt COMMAND")
    monkeypatch.setattr(sys, "argv", ["steadygpt", "help", "runs"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out.startswith("usage: steadygpt runs")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "; perhaps you meant train"),
        ("generate", "; perhaps you meant sample"),
        ("--versoin", "; perhaps you meant --version"),
        ("brew", ""),
    ],
)
def test_a_command_that_does_not_exist(
    name: str, hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["steadygpt", name])
    assert cli.main() == 2
    message = f"steadygpt: {name}: no such command{hint}; steadygpt --help lists all\n"
    assert capsys.readouterr() == ("", message)


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
    tiny_file: Path,
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    code, out, _ = called(capsys, "train", tiny_file, "--out-dir", "~/run", "--dry-run")
    assert code == 0
    assert str(tmp_path / "run") in out
    code, _, err = called(capsys, "train", tiny_file, "--resume", "~/step", "--dry-run")
    assert code == 2
    assert f"--resume {tmp_path / 'step'}" in err

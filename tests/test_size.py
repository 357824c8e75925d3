from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from gpt import cli
from gpt.config import Config, validate
from gpt.errors import InputError
from gpt.hardware import size
from gpt.model.gpt2 import ACTIVATIONS, GPT
from gpt.model.norm import NORMS
from gpt.model.placement import PLACEMENTS


def counted(vocab_size: int = 300, **model: Any) -> tuple[int, int]:
    """The count before a model is built, and after."""
    config = validate(Config, {"model": {"layers": 4, **model}}).model
    with torch.device("meta"):
        return size.parameters(config, vocab_size), GPT(config, vocab_size).num_parameters()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_count_is_a_lower_bound_within_one_per_cent(placement: str):
    for activation, tied, bias in itertools.product(ACTIVATIONS, (True, False), (True, False)):
        options = {
            "width": 1024,
            "tied_head": tied,
            "bias": bias,
            "norm": {"placement": placement},
            "mlp": {"activation": activation},
        }
        least, built = counted(**options)
        assert 0.99 * built < least <= built, options


@pytest.mark.parametrize("norm", NORMS)
def test_the_count_of_a_small_model_is_a_lower_bound(norm: str):
    for activation, width, multiple in itertools.product(ACTIVATIONS, (1, 5, 24), (1, 1.7, 4)):
        options: dict[str, Any] = {"width": width, "heads": 1, "norm": {"type": norm}}
        options["mlp"] = {"activation": activation, "multiple": multiple}
        least, built = counted(**options)
        assert 0 < least <= built, options


def rejection(tree: dict[str, Any], memory: int, **given: Any) -> str:
    given = {"shared": True, **given}
    with pytest.raises(InputError) as caught:
        size.check_training(validate(Config, tree), device_memory=memory, **given)
    return str(caught.value)


def test_both_numbers_are_in_the_message():
    model = {"layers": 1000, "width": 1000, "heads": 1}
    assert rejection({"model": model}, 24 * 10**9) == (
        "training model.layers: 1,000, model.width: 1,000, 11,988,129,000 parameters, needs at "
        "least 191.8 GB of memory, but only 24.0 GB are available"
    )


def test_the_activations_of_one_forward_pass_count():
    long = {"model": {"context": 10**6}}
    assert "a forward pass over 1 x 1,000,000 tokens needs" in rejection(long, 8 * 10**9)
    whole = {"training": {"batch_sequences": 10**6, "micro_batch": 10**6}}
    assert "a forward pass over 1,000,000 x 128 tokens needs" in rejection(whole, 10**10)


def test_the_logits_are_those_of_one_chunk():
    parts: dict[str, Any] = {"model": {"width": 4}, "training": {"loss_chunk": 8}}
    size.check_training(validate(Config, parts), 10**6, device_memory=10**8, shared=True)
    assert "a forward pass over 1 x 128 tokens" in rejection(
        {"model": {"width": 4}}, 10**8, vocab_size=10**6
    )


def test_the_batch_counts_in_the_memory_that_holds_it(monkeypatch: pytest.MonkeyPatch):
    large = {"training": {"batch_sequences": 10**7}}
    assert "a batch of 10,000,000 x 128 tokens needs at least 10.3 GB" in rejection(large, 10**10)
    monkeypatch.setattr(size, "machine_memory", lambda: 10**10)
    assert "a batch of" in rejection(large, 10**12, shared=False)  # of the machine, not of the GPU
    monkeypatch.setattr(size, "machine_memory", lambda: 2 * 10**10)
    size.check_training(validate(Config, large), device_memory=10**9, shared=False)


def test_with_unknown_memory_nothing_is_rejected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(size, "machine_memory", lambda: None)
    huge = validate(Config, {"model": {"width": 100_000, "layers": 1000}})
    size.check_training(huge, device_memory=None, shared=True)


def test_a_control_group_limits_the_memory(tmp_path: Path):
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text("0::/a/b\n4:cpu,memory:/c\n3:cpuset:/\n")
    for folder in ("a/b", "memory/c"):
        (root / folder).mkdir(parents=True)
    found = {str(path.relative_to(root)) for path in size._group_limits(root, own)}
    version_1 = {"memory/c/memory.limit_in_bytes", "memory/memory.limit_in_bytes"}
    assert found == {"a/b/memory.max", "a/memory.max", "memory.max"} | version_1
    assert list(size._group_limits(root, tmp_path / "none")) == []


def test_the_smallest_limit_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [tmp_path / name for name in ("max", "less", "none")]
    files[0].write_text("max\n")
    files[1].write_text("1000000\n")
    whole = size.machine_memory()
    monkeypatch.setattr(size, "_group_limits", lambda: iter(files))
    assert size.machine_memory() == 10**6
    assert whole is not None
    assert whole > 10**8


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_config_that_cannot_fit_is_rejected_before_torch_is_loaded(
    tmp_path: Path, flags: list[str]
):
    (tmp_path / "c.yaml").write_text("model: {layers: 2000, width: 20000, heads: 1}\n")
    program = (
        "import sys; from gpt import cli\n"
        "try: cli.run('train', sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "c.yaml", "--training.device", "cpu", *flags]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=20, env=environment
    )
    assert ran.stdout == "2 False\n"
    assert "2,000, model.width: 20,000, 9,599" in ran.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_the_vocabulary_counts_once_it_is_known(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gpt.training import train

    config = tiny()
    known = size.parameters(config.model, 257) - 1  # less than its tokens take
    monkeypatch.setattr(size, "machine_memory", lambda: 16 * known)
    with pytest.raises(InputError, match=r"needs at least .* GB of memory"):
        train(config, tmp_path / "run", quiet=True)


def test_the_cache_of_many_samples_is_counted():
    model = validate(Config, {"model": {"context": 100_000, "width": 1024}}).model
    given = {"tokens": 10**6, "size": 4, "memory": 10**11}
    with pytest.raises(InputError) as caught:
        size.check_sampling(model, 300, samples=1000, **given)
    assert str(caught.value) == (
        "num_samples 1,000: caching the keys and values of 100,000 tokens each needs at least "
        "3,276.8 GB of memory, but only 100.0 GB are available"
    )
    size.check_sampling(model, 300, samples=10, **given)


def test_probes_may_have_more_layers_than_cells():
    model = validate(Config, {"model": {"width": 100_000, "heads": 1, "layers": 1}}).model
    with pytest.raises(
        InputError, match=r"a probe \(probes: false turns it off\) of model.layers: 24,"
    ):
        size.check_probing(model, 24)


def test_a_forged_config_is_not_built(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt.training import train

    train(tiny(training={"steps": 1}), tmp_path / "run", quiet=True)
    path = tmp_path / "run/config.yaml"
    path.write_text(tiny(model={"layers": 2_000, "width": 20_000, "heads": 1}).to_yaml())
    with pytest.raises(SystemExit) as end:
        cli.run("sample", [str(tmp_path / "run"), "--prompt", "a"])
    assert end.value.code == 2
    assert "config.yaml: model.layers: 2,000, model.width: 20,000 needs" in capsys.readouterr().err


def test_a_forged_config_of_more_blocks_than_the_checkpoint_has_is_not_built(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gpt import training
    from gpt.run.loading import load_run

    training.train(tiny(training={"steps": 1}), tmp_path / "run", quiet=True)
    (tmp_path / "run/config.yaml").write_text(tiny(model={"layers": 2_000}).to_yaml())
    monkeypatch.setattr("gpt.run.loading.GPT", lambda *arguments: pytest.fail("it was built"))
    with pytest.raises(InputError, match=r"step-00000001: does not fit .*config.yaml: it holds"):
        load_run(tmp_path / "run")

"""Warnings before a run: options without effect, another optimizer's rate, too little text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NEEDS_A_RUN
from test_cli import called
from torch import nn

from gpt.config import Config, load, nest, validate
from gpt.config.options import OptimizerConfig, ScheduleConfig
from gpt.config.shipped import names
from gpt.config.values import Only
from gpt.data.preparation import prepare
from gpt.data.prepared import Dataset
from gpt.optim import OPTIMIZERS, Optimizer
from gpt.run.cautions import cautions
from gpt.schedule import BODIES, WARMUPS, lr_multiplier
from gpt.training import train

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text)
        return path

    return to_file


# -- Options without effect --------------------------------------------------------------------


def marked(section: type[Any], other: str) -> dict[str, set[object]]:
    """The values of `other` with which each option of a section is read, as its mark says."""
    fields = section.model_fields.items()
    marks = {name: mark for name, f in fields for mark in f.metadata if isinstance(mark, Only)}
    return {name: set(mark.values) for name, mark in marks.items() if mark.other == other}


CHANGED = {"beta1": 0.5, "beta2": 0.6, "eps": 0.1, "momentum": 0.3}
CHANGED |= {"learning_rate": 0.5, "weight_decay": 0.7}


def weights(config: OptimizerConfig) -> list[float]:
    """The weights of a matrix and a bias after three updates with different gradients."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"blocks": nn.Linear(3, 4)})
    optimizer = Optimizer([(f"{n}", p) for n, p in network.named_parameters()], config)
    for step in range(7):
        for index, parameter in enumerate(network.parameters()):
            parameter.grad = torch.cos(parameter.detach() * (step + 2) + index)
        optimizer.step(1.0)
    return [number for p in network.parameters() for number in p.flatten().tolist()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_reads_the_options_that_are_marked_with_it(name: str):
    plain = OptimizerConfig(name=name, learning_rate=0.1)
    before = weights(plain)
    read = {
        option
        for option, value in CHANGED.items()
        if weights(plain.model_copy(update={option: value})) != before
    }
    constants = marked(OptimizerConfig, "name")
    assert set(constants) <= set(CHANGED)
    assert read == {o for o in CHANGED if o not in constants or name in constants[o]}


@pytest.mark.parametrize(("table", "other"), [(WARMUPS, "warmup"), (BODIES, "body")])
def test_a_schedule_reads_the_options_that_are_marked_with_it(table: dict[str, Any], other: str):
    changed = {"warmup_steps": 7, "final_ratio": 0.7, "decay_fraction": 0.9}
    options = marked(ScheduleConfig, other)
    for name, option in itertools.product(table, options):
        plain = ScheduleConfig(**{"warmup_steps": 3, other: name})
        configs = plain, plain.model_copy(update={option: changed[option]})
        one, two = ([lr_multiplier(c, step, 30) for step in range(1, 31)] for c in configs)
        assert (one != two) == (name in options[option]), (name, option)
    everything = marked(ScheduleConfig, "warmup") | marked(ScheduleConfig, "body")
    assert set(everything) == set(changed)


@pytest.mark.parametrize("name", [name for name in names("config") if name != NEEDS_A_RUN])
def test_shipped_configs_are_without_warnings(name: str):
    assert load(name).cautions == ()


@pytest.mark.parametrize(
    ("text", "flags", "options"),
    [
        ("optimizer: {name: sgd, beta1: 0.9, learning_rate: 0.1}", {}, ["optimizer.beta1"]),
        ("optimizer: {momentum: 0.95}", {}, ["optimizer.momentum"]),  # even at its default
        ("schedule: {body: cosine, decay_fraction: 0.5}", {}, ["schedule.decay_fraction"]),
        ("schedule: {warmup: none, warmup_steps: 5}", {}, ["schedule.warmup_steps"]),
        ("schedule: {body: constant}", {"schedule.final_ratio": "0"}, ["schedule.final_ratio"]),
        ("data: {tokenizer: bytes, vocab_size: 300}", {}, ["data.vocab_size"]),
        ("data: {dtype: uint32, hub: {split: test}}", {}, ["data.dtype", "data.hub.split"]),
        ("diagnostics: {sequences: 3}", {}, ["diagnostics.sequences"]),
        ("data: {validation: {source: stdlib}, holdout: tail}", {}, ["data.holdout"]),
        (
            "sampling: {tokens: 0, prompt: Once, every: 5}",
            {},
            ["sampling.every", "sampling.prompt"],
        ),
        # Set below the variant: it was for another one.
        ("optimizer: {beta1: 0.8}", {"optimizer.name": "sgd", "optimizer.learning_rate": 1}, []),
        ("schedule: {warmup_steps: 50}", {"schedule.warmup": "none"}, []),
        ("sampling: {prompt: Once}", {"sampling.tokens": "0"}, []),
        ("base: tiny-shakespeare-char", {"data.source": "stdlib", "data.path": []}, []),
        # Read by another source.
        ("data: {text_field: body, mix: [{source: jsonl, path: a.jsonl}]}", {}, []),
    ],
)
def test_options_without_effect(text: str, flags: dict[str, Any], options: list[str], write: Write):
    lines = load(write(text), nest(flags)).cautions
    assert [line.partition(" ")[0] for line in lines] == options
    assert all(re.search("has no effect with", line.replace("without", "with")) for line in lines)


def test_a_resolved_config_lists_options_that_nobody_set(write: Write):
    assert load(write(load("quickstart").to_yaml())).cautions == ()


@pytest.mark.parametrize(
    ("text", "flags", "before"),
    [
        ("base: quickstart", {"optimizer.name": "adamw"}, "muon"),
        ("base: quickstart\noptimizer: {name: sgd}", {}, "muon"),
        ("base: pre-norm", {"optimizer.name": "muon"}, "adamw"),
        ("optimizer: {name: adafactor}", {}, "adamw"),  # the default rate
        ("base: quickstart", {"optimizer.name": "adamw", "optimizer.learning_rate": "1e-3"}, None),
        ("base: quickstart", {"optimizer.name": "muon"}, None),
        ("base: quickstart", {"optimizer.learning_rate": "0.1"}, None),
        ("base: pre-norm", {"optimizer.name": "radam"}, None),  # the same rates as adamw
    ],
)
def test_another_optimizers_rate(
    text: str, flags: dict[str, Any], before: str | None, write: Write
):
    lines = load(write(text), nest(flags)).cautions
    assert len(lines) == (before is not None)
    if before is not None:
        assert lines[0].startswith("optimizer.learning_rate ")
        assert f" {before};" in lines[0]
        assert lines[0].endswith("set optimizer.learning_rate too")


# -- Too little text ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tiny: Callable[..., Config]) -> Dataset:
    return prepare(tiny().data)


def of_sizes(dataset: Dataset, train: int, val: int, documents: int = 30) -> Dataset:
    """The dataset as if it had these many tokens, all of one byte."""
    ids = [np.broadcast_to(np.uint16(0), n) for n in (train, val)]
    files = [
        replace(file, tokens=n, bytes=n, documents=documents)
        for file, n in zip(dataset.files, (train, val), strict=True)
    ]
    return replace(dataset, train=(ids[0],), val=ids[1], files=tuple(files))


def enough(**overrides: Any) -> Config:
    """5 million tokens, 1 epoch of 10 million."""
    tree = {
        "data": {"tokenizer": "bytes", "val_fraction": 0.1},
        "training": {"steps": 5000, "batch_sequences": 8},
    }
    return validate(Config, nest({**dict(_leaves(tree)), **overrides}))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize(
    ("options", "train_tokens", "val_tokens", "message"),
    [
        ({}, 9_000_000, 1_000_000, None),
        ({}, 990_000, 10_000, "are 1.00% of the text, not the 10.00% .* data.holdout: tail"),
        ({}, 900_000, 300_000, "25.00% of the text, not the 10.00%"),
        ({"data.holdout": "tail"}, 900_000, 300_000, "data.holdout: documents"),
        ({}, 60_000, 5_000, "only 5,000 validation tokens in 30 documents, .* data.val_fraction"),
        ({"evaluation.sequences": 10}, 9_000_000, 1_000_000, "1,280 .*evaluation.sequences"),
        ({"training.batch_sequences": 1000}, 100_000, 11_000, "a batch of 128,000 .* lower train"),
        ({"training.steps": 60_000}, 600_000, 60_000, "102 epochs"),
        ({"data.windows": "fixed", "training.steps": 60_000}, 600_000, 60_000, None),
        ({"model.context": 1024}, 100_000, 1_000, "model.context 1,024 .* 1,000 validation"),
        ({"training.steps": 20}, 9_000_000, 1_000_000, "raise training.steps, or lower model"),
        ({"model.layers": 30}, 100_000, 11_000, "add text, or lower model.width"),
    ],
)
def test_too_little_text(
    options: dict[str, Any],
    train_tokens: int,
    val_tokens: int,
    message: str | None,
    dataset: Dataset,
):
    lines = cautions(enough(**options), of_sizes(dataset, train_tokens, val_tokens))
    if message is None:
        assert lines == []
    assert message is None or any(re.search(message, line) for line in lines), lines


def test_few_sequences_of_much_text_are_one_caution(dataset: Dataset):
    (line,) = cautions(
        enough(**{"evaluation.sequences": 1}), of_sizes(dataset, 9_000_000, 1_000_000)
    )
    assert line == "losses of 128 tokens are uncertain; raise evaluation.sequences"


def test_they_are_printed_before_a_run_by_dry_run_and_by_prepare(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for command, *rest in (("prepare",), ("train", "--dry-run"), ("train", "--out-dir", tmp_path)):
        flags = ("--optimizer.momentum", "0.8", "--training.steps", "1")
        code, out, err = called(capsys, command, tiny_file, *rest, *flags)
        assert code == 0
        assert "warning: optimizer.momentum has no effect with optimizer.name adamw" in err
        assert re.search(r"warning: only [\d,]+ validation tokens in \d+ documents", err)
        assert "warning" not in out
        described = f"{out}{err}"
        assert command == "prepare" or "validation tokens in" in described.partition("warning")[0]


def test_a_run_in_a_comparison_is_quiet(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(tiny(training={"steps": 1}), tmp_path / "quiet", quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "content"),
    [("text", "A single document. " * 20), ("jsonl", '{"text": "A single record. A. B. C. D."}\n')],
)
def test_a_single_document_is_held_out_by_its_tail(
    source: str, content: str, tmp_path: Path, tiny: Callable[..., Config]
):
    (tmp_path / "a").write_text(content)
    (tmp_path / "empty").touch()  # not a document
    data = {"source": source, "path": [str(tmp_path)], "cache_dir": str(tmp_path.parent / "c")}
    config = tiny(data=data | {"path": [str(tmp_path / "a"), str(tmp_path / "empty")]}).data
    found = prepare(config)
    tail = prepare(config.model_copy(update={"holdout": "tail"}))
    assert found.fingerprint == tail.fingerprint
    assert [file.documents for file in found.files] == [1, 1]


# -- What a loss means -------------------------------------------------------------------------


def test_train_says_what_guessing_loses(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, _ = called(capsys, "train", tiny_file, "--out-dir", tmp_path / "long")
    assert code == 0
    assert re.search(r"training loss +[\d.]+ nats per token, mean of the last \d+ updates\n", out)
    (line,) = [line for line in out.splitlines() if "by token frequencies" in line]
    found = re.search(r"([\d.]+) by token frequencies \(H₁\), ([\d.]+) uniformly \(ln V\)", line)
    assert found is not None
    assert float(found[2]) == pytest.approx(np.log(257), abs=1e-4)
    assert 2 < float(found[1]) < 4
    little = ("--optimizer.learning-rate", "1e-6", "--out-dir", tmp_path / "little")
    _, out, _ = called(capsys, "train", tiny_file, *little)
    assert "no more than token frequencies" in out
    assert "still falling" not in out
    slow = ("--optimizer.learning-rate", "1e-4", "--training.steps", "80")
    _, out, _ = called(capsys, "train", tiny_file, *slow, "--out-dir", tmp_path / "slow")
    assert "no more than token frequencies.\n  Its training loss is still falling" in out
    (tmp_path / "little/environment.json").unlink()
    code, out, _ = called(capsys, "train", tiny_file, *little)
    assert code == 0
    assert "by token frequencies" not in out

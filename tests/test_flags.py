"""How a command line is split: values, lists, switches, mistakes."""

from __future__ import annotations

from typing import Any

import pytest

from gpt.cli.flags import parse
from gpt.cli.sample import Arguments as SampleArguments
from gpt.cli.train import Arguments as TrainArguments
from gpt.config import Config
from gpt.errors import InputError


def options(*argv: str) -> dict[str, Any]:
    """The config's options on a command line of `train.py`."""
    return parse(TrainArguments, "train.py", ["c.yaml", *argv], Config)[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", "-x"], "-x"),
        (["--prompt=-x"], "-x"),
        (["--prompt=--top-k"], "--top-k"),
        (["--prompt", "---"], "---"),
        (["--prompt", "-- a dialogue"], "-- a dialogue"),
        (["--prompt", "-1e-3"], "-1e-3"),
    ],
)
def test_a_value_may_begin_with_a_dash(arguments: list[str], expected: str):
    parsed, _ = parse(SampleArguments, "sample.py", ["run", *arguments])
    assert parsed == SampleArguments(run_dir="run", prompt=expected)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--model.tied-head", "false"], {"model": {"tied_head": "false"}}),
        (["--model.tied_head=false"], {"model": {"tied_head": "false"}}),
        (["--model.norm.eps", "1e-3"], {"model": {"norm": {"eps": "1e-3"}}}),
        (["--optimizer.clip", "null"], {"optimizer": {"clip": None}}),
        (["--sampling.prompt", "null"], {"sampling": {"prompt": "null"}}),
        (["--data.hub.config", "null"], {"data": {"hub": {"config": "null"}}}),
        (["--data.path", "a", "b", "--seed", "1"], {"data": {"path": ["a", "b"]}, "seed": "1"}),
        (["--data.path=a"], {"data": {"path": ["a"]}}),
        (["--data.path"], {"data": {"path": []}}),
        (["--data.mix", "[{path: a}]"], {"data": {"mix": "[{path: a}]"}}),
        (["--name", ""], {"name": ""}),
        (["--model.bias"], {"model": {"bias": "true"}}),
        (["--model.bias", "--seed", "1"], {"model": {"bias": "true"}, "seed": "1"}),
        (["--model.bias", "No"], {"model": {"bias": "No"}}),
        (["--model.norm.bias", "null"], {"model": {"norm": {"bias": None}}}),
        (["--no-model.tied_head"], {"model": {"tied_head": "false"}}),
        (["--no_training.compile"], {"training": {"compile": "false"}}),
    ],
)
def test_options_are_nested_texts(argv: list[str], expected: dict[str, Any]):
    assert options(*argv) == expected


def test_a_commands_own_arguments_are_validated():
    argv = ["--out_dir=x", "c.yaml", "--dry-run", "--max-seconds", "1e2"]
    arguments, given = parse(TrainArguments, "train.py", argv, Config)
    assert arguments == TrainArguments(config="c.yaml", out_dir="x", dry_run=True, max_seconds=100)
    assert given == {}
    with pytest.raises(InputError) as caught:
        parse(TrainArguments, "train.py", ["", "--max-seconds", "0", "--out-dir", ""], Config)
    assert str(caught.value).splitlines() == [
        "CONFIG.yaml: '' is empty, and must name a file or folder",
        "--out-dir: '' is empty, and must name a file or folder",
        "--max-seconds: '0' is not between 0.001 and 1e+09; null switches it off",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.widht", "3"], "--model.widht: no such option; perhaps you meant --model.width"),
        (["--out_dri", "x"], "--out-dri: no such option; perhaps you meant --out-dir"),
        (["--model.w", "3"], "--model.w: no such option"),
        (["--seed"], "--seed: needs a value; one that begins with two dashes is written --seed=--"),
        (["--seed", "--dry-run"], "--seed: needs a value"),
        (["--dry-run=x"], "--dry-run: takes no value"),
        (["--seed", "1", "--seed=2"], "--seed: given twice"),
        (["--config", "d.yaml"], "--config: no such option; CONFIG.yaml is written without it"),
        (["--data.path", "a", "--data.path", "b"], "--data.path: given twice; all values"),
        (["b.yaml"], "'b.yaml': unexpected argument; a file builds on another by naming it as its"),
        (
            ["--model.bias", "ture"],
            "'ture': unexpected argument; --model.bias is true or false, or",
        ),
        (["--dry-run", "yes"], "'yes': unexpected argument; --dry-run takes no value"),
        (["--no-dry-run"], "--no-dry-run: no such option; perhaps you meant --dry-run"),
        (["--model.bias", "--no-model.bias"], "--model.bias: given twice"),
        (
            ["model.tied_head=no_"],
            "'model.tied_head=no_': unexpected argument; an option begins with "
            "two dashes: --model.tied-head=no_",
        ),
        (["--lr", "3"], "--lr: no such option; perhaps you meant --optimizer.learning-rate"),
        (["-lr", "3"], "'-lr': unexpected argument; perhaps you meant --optimizer.learning-rate"),
        (
            ["--sampling.prompt", "Once", "upon"],
            "'upon': unexpected argument; a text of several words "
            "is quoted: --sampling.prompt 'Once upon'",
        ),
        (["-x"], "'-x': unexpected argument; write ./-x for a file"),
        (["--name", "a\0"], "'a\\x00': contains a NUL character"),
    ],
)
def test_mistakes(argv: list[str], message: str):
    with pytest.raises(InputError) as caught:
        options(*argv)
    assert str(caught.value).startswith(message)


def test_a_boolean_before_the_config_does_not_take_it():
    arguments, given = parse(TrainArguments, "train.py", ["--model.bias", "c.yaml"], Config)
    assert (arguments.config, given) == ("c.yaml", {"model": {"bias": "true"}})


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["Once", "upon a"], "to continue a text: --prompt 'Once upon a'"),
        (["--prompt", "It's", "I"], """a text of several words is quoted: --prompt 'It'"'"'s I'"""),
    ],
)
def test_words_that_are_meant_as_a_prompt(argv: list[str], option: str):
    with pytest.raises(InputError) as caught:
        parse(SampleArguments, "sample.py", ["run", *argv])
    assert str(caught.value).endswith(option)


def test_a_missing_argument_is_named():
    with pytest.raises(InputError, match=r"^missing: CONFIG\.yaml; see --help$"):
        parse(TrainArguments, "train.py", ["--dry-run"], Config)


def test_only_a_list_given_twice_is_said_to_follow_one_flag():
    with pytest.raises(InputError, match=r"^--seed: given twice$"):
        options("--seed", "1", "--seed=2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=c.yaml"], "--config: no such option; CONFIG.yaml is written without it"),
        (["--lr", "3"], "--lr: no such option; perhaps you meant --optimizer.learning-rate"),
    ],
)
def test_an_unknown_flag_is_named_before_a_missing_argument(argv: list[str], message: str):
    with pytest.raises(InputError) as caught:
        parse(TrainArguments, "train.py", argv, Config)
    assert str(caught.value).startswith(message)


def test_unknown_flags_are_reported_together():
    with pytest.raises(InputError) as caught:
        options("--a", "1", "--b=2", "--c", "3", "--d")
    assert str(caught.value).splitlines() == [f"--{name}: no such option" for name in "abc"]

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import time
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import NEEDS_A_RUN, ROOT

from gpt import config as configs
from gpt.cli import COMMANDS
from gpt.cli.sample import Arguments as SampleArguments
from gpt.config import Config, ModelConfig, load, option_paths, validate
from gpt.config.loading import schema
from gpt.config.values import Choice
from gpt.errors import InputError, naming_flags, nearest
from gpt.errors.names import ALIASES

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def error_of(tree: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        validate(Config, tree)
    return str(caught.value)


def test_the_promised_configs_are_shipped():
    names = {path.stem for path in SHIPPED}
    assert names >= {"quickstart", "tiny-shakespeare-char", "gpt2-124m", "pre-norm", "post-norm"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path):
    assert path.stem == NEEDS_A_RUN or load(path).name == path.stem
    assert path.read_text().startswith("# yaml-language-server: $schema=")


def test_pre_and_post_norm_differ_in_one_option():
    pre, post = load(ROOT / "configs/pre-norm.yaml"), load(ROOT / "configs/post-norm.yaml")
    assert list(pre.differences(post)) == ["name", "model.norm.placement"]


def test_gpt2_124m_is_gpt2():
    model = load(ROOT / "configs/gpt2-124m.yaml").model
    assert (model.layers, model.heads, model.width, model.context) == (12, 12, 768, 1024)
    assert model.bias
    assert model.tied_head


def test_base_is_merged_deeply_and_flags_come_last(tmp_path: Path):
    write(tmp_path / "base.yaml", "model: {layers: 3, width: 32}\nseed: 1\n")
    path = write(tmp_path / "mine.yaml", "base: base.yaml\nmodel: {width: 64}\nseed: 2\n")
    config = load(path, {"seed": "3"})
    assert (config.model.layers, config.model.width, config.seed) == (3, 64, 3)
    assert config.name == "mine"


def test_a_name_is_not_inherited(tmp_path: Path):
    write(tmp_path / "base.yaml", "name: parent")
    assert load(write(tmp_path / "child.yaml", "base: base.yaml")).name == "child"


def test_a_batch_of_16_sequences_is_the_default():
    assert validate(Config, {"training": {"steps": 5}}).batch_sequences == 16
    assert validate(Config, {"training": {"batch_tokens": 256}}).batch_sequences == 2


def test_a_batch_size_on_top_replaces_one_below_in_the_other_unit(tmp_path: Path):
    sequences = write(tmp_path / "s.yaml", "training: {batch_sequences: 6}\nmodel: {context: 64}")
    tokens = write(tmp_path / "t.yaml", "training: {batch_tokens: 640}\nmodel: {context: 64}")
    assert load(sequences, {"training": {"batch_tokens": "128"}}).batch_sequences == 2
    assert load(tokens, {"training": {"batch_sequences": "3"}}).batch_sequences == 3
    assert load(tokens, {"training": {"batch_sequences": None}}).batch_sequences == 10
    above = write(tmp_path / "a.yaml", "base: s.yaml\ntraining: {batch_tokens: 256}")
    assert load(above).batch_sequences == 4
    resolved = write(tmp_path / "r.yaml", load(sequences).to_yaml())
    assert load(resolved, {"training": {"batch_tokens": 128}}).training.batch_sequences is None
    both = {"training.batch_tokens": 128, "training.batch_sequences": 2}
    for pairs in (both.items(), reversed(both.items())):  # on one level, neither wins
        with pytest.raises(InputError, match="are both given"):
            load(sequences, configs.nest(dict(pairs)))


def test_one_path_need_not_be_a_list():
    assert validate(Config, {"data": {"source": "text", "path": "a.txt"}}).data.path == ("a.txt",)


def test_a_base_that_leads_back_is_refused(tmp_path: Path):
    write(tmp_path / "a.yaml", "base: b.yaml")
    write(tmp_path / "b.yaml", "base: a.yaml")
    with pytest.raises(InputError, match="loops back"):
        load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("written", "expected"), [("3e-4", 3e-4), ("1", 1.0), ("1_000", 1000.0), ("1e-3", 1e-3)]
)
def test_numbers_that_yaml_1_1_reads_as_text(tmp_path: Path, written: str, expected: float):
    path = write(tmp_path / "c.yaml", f"optimizer: {{learning_rate: {written}}}")
    assert load(path).optimizer.learning_rate == expected


@pytest.mark.parametrize("written", ["1e6", "1_000_000", "1000000", "1.0e+6", "'1000000'"])
def test_whole_numbers_may_be_written_as_floats(tmp_path: Path, written: str):
    path = write(tmp_path / "c.yaml", f"training: {{steps: {written}, batch_sequences: 1}}")
    assert load(path).training.steps == 1_000_000


def test_large_seeds_keep_every_digit():
    assert validate(Config, {"seed": "9007199254740993"}).seed == 2**53 + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "line 2: duplicate key 'seed'"),
        ("model: {width: 1, width: 2}", "duplicate key 'width'"),
        ("a: &x 1\nb: *x", "aliases"),
        ("model: [", "line 1"),
        ("- 1", "must be a mapping"),
        ("1: 2", "must be a mapping"),
        ("? [a]", "is not valid YAML"),
        ("{{name}: 1}: 2", "is not valid YAML"),
        ("seed: !!int ''", "is not valid YAML"),
        ("seed: !!bool x", "is not valid YAML"),
        ("seed: !!timestamp foo", "is not valid YAML"),
        ("seed: !!int 0x" + "f" * 5000, "is not valid YAML: a number has too many digits"),
        ("base: none.yaml", "base: none.yaml: no such file (looked in "),
        ("base: 3", "base: must be the path"),
        ("x: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_broken_yaml_is_refused_with_file_and_line(tmp_path: Path, text: str, message: str):
    path = write(tmp_path / "broken.yaml", text)
    with pytest.raises(InputError, match=r"broken\.yaml") as caught:
        load(path)
    assert message in str(caught.value)


def test_deep_nesting_and_bad_encoding_are_refused(tmp_path: Path):
    deep = write(tmp_path / "deep.yaml", "a: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(InputError, match="deep"):
        load(deep)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(InputError, match=r"byte 6"):
        load(tmp_path / "bytes.yaml")
    (tmp_path / "x.parquet").write_bytes(b"PAR1\0")
    with pytest.raises(InputError, match=r"is a Parquet file, not UTF-8 text$"):
        load(tmp_path / "x.parquet")


def test_all_errors_at_once_by_dotted_path_with_the_nearest_name():
    message = error_of(
        {"model": {"widht": 3, "norm": {"placement": "prenorm"}}, "training": {"steps": "many"}}
    )
    assert "model.widht: no such option; perhaps you meant model.width" in message
    assert "model.norm.placement: 'prenorm' is not one of pre, post" in message
    assert "perhaps you meant pre" in message
    assert "training.steps: must be a whole number, found 'many'" in message
    assert len(message.splitlines()) == 3


def test_a_misspelled_section_is_found():
    assert "perhaps you meant training" in error_of({"traning": {"steps": 1}})


def test_an_option_in_the_wrong_section_is_found():
    assert "perhaps you meant optimizer.learning_rate" in error_of({"learning_rate": 1})


def test_many_errors_still_fit_three_lines():
    message = error_of(dict.fromkeys("abcdefg", 1))
    assert len(message.splitlines()) == 3
    assert all(f"{name}: no such option" in message for name in "abcdefg")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"training": {"steps": True, "batch_sequences": 1}}, "true is a boolean, not a number"),
        (
            {"training": {"steps": 0, "batch_sequences": 1}},
            "training.steps: 0 is not between 1 and 1,000,000,000",
        ),
        ({"optimizer": {"learning_rate": "nan"}}, "'nan' is not between 1e-30 and 1e+30"),
        ({"optimizer": {"learning_rate": ".inf"}}, "must be a number"),
        ({"model": {"heads": 3}}, "heads (3) must divide width (128)"),
        ({"training": {"batch_sequences": 1, "batch_tokens": 128}}, "set one of them to null"),
        ({"training": {"batch_tokens": 100}}, "must be a multiple of model.context (128)"),
        ({"training": {"batch_sequences": 6, "micro_batch": 4}}, "must divide the batch of 6"),
        (
            {"data": {"windows": "fixed"}, "training": {"nonfinite": "rollback"}},
            "training.nonfinite rollback conflicts with data.windows fixed",
        ),
        ({"data": {"source": "text"}}, "source: text needs path"),
        ({"name": "../up"}, "name: must begin with a letter or digit"),
        ({"model": 3}, "model: must be a mapping"),
    ],
)
def test_values_that_make_no_sense(tree: dict[str, Any], message: str):
    assert message in error_of(tree)


def test_errors_in_flags_name_the_flag_and_errors_in_python_the_option(tmp_path: Path):
    path = write(tmp_path / "c.yaml", "seed: -1")
    for flags, name in (
        (naming_flags(), "--model.norm.final-norm"),
        (contextlib.nullcontext(), "model.norm.final_norm"),
    ):
        with flags, pytest.raises(InputError) as caught:
            load(path, {"model": {"norm": {"final_norm": "0"}}})
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(f"{path}: seed:")
        assert lines[1].startswith(name)


def test_overrides_are_nested_or_dotted_or_both():
    changed = {
        "optimizer": {"learning_rate": 3e-3},
        "model": {"layers": 6, "norm": {"type": "rms"}},
    }
    expected = load("quickstart", changed)
    assert (expected.optimizer.learning_rate, expected.model.layers) == (3e-3, 6)
    dotted = {"optimizer.learning_rate": 3e-3, "model": {"layers": 6, "norm.type": "rms"}}
    assert load("quickstart", dotted) == expected
    assert load("quickstart", {"model": {}}) == load("quickstart")
    for wrong, message in {
        "optimizer.learnin_rate": "optimizer.learnin_rate: no such option; perhaps you meant "
        "optimizer.learning_rate",
        "model.layers.x": "model.layers.x: no such option; perhaps you meant model.layers",
        "model": "model: must be a mapping of options, found 3",
    }.items():
        with pytest.raises(InputError) as caught:
            load("quickstart", {wrong: 3})
        assert str(caught.value).startswith(message)
    with pytest.raises(InputError, match=r"^model\.norm\.7: no such option"):
        load("quickstart", {"model": {"norm": {7: 1}}})


def test_the_resolved_config_reads_back_equal(tmp_path: Path):
    config = load(ROOT / "configs/quickstart.yaml", {"optimizer": {"learning_rate": "3e-5"}})
    path = write(tmp_path / "resolved.yaml", config.to_yaml())
    assert load(path) == config
    assert set(yaml.safe_load(config.to_yaml())) == set(Config.model_fields)


def test_a_switch_may_be_written_as_yaml_reads_it(tmp_path: Path):
    path = tmp_path / "c.yaml"
    for word, expected in (("on", "on"), ("off", "off"), ("'off'", "off"), ("auto", "auto")):
        path.write_text(f"model: {{norm: {{final_norm: {word}}}}}")
        config = load(path)
        assert config.model.norm.final_norm == expected
        path.write_text(config.to_yaml())
        assert load(path) == config


def test_independent_decay_that_would_lose_the_weights_is_refused():
    message = error_of({"optimizer": {"independent_decay": True}})
    assert (
        "weight_decay (0.1): with independent_decay this fraction of the weights is lost" in message
    )
    assert validate(Config, {"optimizer": {"independent_decay": True, "weight_decay": 1e-4}})


def test_option_paths_reach_every_leaf():
    assert {"seed", "model.norm.placement", "sampling.top_p"} <= set(option_paths(Config))


def choices(section: type[configs.Section]) -> list[Choice]:
    found = []
    for info in section.model_fields.values():
        kinds = typing.get_args(info.annotation)  # `Choice | None` holds it one deeper
        notes = [*info.metadata, *(n for k in kinds for n in getattr(k, "__metadata__", ()))]
        found += [note for note in notes if isinstance(note, Choice)]
        if isinstance(info.annotation, type) and issubclass(info.annotation, configs.Section):
            found += choices(info.annotation)
    return found


def test_names_read_from_the_source_are_the_tables_keys(monkeypatch: pytest.MonkeyPatch):
    assert len(choices(Config)) == 10
    for choice in choices(Config):
        table = getattr(importlib.import_module(choice.module), choice.table)
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, choice.module)
            assert choice.names() == tuple(table)


def test_the_norm_lab_shows_every_variant():
    text = (ROOT / "configs/norm-lab.yaml").read_text("utf-8")
    shown = {
        key: {word.strip() for word in f"{value}|{others.partition(';')[0]}".split("|")} - {""}
        for key, value, others in re.findall(r"^ +(\w+): (\S+) # ?(\|.*)$", text, re.MULTILINE)
    }
    tables = {
        "placement": ("gpt.model.placement", "PLACEMENTS"),
        "type": ("gpt.model.norm", "NORMS"),
        "regime": ("gpt.model.init", "REGIMES"),
        "activation": ("gpt.model.gpt2", "ACTIVATIONS"),
        "warmup": ("gpt.schedule", "WARMUPS"),
        "body": ("gpt.schedule", "BODIES"),
        "name": ("gpt.optim", "OPTIMIZERS"),
    }
    for key, (module, table) in tables.items():
        names = Choice(module, table).names()
        assert shown[key] - {"null"} <= set(names), key
        assert len(shown[key]) >= min(len(names), 14), key  # a new placement may wait
    model = load(ROOT / "configs/norm-lab.yaml").model
    assert set(ModelConfig.model_fields) - set(yaml.safe_load(text)["model"]) == {
        *("layers", "heads", "width", "context")
    }
    assert model == load(ROOT / "configs/pre-norm.yaml").model.model_copy(
        update={"norm": model.norm}
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("prenorm", "pre"),
        ("rms_norm", "rms"),
        ("gelu_tahn", "gelu_tanh"),
        ("relu_2", "relu2"),
        ("swiglo", "swiglu"),
        ("deepnrm", "deepnorm"),
    ],
)
def test_the_nearest_variant(typed: str, meant: str):
    names = [
        *Choice("gpt.model.placement", "PLACEMENTS").names(),
        *Choice("gpt.model.norm", "NORMS").names(),
    ]
    names += Choice("gpt.model.gpt2", "ACTIVATIONS").names()
    assert nearest(typed, names) == f"; perhaps you meant {meant}"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.qk_norm", "model.attention.qk_norm"),
        ("log_every", "training.log_every"),
        ("model.widht", "model.width"),
        ("learning_rate", "optimizer.learning_rate"),
        ("data_sed", "data.seed"),
        ("data.tokenizer.type", "data.tokenizer"),
    ],
)
def test_the_nearest_option(typed: str, meant: str):
    assert nearest(typed, option_paths(Config)) == f"; perhaps you meant {meant}"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("batch_size", "training.batch_sequences"),
        ("gradient_accumulation_steps", "training.micro_batch"),
        ("n_layer", "model.layers"),
        ("n_head", "model.heads"),
        ("n_embd", "model.width"),
        ("block_size", "model.context"),
        ("vocab_size", "data.vocab_size"),
        ("max_iters", "training.steps"),
        ("warmup_iters", "schedule.warmup_steps"),
        ("min_lr", "schedule.final_ratio"),
        ("grad_clip", "optimizer.clip"),
        ("train.max_norm", "optimizer.clip"),
        ("eval_interval", "evaluation.every"),
        ("eval.interval", "evaluation.every"),
        ("max_new_tokens", "sampling.tokens"),
        ("temperature", "sampling.temperature"),
        ("dtype", "training.precision"),
        ("nlayers", "model.layers"),
        ("eps", "optimizer.eps"),
        ("norm.eps", "model.norm.eps"),
        ("eval.max_iters", "evaluation.sequences"),
        ("report_to", "tracking"),
        ("model_name_or_path", "init_from"),
        ("tokenizer_dir", "data.vocabulary"),
    ],
)
def test_an_option_by_its_name_in_another_program(typed: str, meant: str):
    assert nearest(typed, option_paths(Config)) == f"; perhaps you meant {meant}"


@pytest.mark.parametrize("typed", ["fused", "gradient_checkpointing", "train.do_train"])
def test_an_option_without_counterpart_has_no_hint(typed: str):
    assert nearest(typed, [*option_paths(Config), "training", "checkpoint"]) == ""


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lr": 1}, "lr: no such option; perhaps you meant optimizer.learning_rate"),
        ({"optimizer": {"lr": 1}}, "lr: no such option; perhaps you meant optimizer.learning_rate"),
        ({"train": {"lr": 1}}, "train: no such option; perhaps you meant training"),
        ({"eval": {"interval": 1}}, "eval: no such option; perhaps you meant evaluation"),
        ({7.5: 1}, "7.5: no such option"),
        ({"model": {"norm": {7: 1}}}, "model.norm.7: no such option"),
        ({"data": {"mix": [{7: 1}]}}, "data.mix.0.7: no such option"),
    ],
)
def test_a_key_by_its_name_in_another_program(tree: dict[str, Any], message: str):
    assert message in error_of(tree)


def test_every_alias_is_of_a_name_that_exists_and_hides_none():
    options = {path for s in (Config, SampleArguments) for path in option_paths(s)}
    sections = {path.partition(".")[0] for path in options if "." in path}
    schemas = json.dumps([Config.model_json_schema(), SampleArguments.model_json_schema()])
    values = set(re.findall(r'"(\w+)"', "".join(re.findall(r'"enum": \[.*?\]', schemas))))
    names = {name.replace("-", "_") for name in ALIASES}
    own = {"out_dir", "resume", "max_seconds", "workers"}  # arguments of commands
    assert names - values - options - sections - set(COMMANDS) == own
    lasts = {path.rpartition(".")[2] for path in option_paths(Config)}
    hidden = {a for name, aliases in ALIASES.items() if "." in name for a in aliases} & lasts
    # In other programs, dtype is that of the weights, not of token files, and eps is Adam's.
    assert hidden == {"dtype", "eps"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.name", "adam", "perhaps you meant adamw"),
        ("optimizer.name", "Adam", "perhaps you meant adamw"),
        ("model.norm.type", "RMSNorm", "perhaps you meant rms"),
        ("schedule.body", "constant_with_warmup", "perhaps you meant constant"),
        (
            "schedule.warmup",
            None,
            "null is not one of none, linear, cosine; perhaps you mean",
        ),
        ("schedule.warmup", False, "false is not one of none, linear, cosine; perhaps you meant"),
        (
            "training.device",
            "gpu",
            "must be auto, cpu, cuda or mps, found 'gpu'; perhaps you m",
        ),
        ("training.precision", "bfloat16", "perhaps you meant bf16"),
        ("training.precision", 16, "found 16; perhaps you meant fp16"),
        ("model.mlp.activation", "relu_squared", "perhaps you meant relu2"),
        ("optimizer.name", "paged_adamw_8bit", "perhaps you meant adamw"),
        ("training.micro_batch", "x", "must be auto or a whole number, found 'x'"),
        ("training.micro_batch", 0, "training.micro_batch: 0 is not between 1 and 1,000,000,000"),
        ("training.steps", 2.5, "must be a whole number, found 2.5"),
        ("model.bias", "maybe", "must be true or false, found 'maybe'"),
        ("model.bias", None, "must be true or false, found null"),
        (
            "optimizer.clip",
            "none",
            "must be a number, found 'none'; null switches it off: no",
        ),
        (
            "optimizer.clip",
            False,
            "false is a boolean, not a number; null switches it off: no",
        ),
        ("checkpoint.every", "off", "found 'off'; null unsets it: as evaluation.every"),
        ("optimizer.clip", 0.0, "0.0 is not between 1e-30 and 1e+30; null switches it off: no"),
        ("sampling.top_k", -1, "; null unsets it: from all"),
        ("evaluation.patience", 0, "0 is not between 1 and 1,000,000,000; null switches it off"),
        ("tracking", "none", "'none' is not one of tensorboard, wandb, trackio; [] means none"),
        ("tracking", False, "tracking: must be a list, found false; [] means none"),
        ("evaluation.every", "none", "evaluation.every: must be a whole number, found 'none'"),
        ("data.path", {"a": None}, "data.path: must be a list, found {a: null}"),
        (
            "data.mix",
            [{"weigth": 1}],
            "data.mix.0.weigth: no such option; perhaps you meant data",
        ),
        (
            "name",
            "a b",
            "name: must begin with a letter or digit, and contain only letters",
        ),
        ("name", "x" * 101, "name: must have at most 100 characters, found 'xxx"),
        ("optimizer", "adamw", "optimizer: must be a mapping of options, found 'adamw'"),
    ],
)
def test_wrong_values_are_described_in_words(key: str, value: object, message: str):
    found = error_of(configs.nest({key: value}))
    assert message in found
    assert not re.search(r"None|True|False|pattern|Input|valid|\^", found)


def test_a_variant_added_at_run_time_is_valid(monkeypatch: pytest.MonkeyPatch):
    from gpt.model.placement import PLACEMENTS, PreNorm

    monkeypatch.setitem(PLACEMENTS, "mine", PreNorm)
    assert validate(Config, {"model": {"norm": {"placement": "mine"}}})


def test_the_shipped_schema_is_current():
    shipped = (ROOT / "configs/schema.json").read_text("utf-8")
    assert shipped == schema(), "python -m gpt.config > configs/schema.json"


def test_every_option_is_documented():
    def check(section: type[configs.Section]) -> None:
        assert section.__doc__
        for name, info in section.model_fields.items():
            below = info.annotation
            if isinstance(below, type) and issubclass(below, configs.Section):
                check(below)
            else:
                assert info.description, name

    check(Config)


def test_a_tilde_in_a_path_is_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "base.yaml").write_text("seed: 7")
    path = tmp_path / "c.yaml"
    path.write_text("base: ~/base.yaml\ndata: {source: text, path: ['~/a/*.txt', ./~b, c~]}")
    over = {"data": {"cache_dir": "~/x", "mix": [{"path": "~/m"}], "path": []}}
    config = load(path, {"checkpoint": {"spare_dir": "~"}})
    assert config.seed == 7
    assert config.data.path == (f"{tmp_path}/a/*.txt", "./~b", "c~")
    assert config.checkpoint.spare_dir == str(tmp_path)
    data = load(path, over).data
    assert data.cache_dir == f"{tmp_path}/x"
    assert data.sources[0].path == (f"{tmp_path}/m",)


def test_no_such_user_is_an_error_and_not_a_folder(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {source: text, path: ~no-such-user/x}")
    with pytest.raises(InputError, match=r"data\.path\.0: ~no-such-user/x: there is no user"):
        load(path)
    path.write_text("base: ~no-such-user/x")
    with pytest.raises(InputError, match="there is no user no-such-user"):
        load(path)


@pytest.mark.parametrize("name", ["con", "NUL", "aux.v2", "com1", "run."])
def test_a_name_that_windows_reserves_is_refused(name: str, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(f"name: {name}")
    with pytest.raises(InputError, match="not a valid file name on Windows"):
        load(path)


def numbers(section: type[configs.Section], prefix: str = "") -> dict[str, configs.Between]:
    """Every option that is a number, by its dotted path, and its range."""
    found = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, configs.Section):
            found |= numbers(info.annotation, f"{prefix}{name}.")
        kinds = typing.get_args(info.annotation)
        notes = [*info.metadata, *(n for k in kinds for n in getattr(k, "__metadata__", ()))]
        found |= {f"{prefix}{name}": note for note in notes if isinstance(note, configs.Between)}
    return found


SECTIONS = {"Config": Config, "MixedSource": configs.MixedSource, "Sampling": SampleArguments}
REQUIRED = {"Sampling": {"run_dir": "run"}}
NUMBERS = [(name, key) for name, section in SECTIONS.items() for key in numbers(section)]


def test_every_number_has_a_range():
    schema = Config.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        for name, option in section["properties"].items():
            for kind in option.get("anyOf", [option]):
                if kind.get("type") in ("integer", "number"):
                    assert {"minimum", "maximum"} <= kind.keys(), name
    assert len(NUMBERS) > 50


@pytest.mark.parametrize(("section", "key"), NUMBERS, ids=lambda each: str(each))
def test_a_number_out_of_its_range_is_refused_with_key_value_and_range(section: str, key: str):
    kind = SECTIONS[section]
    between = numbers(kind)[key]
    too_large = [
        2 * between.maximum + 1,
        "9" * 309,
        "9" * 5000,
        10**5000,
        "1e301",
        "inf",
        float("inf"),
    ]
    too_small = [between.minimum - max(1e-31, between.minimum), -1, "-1e301", "-inf", "nan"]
    for value in [*too_large, *too_small]:
        if value == between.minimum:  # 0 - 0
            continue
        with pytest.raises(InputError) as caught:
            validate(kind, configs.nest({key: value, **REQUIRED.get(section, {})}))
        message = str(caught.value)
        assert message.startswith(f"{key}: "), message
        assert f" is not {between}" in message
        assert len(message) < 250


@pytest.mark.parametrize("written", ["9" * 309, "9" * 5000, "0x" + "f" * 90, "1e301", "-1", ".nan"])
def test_out_of_range_in_a_file_names_file_and_key(tmp_path: Path, written: str):
    for key in ("training.steps", "optimizer.learning_rate"):
        section, name = key.split(".")
        path = write(tmp_path / "c.yaml", f"{section}: {{{name}: {written}}}")
        with pytest.raises(InputError) as caught:
            load(path)
        assert re.fullmatch(rf"{path}: {key}: .* is not between 1\S* and 1\S*", str(caught.value))


@pytest.mark.parametrize("written", ["1:30", "1:1:1.5", "0o17", "0x" + "f" * 5000])
def test_what_yaml_1_2_reads_as_text_is_not_a_number(tmp_path: Path, written: str):
    path = write(tmp_path / "c.yaml", f"seed: {written}")
    with pytest.raises(InputError, match="seed: must be a whole number"):
        load(path)
    path = write(tmp_path / "c.yaml", f"sampling: {{prompt: {written}}}")
    assert load(path).sampling.prompt == written


def test_a_date_is_text_and_a_leading_zero_is_ignored(tmp_path: Path):
    path = write(tmp_path / "c.yaml", "name: 2026-01-02\nseed: 010\ntraining: {steps: 0x1f}")
    config = load(path)
    assert (config.name, config.seed, config.training.steps) == ("2026-01-02", 10, 31)


@pytest.mark.parametrize("unit", [":1", "9", "_"])
@pytest.mark.parametrize("before", ["seed: 1", "seed: !!int 1", "seed: !!float 1"])
def test_the_cost_of_a_number_is_linear(tmp_path: Path, before: str, unit: str):
    path = write(tmp_path / "c.yaml", before + unit * (configs.MAX_BYTES // len(unit) - 10))
    began = time.process_time()
    with contextlib.suppress(InputError):
        load(path)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("over", ["layers", "norm"])
def test_a_mapping_does_not_replace_another_value(tmp_path: Path, over: str):
    on_top = {"layers": {"layers": "3"}, "norm": {"norm": {"eps": "0.1"}}}[over]
    below = {"layers": "model: 5", "norm": "model: {norm: 5}"}[over]
    key = {"layers": "model", "norm": "model.norm"}[over]
    write(tmp_path / "base.yaml", below)
    path = write(tmp_path / "mine.yaml", yaml.safe_dump({"base": "base.yaml", "model": on_top}))
    for load_it in (
        lambda: load(path),
        lambda: load(tmp_path / "base.yaml", {"model": on_top}),
    ):
        with pytest.raises(InputError, match=f"{key}: must be a mapping of options, found 5"):
            load_it()


def test_a_long_chain_of_bases_is_refused(tmp_path: Path):
    for n in range(100):
        write(tmp_path / f"{n}.yaml", f"base: {n + 1}.yaml\nseed: {n}")
    write(tmp_path / "100.yaml", "seed: 100")
    with pytest.raises(InputError, match=r"16\.yaml: base: a chain of more than 16 base files"):
        load(tmp_path / "0.yaml")
    assert load(tmp_path / "84.yaml").seed == 84


def test_a_config_or_base_that_is_not_a_small_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "long.yaml", "#" * (configs.MAX_BYTES + 1))
    for name, words in (
        ("pipe", "is a named pipe, not a regular file"),
        ("long.yaml", "is larger than 131,072 bytes"),
        (".", "is a folder, not a regular file"),
    ):
        with pytest.raises(InputError, match=words):
            load(tmp_path / name)
        with pytest.raises(InputError, match=words):
            load(write(tmp_path / "mine.yaml", f"base: {name}"))


def test_thousands_of_errors_come_at_once_and_in_three_lines():
    began = time.process_time()
    message = error_of({f"modle{n}": 1 for n in range(3_000)})
    assert "and 2,998 more: modle2: no such option" in message
    assert time.process_time() - began < 2

"""`init_from`: the options and weights that a run takes from its source, and refused sources."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from conftest import vouch
from safetensors.torch import load_file, save_file
from test_cli import called
from test_exporting import BYTES, EXPORTABLE, TOKENS, logits, network
from test_hub import COMMIT, Hub

from gpt import load, load_run, train
from gpt.compare import grid as grids
from gpt.config import Config, merge, nest
from gpt.config.layouts import LAYOUTS, SIZES
from gpt.ensemble import train_together
from gpt.errors import InputError
from gpt.exchange import pretrained
from gpt.exchange.exporting import export
from gpt.model.gpt2 import GPT
from gpt.rng import generator
from gpt.run.opening import start_afresh
from gpt.run.recovery import roll_back
from gpt.trainer import Trainer

Make = Callable[..., Config]
Write = Callable[..., Path]


@pytest.fixture
def written(tree: dict[str, Any], tmp_path: Path) -> Write:
    """Write a config with `init_from` and the options of `tree`, except its model and tokenizer."""

    def write(source: object, name: str = "tuned", **options: Any) -> Path:
        plain = {key: value for key, value in tree.items() if key not in ("name", "model")}
        plain["data"] = {k: v for k, v in tree["data"].items() if k != "tokenizer"}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge({**plain, "init_from": str(source)}, options)))
        return path

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network of random weights, with the vocabulary of bytes."""
    path = tmp_path_factory.mktemp("exported") / "pre"
    export(network(EXPORTABLE["pre"]), BYTES, path, "card")
    return path


def started(config: Config, weights: pretrained.Pretrained | None = None) -> GPT:
    """The network of a run before its first update."""
    trainer = Trainer(config, BYTES.n_vocab, torch.device("cpu"))
    start_afresh(trainer, lambda: torch.tensor(TOKENS)[:, : config.model.context], weights)
    return trainer.model


# -- From a run -----------------------------------------------------------------------------------


def test_a_run_starts_from_the_best_weights_of_another(
    tiny_run: Path, written: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = load(written(tiny_run))
    source, _, step = load_run(tiny_run)
    assert config.model == source.config
    assert config.data.tokenizer == "file"
    assert config.data.vocabulary == str(tiny_run / "tokenizer.json")
    short = ("--training.steps", 2, "--evaluation.every", 2)
    code, _, err = called(capsys, "train", written(tiny_run), "--out-dir", tmp_path / "run", *short)
    assert code == 0, err
    weights = tiny_run / f"checkpoints/step-{step:08d}/model.safetensors"
    assert f"initial weights: {weights.parent}\n" in err
    first, *_ = map(json.loads, (tmp_path / "run/metrics.jsonl").open())
    result = json.loads((tiny_run / "result.json").read_text())
    assert first == {**first, "step": 0, "val_loss": result["best_val_loss"]}
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert environment["init_from"] == {"source": str(tiny_run), "sha256": {str(weights): digest}}
    found = started(config).state_dict()
    assert all(torch.equal(found[name], each) for name, each in source.state_dict().items())


def test_a_checkpoint_is_a_source_too(tiny_run: Path, written: Write):
    checkpoint = tiny_run / "checkpoints/step-00000010"
    config = load(written(checkpoint))
    assert config.data.vocabulary == str(checkpoint / "tokenizer.json")
    found, (source, *_) = started(config).state_dict(), load_run(tiny_run, "10")
    assert all(torch.equal(found[name], each) for name, each in source.state_dict().items())


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_the_file_that_names_a_checkpoint_is_a_source(
    pointer: str, tiny_run: Path, tmp_path: Path, written: Write
):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "checkpoints/latest").write_text("step-00000020\n")
    (run / "checkpoints/best").write_text("step-00000010\n")
    config = load(written(run / "checkpoints" / pointer))
    assert config.data.vocabulary == str(run / "tokenizer.json")
    weights, chosen = pretrained.find(config), run / "checkpoints" / pointer
    assert weights.folder.name == chosen.read_text().strip()
    chosen.write_text("step-00000020\n" if pointer == "best" else "step-00000010\n")
    found = started(config, weights)  # the run has trained on, and the weights are those found
    expected = load_file(weights.folder / "model.safetensors")
    assert torch.equal(found.token_embedding.weight, expected["token_embedding.weight"])


def test_a_shorter_context_and_another_dropout_are_allowed(tiny_run: Path, written: Write):
    config = load(written(tiny_run, model={"context": 5, "dropout": 0.2}))
    assert (config.model.context, config.model.dropout) == (5, 0.2)
    assert config.model.width == 16
    plan = pretrained.find(config)
    assert plan is not None
    assert plan.summary(config.model).endswith(", the first 5 of their 16 positions")
    found = started(config).state_dict()
    source = load_run(tiny_run)[0].state_dict()
    assert torch.equal(found["position_embedding.weight"], source["position_embedding.weight"][:5])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"layers": 3}, "model.layers: 3 conflicts with 2"),
        ({"norm": {"eps": 1e-6}}, "model.norm.eps: 1e-06 conflicts with 1e-05"),
        ({"norm": {"placement": "post"}}, "model.norm.placement: post conflicts with pre"),
        ({"init": {"regime": "xavier"}}, "model.init.regime: xavier conflicts with gpt2"),
        ({"logit_soft_cap": 30}, "model.logit_soft_cap: 30.0 conflicts with None"),
        ({"context": 17}, "model.context: 17 is longer than 16"),
    ],
)
def test_other_options_must_agree(tiny_run: Path, written: Write, model: Any, message: str):
    path = written(tiny_run, model=model)
    with pytest.raises(InputError) as caught:
        load(path)
    assert f"{path}: {message}" in str(caught.value)
    assert str(tiny_run) in str(caught.value)


def test_options_that_say_the_same_agree(tiny_run: Path, written: Write):
    same = {"norm": {"type": "layer", "final_norm": "on", "bias": True}, "layers": 2}
    assert load(written(tiny_run, model=same)).model.norm.type == "layer"


def test_a_resumed_run_does_not_need_its_source(
    tiny_run: Path, written: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(tiny_run, source)
    path = written(source, training={"steps": 4}, evaluation={"every": 4})
    calls: list[None] = []
    stop = {"on_update": lambda: calls.append(None), "stop": lambda: len(calls) == 2}
    assert train(load(path), out, quiet=True, **stop).status == "interrupted"
    whole = train(load(path), tmp_path / "whole", quiet=True)
    shutil.rmtree(source)
    code, _, err = called(capsys, "train", path, "--out-dir", out)
    assert code == 0, err
    assert json.loads((out / "result.json").read_text())["val_loss"] == whole.val_loss
    code, _, err = called(capsys, "train", path, "--out-dir", tmp_path / "new")
    assert code == 2
    assert f"{path}: init_from: {source}: no such folder" in err
    assert not (tmp_path / "new").exists()


def test_another_run_from_its_checkpoint_does_not_need_the_source(
    tiny_run: Path, written: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(tiny_run, source)
    short = {"steps": 2}, {"every": 2}
    path = written(source, training=short[0], evaluation=short[1])
    assert train(load(path), out, quiet=True).status == "finished"
    shutil.rmtree(source)
    longer = ("--training.steps", 4, "--resume", out / "checkpoints/latest")
    code, _, err = called(capsys, "train", path, "--out-dir", tmp_path / "branch", *longer)
    assert code == 0, err
    assert "initial weights" not in err
    assert json.loads((tmp_path / "branch/result.json").read_text())["step"] == 4


def test_a_run_whose_source_is_gone_cannot_return_to_it(tiny_run: Path, written: Write, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_run, source)
    trainer = Trainer(load(written(source)), BYTES.n_vocab, torch.device("cpu"))
    shutil.rmtree(source)

    class NoCheckpoint:
        def newest(self, among: object) -> None:
            return None

    from gpt.checkpoint.state import Progress
    from gpt.errors import Fault

    fault = Fault(3, "loss", "is not finite")
    assert roll_back(trainer, NoCheckpoint(), Progress(step=2), fault, lambda: None) is None


def test_the_example_fine_tunes_the_quickstart(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"init_from: runs/quickstart: .*;\nset init_from to a run"
    ):
        load("finetune")
    shutil.copytree(tiny_run, tmp_path / "runs/quickstart")
    options = {"model": {"context": 16}, "data": {"path": [str(corpus)]}}
    config = load("finetune", options)
    assert config.model == load_run(tiny_run)[0].config
    assert config.data.vocabulary == "runs/quickstart/tokenizer.json"


# -- From an exported folder -----------------------------------------------------------------------


@pytest.mark.parametrize("options", EXPORTABLE.values(), ids=EXPORTABLE)
def test_export_and_back_is_exact(options: dict[str, Any], tmp_path: Path, written: Write):
    model = network(options)
    export(model, BYTES, tmp_path / "out", "card")
    config = load(written(tmp_path / "out"))
    found = started(config).eval()
    scaled = model.logit_scale != 1  # then the last norm has the factor
    for name, tensor in model.state_dict().items():
        if not (scaled and name.startswith(("final_norm", "blocks.1.mlp_norm"))):
            assert torch.equal(found.state_dict()[name], tensor), name
    assert found.state_dict().keys() == model.state_dict().keys()
    np.testing.assert_allclose(logits(found), logits(model), rtol=0, atol=1e-6 if scaled else 0)
    export(found, BYTES, tmp_path / "again", "card")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def split(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the weights as two files and their index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def halves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As in GPT-2's own file on the hub: no prefix, and the causal masks."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 6, 6).tril() for i in range(2)}
    return {name.removeprefix("transformer."): each for name, each in tensors.items()} | masks


def test_other_forms_of_the_same_folder(folder: Path, tmp_path: Path, written: Write):
    expected = started(load(written(folder))).state_dict()
    for name, change in (("halves", halves), ("bare", bare), ("parts", None)):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "model.safetensors")
        if change is None:
            split(copy, tensors)
        else:
            save_file(change(tensors), copy / "model.safetensors")
        found = started(load(written(copy))).state_dict()
        for key, tensor in expected.items():
            tensor = tensor.bfloat16().float() if name == "halves" else tensor
            assert torch.equal(found[key], tensor), (name, key)


# The values that transformers 5.23 documents for keys that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "layers": 12, "heads": 12, "width": 768, "context": 1024, "dropout": 0.1,
        "norm.eps": 1e-5, "norm.placement": "pre", "mlp.activation": "gelu_tanh",
        "tied_head": True,
    },
    "opt": {
        "layers": 12, "heads": 12, "width": 768, "context": 2048, "dropout": 0.1,
        "norm.placement": "post", "mlp.activation": "relu", "tied_head": True,
    },
}  # fmt: skip


def test_what_a_config_leaves_out_has_the_value_of_transformers():
    assert LAYOUTS["gpt2"].to_options({}) == nest(DEFAULTS["gpt2"])
    assert LAYOUTS["opt"].to_options({"do_layer_norm_before": False}) == nest(DEFAULTS["opt"])
    with pytest.raises(InputError, match="do_layer_norm_before: True is not supported"):
        LAYOUTS["opt"].to_options({})


@pytest.mark.parametrize(
    ("spelled", "ours"),
    [
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("relu", "relu"),
        ("relu2", "relu2"),
    ],
)
def test_the_spellings_of_activations(spelled: str, ours: str):
    options = LAYOUTS["gpt2"].to_options({"activation_function": spelled})
    assert options["mlp"] == {"activation": ours}


# -- What is refused ------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value != "absent"}))


def replace(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_part(folder: Path) -> None:
    split(folder, load_file(folder / "model.safetensors"))
    (folder / "model-00002-of-00002.safetensors").unlink()


QKV = "transformer__h__1__attn__c_attn__weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "has neither config.yaml nor config.json",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is damaged"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: is damaged"),
    "llama": (lambda f: edit(f, model_type="llama"), "config.json: model_type: 'llama' is another"),
    "no type": (lambda f: edit(f, model_type="absent"), "model_type: None is another architecture"),
    "odd type": (lambda f: edit(f, model_type=[1]), "model_type: [1] is another architecture"),
    "cross": (
        lambda f: edit(f, add_cross_attention=True),
        "add_cross_attention: True is not supported, only False",
    ),
    "scaling": (
        lambda f: edit(f, scale_attn_by_inverse_layer_idx=True),
        "config.json: scale_attn_by_inverse_layer_idx: True is not supported, only False",
    ),
    "scores": (
        lambda f: edit(f, scale_attn_weights=False),
        "scale_attn_weights: False is not supported, only True",
    ),
    "activation": (lambda f: edit(f, activation_function="silu"), "activation_function: 'silu' is"),
    "inner": (lambda f: edit(f, n_inner="x"), "n_inner: 'x' is not a whole number"),
    "width": (lambda f: edit(f, n_embd="wide"), "config.json: n_embd: must be"),
    "negative": (lambda f: edit(f, n_layer=-1), "config.json: n_layer: -1 is not between 1"),
    "heads": (lambda f: edit(f, n_head=3), "heads (3) must divide width (8)"),
    "more layers": (lambda f: edit(f, n_layer=3), "has no tensor transformer.h.2.ln_1.weight"),
    "fewer layers": (lambda f: edit(f, n_layer=1), "transformer.h.1.attn.c_attn.bias is not part"),
    "free head": (
        lambda f: edit(f, tie_word_embeddings=False),
        "no tensor lm_head.weight, of shape",
    ),
    "missing": (
        lambda f: replace(f, **{QKV: None}),
        "no tensor transformer.h.1.attn.c_attn.weight",
    ),
    "misshapen": (
        lambda f: replace(f, **{QKV: torch.zeros(24, 8)}),
        "transformer.h.1.attn.c_attn.weight has the shape [24, 8], not [8, 24]",
    ),
    "integers": (
        lambda f: replace(f, **{QKV: torch.zeros(8, 24, dtype=torch.int8)}),
        "transformer.h.1.attn.c_attn.weight has I8 numbers, not F32, F16, BF16",
    ),
    "no embedding": (
        lambda f: replace(f, transformer__wte__weight=None),
        "has no tensor transformer.wte.weight",
    ),
    "scalar embedding": (
        lambda f: replace(f, transformer__wte__weight=torch.tensor(1.0)),
        "transformer.wte.weight has the shape []",
    ),
    "more": (
        lambda f: replace(f, score__weight=torch.zeros(2, 8)),
        "score.weight is not part of the",
    ),
    "vocabulary": (
        lambda f: replace(f, transformer__wte__weight=torch.zeros(300, 8)),
        "are for 300;\ntrain.py: set data.vocabulary to that of the weights",
    ),
    "damaged": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
        "model.safetensors: is damaged",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle": (as_bin, "pytorch_model.bin: is not read, because loading a .bin can execute code"),
    "part": (lose_part, "model-00002-of-00002.safetensors: is missing, but"),
    "index": (
        lambda f: (as_bin(f), (f / "model.safetensors.index.json").write_text("{}")),
        "model.safetensors.index.json: is damaged",
    ),
    "biases": (
        lambda f: edit(f, steadygpt={"bias": False}),
        "is not 0, but config.json says that the network has no such bias",
    ),
}


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_wrong_folder_is_refused(
    change: Callable[[Path], object], message: str, folder: Path, tmp_path: Path, written: Write,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    copy, out = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(folder, copy)
    change(copy)
    code, _, err = called(capsys, "train", written(copy), "--out-dir", out)
    assert code == 2, err
    assert message in err
    assert err.count("\n") <= 12
    assert not out.exists()


def test_another_vocabulary_of_the_same_size_is_refused(
    tiny_run: Path, written: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tree = json.loads((tiny_run / "tokenizer.json").read_text())
    tree["tokens"][65:67] = tree["tokens"][66:64:-1]
    (tmp_path / "swapped.json").write_text(json.dumps(tree))
    other = {"tokenizer": "file", "vocabulary": str(tmp_path / "swapped.json")}
    code, _, err = called(
        capsys, "train", written(tiny_run, data=other), "--out-dir", tmp_path / "run"
    )
    assert code == 2
    assert "data.tokenizer: file has other tokens than the weights of init_from" in err
    same = written(tiny_run, data={"tokenizer": "bytes"}, training={"steps": 1})
    assert called(capsys, "train", same, "--out-dir", tmp_path / "run")[0] == 0


@pytest.mark.parametrize("tokenizer", ["bpe", "chars"])
def test_a_vocabulary_made_from_the_new_text_is_refused_before_any_is_prepared(
    tokenizer: str, tiny_run: Path, written: Write, tmp_path: Path, capsys
):
    data = {"tokenizer": tokenizer, "cache_dir": str(tmp_path / "cache")}
    path = written(tiny_run, data=data)
    for more in ([], ["--dry-run"]):
        code, _, err = called(capsys, "train", path, "--out-dir", tmp_path / "run", *more)
        assert code == 2
        assert f"data.tokenizer: {tokenizer} makes a vocabulary from the new text" in err
        assert f"data.vocabulary: {tiny_run / 'tokenizer.json'}" in err
    assert not (tmp_path / "cache").exists()


def test_a_damaged_checkpoint_is_refused(tiny_run: Path, tmp_path: Path, written: Write):
    shutil.copytree(tiny_run, tmp_path / "copy")
    checkpoint = tmp_path / "copy/checkpoints/step-00000020"
    config = load(written(checkpoint))
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    with pytest.raises(InputError, match=r"step-00000020/model\.safetensors: is damaged"):
        started(config)
    save_file({name: each for name, each in tensors.items() if "up" not in name}, weights)
    vouch(checkpoint)
    with pytest.raises(InputError, match=r"has no tensor blocks\.0\.mlp\.up\.weight"):
        started(config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("runs/none", r"runs/none: no such folder;\nset init_from to a run directory"),
        ("../x/y/z", r"no such folder"),
        ("mine", r"mine: no such folder; perhaps you meant runs/mine"),
        ("runs/mien", r"runs/mien: no such folder; perhaps you meant runs/mine"),
        ("runs/mine/checkpoints", r"nor config\.json; perhaps you meant runs/mine;"),
        ("runs", r"runs: has neither .* nor config\.json; perhaps you meant runs/mine;"),
        ("folder", r"folder: has neither config\.yaml nor config\.json"),
        ("file.txt", r"file\.txt: is a file"),
        ("folder/nothing", r"folder/nothing: no such folder"),
        ("fol der", r"fol der: no such folder; perhaps you meant folder"),
        ("step-00000001", r"step-00000001: its run's config is missing"),
        ([1], r"c\.yaml: init_from: "),
        ("", r"init_from: .*is empty"),
    ],
)
def test_a_name_of_nothing_is_refused_without_a_network(
    source: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt.config.source.download", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "runs/mine/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").touch()
    (tmp_path / "file.txt").touch()
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"init_from": source}))
    with pytest.raises(InputError, match=message):
        load("c.yaml")


def test_a_repository_without_safetensors_is_refused(
    written: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setattr("gpt.config.source.download", lambda *arguments: tmp_path)
    with pytest.raises(
        InputError, match=r"init_from: me/model: has no model\.safetensors on the hub"
    ):
        pretrained.find(load(written("me/model")))


# -- GPT-2's names, comparisons, ensembles ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("openai-community/gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_sizes_of_gpt2_need_no_network(
    name: str, parameters: int, written: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt.config.source.download", None)
    config = load(written(name, model={"context": 256}))
    assert config.data.tokenizer == "gpt2"
    assert config.model.dropout == 0.1
    with torch.device("meta"):
        whole = GPT(config.model.model_copy(update={"context": 1024}), 50257)
    assert whole.num_parameters() == parameters
    assert name.removeprefix("openai-community/") in SIZES


def test_comparisons_and_coordcheck_refuse_it(
    tiny_run: Path, written: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = written(tiny_run)
    arms = {"warmup": {w: {"schedule.warmup": w} for w in ("none", "linear")}}
    grid = {
        "base": str(path),
        "arms": arms,
        "grid": {"optimizer.learning_rate": [0.01]},
        "seeds": 1,
    }
    for changes in (
        {},
        {"base": {}, "options": {"init_from": str(tiny_run)}},
        {"base": {}, "grid": {"init_from": [str(tiny_run)]}},
    ):
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**grid, **changes}))
        with pytest.raises(InputError, match="a comparison trains new networks"):
            grids.load(tmp_path / "grid.yaml")
    code, _, err = called(capsys, "coordcheck", path)
    assert (code, "only new networks are checked" in err) == (2, True)


def test_an_ensemble_starts_from_it(tiny_run: Path, written: Write, tmp_path: Path):
    path = written(tiny_run, training={"steps": 2}, evaluation={"every": 2})
    configs = [load(path, {"seed": seed}) for seed in range(2)]
    paths = [tmp_path / f"cell-{seed}" for seed in range(2)]
    options = {"stop": lambda: False, "on_update": lambda i: None, "save_checkpoints": True}
    results = train_together(configs, paths, **options)
    best = json.loads((tiny_run / "result.json").read_text())["best_val_loss"]
    first = [json.loads((each / "metrics.jsonl").open().readline()) for each in paths]
    assert [record["val_loss"] for record in first] == [best, best]
    assert len({result.val_loss for result in results}) == 2  # the data differs


# -- Folders made by transformers ------------------------------------------------------------------


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_small_folder_of_transformers(
    transformers: Any, kind: str, tied: bool, tmp_path: Path, written: Write
):
    common = {"vocab_size": 257, "tie_word_embeddings": tied, "bos_token_id": 256}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=6, **common)
    else:
        config = transformers.OPTConfig(
            hidden_size=8, ffn_dim=20, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=6, do_layer_norm_before=False, pad_token_id=None, **common,
        )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "folder", max_shard_size="4KB")
    assert (tmp_path / "folder/model.safetensors.index.json").is_file()
    ours = load(written(tmp_path / "folder", data={"tokenizer": "bytes"}))
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(started(ours).eval()), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_gpt2_small_as_transformers_writes_it(transformers: Any, tmp_path: Path, written: Write):
    """The real shape, with random weights and GPT-2's vocabulary."""
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    theirs = theirs.to_empty(device="cpu")
    theirs.tie_weights()
    with torch.no_grad():
        for index, parameter in enumerate(theirs.parameters()):
            few = torch.empty(997).normal_(generator=generator(index, "test")) * 0.05
            count = parameter.numel()
            parameter.copy_(few.repeat(count // 997 + 1)[:count].view(parameter.shape))
    theirs.save_pretrained(tmp_path / "gpt2")
    config = load(written(tmp_path / "gpt2", data={"tokenizer": "gpt2"}, model={"context": 64}))
    assert (config.model.layers, config.model.heads, config.model.width) == (12, 12, 768)
    weights = pretrained.find(config)
    assert (weights.context, weights.vocab_size) == (1024, 50257)
    model = GPT(config.model, weights.vocab_size).eval()
    model.load_state_dict(weights.load(config.model))
    tokens = torch.tensor([[464, 2068, 7586, 21831, 50256]])
    with torch.no_grad():
        found, expected = model(tokens), theirs.eval()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_gpt2s_sizes_have_the_names_and_shapes_of_transformers(
    transformers: Any, name: str, tmp_path: Path, written: Write, monkeypatch: pytest.MonkeyPatch
):
    """Also in the form of the hub's files, without the prefix and with the causal masks."""
    with torch.device("meta"):
        config = transformers.GPT2Config(**SIZES[name])
        theirs = transformers.GPT2LMHeadModel(config).state_dict()
    shapes = {n: tuple(t.shape) for n, t in theirs.items()}
    masks = {f"h.{i}.attn.bias": (1, 1, 1024, 1024) for i in range(config.n_layer)}
    plain = {n.removeprefix("transformer."): each for n, each in shapes.items()} | masks
    del plain["lm_head.weight"]
    for found in (shapes, plain):
        headers = {n: pretrained.Header(tmp_path, shape, "F32") for n, shape in found.items()}
        monkeypatch.setattr(pretrained, "locate", lambda source: tmp_path)
        monkeypatch.setattr(pretrained, "_headers", lambda folder, headers=headers: headers)
        weights = pretrained.find(load(written(name, model={"context": 512})))
        assert (weights.context, weights.vocab_size) == (1024, 50257)
        used = {n for _, names in weights.parts.values() for n in names}
        assert used == {n for n in found if not n.endswith((".attn.bias", "lm_head.weight"))}


# -- The hub --------------------------------------------------------------------------------------


class ModelHub(Hub):
    """The part of the hub that is requested for the weights of one repository, me/model."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        if path.startswith("/api/models/me/model/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
                for name, content in self.files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/me/model"):
            names = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "me/model", "sha": COMMIT, "siblings": names}).encode())
        elif path.rpartition("/")[2] in self.files and "me/model" in path:
            self.answer(self.files[path.rpartition("/")[2]])
        else:
            self.answer(b"", 404, "EntryNotFound" if "me/model" in path else "RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def start(
    written: Write, tmp_path: Path, environment: dict[str, str]
) -> Callable[..., tuple[int, str, float]]:
    """Start a run with `init_from` in a process; its exit code, stderr and seconds."""

    def run(source: str, endpoint: str) -> tuple[int, str, float]:
        path = written(source, training={"steps": 2}, evaluation={"every": 2})
        variables = {**environment, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "gpt", "train", path, "--out-dir", tmp_path / "run"],
            env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=100,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.returncode, done.stderr, time.monotonic() - began

    return run


@pytest.mark.slow
def test_weights_are_fetched_once_from_the_hub(folder: Path, start: Any, tmp_path: Path):
    ModelHub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    ModelHub.files["pytorch_model.bin"] = b"is not fetched"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ModelHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    code, err, _ = start("me/model", endpoint)
    assert code == 0, err
    source = json.loads((tmp_path / "run/environment.json").read_text())["init_from"]
    assert source["source"] == "me/model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert list(source["sha256"].values()) == [digest]
    assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))
    code, err, _ = start("me/nothing", endpoint)
    assert code == 2
    assert "me/nothing: is neither a local folder nor a model on the hub" in err
    server.shutdown()
    shutil.rmtree(tmp_path / "run")
    code, err, _ = start("me/model", "http://127.0.0.1:9")  # all is in the cache
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("source", ["gpt2", "me/model"])
def test_a_hub_that_does_not_answer_is_reported_within_ten_seconds(start: Any, source: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, err, seconds = start(source, f"http://127.0.0.1:{server.getsockname()[1]}")
    assert code == 2
    assert "cannot be fetched from http://127.0.0.1" in err
    assert "Without a network" in err
    assert len(err.splitlines()) <= 4
    assert seconds < 10

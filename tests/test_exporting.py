"""Exported folders: their contents, read by a second implementation and by transformers itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from scipy.special import erf
from test_cli import called

from gpt import load_run
from gpt.config import Config, ModelConfig, nest, option_paths
from gpt.config.layouts import LAYOUTS, OF_INITIALIZATION, without_counterpart
from gpt.data.tokenizer import bytes_tokenizer
from gpt.errors import InputError
from gpt.exchange import card as card_of
from gpt.exchange import exporting
from gpt.exchange.exporting import export, layout_for
from gpt.model.gpt2 import GPT
from gpt.rng import generator

SHAPE = {"layers": 2, "heads": 2, "width": 8, "context": 6}
BYTES = bytes_tokenizer(Config().data, ())
TOKENS = [[72, 101, 108, 108, 111, 256], [0, 255, 10, 10, 84, 104]]

# Options that can be exported, a network for each.
EXPORTABLE: dict[str, dict[str, Any]] = {
    "pre": {},
    "pre: free head": {"tied_head": False},
    "pre: no biases": {"bias": False},
    "pre: no biases in norms": {"norm.bias": False},
    "pre: xavier, tied": {"init.regime": "xavier"},
    "pre: small, free": {"init.regime": "small", "tied_head": False},
    "pre: gelu": {"mlp.activation": "gelu"},
    "pre: relu": {"mlp.activation": "relu"},
    "pre: relu2": {"mlp.activation": "relu2"},
    "pre: multiple": {"mlp.multiple": 2.7},
    "pre: eps": {"norm.eps": 1e-3},
    "pre: dropout": {"dropout": 0.25},
    "pre: named defaults": {"norm.type": "layer", "norm.final_norm": "on", "norm.bias": True},
    "post": {"norm.placement": "post"},
    "post: free head": {"norm.placement": "post", "tied_head": False},
    "post: no biases": {"norm.placement": "post", "bias": False},
    "post: xavier, tied": {"norm.placement": "post", "init.regime": "xavier"},
    "post: relu": {"norm.placement": "post", "mlp.activation": "relu"},
    "post: multiple": {"norm.placement": "post", "mlp.multiple": 1.5, "dropout": 0.1},
}


def network(options: dict[str, Any]) -> GPT:
    """A network in which every weight, bias and norm matters: all are random."""
    config = ModelConfig.model_validate({**SHAPE, **nest(options)})
    model = GPT(config, BYTES.n_vocab)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator(3, "test", name)).mul_(0.5)
    return model.eval()


def logits(model: GPT) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).numpy()


# -- A second implementation, in float64, of what the two classes of transformers compute ------


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_new": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * (1 + erf(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


class Folder:
    """An exported folder; `logits` is the function that its config.json describes."""

    def __init__(self, path: Path) -> None:
        self.config = json.loads((path / "config.json").read_text())
        found = load_file(path / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {np.dtype("float32")}
        self.w = {name: tensor.astype(np.float64) for name, tensor in found.items()}
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.used.add(name)
        return self.w[name]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        eps = self.config.get("layer_norm_epsilon", 1e-5)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * self[f"{name}.weight"] + self[f"{name}.bias"]

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
        T, d = q.shape
        mixed = []
        for columns in np.split(np.arange(d), heads):
            scores = q[:, columns] @ k[:, columns].T / math.sqrt(len(columns))
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[:, columns])
        return np.concatenate(mixed, axis=1)

    def logits(self, tokens: list[int]) -> np.ndarray:
        kind = {"gpt2": self.gpt2, "opt": self.opt}[self.config["model_type"]]
        return kind(tokens)

    def gpt2(self, tokens: list[int]) -> np.ndarray:
        c, activation = self.config, ACTIVATIONS[self.config["activation_function"]]

        def conv(name: str, x: np.ndarray) -> np.ndarray:
            return x @ self[f"{name}.weight"] + self[f"{name}.bias"]

        embedding = self["transformer.wte.weight"]
        x = embedding[tokens] + self["transformer.wpe.weight"][: len(tokens)]
        for layer in range(c["n_layer"]):
            h = f"transformer.h.{layer}."
            qkv = np.split(conv(f"{h}attn.c_attn", self.norm(f"{h}ln_1", x)), 3, axis=1)
            x = x + conv(f"{h}attn.c_proj", self.attend(*qkv, c["n_head"]))
            inner = activation(conv(f"{h}mlp.c_fc", self.norm(f"{h}ln_2", x)))
            assert inner.shape[1] == c["n_inner"]
            x = x + conv(f"{h}mlp.c_proj", inner)
        head = embedding if c["tie_word_embeddings"] else self["lm_head.weight"]
        return self.norm("transformer.ln_f", x) @ head.T

    def opt(self, tokens: list[int]) -> np.ndarray:
        c, activation = self.config, ACTIVATIONS[self.config["activation_function"]]
        assert c["do_layer_norm_before"] is False

        def linear(name: str, x: np.ndarray) -> np.ndarray:
            return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

        embedding = self["model.decoder.embed_tokens.weight"]
        positions = self["model.decoder.embed_positions.weight"]
        assert len(positions) == c["max_position_embeddings"] + 2
        x = embedding[tokens] + positions[2 : 2 + len(tokens)]
        for layer in range(c["num_hidden_layers"]):
            h = f"model.decoder.layers.{layer}."
            q, k, v = (linear(f"{h}self_attn.{each}_proj", x) for each in "qkv")
            mixed = self.attend(q, k, v, c["num_attention_heads"])
            x = self.norm(f"{h}self_attn_layer_norm", x + linear(f"{h}self_attn.out_proj", mixed))
            inner = activation(linear(f"{h}fc1", x))
            assert inner.shape[1] == c["ffn_dim"]
            x = self.norm(f"{h}final_layer_norm", x + linear(f"{h}fc2", inner))
        return x @ (embedding if c["tie_word_embeddings"] else self["lm_head.weight"]).T


@pytest.mark.parametrize("options", EXPORTABLE.values(), ids=EXPORTABLE)
def test_the_files_describe_the_same_function(options: dict[str, Any], tmp_path: Path):
    model = network(options)
    export(model, BYTES, tmp_path / "out", "card")
    folder = Folder(tmp_path / "out")
    own = logits(model)
    assert own.std() > 0.1
    for tokens, expected in zip(TOKENS, own, strict=True):
        np.testing.assert_allclose(folder.logits(tokens), expected, rtol=0, atol=1e-5)
    assert folder.used == set(folder.w)
    c = folder.config
    assert c["vocab_size"] == 257
    assert (c["bos_token_id"], c["eos_token_id"]) == (256, 256)
    limit = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_max_length"]
    ends = json.loads((tmp_path / "out/generation_config.json").read_text())["max_length"]
    assert limit == ends == SHAPE["context"]
    dropouts = {value for key, value in c.items() if "drop" in key}
    assert dropouts == {options.get("dropout", 0.0)}


# Logits of the last token of the second row that transformers 5.23 computed from these folders.
STORED = {
    "pre": [0.796558, -0.32302, 0.308368, -0.722794, -0.436096, 0.596446, 0.947933, -0.894215],
    "post": [1.259409, -0.583106, -0.187463, -1.716178, -0.514427, -0.236646, 0.644795, 1.366798],
}


@pytest.mark.parametrize("name", STORED)
def test_transformers_computed_the_same(name: str):
    found = logits(network(EXPORTABLE[name]))[1, -1, :8]
    np.testing.assert_allclose(found, STORED[name], rtol=0, atol=1e-5)


# -- What cannot be exported ----------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "placement": ({"norm.placement": "peri"}, "norm.placement: peri has no counterpart"),
    "other layout": ({"norm.placement": "none"}, "norm.placement: none has no counterpart"),
    "type": ({"norm.type": "rms"}, "norm.type: rms; model.norm.bias: False"),
    "no norms": ({"norm.type": "none"}, "norm.type: none"),
    "dyt": ({"norm.type": "dyt", "norm.alpha0": 0.7}, "norm.type: dyt"),
    "eps": ({"norm.placement": "post", "norm.eps": 1e-6}, "model.norm.eps: 1e-06"),
    "no final norm": ({"norm.final_norm": "off"}, "norm.final_norm: off"),
    "final norm": ({"norm.placement": "post", "norm.final_norm": "on"}, "norm.final_norm: on"),
    "embedding": ({"norm.embedding": True}, "norm.embedding: True"),
    "activation": ({"mlp.activation": "swiglu"}, "mlp.activation: swiglu"),
    "qk_norm": ({"attention.qk_norm": True}, "attention.qk_norm: True"),
    "cap": ({"attention.soft_cap": 50}, "attention.soft_cap: 50.0"),
    "logit cap": ({"logit_soft_cap": 30}, "model.logit_soft_cap: 30.0"),
    "mup": (
        {"parametrization": "mup", "mup_base_width": 4},
        "model.parametrization: mup; model.mup_base_width: 4",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_an_option_without_counterpart_is_named(options: dict[str, Any], message: str):
    config = ModelConfig.model_validate({**SHAPE, **nest(options)})
    with pytest.raises(InputError) as caught:
        layout_for(config)
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.")


def test_every_option_of_the_model_is_tried():
    tried = {*SHAPE, *OF_INITIALIZATION[1:], "init.regime", "init.depth_scaled"}
    for options in (*EXPORTABLE.values(), *(options for options, _ in REFUSED.values())):
        tried |= options.keys()
    assert tried == set(option_paths(ModelConfig))


def test_what_is_exportable_comes_back():
    for options in EXPORTABLE.values():
        config = ModelConfig.model_validate({**SHAPE, **nest(options)})
        layout = LAYOUTS[layout_for(config)]
        assert without_counterpart(layout, config) == {}
        back = ModelConfig.model_validate(layout.to_options(layout.to_config(config)))
        assert back.bias == config.bias
        assert GPT(back, 300).num_parameters() == GPT(config, 300).num_parameters()


# -- The folder ----------------------------------------


def test_the_command_writes_the_folder(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "out"
    code, printed, _ = called(capsys, "export", tiny_run, out, "--checkpoint", 10)
    assert code == 0
    assert "step 10, as GPT2LMHeadModel" in printed
    names = ["config.json", "generation_config.json", "model.safetensors"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", *names]
    model, _, step = load_run(tiny_run, "10")
    assert step == 10
    tensors = load_file(out / "model.safetensors")
    assert np.array_equal(tensors["transformer.wte.weight"], model.token_embedding.weight.detach())
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1  # also of the weights
    card = (out / "README.md").read_text()
    environment = json.loads((tiny_run / "environment.json").read_text())
    assert environment["data_fingerprint"] in card
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").open()]
    (val_loss,) = [r["val_loss"] for r in records if r["step"] == 10 and "val_loss" in r]
    assert f"| validation loss | {val_loss:.4f} |" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    options = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert options["model"] == model.config.model_dump(mode="json")
    assert options["data"]["path"] == [Path(load_config(tiny_run).data.path[0]).name]
    assert str(tmp_path.parents[1]) not in card  # no path of this machine


def load_config(run: Path) -> Config:
    return Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))


def test_the_card_names_each_loss_and_source(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A loss of an earlier step says so; names on the hub are kept, and paths are not."""
    run, out = tmp_path / "run", tmp_path / "my out"
    shutil.copytree(tiny_run, run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    kept = [r for r in records if r["step"] < 20 or "val_loss" not in r]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("init_from: null", "init_from: me/model"))
    code, printed, _ = called(capsys, "export", run, out, "--checkpoint", 20)
    assert code == 0
    assert f"finetune --init-from '{out}' --data.path MY.txt" in printed
    card = (out / "README.md").read_text()
    known = {record["step"]: record["val_loss"] for record in kept if "val_loss" in record}
    assert f"| validation loss after {max(known)} updates | {known[max(known)]:.4f} |" in card
    assert "| initial weights | me/model |" in card
    assert "init_from: me/model" in card
    options = {"init_from": "/home/me/secret/runs/x", "data": {"hub": {"name": "/home/me/secret"}}}
    shortened = card_of._without_folders(options)
    assert shortened == {"init_from": "x", "data": {"hub": {"name": "secret"}}}


def test_nothing_is_overwritten(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name, problem in (
        ("full", "not empty"),
        ("file", "not a folder"),
        ("link", "not a folder"),
        ("file/out", f"cannot be made, because {tmp_path / 'file'} is not a folder"),
    ):
        code, _, err = called(capsys, "export", tiny_run, tmp_path / name)
        assert (code, problem in err) == (2, True)
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = called(capsys, "export", tiny_run, ".")
    assert (code, "is the working directory" in err) == (2, True)
    monkeypatch.chdir(tmp_path)
    assert called(capsys, "export", tiny_run, tmp_path / "empty")[0] == 0
    assert (tmp_path / "empty/config.json").is_file()


def test_a_failed_export_leaves_nothing(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(exporting, "save_tensors", fail)
    code, _, err = called(capsys, "export", tiny_run, tmp_path / "out")
    assert code == 2
    assert "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_run_is_refused(tiny_run: Path, tmp_path: Path, capsys):
    code, _, err = called(capsys, "export", tmp_path / "none", tmp_path / "out")
    assert (code, "no such directory" in err) == (2, True)
    code, _, err = called(capsys, "export", tiny_run, tmp_path / "out", "--checkpoint", "7")
    assert (code, "no such checkpoint" in err) == (2, True)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("qk_norm: false", "qk_norm: true"))
    code, _, err = called(capsys, "export", copy, tmp_path / "out")
    assert code == 2
    assert "model.attention.qk_norm: True: without counterpart in GPT2LMHeadModel" in err
    assert not (tmp_path / "out").exists()


# -- transformers itself ----------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", EXPORTABLE.values(), ids=EXPORTABLE)
def test_transformers_loads_it(options: dict[str, Any], tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    model = network(options)
    export(model, BYTES, tmp_path / "out", "card")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    assert type(theirs).__name__ == LAYOUTS[layout_for(model.config)].architecture
    with torch.no_grad():
        found = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(found, logits(model), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_transformers_writes_the_same_text(
    placement: str, tiny: Callable[..., Config], tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    from gpt.training import train

    model = {"norm": {"placement": placement}, "init": {"regime": "xavier"}, "context": 64}
    config = tiny(model=model, training={"steps": 60}, optimizer={"learning_rate": 0.02})
    train(config, tmp_path / "run", quiet=True)
    assert called(capsys, "export", tmp_path / "run", tmp_path / "out")[0] == 0
    _, own, _ = called(
        capsys, "sample", tmp_path / "run", "--prompt", "The é", "--temperature", 0,
        "--max-new-tokens", 40,
    )  # fmt: skip
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    (written,) = pipe("The é", do_sample=False, max_new_tokens=40)
    assert written["generated_text"] == own.removesuffix("\n")
    assert len(own) > 20

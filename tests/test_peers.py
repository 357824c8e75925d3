"""Our variants against those of known libraries, with the same weights, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.gpt2 import GPT

VOCAB, LAYERS, HEADS, WIDTH, CONTEXT = 29, 3, 4, 32, 16
SEEN = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


def ours(**options: Any) -> GPT:
    shape = {"layers": LAYERS, "heads": HEADS, "width": WIDTH, "context": CONTEXT}
    return GPT(ModelConfig.model_validate({**shape, **options}), VOCAB).double()


def shaken(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of `module` in float64, each moved by noise."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).double()
    return dict(module.named_parameters())


def load(model: GPT, weights: dict[str, Tensor]) -> None:
    """Copy exactly these weights into `model`."""
    mine = dict(model.named_parameters())
    assert set(mine) == set(weights)
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(weights[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "options"),
    [("pre", {}), ("post", {"pre_norm": False}), ("peri", {"sandwich_norm": True})],
)
def test_x_transformers(placement: str, options: dict[str, bool]):
    x_transformers = pytest.importorskip("x_transformers")
    theirs = x_transformers.TransformerWrapper(
        num_tokens=VOCAB,
        max_seq_len=CONTEXT,
        attn_layers=x_transformers.Decoder(
            dim=WIDTH,
            depth=LAYERS,
            heads=HEADS,
            attn_dim_head=WIDTH // HEADS,
            attn_flash=True,  # otherwise its softmax is in float32
            norm_add_unit_offset=False,
            ff_no_bias=True,
            **options,
        ),
    ).eval()
    w = shaken(theirs)
    model = ours(
        norm={"placement": placement}, mlp={"activation": "gelu"}, bias=False, tied_head=False
    )
    weights = {
        "token_embedding.weight": w["token_emb.emb.weight"],
        "position_embedding.weight": w["pos_emb.emb.weight"] * WIDTH**-0.5,
        "head.weight": w["to_logits.weight"],
    }
    if placement != "post":
        weights["final_norm.weight"] = w["attn_layers.final_norm.gamma"]
    names = {"pre": {"norm": 0}, "post": {"norm": 2}, "peri": {"norm": 0, "out_norm": 1}}
    for layer in range(LAYERS):
        attention, mlp = (f"attn_layers.layers.{2 * layer + i}" for i in (0, 1))
        for name, slot in names[placement].items():
            weights[f"blocks.{layer}.attention_{name}.weight"] = w[f"{attention}.0.{slot}.gamma"]
            weights[f"blocks.{layer}.mlp_{name}.weight"] = w[f"{mlp}.0.{slot}.gamma"]
        qkv = [w[f"{attention}.1.to_{part}.weight"] for part in "qkv"]
        weights[f"blocks.{layer}.attention.qkv.weight"] = torch.cat(qkv)
        weights[f"blocks.{layer}.attention.out.weight"] = w[f"{attention}.1.to_out.weight"]
        weights[f"blocks.{layer}.mlp.up.weight"] = w[f"{mlp}.1.ff.0.0.weight"]
        weights[f"blocks.{layer}.mlp.out.weight"] = w[f"{mlp}.1.ff.2.weight"]
    load(model, weights)
    torch.testing.assert_close(model(SEEN), theirs(SEEN), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_torchs_own_encoder_layer(placement: str, activation: str):
    layer = nn.TransformerEncoderLayer(
        WIDTH,
        HEADS,
        4 * WIDTH,
        dropout=0.0,
        activation=activation,
        batch_first=True,
        norm_first=placement == "pre",
    )
    norm = nn.LayerNorm(WIDTH) if placement == "pre" else None
    theirs = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
    w = shaken(theirs)
    model = ours(norm={"placement": placement}, mlp={"activation": activation})
    embeddings = {n: p for n, p in model.named_parameters() if n.endswith("embedding.weight")}
    names = {
        "attention.qkv.": "self_attn.in_proj_",
        "attention.out.": "self_attn.out_proj.",
        "attention_norm.": "norm1.",
        "mlp.up.": "linear1.",
        "mlp.out.": "linear2.",
        "mlp_norm.": "norm2.",
    }
    weights = embeddings | {
        f"blocks.{i}.{mine}{leaf}": w[f"layers.{i}.{their}{leaf}"]
        for i in range(LAYERS)
        for mine, their in names.items()
        for leaf in ("weight", "bias")
    }
    if placement == "pre":
        weights |= {f"final_norm.{leaf}": w[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    load(model, weights)
    mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT).double()
    expected = theirs(model.embed(SEEN), mask=mask, is_causal=True)
    torch.testing.assert_close(model.hidden(SEEN), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_transformers_opt(placement: str):
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        ffn_dim=4 * WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=WIDTH,
        do_layer_norm_before=placement == "pre",
        dropout=0.0,
        activation_function="relu",
        pad_token_id=None,
    )
    theirs = transformers.OPTModel(config).eval()
    w = {name.removeprefix("decoder."): p for name, p in shaken(theirs).items()}
    model = ours(norm={"placement": placement}, mlp={"activation": "relu"})
    names = {
        "attention.out.": "self_attn.out_proj.",
        "attention_norm.": "self_attn_layer_norm.",
        "mlp.up.": "fc1.",
        "mlp.out.": "fc2.",
        "mlp_norm.": "final_layer_norm.",
    }
    weights = {
        "token_embedding.weight": w["embed_tokens.weight"],
        "position_embedding.weight": w["embed_positions.weight"][2:],  # its first two are padding's
    }
    for leaf in ("weight", "bias"):
        for i in range(LAYERS):
            qkv = [w[f"layers.{i}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            weights[f"blocks.{i}.attention.qkv.{leaf}"] = torch.cat(qkv)
            for mine, their in names.items():
                weights[f"blocks.{i}.{mine}{leaf}"] = w[f"layers.{i}.{their}{leaf}"]
        if placement == "pre":
            weights[f"final_norm.{leaf}"] = w[f"final_layer_norm.{leaf}"]
    load(model, weights)
    expected = theirs(SEEN, attention_mask=torch.ones_like(SEEN)).last_hidden_state
    torch.testing.assert_close(model.hidden(SEEN), expected, atol=1e-12, rtol=1e-12)

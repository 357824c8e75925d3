from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gpt.config import ModelConfig
from gpt.init import initialize
from gpt.model import GPT
from gpt.placement import PLACEMENTS

VOCAB = 61
SHAPE = ModelConfig(layers=4, heads=4, width=32, context=24)


def shaped(placement: str = "pre", **options: object) -> ModelConfig:
    tree = {**SHAPE.model_dump(), **options}
    return ModelConfig.model_validate({**tree, "norm": {"placement": placement}})


def make(placement: str = "pre", **options: object) -> GPT:
    model = GPT(shaped(placement, **options), VOCAB)
    initialize(model, model.config, seed=1)
    return model


def shake(model: nn.Module) -> None:
    """Make biases and norms count, which start as nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_equal_to_transformers_gpt2_in_logits_loss_and_every_gradient():
    transformers = pytest.importorskip("transformers")
    ours = make()
    shake(ours)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=24,
            n_embd=32,
            n_layer=4,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )
    # Their name -> our name; their Conv1D keeps matrices transposed.
    names = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
    block = {
        "ln_1": "attention_norm",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.out",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.out",
    }
    for layer in range(4):
        names |= {f"h.{layer}.{theirs}": f"blocks.{layer}.{ours}" for theirs, ours in block.items()}
    matched = {}
    for name, parameter in theirs.transformer.named_parameters():
        module, _, leaf = name.rpartition(".")
        matched[f"{names[module]}.{leaf}"] = (parameter, ".c_" in f".{name}" and leaf == "weight")
    mine = dict(ours.named_parameters())
    assert set(mine) == set(matched)
    with torch.no_grad():
        for name, (parameter, transposed) in matched.items():
            parameter.copy_(mine[name].T if transposed else mine[name])

    x = tokens()
    y = x.roll(-1, dims=1)
    out = theirs(x, labels=x)
    torch.testing.assert_close(ours(x), out.logits, atol=1e-5, rtol=0)
    # Their loss shifts inside: predicts x[1:] from x[:-1].
    torch.testing.assert_close(ours.loss(x[:, :-1], y[:, :-1]), out.loss, atol=1e-5, rtol=0)
    out.loss.backward()
    ours.loss(x[:, :-1], y[:, :-1]).backward()
    for name, (parameter, transposed) in matched.items():
        gradient = parameter.grad.T if transposed else parameter.grad
        torch.testing.assert_close(mine[name].grad, gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_parameter_gets_a_gradient(placement: str):
    model = make(placement)
    shake(model)  # at its start, rezero lets nothing through
    model.loss(tokens(), tokens(seed=1)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_loss_at_initialisation_is_that_of_a_uniform_guess(placement: str):
    loss = make(placement, width=128).loss(tokens(8), tokens(8, seed=1)).item()
    assert loss == pytest.approx(math.log(VOCAB), abs=0.1 if placement == "pre" else 0.3)


def test_pre_norm_has_a_final_norm_and_post_norm_has_none():
    assert isinstance(make("pre").final_norm, nn.LayerNorm)
    assert not list(make("post").final_norm.parameters())


def test_initial_weights_have_gpt2s_spread():
    model = GPT(shaped(layers=8, width=128, context=128), 1000)
    initialize(model, model.config, seed=0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            sigma = 0.02 / math.sqrt(16) if name.endswith(".out.weight") else 0.02
            assert parameter.std().item() == pytest.approx(sigma, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.1 * sigma


def test_models_share_the_initial_weights_that_they_have_in_common():
    pre, post = dict(make("pre").named_parameters()), dict(make("post").named_parameters())
    assert set(pre) - set(post) == {"final_norm.weight", "final_norm.bias"}
    assert all(torch.equal(pre[name], post[name]) for name in post)
    deeper = dict(make("pre", layers=5, width=32).named_parameters())
    name = "blocks.1.attention.qkv.weight"
    assert torch.equal(pre[name], deeper[name])
    other = GPT(SHAPE, VOCAB)
    initialize(other, other.config, seed=2)
    assert not torch.equal(dict(other.named_parameters())[name], pre[name])


def test_sizes():
    model = GPT(ModelConfig(layers=12, heads=12, width=768, context=1024), 50257)
    assert model.num_parameters() == 124_439_808  # GPT-2 small
    assert model.num_parameters() - model.num_embedding_parameters() == 85_056_000


def test_an_untied_head_is_a_matrix_of_its_own():
    model = make(tied_head=False)
    assert model.head.weight.shape == (VOCAB, 32)
    assert model.num_parameters() == make().num_parameters() + VOCAB * 32


def test_without_biases_only_weights_remain():
    assert not [n for n, _ in make(bias=False).named_parameters() if n.endswith("bias")]


def test_dropout_acts_in_training_only():
    model = make(dropout=0.5)
    x = tokens()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))

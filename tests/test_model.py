from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gpt.config import ModelConfig
from gpt.init import initialize
from gpt.model import GPT
from gpt.norm import PLACEMENTS

VOCAB = 61
SHAPE = ModelConfig(layers=3, heads=4, width=32, context=24)


def shaped(placement: str = "pre", **options: object) -> ModelConfig:
    tree = {**SHAPE.model_dump(), **options}
    return ModelConfig.model_validate({**tree, "norm": {"placement": placement}})


def make(placement: str = "pre", **options: object) -> GPT:
    model = GPT(shaped(placement, **options), VOCAB)
    initialize(model, seed=1)
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
            n_layer=3,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )
    # Their name -> our name; their Conv1D keeps matrices transposed.
    names = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
    block = {
        "ln_1": "attention.norm",
        "attn.c_attn": "attention.sublayer.qkv",
        "attn.c_proj": "attention.sublayer.out",
        "ln_2": "mlp.norm",
        "mlp.c_fc": "mlp.sublayer.up",
        "mlp.c_proj": "mlp.sublayer.out",
    }
    for layer in range(3):
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


def reference_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)  # biased
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def reference_attention(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    B, T, d = x.shape
    h = layer.heads
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(d, dim=-1)
    q, k, v = (z.view(B, T, h, d // h).transpose(1, 2) for z in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(d // h)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, d)
    return y @ layer.out.weight.T + layer.out.bias


def reference_mlp(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    z = x @ layer.up.weight.T + layer.up.bias
    gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return gelu @ layer.out.weight.T + layer.out.bias


def reference_logits(model: GPT, x: torch.Tensor, placement: str) -> torch.Tensor:
    z = model.token_embedding.weight[x] + model.position_embedding.weight[: x.shape[1]]
    for block in model.blocks:
        parts = ((block.attention, reference_attention), (block.mlp, reference_mlp))
        for place, function in parts:
            if placement == "pre":
                z = z + function(reference_norm(z, place.norm), place.sublayer)
            else:
                z = reference_norm(z + function(z, place.sublayer), place.norm)
    if placement == "pre":
        z = reference_norm(z, model.final_norm)
    return z @ model.token_embedding.weight.T


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_equal_to_the_equations_written_out_in_float64(placement: str):
    model = make(placement).double()
    shake(model)
    x = tokens()
    expected = reference_logits(model, x, placement)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_position_sees_a_later_one(placement: str):
    model = make(placement).double()
    shake(model)
    x = tokens(1)
    for position in (0, 7, 22):
        changed = x.clone()
        changed[:, position + 1 :] = (changed[:, position + 1 :] + 1) % VOCAB
        before, after = model(x), model(changed)
        assert torch.equal(before[:, : position + 1], after[:, : position + 1])
        assert not torch.allclose(before[:, position + 1 :], after[:, position + 1 :])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_parameter_gets_a_gradient(placement: str):
    model = make(placement)
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
    initialize(model, seed=0)
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
    name = "blocks.1.attention.sublayer.qkv.weight"
    assert torch.equal(pre[name], deeper[name])
    other = GPT(SHAPE, VOCAB)
    initialize(other, seed=2)
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


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 1, 1, 10, 7]])
def test_the_cache_gives_the_uncached_logits(placement: str, pieces: list[int]):
    model = make(placement).eval()
    shake(model)
    x = tokens()
    model.attach_caches(2)
    cached = torch.cat([model(piece) for piece in x.split(pieces, dim=1)], dim=1)
    model.detach_caches()
    torch.testing.assert_close(cached, model(x), atol=1e-5, rtol=1e-5)

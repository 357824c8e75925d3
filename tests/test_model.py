from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from gpt.config import ModelConfig
from gpt.model.gpt2 import ACTIVATIONS, GPT, MLP, soft_cap
from gpt.model.init import initialize
from gpt.model.placement import PLACEMENTS

VOCAB = 61
# tolerance of fp32 sums; without vector units torch adds number by number, which rounds more
ROUNDING = 4e-6 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 1e-6
SHAPE = ModelConfig(layers=4, heads=4, width=32, context=24)


def shaped(placement: str = "pre", **options: object) -> ModelConfig:
    tree = {**SHAPE.model_dump(), "norm": {"placement": placement}, **options}
    return ModelConfig.model_validate(tree)


def make(placement: str = "pre", **options: object) -> GPT:
    model = GPT(shaped(placement, **options), VOCAB)
    initialize(model, model.config, seed=1)
    return model


def shake(model: nn.Module) -> None:
    """Move every parameter, since biases and norms start without effect."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_logits_loss_and_gradients_equal_those_of_transformers_gpt2():
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
    shake(model)  # initially, rezero blocks every gradient
    model.loss(tokens(), tokens(seed=1)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_initial_loss_is_that_of_a_uniform_guess(placement: str):
    loss = make(placement, width=128).loss(tokens(8), tokens(8, seed=1)).item()
    assert loss == pytest.approx(math.log(VOCAB), abs=0.1 if placement == "pre" else 0.3)


def test_pre_norm_has_a_final_norm_and_post_norm_does_not():
    assert isinstance(make("pre").final_norm, nn.LayerNorm)
    assert not list(make("post").final_norm.parameters())


def test_sizes():
    model = GPT(ModelConfig(layers=12, heads=12, width=768, context=1024), 50257)
    assert model.num_parameters() == 124_439_808  # GPT-2 small
    assert model.num_parameters() - model.num_embedding_parameters() == 85_056_000


def test_an_untied_head_has_its_own_matrix():
    model = make(tied_head=False)
    assert model.head.weight.shape == (VOCAB, 32)
    assert model.num_parameters() == make().num_parameters() + VOCAB * 32


def test_without_biases_only_weights_remain():
    assert not [n for n, _ in make(bias=False).named_parameters() if n.endswith("bias")]


def test_dropout_applies_only_in_training():
    model = make(dropout=0.5)
    x = tokens()
    assert not torch.equal(model(x), model(x))
    assert (model.embed(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    model.eval()
    assert torch.equal(model(x), model(x))


# -- Switches ---------------------------------------------------------------------------------


def logits_of(**options: object) -> torch.Tensor:
    model = make(**options)
    shake(model)
    return model.eval()(tokens())


@pytest.mark.parametrize(
    "options",
    [
        {"attention": {"qk_norm": True}},
        {"attention": {"soft_cap": 0.5}},
        {"logit_soft_cap": 0.5},
        {"init": {"regime": "xavier"}},
        *({"mlp": {"activation": name}} for name in ACTIVATIONS if name != "gelu_tanh"),
    ],
)
def test_every_switch_changes_the_logits_and_works_with_the_cache(options: dict[str, object]):
    assert not torch.allclose(logits_of(**options), logits_of(), atol=1e-5)
    model = make(**options).eval()
    shake(model)
    x = tokens()
    model.attach_caches(model.make_caches(2))
    cached = torch.cat([model(piece) for piece in x.split([5, 1, 1, 10, 7], dim=1)], dim=1)
    model.detach_caches()
    torch.testing.assert_close(cached, model(x), atol=1e-5, rtol=1e-5)


def test_with_a_huge_soft_cap_our_attention_equals_torchs_kernel():
    plain = logits_of()
    torch.testing.assert_close(logits_of(attention={"soft_cap": 1e6}), plain)
    torch.testing.assert_close(logits_of(logit_soft_cap=1e6), plain)


def test_soft_cap_by_hand():
    z = torch.tensor([-1e9, -1.0, 0.0, 0.01, 1e9])
    capped = soft_cap(z, 2.0)
    torch.testing.assert_close(capped, torch.tensor([-2.0, -0.92423431, 0.0, 0.0099999, 2.0]))
    assert soft_cap(z, None) is z
    assert logits_of(logit_soft_cap=0.1).abs().max() <= 0.1


def test_qk_norm_bounds_attention_scores_for_any_weights():
    model = make(attention={"qk_norm": True})
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.qkv.weight *= 1e4
    q, k, _ = attention.project(torch.randn(2, 24, 32))
    assert q.shape == (2, 4, 24, 8)
    for each in (q, k):  # per head, of its 8 channels
        torch.testing.assert_close(each.mean(-1), torch.zeros(2, 4, 24), atol=1e-5, rtol=0)
        torch.testing.assert_close(each.norm(dim=-1), torch.full((2, 4, 24), math.sqrt(8)))
    assert attention.scores(q, k).abs().max() <= math.sqrt(8) + 1e-4


def test_attention_dropout_also_applies_with_a_soft_cap():
    model = make(dropout=0.5, attention={"soft_cap": 30.0})
    attention = model.blocks[0].attention
    attention.out_dropout.p = 0.0
    x = torch.randn(2, 24, 32)
    assert not torch.equal(attention(x), attention(x))


ACTIVATIONS_AT_MINUS_1_AND_2 = {
    "gelu_tanh": [-0.158808, 1.954597],
    "gelu": [-0.158655, 1.954500],
    "relu": [0.0, 2.0],
    "relu2": [0.0, 4.0],
    "swiglu": [-0.537883],  # silu(-1) * 2
}


def test_every_activation_has_values_by_hand():
    assert list(ACTIVATIONS_AT_MINUS_1_AND_2) == list(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS_AT_MINUS_1_AND_2)
def test_activations_by_hand(name: str):
    y = ACTIVATIONS[name](torch.tensor([-1.0, 2.0]))
    assert y.tolist() == pytest.approx(ACTIVATIONS_AT_MINUS_1_AND_2[name], abs=1e-6)


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (96, 256), (64, 168)])
def test_swiglu_has_about_as_many_parameters_as_gelu(width: int, hidden: int):
    gated, plain = (
        MLP(ModelConfig.model_validate({"width": width, "heads": 1, "mlp": {"activation": name}}))
        for name in ("swiglu", "gelu")
    )
    assert gated.out.in_features == hidden
    sizes = [sum(p.numel() for p in mlp.parameters()) for mlp in (gated, plain)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


@pytest.mark.parametrize(("multiple", "hidden"), [(1, 32), (2.5, 80), (4, 128)])
def test_the_inner_width_is_a_multiple_of_the_width(multiple: float, hidden: int):
    model = make(mlp={"multiple": multiple})
    assert {b.mlp.up.weight.shape for b in model.blocks} == {(hidden, 32)}


def test_z_loss_adds_the_mean_square_of_log_z():
    model = make()
    shake(model)
    x, y = tokens(), tokens(seed=1)
    total_loss, loss = model.loss_fn(x, y, z_loss=0.5)
    log_z = model(x).exp().sum(-1).log()
    torch.testing.assert_close(total_loss, loss + 0.5 * (log_z**2).mean())
    assert torch.equal(loss, model.loss(x, y))
    assert torch.equal(model.loss_fn(x, y)[0], loss)


def test_a_feed_forward_network_without_width_is_refused():
    with pytest.raises(ValueError, match=r"mlp\.multiple \(0\.001\) gives a hidden width of 0"):
        make(mlp={"multiple": 0.001})


# -- Fast paths: the padded head, and the loss in chunks -----------------------------------------


@pytest.fixture
def rows_of_heads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens, rows of the matrix) of every call of `linear`."""
    found: list[tuple[int, int]] = []
    linear = functional.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        found.append((x.shape[:-1].numel(), len(weight)))
        return linear(x, weight, *rest)

    monkeypatch.setattr(functional, "linear", spy)
    return found


Result = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def learnt(model: GPT, z_loss: float) -> Result:
    """The total loss, the cross-entropy, and all gradients."""
    x, y = tokens(3), tokens(3, seed=1)
    model.zero_grad()
    total_loss, loss = model.loss_fn(x, y, z_loss)
    total_loss.backward()
    return total_loss, loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(fast: Result, plain: Result, tolerance: float) -> None:
    for mine, theirs in zip(fast[:2], plain[:2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=tolerance)
    for name, gradient in plain[2].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(fast[2][name], gradient, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, ROUNDING)], ids=str
)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [{}, {"tied_head": False}, {"logit_soft_cap": 0.5}, {"init": {"regime": "xavier"}}],
    ids=str,
)
def test_a_padded_head_and_a_chunked_loss_change_nothing(
    options: dict[str, object],
    z_loss: float,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
    rows_of_heads: list[tuple[int, int]],
):
    model = make(**options).to(dtype)
    shake(model)
    plain = learnt(model, z_loss)
    assert rows_of_heads[-1] == (72, 61)
    for multiple in (1, 64):
        monkeypatch.setattr("gpt.model.gpt2.VOCABULARY_MULTIPLE", {"cpu": multiple})
        for chunk in (None, 7, 1000):  # 72 tokens are ten chunks of 7, and 2 more
            model.loss_chunk = chunk
            rows_of_heads.clear()
            assert_same(learnt(model, z_loss), plain, tolerance)
            heads = {rows for rows in rows_of_heads if rows[1] in (61, 64)}
            rows = 64 if multiple == 64 else 61
            assert heads == ({(7, rows), (2, rows)} if chunk == 7 else {(72, rows)})


def test_the_head_is_padded_only_in_training(
    monkeypatch: pytest.MonkeyPatch, rows_of_heads: list[tuple[int, int]]
):
    """Copying the matrix for each token would slow generation down."""
    monkeypatch.setattr("gpt.model.gpt2.VOCABULARY_MULTIPLE", {"cpu": 64})
    model = make()
    assert model(tokens()).shape == (2, 24, VOCAB)
    assert rows_of_heads[-1] == (48, 64)
    trained = model(tokens())
    evaluated = model.eval()(tokens())
    assert rows_of_heads[-1] == (48, 61)
    torch.testing.assert_close(evaluated, trained)


def test_a_chunked_loss_computes_no_gradients_under_no_grad(rows_of_heads: list[tuple[int, int]]):
    model = make(tied_head=False)
    plain = model.loss(tokens(), tokens(seed=1))
    model.loss_chunk = 20
    rows_of_heads.clear()
    with torch.no_grad():
        loss = model.loss(tokens(), tokens(seed=1))
    assert [rows for rows in rows_of_heads if rows[1] == VOCAB] == [(20, 61), (20, 61), (8, 61)]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain)


def test_gradients_of_a_chunked_loss_scale_and_accumulate():
    """Gradient accumulation and fp16's loss scale need this."""
    model = make()
    gradients = []
    for chunk in (None, 20):
        model.loss_chunk = chunk
        model.zero_grad()
        for seed in (0, 1):
            (model.loss_fn(tokens(seed=seed), tokens(seed=2), 0.1)[0] * 1000).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_fast_paths_compile_to_one_graph(precision: str, monkeypatch: pytest.MonkeyPatch):
    """Without generating code, which takes minutes. In bf16 results agree up to rounding."""
    model = make(layers=1)
    shake(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        plain = learnt(model, 0.1)
        monkeypatch.setattr("gpt.model.gpt2.VOCABULARY_MULTIPLE", {"cpu": 64})
        model.loss_chunk = 20
        torch._dynamo.reset()
        model.loss_fn = torch.compile(  # type: ignore[method-assign]
            model.loss_fn, dynamic=False, fullgraph=True, backend="aot_eager"
        )
        compiled = learnt(model, 0.1)
    torch._dynamo.reset()
    assert_same(compiled, plain, 1e-6 if precision == "fp32" else 0.02)


PEAK = """
import sys, torch
from gpt.config import ModelConfig
from gpt.model.init import initialize
from gpt.model.gpt2 import GPT
model = GPT(ModelConfig(layers=1, heads=1, width=16, context=512), 50257)
initialize(model, model.config, seed=0)
model.loss_chunk = int(sys.argv[1]) or None
x = torch.zeros(2, 512, dtype=torch.long)
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
before = peak()
model.loss_fn(x, x)[0].backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_chunked_loss_takes_less_memory(environment: dict[str, str]):
    peaks = []
    for chunk in ("0", "256"):
        command = [sys.executable, "-c", PEAK, chunk]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        peaks.append(int(done.stdout) / 1024)  # MiB
    logits = 2 * 512 * 50257 * 4 / 2**20  # MiB of float32
    assert peaks[0] > 2 * logits
    assert peaks[0] - peaks[1] > 1.5 * logits, peaks

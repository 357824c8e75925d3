"""Every placement against its equations, implemented again from the weights alone.

The forms are those of the papers and, where there is one, of their authors' code:
wangqiangneu/dlcl (fairseq/modules/layer_history.py), LiyuanLucasLiu/Transformer-Clinic
(fairseq/modules/transformer_layer.py), pixeli99/MixLN and lmsdss/LayerNorm-Scaling
(modeling_llama.py), takase/b2t_connection (transformer_layer.py), microsoft/ResiDual
(resi_dual_layers.py), microsoft/torchscale (decoder.py: DeepNorm and Sub-LN), THUDM/CogView
(sparse_transformer.py), allenai/OLMo (model.py, norm_after), majumderb/rezero (rztx.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt.config import Config, ModelConfig, validate
from gpt.errors import InputError
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.model.norm import NORMS
from gpt.model.placement import PLACEMENTS, Block, DeepNorm

VOCAB, LAYERS, HEADS, WIDTH, EPS = 23, 4, 2, 8, 1e-5
NORMED = [name for name, placement in PLACEMENTS.items() if placement.has_norms]


def shaped(placement: str, norm_type: str | None = None, **options: Any) -> ModelConfig:
    tree = {
        "layers": LAYERS,
        "heads": HEADS,
        "width": WIDTH,
        "context": 12,
        "norm": {"placement": placement, "type": norm_type, "eps": EPS},
        **options,
    }
    return ModelConfig.model_validate(tree)


def is_valid(placement: str, norm: str) -> bool:
    try:
        shaped(placement, norm)
    except ValueError:
        return False
    return True


PAIRS = [
    (placement, norm) for placement in PLACEMENTS for norm in NORMS if is_valid(placement, norm)
]
# The equations are compared for all pairs; their consequences for each placement with layer norm
# and batch norm, which mixes positions, and for each norm in pre-norm and DLCL.
FEW = [
    (placement, norm)
    for placement, norm in PAIRS
    if placement in ("pre", "dlcl") or norm in ("layer", "batch") or placement not in NORMED
]


def make(placement: str, norm_type: str | None = None, **options: Any) -> GPT:
    """A float64 model whose parameters are all moved, so that each of them has an effect."""
    config = shaped(placement, norm_type, **options)
    model = GPT(config, VOCAB)
    initialize(model, config, seed=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def tokens(batch: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- The references: functions of the weights, without any code of the model ------------------


Weights = dict[str, Tensor]


def standardized(x: Tensor, dims: tuple[int, ...], w: Weights) -> Tensor:
    count = math.prod(x.shape[dim] for dim in dims)
    mean = x.sum(dims, keepdim=True) / count
    variance = ((x - mean) ** 2).sum(dims, keepdim=True) / count
    return (x - mean) / (variance + EPS) ** 0.5 * w["weight"] + w.get("bias", torch.zeros(()))


def squares(x: Tensor) -> Tensor:
    return (x**2).sum(-1, keepdim=True)


NORMS_BY_HAND: dict[str, Callable[[Tensor, Weights], Tensor]] = {
    "layer": lambda x, w: standardized(x, (-1,), w),
    "rms": lambda x, w: x / (squares(x) / x.shape[-1] + EPS) ** 0.5 * w["weight"],
    "batch": lambda x, w: standardized(x, (0, 1), w),
    "dyt": lambda x, w: w["weight"] * torch.tanh(w["alpha"] * x) + w["bias"],
    "scale": lambda x, w: w["g"] * x / squares(x).sqrt(),
    "none": lambda x, w: x,
}


class Reference:
    """The model of a config, computed from a dict of its weights."""

    def __init__(self, model: GPT) -> None:
        self.w = {name: p.detach() for name, p in model.state_dict().items()}
        self.norm_type = model.config.norm.type or "layer"
        self.L = model.config.layers

    def N(self, name: str, x: Tensor) -> Tensor:
        start = f"{name}."
        own = {key.removeprefix(start): w for key, w in self.w.items() if key.startswith(start)}
        return NORMS_BY_HAND[self.norm_type](x, own)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def A(self, layer: int, x: Tensor, inner: bool = False) -> Tensor:
        name = f"blocks.{layer - 1}.attention"
        _, T, d = x.shape
        q, k, v = self.linear(f"{name}.qkv", x).split(d, dim=-1)
        heads = []
        for head in range(HEADS):
            part = slice(head * d // HEADS, (head + 1) * d // HEADS)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d / HEADS)
            scores[:, torch.ones(T, T).triu(1).bool()] = -torch.inf
            heads.append(torch.softmax(scores, -1) @ v[..., part])
        y = torch.cat(heads, -1)
        return self.linear(f"{name}.out", self.N(f"{name}.inner_norm", y) if inner else y)

    def F(self, layer: int, x: Tensor, inner: bool = False) -> Tensor:
        name = f"blocks.{layer - 1}.mlp"
        z = self.linear(f"{name}.up", x)
        y = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return self.linear(f"{name}.out", self.N(f"{name}.inner_norm", y) if inner else y)

    def norms(self, layer: int) -> tuple[Callable[[Tensor], Tensor], ...]:
        names = ("attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm")
        return tuple(lambda x, n=n: self.N(f"blocks.{layer - 1}.{n}", x) for n in names)

    def logits(self, x: Tensor, placement: str) -> Tensor:
        x = self.w["token_embedding.weight"][x] + self.w["position_embedding.weight"][: x.shape[1]]
        return STACKS[placement](self, x) @ self.w["token_embedding.weight"].T


def blockwise(block: Callable[..., Tensor], final: bool) -> Callable[[Reference, Tensor], Tensor]:
    def stack(r: Reference, x: Tensor) -> Tensor:
        for layer in range(1, r.L + 1):
            x = block(r, layer, x, *r.norms(layer))
        return r.N("final_norm", x) if final else x

    return stack


def pre(r, layer, x, N1, N2, *_):
    h = x + r.A(layer, N1(x))
    return h + r.F(layer, N2(h))


def post(r, layer, x, N1, N2, *_):
    h = N1(x + r.A(layer, x))
    return N2(h + r.F(layer, h))


def peri(r, layer, x, N1, N2, N3, N4):
    h = x + N3(r.A(layer, N1(x)))
    return h + N4(r.F(layer, N2(h)))


def res_post(r, layer, x, N1, N2, *_):
    h = x + N1(r.A(layer, x))
    return h + N2(r.F(layer, h))


def deepnorm(r, layer, x, N1, N2, *_):
    alpha = math.sqrt(math.sqrt(2 * r.L))
    h = N1(alpha * x + r.A(layer, x))
    return N2(alpha * h + r.F(layer, h))


def admin(r, layer, x, N1, N2, *_):
    h = N1(r.w[f"blocks.{layer - 1}.attention_omega"] * x + r.A(layer, x))
    return N2(r.w[f"blocks.{layer - 1}.mlp_omega"] * h + r.F(layer, h))


def rezero(r, layer, x, *_):
    h = x + r.w[f"blocks.{layer - 1}.a"] * r.A(layer, x)
    return h + r.w[f"blocks.{layer - 1}.a"] * r.F(layer, h)


def b2t(r, layer, x, N1, N2, *_):
    h = N1(x + r.A(layer, x))
    return N2(x + h + r.F(layer, h))


def mix(r, layer, x, *norms):
    return post(r, layer, x, *norms) if layer == 1 else pre(r, layer, x, *norms)  # a quarter of 4


def lns(r, layer, x, N1, N2, *_):
    h = x + r.A(layer, N1(x) / math.sqrt(layer))
    return h + r.F(layer, N2(h) / math.sqrt(layer))


def sub(r, layer, x, N1, N2, *_):
    h = x + r.A(layer, N1(x), inner=True)
    return h + r.F(layer, N2(h), inner=True)


def none(r, layer, x, *_):
    h = x + r.A(layer, x)
    return h + r.F(layer, h)


def dlcl(r: Reference, y: Tensor) -> Tensor:
    z, x = [y], y
    for layer in range(1, r.L + 1):
        z.append(r.N(f"blocks.{layer - 1}.output_norm", pre(r, layer, x, *r.norms(layer))))
        x = torch.einsum("k,kbtd->btd", r.w[f"blocks.{layer - 1}.mix"], torch.stack(z))
    return r.N("final_norm", x)


def residual(r: Reference, x: Tensor) -> Tensor:
    branches = [x]
    for layer in range(1, r.L + 1):
        N1, N2, *_ = r.norms(layer)
        branches.append(r.A(layer, x))
        x = N1(x + branches[-1])
        branches.append(r.F(layer, x))
        x = N2(x + branches[-1])
    return x + r.N("final_norm", torch.stack(branches).sum(0))


STACKS = {
    "pre": blockwise(pre, final=True),
    "post": blockwise(post, final=False),
    "peri": blockwise(peri, final=True),
    "res_post": blockwise(res_post, final=True),
    "deepnorm": blockwise(deepnorm, final=False),
    "admin": blockwise(admin, final=False),
    "rezero": blockwise(rezero, final=False),
    "dlcl": dlcl,
    "residual": residual,
    "b2t": blockwise(b2t, final=False),
    "mix": blockwise(mix, final=True),
    "lns": blockwise(lns, final=True),
    "sub": blockwise(sub, final=True),
    "none": blockwise(none, final=False),
}


@pytest.mark.parametrize(
    ("placement", "norm"),
    [
        (placement, norm)
        for placement, norm in PAIRS
        if placement in STACKS and norm in NORMS_BY_HAND
    ],
)
def test_equal_to_its_equations_in_float64(placement: str, norm: str):
    model = make(placement, norm)
    x = tokens()
    expected = Reference(model).logits(x, placement)
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)


def test_every_placement_and_norm_has_a_reference():
    assert list(STACKS) == list(PLACEMENTS), "add its equation to STACKS"
    assert list(NORMS_BY_HAND) == list(NORMS), "add its equation to NORMS_BY_HAND"


@pytest.mark.parametrize(("placement", "norm"), FEW)
def test_gradients_equal_finite_differences(placement: str, norm: str):
    model = make(placement, norm)
    x, y = tokens(2, 3), tokens(2, 3, seed=1)
    names = [name for name, _ in model.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        logits = torch.func.functional_call(model, weights, (x,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


@pytest.mark.parametrize(("placement", "norm"), FEW)
def test_only_batch_norm_in_training_sees_later_positions(placement: str, norm: str):
    model = make(placement, norm)
    x = tokens(1)
    for training in (True, False):
        model.train(training)
        leaks = training and norm == "batch"
        for position in (0, 6, 10):
            changed = x.clone()
            changed[:, position + 1 :] = (changed[:, position + 1 :] + 1) % VOCAB
            before, after = model(x), model(changed)
            assert torch.equal(before[:, : position + 1], after[:, : position + 1]) != leaks
            assert not torch.allclose(before[:, position + 1 :], after[:, position + 1 :])


@pytest.mark.parametrize(("placement", "norm"), FEW)
def test_cached_logits_equal_uncached_logits(placement: str, norm: str):
    model = make(placement, norm).eval()
    x = tokens(2)
    model.attach_caches(model.make_caches(2))
    cached = torch.cat([model(piece) for piece in x.split([5, 1, 1, 5], dim=1)], dim=1)
    model.detach_caches()
    torch.testing.assert_close(cached, model(x), atol=1e-10, rtol=1e-10)


# -- Constants, by hand --------------------------------------------------


@pytest.mark.parametrize(("layers", "alpha", "beta"), [(8, 2.0, 0.35355339), (2, 1.41421356, 0.5)])
def test_deepnorms_constants(layers: int, alpha: float, beta: float):
    assert DeepNorm.alpha(layers) == pytest.approx(alpha)
    assert weight_ratios("deepnorm", layers) == pytest.approx(
        {"q": 1, "k": 1, "v": beta, "out": beta, "up": beta, "mlp.out": beta}
    )


@pytest.mark.parametrize(("layers", "gain"), [(2, 1.17741002), (8, 1.66510922)])
def test_sub_lns_gain(layers: int, gain: float):
    assert weight_ratios("sub", layers) == pytest.approx(
        {"q": 1, "k": 1, "v": gain, "out": gain, "up": gain, "mlp.out": gain}
    )


@pytest.mark.parametrize(("layers", "gain"), [(4, 0.5), (16, 0.25)])
def test_b2ts_gain(layers: int, gain: float):
    assert list(weight_ratios("b2t", layers).values()) == pytest.approx([gain] * 6)


def weight_ratios(placement: str, layers: int) -> dict[str, float]:
    """Initial weights of the last block, divided by those of post-norm with the same seed."""
    options = {"layers": layers, "init": {"regime": "xavier"}}
    made = []
    for name in (placement, "post"):
        config = shaped(name, **options)
        model = GPT(config, VOCAB)
        initialize(model, config, seed=3)
        made.append(model.blocks[-1])
    mine, posts = made

    def ratio(a: Tensor, b: Tensor) -> float:
        torch.testing.assert_close(a, b * (a / b).median())
        return (a / b).median().item()

    qkv = zip(mine.attention.qkv.weight.chunk(3), posts.attention.qkv.weight.chunk(3), strict=True)
    return {name: ratio(*pair) for name, pair in zip("qkv", qkv, strict=True)} | {
        "out": ratio(mine.attention.out.weight, posts.attention.out.weight),
        "up": ratio(mine.mlp.up.weight, posts.mlp.up.weight),
        "mlp.out": ratio(mine.mlp.out.weight, posts.mlp.out.weight),
    }


@pytest.mark.parametrize(("layers", "posts"), [(4, 1), (6, 1), (12, 3), (24, 6)])
def test_mix_lns_split(layers: int, posts: int):
    model = make("mix", layers=layers)
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64) + 5
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()
        normalized = [block(x).mean(-1).abs().max().item() < 1e-6 for block in model.blocks]
    assert normalized == [True] * posts + [False] * (layers - posts)


@pytest.mark.parametrize(("layer", "scale"), [(1, 1.0), (4, 0.5), (9, 1 / 3)])
def test_lns_divides_by_the_root_of_the_block(layer: int, scale: float):
    block = make("lns", layers=9).blocks[layer - 1]
    seen = []
    for sublayer in (block.attention, block.mlp):
        sublayer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.attention_norm = block.mlp_norm = nn.LayerNorm(WIDTH, elementwise_affine=False).double()
    block(torch.randn(2, 3, WIDTH, dtype=torch.float64))
    for x in seen:
        assert x.std(-1, correction=0).mean().item() == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize("layers", [2, 5])
def test_admins_omega_is_the_standard_deviation_of_the_earlier_branches(layers: int):
    model = make("admin", layers=layers)
    x = tokens(4)
    model.calibrate(x)
    r = Reference(model)
    stream = r.w["token_embedding.weight"][x] + r.w["position_embedding.weight"][: x.shape[1]]
    omega = 1.0
    for layer in range(1, layers + 1):
        N1, N2, *_ = r.norms(layer)
        for name, f, N in (("attention", r.A, N1), ("mlp", r.F, N2)):
            assert r.w[f"blocks.{layer - 1}.{name}_omega"].tolist() == pytest.approx(
                [omega] * WIDTH
            )
            branch = f(layer, stream)
            before, stream = stream, N(omega * stream + branch)
            omega = math.sqrt(biased(omega * before) + biased(branch))
    assert abs(omega - 1) > 0.05


def biased(x: Tensor) -> float:
    return ((x - x.mean()) ** 2).mean().item()


def test_only_admin_is_calibrated():
    for placement in PLACEMENTS:
        model = make(placement)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        model.calibrate(tokens())
        changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
        expected = {n for n in before if n.endswith("_omega")} if placement == "admin" else set()
        assert changed == expected
    model = make("pre", norm={"type": "batch", "embedding": True})
    model.calibrate(tokens())
    assert not model.embedding_norm.num_batches_tracked


def test_rezeros_blocks_start_as_the_identity():
    config = shaped("rezero")
    model = GPT(config, VOCAB)
    initialize(model, config, seed=0)
    x = model.embed(tokens())
    assert torch.equal(model.blocks[0](x), x)
    assert sum(name.endswith(".a") for name, _ in model.named_parameters()) == LAYERS


def test_dlcl_starts_with_the_mean_of_all_outputs():
    config = shaped("dlcl")
    model = GPT(config, VOCAB)
    initialize(model, config, seed=0)
    x = model.embed(tokens())
    stream = model.placement.begin(x)
    for number, block in enumerate(model.blocks, 1):
        stream = block(stream)
        assert len(stream) == number + 2
        torch.testing.assert_close(stream[0], torch.stack(stream[1:]).mean(0))
    assert torch.equal(stream[1], x)


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "res_post", "mix"])
def test_without_norms_simple_placements_equal_none(placement: str):
    model, control = make(placement, "none"), make("none")
    control.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens()), control(tokens()))


# -- Around the blocks --------------------------------------------------


@pytest.mark.parametrize("placement", NORMED)
@pytest.mark.parametrize("switch", ["auto", "on", "off"])
def test_final_norm(placement: str, switch: str):
    norm = {"placement": placement, "final_norm": switch}
    model = GPT(shaped("pre", norm=norm), VOCAB)
    expected = {"auto": PLACEMENTS[placement].final_norm, "on": True, "off": False}[switch]
    assert any(name.startswith("final_norm") for name, _ in model.named_parameters()) == expected


@pytest.mark.parametrize("placement", STACKS)
def test_the_papers_final_norms(placement: str):
    without = {"post", "deepnorm", "admin", "rezero", "b2t", "none"}
    assert PLACEMENTS[placement].final_norm == (placement not in without)


def test_a_norm_on_the_embeddings():
    model = GPT(shaped("peri", norm={"placement": "peri", "embedding": True}), VOCAB)
    initialize(model, model.config, seed=0)
    x = model.embed(tokens())
    assert (model.token_embedding.weight.var() < 0.001).item()
    torch.testing.assert_close(x.var(-1, correction=0), torch.ones(x.shape[:2]), atol=0.1, rtol=0)


REFUSED = [
    (
        {"norm": {"placement": "rezero", "type": "layer"}},
        ["norm.type: layer", "rezero, which has no"],
    ),
    (
        {"norm": {"placement": "none", "final_norm": "on"}},
        ["norm.final_norm: on", "none, which has"],
    ),
    ({"norm": {"placement": "rezero", "embedding": True}}, ["norm.embedding: true", "no norms"]),
    (
        {"norm": {"placement": "rezero"}, "attention": {"qk_norm": True}},
        ["attention.qk_norm: true", "placement rezero, which has no norms"],
    ),
    (
        {"norm": {"placement": "admin", "type": "none"}},
        ["norm.type: none", "placement admin: its ω"],
    ),
    ({"norm": {"placement": "deepnorm", "type": "none"}}, ["norm.type: none", "its α > 1"]),
    ({"norm": {"placement": "residual", "type": "none"}}, ["norm.type: none", "two streams"]),
    (
        {"norm": {"placement": "lns", "type": "none"}},
        ["norm.type: none", "the output of its norms"],
    ),
    ({"norm": {"placement": "sub", "type": "none"}}, ["norm.type: none", "second norms"]),
    ({"norm": {"type": "none", "final_norm": "on"}}, ["norm.final_norm: on", "norm.type none"]),
    (
        {"norm": {"type": "none"}, "attention": {"qk_norm": True}},
        ["qk_norm: true", "norm.type none"],
    ),
    ({"norm": {"placement": "mix"}, "layers": 3}, ["layers: 3", "mix, which needs at least 4"]),
    ({"norm": {"type": "batch"}, "context": 1}, ["context: 1", "batch, which needs more than one"]),
    (
        {"norm": {"type": "rms", "bias": True}},
        ["norm.bias: true", "norm.type rms, which has no bias"],
    ),
    ({"norm": {"type": "none", "bias": True}}, ["norm.bias: true", "norm.type none, which has no"]),
    (
        {"norm": {"placement": "rezero", "bias": True, "eps": 1e-3}},
        ["norm.bias: true", "norm.eps: 0.001 conflicts with placement rezero, which has no norms"],
    ),
    ({"norm": {"type": "rms", "alpha0": 1.0}}, ["norm.alpha0: 1.0", "any norm.type but dyt"]),
    ({"norm": {"alpha0": 1.0}}, ["norm.alpha0: 1.0", "any norm.type but dyt"]),
]


@pytest.mark.parametrize(("options", "parts"), REFUSED)
def test_a_config_that_makes_no_sense_is_refused_with_the_reason(
    options: dict[str, Any], parts: list[str]
):
    tree = {"layers": 4, "heads": 2, "width": 8, **options}
    with pytest.raises(InputError, match=r"^model\.[a-z0-9_.]+: ") as caught:
        validate(Config, {"model": tree})
    for part in parts:
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="conflicts with"):  # also built without `validate`
        ModelConfig.model_validate(tree)


def test_all_conflicts_of_a_config_are_reported_at_once():
    norm = {"placement": "rezero", "type": "rms", "embedding": True}
    tree = {"model": {"norm": norm, "attention": {"qk_norm": True}}, "seed": -1}
    with pytest.raises(InputError) as caught:
        validate(Config, tree)
    for key in ("seed", "model.norm.type", "model.norm.embedding", "model.attention.qk_norm"):
        assert f"{key}: " in str(caught.value)


def test_a_placement_without_norms_has_none():
    for name in set(PLACEMENTS) - set(NORMED):
        assert not [n for n, _ in make(name).named_parameters() if "norm" in n]


def test_placements_are_blocks():
    for placement in PLACEMENTS.values():
        assert issubclass(placement, Block)
        assert set(placement.more_stable) <= set(PLACEMENTS)
        assert placement.__doc__

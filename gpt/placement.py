"""Norm placements: where the norm N stands around attention A and feed-forward F.

A placement is one block of the transformer, and its `forward` is its equation. A new one is a class
and one entry in `PLACEMENTS`; what else the model must know of it (whether a norm follows the last
block, how its weights start) are attributes of the class. CONTRIBUTING.md adds one as an example.

Shapes: the stream x is (B, T, d), B sequences of T tokens with d channels. L is the number of
blocks, l = 1 ... L the block's own. A block has two sublayers, so the model has 2 L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.errors import InputError
from gpt.norm import SHIFTED, make_norm


class Sublayer(nn.Module):
    """Attention or feed-forward: f, (B, T, d) -> (B, T, d). Its last matrix is `out`.

    Attributes:
        inner_norm: applied to what `out` reads; the identity unless a placement sets it.
    """

    out: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.inner_norm: nn.Module = nn.Identity()


class Add(nn.Module):
    """x + f(x), the residual connection; a module of its own so that diagnostics can watch it."""

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Two (B, T, d) -> (B, T, d)."""
        return x + f


class Placement(nn.Module):
    """One block. `forward` takes what the block before it returned: x, or a tuple that holds it.

    Args:
        config: the model's.
        layer: l, from 1.
        attention, mlp: A and F.

    Attributes:
        final_norm: whether a norm follows the last block, where the config says "auto".
        has_norms: whether there are norms at all.
        needs_norms: why norm type "none" makes no sense here; empty if it does.
        least_layers: the fewest blocks with which it is itself.
        scales_depth: it has its own answer to depth, in place of the factor 1/sqrt(2 L).
        calmer: placements that were found to be more stable, for advice when a run fails.
    """

    final_norm: ClassVar[bool] = True
    has_norms: ClassVar[bool] = True
    needs_norms: ClassVar[str] = ""
    least_layers: ClassVar[int] = 1
    scales_depth: ClassVar[bool] = False
    calmer: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__()
        self.layer, self.layers = layer, config.layers
        self.attention, self.mlp = attention, mlp
        self.attention_norm = make_norm(config) if self.has_norms else nn.Identity()
        self.mlp_norm = make_norm(config) if self.has_norms else nn.Identity()
        self.add = Add()

    @staticmethod
    def gain(layers: int, part: str) -> float:
        """Factor on the initial weights of a block's matrix: q, k, v, out, up or gate."""
        return 1.0

    @staticmethod
    def begin(x: Tensor) -> Any:
        """What the first block gets, from the embeddings."""
        return x

    @staticmethod
    def end(stream: Any, final_norm: nn.Module) -> Tensor:
        """What the head gets, from what the last block returned."""
        return final_norm(stream)

    @classmethod
    def calibrate(cls, blocks: Sequence[Placement], embed: Callable[[], Tensor]) -> None:
        """Set what the first batch decides, whose embeddings `embed` gives; mostly nothing."""


class PreNorm(Placement):
    """The norm inside the residual branch; GPT-2, Xiong et al. 2020.

    The stream grows with depth, so a final norm follows.
    """

    calmer = ("peri",)

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.attention(self.attention_norm(x)))
        return self.add(h, self.mlp(self.mlp_norm(h)))


class PostNorm(Placement):
    """The norm after the residual connection; Vaswani et al. 2017, GPT-1.

    Its output is normalised: no final norm.
    """

    final_norm = False
    calmer = ("pre", "deepnorm", "admin")

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(self.add(x, self.attention(x)))
        return self.mlp_norm(self.add(h, self.mlp(h)))


class PeriNorm(Placement):
    """Norms before and after each sublayer; CogView's sandwich (Ding et al. 2021), Kim et al. 2025.

    Peri-LN also normalises the embeddings: `norm.embedding`.
    """

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        self.attention_out_norm, self.mlp_out_norm = make_norm(config), make_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.attention_out_norm(self.attention(self.attention_norm(x))))
        return self.add(h, self.mlp_out_norm(self.mlp(self.mlp_norm(h))))


class ResPostNorm(Placement):
    """The norm on the sublayer's output; Swin v2 (Liu et al. 2022), OLMo 2, there with QK-norm."""

    calmer = ("peri",)

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.attention_norm(self.attention(x)))
        return self.add(h, self.mlp_norm(self.mlp(h)))


class DeepNorm(Placement):
    """Post-norm with a stronger residual, α = (2L)^¼, and smaller weights, β = (8L)^-¼.

    Wang et al. 2022 (DeepNet), for decoders; their weights are Xavier's times β.
    """

    final_norm = False
    needs_norms = "its α > 1 enlarges the stream at each sublayer, and the norms bring it back"
    scales_depth = True
    calmer = ("pre",)

    @staticmethod
    def alpha(layers: int) -> float:
        """The factor on the residual connection."""
        return (2 * layers) ** 0.25

    @staticmethod
    def gain(layers: int, part: str) -> float:
        return 1.0 if part in ("q", "k") else (8 * layers) ** -0.25

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha(self.layers)
        h = self.attention_norm(self.add(alpha * x, self.attention(x)))
        return self.mlp_norm(self.add(alpha * h, self.mlp(h)))


class Admin(Placement):
    """Post-norm whose residual is weighted by ω, one number a channel; Liu et al. 2020.

    ω is trained. It starts at the standard deviation that the sum of all branches up to there has
    in one profiled batch, ω²ᵢ₊₁ = Var[ωᵢ xᵢ] + Var[fᵢ], so that late sublayers add little.
    """

    final_norm = False
    needs_norms = "its ω weigh branches that follow a norm"
    calmer = ("pre",)

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        self.attention_omega = nn.Parameter(torch.empty(config.width))
        self.mlp_omega = nn.Parameter(torch.empty(config.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """1, until they are calibrated."""
        nn.init.ones_(self.attention_omega)
        nn.init.ones_(self.mlp_omega)

    @classmethod
    @torch.no_grad()
    def calibrate(cls, blocks: Sequence[Placement], embed: Callable[[], Tensor]) -> None:
        """Profile: ω₁ = 1, then the recursion; variances over the whole batch, biased."""
        x = embed()
        variance = torch.ones((), device=x.device)
        for block in blocks:
            assert isinstance(block, Admin)
            for f, norm, omega in (
                (block.attention, block.attention_norm, block.attention_omega),
                (block.mlp, block.mlp_norm, block.mlp_omega),
            ):
                omega.copy_(variance.sqrt().expand_as(omega))
                residual, branch = omega * x, f(x)
                variance = residual.var(correction=0) + branch.var(correction=0)
                x = norm(residual + branch)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(self.add(self.attention_omega * x, self.attention(x)))
        return self.mlp_norm(self.add(self.mlp_omega * h, self.mlp(h)))


class ReZero(Placement):
    """Branches that start closed: one trained number a block, 0 at first; Bachlechner et al. 2020.

    No norms anywhere.
    """

    final_norm = False
    has_norms = False
    calmer = ("pre",)

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        self.a = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Closed."""
        nn.init.zeros_(self.a)

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.a * self.attention(x))
        return self.add(h, self.a * self.mlp(h))


class DLCL(Placement):
    """A block reads a trained mix of all earlier outputs, each normalised; Wang et al. 2019.

    Dynamic linear combination of layers, round pre-norm blocks. With y₀ the embeddings and y_k the
    output of block k, z₀ = y₀ and z_k = N_k(y_k), block l + 1 reads Σ_k w_k z_k over k = 0 ... l,
    and the final norm the last such sum. The weights start as the mean's, 1/(l + 1). The first
    block reads y₀ itself: a weight there would only scale the embeddings.
    """

    calmer = ("pre",)

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        self.output_norm = make_norm(config)
        self.mix = nn.Parameter(torch.empty(layer + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The mean of all outputs so far."""
        nn.init.constant_(self.mix, 1 / (self.layer + 1))

    @staticmethod
    def begin(x: Tensor) -> tuple[Tensor, ...]:
        return x, x  # what the block reads, and the outputs so far

    @staticmethod
    def end(stream: tuple[Tensor, ...], final_norm: nn.Module) -> Tensor:
        return final_norm(stream[0])

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *outputs = stream
        h = self.add(x, self.attention(self.attention_norm(x)))
        y = self.add(h, self.mlp(self.mlp_norm(h)))
        outputs.append(self.output_norm(y))
        x = torch.stack([w * z for w, z in zip(self.mix, outputs, strict=True)]).sum(0)
        return x, *outputs


class ResiDual(Placement):
    """Two streams, x normalised as in post-norm and r summed as in pre-norm; Xie et al. 2023."""

    needs_norms = "its two streams differ only by the norms"
    calmer = ("pre",)

    @staticmethod
    def begin(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    @staticmethod
    def end(stream: tuple[Tensor, Tensor], final_norm: nn.Module) -> Tensor:
        x, r = stream
        return x + final_norm(r)

    def forward(self, stream: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, r = stream
        f = self.attention(x)
        x, r = self.attention_norm(self.add(x, f)), r + f
        f = self.mlp(x)
        return self.mlp_norm(self.add(x, f)), r + f


class B2T(Placement):
    """Post-norm, and a path round the first norm, from bottom to top; Takase et al. 2022."""

    final_norm = False
    scales_depth = True
    calmer = ("pre",)

    @staticmethod
    def gain(layers: int, part: str) -> float:
        return layers**-0.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(self.add(x, self.attention(x)))
        return self.mlp_norm(self.add(x + h, self.mlp(h)))


class MixLN(Placement):
    """Post-norm in the first ⌊L/4⌋ blocks, pre-norm in the rest; Li et al. 2024."""

    least_layers = 4
    calmer = ("pre",)

    def forward(self, x: Tensor) -> Tensor:
        kind: type[Placement] = PostNorm if self.layer <= self.layers // 4 else PreNorm
        return kind.forward(self, x)


class LayerNormScaling(Placement):
    """Pre-norm whose norms give N(x)/sqrt(l), less the deeper they stand; Sun et al. 2025."""

    needs_norms = "it scales what the norms give"
    scales_depth = True

    def forward(self, x: Tensor) -> Tensor:
        scale = self.layer**-0.5
        h = self.add(x, self.attention(scale * self.attention_norm(x)))
        return self.add(h, self.mlp(scale * self.mlp_norm(h)))


class SubLN(PreNorm):
    """Pre-norm with a second norm in each sublayer, before its last matrix; Wang et al. 2022b.

    Magneto's. Its weights start larger, by sqrt(ln 2L).
    """

    needs_norms = "its second norms are what it is"
    scales_depth = True

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        for sublayer in (attention, mlp):
            sublayer.inner_norm = make_norm(config, sublayer.out.in_features)

    @staticmethod
    def gain(layers: int, part: str) -> float:
        return 1.0 if part in ("q", "k") else math.sqrt(math.log(2 * layers))


class NoNorm(Placement):
    """The residual connections alone, for comparison."""

    final_norm = False
    has_norms = False
    calmer = ("pre", "rezero")

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.attention(x))
        return self.add(h, self.mlp(h))


PLACEMENTS: dict[str, type[Placement]] = {
    "pre": PreNorm,
    "post": PostNorm,
    "peri": PeriNorm,
    "res_post": ResPostNorm,
    "deepnorm": DeepNorm,
    "admin": Admin,
    "rezero": ReZero,
    "dlcl": DLCL,
    "residual": ResiDual,
    "b2t": B2T,
    "mix": MixLN,
    "lns": LayerNormScaling,
    "sub": SubLN,
    "none": NoNorm,
}


def has_final_norm(config: ModelConfig) -> bool:
    """Whether a norm follows the last block."""
    if config.norm.final_norm != "auto":
        return config.norm.final_norm == "on"
    return PLACEMENTS[config.norm.placement].final_norm


def check(config: ModelConfig) -> None:
    """Refuse what would not be what its name says.

    Raises:
        InputError: the placement does not go with another option, and why.
    """
    norm, name = config.norm, config.norm.placement
    placement = PLACEMENTS[name]
    wanting = {  # options that ask for a norm
        f"model.norm.type: {norm.type}": norm.type not in (None, "none"),
        "model.norm.final_norm: on": norm.final_norm == "on",
        "model.norm.embedding: true": norm.embedding,
        "model.attention.qk_norm: true": config.attention.qk_norm,
    }
    asked = [option for option, wants in wanting.items() if wants]
    if asked and not placement.has_norms:
        raise InputError(
            f"{asked[0]}: placement {name} has no norms at all; leave that at its default"
        )
    if asked and norm.type == "none":
        raise InputError(
            f"{asked[0]}: norm.type is none, so there is no norm; leave one of them out"
        )
    if norm.type == "none" and placement.needs_norms:
        raise InputError(
            f"model.norm.type: none makes no sense with placement {name}: {placement.needs_norms}"
        )
    if norm.bias and (norm.type or "layer") not in SHIFTED:
        raise InputError(
            f"model.norm.bias: true: norm.type {norm.type} has no shift to switch on; "
            "leave that null"
        )
    if config.layers < placement.least_layers:
        raise InputError(
            f"model.norm.placement: {name} needs at least {placement.least_layers} layers, and "
            f"model.layers is {config.layers}"
        )
    if norm.type == "batch" and config.context == 1:
        raise InputError("model.norm.type: batch needs a context of more than one token")

"""Norm placements: where a block applies its norms N to attention A and feed-forward F.

Each placement is a `Block` of the transformer whose `forward` is its equation. A new one is a class
and one entry in `PLACEMENTS`; CONTRIBUTING.md adds one as an example. Class attributes hold the
rest: whether a norm follows the last block, which options it excludes, how its weights start.

Shapes: the residual stream x is (B, T, d), B sequences of T tokens with d channels. L is the number
of blocks, l = 1 ... L the number of this one. A block has two sublayers, so the model has 2 L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.norm import make_norm


class Sublayer(nn.Module):
    """Attention or feed-forward: f, (B, T, d) -> (B, T, d).

    Attributes:
        out: its last linear layer.
        inner_norm: applied to the input of `out`; the identity unless a placement sets it.
    """

    out: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.inner_norm: nn.Module = nn.Identity()


class Add(nn.Module):
    """x + f, the residual connection; a module so that diagnostics can observe it."""

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Two (B, T, d) -> (B, T, d)."""
        return x + f


class Block(nn.Module):
    """One block of the transformer. `forward` maps the stream to the stream.

    The stream is x, (B, T, d), unless `begin` and `end` say otherwise.

    Args:
        layer: l, counted from 1.
        attention, mlp: A and F.

    Attributes:
        final_norm: whether a norm follows the last block if `norm.final_norm` is "auto".
        has_norms: whether the placement has norms.
        needs_norms: why it cannot do without norms; empty if it can.
        min_layers: the smallest L at which it differs from the other placements.
        scales_depth: whether it replaces the factor 1/sqrt(2 L) of the initial weights.
        more_stable: placements found to be more stable, suggested when a run diverges.

    Give the attributes as literals: validation reads them from the source, without torch.
    """

    final_norm: ClassVar[bool] = True
    has_norms: ClassVar[bool] = True
    needs_norms: ClassVar[str] = ""
    min_layers: ClassVar[int] = 1
    scales_depth: ClassVar[bool] = False
    more_stable: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__()
        self.layer, self.layers = layer, config.layers
        self.attention, self.mlp = attention, mlp
        self.attention_norm = make_norm(config) if self.has_norms else nn.Identity()
        self.mlp_norm = make_norm(config) if self.has_norms else nn.Identity()
        self.add = Add()

    @staticmethod
    def gain(layers: int, part: str) -> float:
        """Factor on the initial weights of one matrix: q, k, v, out, up or gate."""
        return 1.0

    @staticmethod
    def begin(x: Tensor) -> Any:
        """The embeddings, (B, T, d) -> the stream that enters the first block."""
        return x

    @staticmethod
    def end(stream: Any, final_norm: nn.Module) -> Tensor:
        """The stream after the last block -> the head's input, (B, T, d)."""
        return final_norm(stream)

    @classmethod
    def calibrate(cls, blocks: Iterable[nn.Module], embed: Callable[[], Tensor]) -> None:
        """Set parameters that depend on the first batch. Most placements have none.

        Args:
            blocks: all L, in order.
            embed: returns the embeddings of that batch, (B, T, d).
        """


class PreNorm(Block):
    """The norm inside the residual branch; GPT-2, Xiong et al. 2020.

    The stream grows with depth, so a norm follows the last block.
    """

    more_stable = ("peri",)

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.attention(self.attention_norm(x)))
        return self.add(h, self.mlp(self.mlp_norm(h)))


class PostNorm(Block):
    """The norm after the residual connection; Vaswani et al. 2017, GPT-1.

    The last block's output is normalized already, so no norm follows it.
    """

    final_norm = False
    more_stable = ("pre", "deepnorm", "admin")

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(self.add(x, self.attention(x)))
        return self.mlp_norm(self.add(h, self.mlp(h)))


class PeriNorm(Block):
    """Norms before and after each sublayer; CogView's sandwich (Ding et al. 2021), Kim et al. 2025.

    Peri-LN also normalizes the embeddings: `norm.embedding`.
    """

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        self.attention_out_norm, self.mlp_out_norm = make_norm(config), make_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.attention_out_norm(self.attention(self.attention_norm(x))))
        return self.add(h, self.mlp_out_norm(self.mlp(self.mlp_norm(h))))


class ResPostNorm(Block):
    """The norm on the sublayer's output; Swin v2 (Liu et al. 2022), OLMo 2 (with QK-norm)."""

    more_stable = ("peri",)

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.attention_norm(self.attention(x)))
        return self.add(h, self.mlp_norm(self.mlp(h)))


class DeepNorm(Block):
    """Post-norm with a residual scaled up, α = (2L)^¼, and weights scaled down, β = (8L)^-¼.

    Wang et al. 2022 (DeepNet), for decoders. Their weights are Xavier's times β.
    """

    final_norm = False
    needs_norms = "its α > 1 scales the stream up at each sublayer, and only norms scale it down"
    scales_depth = True
    more_stable = ("pre",)

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


class Admin(Block):
    """Post-norm whose residual is scaled by a trained ω per channel; Liu et al. 2020.

    ω starts at the standard deviation of the sum of all earlier branches in one profiled batch,
    ω²ᵢ₊₁ = Var[ωᵢ xᵢ] + Var[fᵢ], so that late sublayers add little.
    """

    final_norm = False
    needs_norms = "its ω compensate for the norms after each sublayer"
    more_stable = ("pre",)

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        self.attention_omega = nn.Parameter(torch.empty(config.width))
        self.mlp_omega = nn.Parameter(torch.empty(config.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """ω = 1, until `calibrate`."""
        nn.init.ones_(self.attention_omega)
        nn.init.ones_(self.mlp_omega)

    @classmethod
    @torch.no_grad()
    def calibrate(cls, blocks: Iterable[nn.Module], embed: Callable[[], Tensor]) -> None:
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


class ReZero(Block):
    """Branches scaled by one trained number per block, initially 0; Bachlechner et al. 2020.

    There are no norms.
    """

    final_norm = False
    has_norms = False
    more_stable = ("pre",)

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        self.a = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a = 0, so that every block starts as the identity."""
        nn.init.zeros_(self.a)

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.a * self.attention(x))
        return self.add(h, self.a * self.mlp(h))


class DLCL(Block):
    """A block reads a trained mix of all earlier outputs, each normalized; Wang et al. 2019.

    A dynamic linear combination of layers around pre-norm blocks. Let y₀ be the embeddings, y_k the
    output of block k, z₀ = y₀ and z_k = N_k(y_k). Block l + 1 reads Σ_k w_k z_k over k = 0 ... l,
    and the final norm reads the last such sum. The weights start at 1/(l + 1), the mean. The first
    block reads y₀ itself, since a weight there would only scale the embeddings.
    """

    more_stable = ("pre",)

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        self.output_norm = make_norm(config)
        self.mix = nn.Parameter(torch.empty(layer + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal weights, the mean of all outputs so far."""
        nn.init.constant_(self.mix, 1 / (self.layer + 1))

    @staticmethod
    def begin(x: Tensor) -> tuple[Tensor, ...]:
        return x, x  # the input of the next block, and the outputs so far

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


class ResiDual(Block):
    """Two streams: x, normalized as in post-norm, and r, summed as in pre-norm; Xie et al. 2023."""

    needs_norms = "without norms its two streams are identical"
    more_stable = ("pre",)

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


class B2T(Block):
    """Post-norm with a path around the first norm, from bottom to top; Takase et al. 2022."""

    final_norm = False
    scales_depth = True
    more_stable = ("pre",)

    @staticmethod
    def gain(layers: int, part: str) -> float:
        return layers**-0.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(self.add(x, self.attention(x)))
        return self.mlp_norm(self.add(x + h, self.mlp(h)))


class MixLN(Block):
    """Post-norm in the first ⌊L/4⌋ blocks, pre-norm in the others; Li et al. 2024."""

    min_layers = 4
    more_stable = ("pre",)

    def forward(self, x: Tensor) -> Tensor:
        kind: type[Block] = PostNorm if self.layer <= self.layers // 4 else PreNorm
        return kind.forward(self, x)


class LayerNormScaling(Block):
    """Pre-norm with norms scaled down with depth, N(x)/sqrt(l); Sun et al. 2025."""

    needs_norms = "it scales the output of its norms"
    scales_depth = True

    def forward(self, x: Tensor) -> Tensor:
        scale = self.layer**-0.5
        h = self.add(x, self.attention(scale * self.attention_norm(x)))
        return self.add(h, self.mlp(scale * self.mlp_norm(h)))


class SubLN(PreNorm):
    """Pre-norm with a second norm in each sublayer, before its last matrix; Wang et al. 2022b.

    From Magneto. All matrices except q and k start scaled by sqrt(ln 2L).
    """

    needs_norms = "its second norms are all that distinguishes it"
    scales_depth = True

    def __init__(self, config: ModelConfig, layer: int, attention: Sublayer, mlp: Sublayer) -> None:
        super().__init__(config, layer, attention, mlp)
        for sublayer in (attention, mlp):
            sublayer.inner_norm = make_norm(config, sublayer.out.in_features)

    @staticmethod
    def gain(layers: int, part: str) -> float:
        return 1.0 if part in ("q", "k") else math.sqrt(math.log(2 * layers))


class NoNorm(Block):
    """Residual connections without norms, for comparison."""

    final_norm = False
    has_norms = False
    more_stable = ("pre", "rezero")

    def forward(self, x: Tensor) -> Tensor:
        h = self.add(x, self.attention(x))
        return self.add(h, self.mlp(h))


PLACEMENTS: dict[str, type[Block]] = {
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

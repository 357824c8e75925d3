"""GPT-2 in PyTorch, to be read once from top to bottom.

    tokens -> token embedding + position embedding -> L blocks -> final norm -> head -> logits

A block is causal self-attention and a feed-forward network, joined by residual connections and
norms; how they are joined is the block's placement (placement.py). Norms are in norm.py, initial
weights in init.py. Shapes: B sequences, T tokens, d channels, h heads, V tokens in the vocabulary.

Not here: training (gpt/training.py) and sampling (gpt/generation.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import ModelConfig
from gpt.model.dropout import Dropout
from gpt.model.init import logit_scale
from gpt.model.kv_cache import KVCache
from gpt.model.loss import chunked_next_token_loss, next_token_loss
from gpt.model.norm import make_norm
from gpt.model.parametrization import logit_factor, width_ratio
from gpt.model.placement import PLACEMENTS, Block, Sublayer, has_final_norm

# ---------------------------------------------------------------------------------------------
# Attention


class FusedLinear(nn.Linear):
    """Several matrices that read the same input, computed as one product.

    Each is initialized as if it were a layer of its own (see `initialize`, init.py).

    Args:
        n_in, n_out: channels of each matrix.
        parts: names of the matrices, in the order of their outputs.
    """

    def __init__(self, n_in: int, n_out: int, parts: tuple[str, ...], bias: bool) -> None:
        super().__init__(n_in, n_out * len(parts), bias)
        self.parts = parts


class CausalSelfAttention(Sublayer):
    """softmax(q k^T / sqrt(d/h) + causal mask) v, in h heads (Vaswani et al. 2017).

    With QK-norm, each head's q and k are normalized (Henry et al. 2020, Dehghani et al. 2023).
    With a `cache`, the input's tokens follow those in the cache and attend to them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.weight_dropout = Dropout(config.dropout)
        self.cap = config.attention.soft_cap
        self.q_scale = logit_factor(config, "attention")
        self.qkv = FusedLinear(config.width, config.width, ("q", "k", "v"), config.bias)
        qk_norm, width = config.attention.qk_norm, config.width // config.heads
        self.q_norm = make_norm(config, width) if qk_norm else nn.Identity()
        self.k_norm = make_norm(config, width) if qk_norm else nn.Identity()
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.out_dropout = Dropout(config.dropout)
        self.kernel: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.cache: KVCache | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        B, T, d = x.shape
        q, k, v = self.project(x)
        attn_mask = None
        if self.cache is not None:
            k, v = self.cache.extend(k, v)  # each (B, h, S, d/h), S >= T
            attn_mask = self.cache.attn_mask
        y = self.attend(q, k, v, attn_mask)  # (B, h, T, d/h)
        y = y.transpose(1, 2).reshape(B, T, d)
        return self.out_dropout(self.out(self.inner_norm(y)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (in muP scaled), keys and values: (B, T, d) -> three times (B, h, T, d/h)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, h, d/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        return q if self.q_scale == 1 else q * self.q_scale, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Weighted sums of v: q (B, h, T, d/h), k and v (B, h, S, d/h) -> (B, h, T, d/h).

        torch's kernel never forms the (T, S) weights, but cannot cap scores or drop by sequence.

        Args:
            attn_mask: (T, S), true where a query attends to a key; None: the causal mask.
        """
        T, S = q.shape[2], k.shape[2]
        dropping = self.training and self.weight_dropout.p > 0
        if self.cap is not None or dropping:
            return self.weight_dropout(self.weights(self.scores(q, k), attn_mask)) @ v
        causal = attn_mask is None and T == S
        if attn_mask is None and 1 < T < S:
            attn_mask = causal_mask(T, S, q.device)
        return self.kernel(q, k, v, attn_mask=attn_mask, is_causal=causal)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Inner products q k^T / sqrt(d/h): (B, h, T, d/h), (B, h, S, d/h) -> (B, h, T, S)."""
        return (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)

    def weights(self, scores: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Softmax of the capped scores over the keys that a query attends to: (B, h, T, S)."""
        T, S = scores.shape[-2:]
        if attn_mask is None:
            attn_mask = causal_mask(T, S, scores.device)
        return soft_cap(scores, self.cap).masked_fill(~attn_mask, -torch.inf).softmax(-1)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), true where query t, at position S - T + t, may attend to key s: s <= S - T + t."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def soft_cap(z: Tensor, cap: float | None) -> Tensor:
    """The bounded c tanh(z/c), close to z for small z, never beyond ±c; without a cap, z itself.

    Bello et al. 2017; Gemma 2 caps attention logits at 50 and output logits at 30.
    """
    return z if cap is None else cap * torch.tanh(z / cap)


# ---------------------------------------------------------------------------------------------
# Feed-forward


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up; Shazeer 2020. (..., 2 n) -> (..., n)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# Nonlinearities between the matrices of the feed-forward network.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's
    "gelu": F.gelu,  # x P(X <= x), X standard normal; Hendrycks and Gimpel 2016
    "relu": F.relu,  # Vaswani et al. 2017
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
    "swiglu": swiglu,
}
GATED = {"swiglu"}  # those that take the outputs of two matrices


class MLP(Sublayer):
    """W2 φ(W1 x), `mlp.multiple` times as wide inside; φ is the activation, in GPT-2 a tanh GELU.

    A gated φ needs a third matrix. Two thirds of the width, rounded to a multiple of 8, then give
    about the same number of parameters (Shazeer 2020).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gated = config.mlp.activation in GATED
        parts = ("gate", "up") if gated else ("up",)
        hidden = config.mlp.multiple * config.width
        hidden = 8 * max(1, round(hidden * 2 / 3 / 8)) if gated else round(hidden)
        self.up = FusedLinear(config.width, hidden, parts, config.bias)
        self.activation = ACTIVATIONS[config.mlp.activation]
        self.out = nn.Linear(hidden, config.width, bias=config.bias)
        self.out_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.out_dropout(self.out(self.inner_norm(self.activation(self.up(x)))))


# ---------------------------------------------------------------------------------------------
# The whole model


# During training the head's matrix is padded to a multiple of this many rows, by device type: a
# GPU's matrix units need multiples of 16 bytes; 50,257 is odd. The padding's logits are cut off.
VOCABULARY_MULTIPLE = {"cuda": 64}


class GPT(nn.Module):
    """A decoder-only transformer language model (Radford et al. 2019).

    Args:
        config: shape and norms, validated; note that `model_copy` does not validate.
        vocab_size: V, from the tokenizer.

    Attributes:
        loss_chunk: tokens whose logits `loss_fn` computes at a time; None: all of them.
        cache: during generation, the first attention layer's cache.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.embedding_dropout = Dropout(config.dropout)
        self.embedding_norm = make_norm(config) if config.norm.embedding else nn.Identity()
        self.placement: type[Block] = PLACEMENTS[config.norm.placement]
        self.blocks = nn.ModuleList(
            self.placement(config, layer, CausalSelfAttention(config), MLP(config))
            for layer in range(1, config.layers + 1)
        )
        self.final_norm = make_norm(config) if has_final_norm(config) else nn.Identity()
        self.head = None if config.tied_head else nn.Linear(config.width, vocab_size, bias=False)
        self.logit_scale = logit_scale(config)
        self.m = width_ratio(config)
        self.loss_chunk: int | None = None
        self.cache: KVCache | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position: (B, T) integers -> (B, T, V).

        T is at most `config.context`, less the length of the caches (see `attach_caches`).
        """
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The residual stream after the final norm: (B, T) integers -> (B, T, d)."""
        stream = self.placement.begin(self.embed(tokens))
        for block in self.blocks:
            stream = block(stream)
        return self.placement.end(stream, self.final_norm)

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream before the first block: (B, T) integers -> (B, T, d)."""
        T, context = tokens.shape[1], self.config.context
        if self.cache is not None:
            positions = self.cache.positions(T)
        else:
            assert context >= T, f"{T} tokens in a context of {context}"
            positions = torch.arange(T, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        return self.embedding_norm(self.embedding_dropout(x))

    def logits(self, x: Tensor) -> Tensor:
        """(..., d) after the final norm -> (..., V)."""
        if self.head is not None and not self.training:  # may be a layer of gpt/inference.py
            return self._scale_logits(self.head(x))
        return self.apply_head(x, self.head_matrix)

    @property
    def head_matrix(self) -> Tensor:
        """(V, d); with a tied head, the token embedding."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def apply_head(self, x: Tensor, head: Tensor) -> Tensor:
        """(..., d) after the final norm, (V, d) -> (..., V)."""
        padding = -len(head) % VOCABULARY_MULTIPLE.get(x.device.type, 1)
        if padding and self.training:  # copying the matrix would slow generation down
            head = F.pad(head, (0, 0, 0, padding))
        return self._scale_logits(F.linear(x, head)[..., : self.vocab_size])

    def _scale_logits(self, logits: Tensor) -> Tensor:
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return soft_cap(logits, self.config.logit_soft_cap)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, a float32 scalar. Arguments: (B, T) integers."""
        return self.loss_fn(tokens, targets)[1]

    def loss_fn(
        self, tokens: Tensor, targets: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(total loss, cross-entropy), means in nats per token; float32 scalars.

        Training minimizes the first: cross-entropy + z_loss * mean(log² Z), see
        `next_token_loss` (loss.py). Tokens and targets are (B, T) integers.
        """
        targets = targets.flatten()
        if self.loss_chunk is None:
            return next_token_loss(self(tokens).flatten(0, 1), targets, z_loss)
        x = self.hidden(tokens).flatten(0, 1)
        return chunked_next_token_loss(
            self.apply_head, x, self.head_matrix, targets, z_loss, self.loss_chunk
        )

    @torch.no_grad()
    def calibrate(self, tokens: Tensor) -> None:
        """Set parameters that a placement derives from one batch (Admin's ω); (B, T) integers."""
        self.placement.calibrate(self.blocks, partial(self.embed, tokens))

    # -- Generation: a key/value cache in every attention layer ---------------------------------

    def attentions(self) -> list[CausalSelfAttention]:
        """The attention layers, first block first."""
        return [module for module in self.modules() if isinstance(module, CausalSelfAttention)]

    def make_caches(self, batch: int, size: int | None = None) -> list[KVCache]:
        """A cache for each attention layer, for `batch` sequences of at most `size` tokens."""
        like = self.token_embedding.weight
        return [KVCache(batch, self.config, like, size) for _ in self.attentions()]

    def attach_caches(self, caches: Sequence[KVCache]) -> None:
        """From now on, `forward` continues the sequences that these caches hold."""
        self.cache = caches[0]  # all hold the same positions
        for attention, cache in zip(self.attentions(), caches, strict=True):
            attention.cache = cache

    def detach_caches(self) -> None:
        """From now on, `forward` takes whole sequences again."""
        self.cache = None
        for attention in self.attentions():
            attention.cache = None

    # -- Size ------------------------------------------------------------------------------------

    def num_parameters(self) -> int:
        """Trainable parameters, embeddings included; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def num_embedding_parameters(self) -> int:
        """Parameters of the token and position embeddings."""
        return self.token_embedding.weight.numel() + self.position_embedding.weight.numel()

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward for one token: 6 N + 12 L d T.

        N leaves out the position embedding, which is only looked up, and the token embedding unless
        it is the head too; the second term is attention's (Chowdhery et al. 2022, appendix B).
        """
        shape = self.config
        numbers = self.num_parameters() - self.position_embedding.weight.numel()
        if self.head is not None:
            numbers -= self.token_embedding.weight.numel()
        return 6 * numbers + 12 * shape.layers * shape.width * shape.context

"""GPT-2 in PyTorch, to be read once from top to bottom.

    tokens -> token embedding + position embedding -> L blocks -> final norm -> head -> logits

A block is causal self-attention and a feed-forward network, joined by a placement
(gpt/placement.py), which holds the norms (gpt/norm.py) and the residual connections. Shapes: B
sequences, T tokens, d channels, h heads, V tokens in the vocabulary. Initial weights are set in
gpt/init.py, by name.

Not here: training (gpt/training.py) and the choice of the next token (gpt/generate.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import ModelConfig
from gpt.init import Stacked, logit_scale
from gpt.loss import chunked_cross_entropy, cross_entropy
from gpt.norm import make_norm
from gpt.placement import PLACEMENTS, Placement, Sublayer, check, has_final_norm


class Place:
    """Where generation stands, as tensors: one-token steps then have shapes that never change.

    A CUDA graph needs that. Attention goes over the whole cache, and `seen` hides what is not read.

    Attributes:
        position: (1,), the next token's.
        seen: (1, S), true up to that position and at it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.seen = torch.zeros(1, size, dtype=torch.bool, device=device)
        self._all = torch.arange(size, device=device)[None]

    def move(self, position: int) -> None:
        """Change both in place."""
        self.position.fill_(position)
        torch.le(self._all, self.position, out=self.seen)


class KVCache:
    """Keys and values of the tokens that one attention layer has seen, for generation.

    Args:
        size: S, the most tokens that it can hold; the model's context unless given.

    Attributes:
        keys, values: (B, h, S, d/h), of which the first `length` positions are filled.
        place: if not None, counts in place of `length`, which then stands still.
    """

    def __init__(
        self, batch: int, config: ModelConfig, like: Tensor, size: int | None = None
    ) -> None:
        shape = (batch, config.heads, size or config.context, config.width // config.heads)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.length = 0
        self.place: Place | None = None

    @property
    def seen(self) -> Tensor | None:
        """(1, S), what of the cache the one next token sees; None: all that `extend` returns."""
        return None if self.place is None else self.place.seen

    def positions(self, count: int) -> Tensor:
        """Where the next `count` tokens stand: (count,) integers."""
        if self.place is not None:
            return self.place.position
        end, size = self.length + count, self.keys.shape[2]
        assert end <= size, f"{end} tokens in a cache of {size}"
        return torch.arange(self.length, end, device=self.keys.device)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, h, t, d/h) keys and values; returns all so far, (B, h, length, d/h).

        With a `place`, t is 1 and the whole cache is returned, (B, h, S, d/h).
        """
        if self.place is not None:
            self.keys.index_copy_(2, self.place.position, keys)
            self.values.index_copy_(2, self.place.position, values)
            return self.keys, self.values
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def soft_cap(z: Tensor, cap: float | None) -> Tensor:
    """The value of c tanh(z/c): nearly z if it is small, never beyond ±c; z itself without a cap.

    Bello et al. 2017; Gemma 2 caps attention's logits at 50 and the last ones at 30.
    """
    return z if cap is None else cap * torch.tanh(z / cap)


class CausalSelfAttention(Sublayer):
    """softmax(q k^T / sqrt(d/h) + causal mask) v, in h heads (Vaswani et al. 2017).

    With QK-norm, each head's q and k are normalised (Henry et al. 2020, Dehghani et al. 2023).
    With a `cache`, the input's tokens follow those in the cache, and see them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.cap = config.attention.soft_cap
        self.qkv = Stacked(config.width, config.width, ("q", "k", "v"), config.bias)
        qk_norm, width = config.attention.qk_norm, config.width // config.heads
        self.q_norm = make_norm(config, width) if qk_norm else nn.Identity()
        self.k_norm = make_norm(config, width) if qk_norm else nn.Identity()
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.out_dropout = nn.Dropout(config.dropout)
        self.kernel: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.cache: KVCache | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        B, T, d = x.shape
        q, k, v = self.project(x)
        seen = None
        if self.cache is not None:
            k, v = self.cache.extend(k, v)  # each (B, h, S, d/h), S >= T
            seen = self.cache.seen
        y = self.mix(q, k, v, seen)  # (B, h, T, d/h)
        y = y.transpose(1, 2).reshape(B, T, d)
        return self.out_dropout(self.out(self.inner_norm(y)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (B, T, d) -> three times (B, h, T, d/h)."""
        B, T, d = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, d // self.heads)  # (B, T, 3, h, d/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """The values, weighted: q (B, h, T, d/h), k and v (B, h, S, d/h) -> (B, h, T, d/h).

        torch's kernel never forms the (T, S) weights, but has no soft cap.

        Args:
            seen: (T, S), which keys a query sees; None: see `visible`.
        """
        T, S = q.shape[2], k.shape[2]
        dropout = self.dropout if self.training else 0.0
        if self.cap is None:
            causal = seen is None and T == S
            if seen is None and 1 < T < S:
                seen = visible(T, S, q.device)
            return self.kernel(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal)
        return F.dropout(self.weights(self.scores(q, k), seen), dropout) @ v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Inner products q k^T / sqrt(d/h): (B, h, T, d/h), (B, h, S, d/h) -> (B, h, T, S)."""
        return (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)

    def weights(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        """The softmax of the capped scores over the keys that a query sees: (B, h, T, S)."""
        T, S = scores.shape[-2:]
        hidden = ~(visible(T, S, scores.device) if seen is None else seen)
        return soft_cap(scores, self.cap).masked_fill(hidden, -torch.inf).softmax(-1)


def visible(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), true where query t of the last T of S positions may see key s: s <= S - T + t."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up; Shazeer 2020. (..., 2 n) -> (..., n)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# What the feed-forward network applies between its matrices.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's
    "gelu": F.gelu,  # x P(X <= x), X standard normal; Hendrycks and Gimpel 2016
    "relu": F.relu,  # Vaswani et al. 2017
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
    "swiglu": swiglu,
}
GATED = {"swiglu"}  # those that take two matrices' outputs


class MLP(Sublayer):
    """W2 φ(W1 x), four times as wide inside, φ the activation; GPT-2's is GELU in its tanh form.

    A gated φ needs a third matrix; two thirds of the width, to the nearest multiple of 8, then give
    about as many parameters (Shazeer 2020).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gated = config.mlp.activation in GATED
        hidden = config.mlp.multiple * config.width
        hidden = 8 * max(1, round(hidden * 2 / 3 / 8)) if gated else round(hidden)
        self.up = Stacked(config.width, hidden, ("gate", "up") if gated else ("up",), config.bias)
        self.activation = ACTIVATIONS[config.mlp.activation]
        self.out = nn.Linear(hidden, config.width, bias=config.bias)
        self.out_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.out_dropout(self.out(self.inner_norm(self.activation(self.up(x)))))


# While training, the head's matrix is padded to a multiple of so many rows, by kind of device: a
# GPU's matrix units need rows of 16 bytes, and 50,257 is odd. The logits are those without it.
VOCABULARY_MULTIPLE = {"cuda": 64}


class GPT(nn.Module):
    """A decoder-only transformer language model (Radford et al. 2019).

    Args:
        config: shape and norms.
        vocab_size: V, from the tokenizer.

    Attributes:
        loss_chunk: tokens whose logits `objective` makes at a time; None: all of them.

    Raises:
        InputError: the placement does not go with the rest (see `gpt.placement.check`).
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.embedding_norm = make_norm(config) if config.norm.embedding else nn.Identity()
        self.placement: type[Placement] = PLACEMENTS[config.norm.placement]
        self.blocks = nn.ModuleList(
            self.placement(config, layer, CausalSelfAttention(config), MLP(config))
            for layer in range(1, config.layers + 1)
        )
        self.final_norm = make_norm(config) if has_final_norm(config) else nn.Identity()
        self.head = None if config.tied_head else nn.Linear(config.width, vocab_size, bias=False)
        self.logit_scale = logit_scale(config)
        self.loss_chunk: int | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position: (B, T) integers -> (B, T, V).

        T may be at most `config.context`, less what the caches hold (see `attach_caches`).
        """
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The stream after the final norm: (B, T) integers -> (B, T, d)."""
        stream = self.placement.begin(self.embed(tokens))
        for block in self.blocks:
            stream = block(stream)
        return self.placement.end(stream, self.final_norm)

    def embed(self, tokens: Tensor) -> Tensor:
        """The stream before the first block: (B, T) integers -> (B, T, d)."""
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
        if self.head is not None and not self.training:  # sampling may have replaced it
            return self._scaled(self.head(x))
        return self.logits_by(x, self.head_matrix)

    @property
    def head_matrix(self) -> Tensor:
        """(V, d); a tied head's is the token embedding."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def logits_by(self, x: Tensor, head: Tensor) -> Tensor:
        """(..., d) after the final norm, (V, d) -> (..., V)."""
        padding = -len(head) % VOCABULARY_MULTIPLE.get(x.device.type, 1)
        if padding and self.training:  # for one token of generation it would not pay
            head = F.pad(head, (0, 0, 0, padding))
        return self._scaled(F.linear(x, head)[..., : self.vocab_size])

    def _scaled(self, logits: Tensor) -> Tensor:
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return soft_cap(logits, self.config.logit_soft_cap)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, a float32 scalar. Both (B, T) integers."""
        return self.objective(tokens, targets)[1]

    def objective(
        self, tokens: Tensor, targets: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """What training makes small, and the mean cross-entropy in it; float32 scalars.

        The first has z_loss * mean(log² Z) beside it (see `gpt.loss.cross_entropy`).
        """
        targets = targets.flatten()
        if self.loss_chunk is None:
            return cross_entropy(self(tokens).flatten(0, 1), targets, z_loss)
        x = self.hidden(tokens).flatten(0, 1)
        return chunked_cross_entropy(
            self.logits_by, x, self.head_matrix, targets, z_loss, self.loss_chunk
        )

    @torch.no_grad()
    def calibrate(self, tokens: Tensor) -> None:
        """Let the placement set what one batch decides (Admin's ω); (B, T) integers."""
        self.placement.calibrate(self.placements(), partial(self.embed, tokens))

    def placements(self) -> list[Placement]:
        """The blocks, first one first."""
        return [block for block in self.blocks if isinstance(block, Placement)]

    # -- Generation: a key/value cache in every attention layer ---------------------------------

    def attentions(self) -> list[CausalSelfAttention]:
        """The attention layers, first block first."""
        return [module for module in self.modules() if isinstance(module, CausalSelfAttention)]

    def make_caches(self, batch: int, size: int | None = None) -> list[KVCache]:
        """A cache for each attention layer, for `batch` sequences of at most `size` tokens."""
        like = self.token_embedding.weight
        return [KVCache(batch, self.config, like, size) for _ in self.attentions()]

    def attach_caches(self, caches: Iterable[KVCache]) -> None:
        """From here on, `forward` continues the sequences that these caches hold."""
        for attention, cache in zip(self.attentions(), caches, strict=True):
            attention.cache = cache

    def detach_caches(self) -> None:
        """Back to `forward` on whole sequences."""
        for attention in self.attentions():
            attention.cache = None

    @property
    def cache(self) -> KVCache | None:
        """The first attention layer's, which tells what all hold."""
        first = self.blocks[0].attention
        assert isinstance(first, CausalSelfAttention)
        return first.cache

    # -- Size ------------------------------------------------------------------------------------

    def num_parameters(self) -> int:
        """Trained numbers, embeddings included; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def num_embedding_parameters(self) -> int:
        """Numbers in the token and position embeddings."""
        return self.token_embedding.weight.numel() + self.position_embedding.weight.numel()

"""GPT-2 in PyTorch, to be read once from top to bottom.

    tokens -> token embedding + position embedding -> L blocks -> final norm -> head -> logits

A block is causal self-attention and a feed-forward network, each inside its placement
(gpt/norm.py), which holds the norm and the residual connection. Shapes: B sequences, T tokens,
d channels, h heads, V tokens in the vocabulary. Initial weights are set in gpt/init.py, by name.

Not here: training (gpt/training.py) and the choice of the next token (gpt/generate.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import ModelConfig
from gpt.norm import PLACEMENTS, make_norm


class KVCache:
    """Keys and values of the tokens that one attention layer has seen, for generation.

    Attributes:
        keys, values: (B, h, T, d/h), of which the first `length` positions are filled.
    """

    def __init__(self, batch: int, config: ModelConfig, like: Tensor) -> None:
        shape = (batch, config.heads, config.context, config.width // config.heads)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, h, t, d/h) keys and values; returns all so far, (B, h, length, d/h)."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d/h) + causal mask) v, in h heads (Vaswani et al. 2017).

    With a `cache`, the input's tokens follow those in the cache, and see them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.out_dropout = nn.Dropout(config.dropout)
        self.cache: KVCache | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        B, T, d = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, d // self.heads)  # (B, T, 3, h, d/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, T, d/h)
        mask = None
        if self.cache is not None:
            k, v = self.cache.extend(k, v)  # each (B, h, S, d/h), S >= T
            if T > 1:  # token t of T stands at S - T + t and sees everything up to there
                S = k.shape[2]
                mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.cache is None,
        )  # (B, h, T, d/h)
        y = y.transpose(1, 2).reshape(B, T, d)
        return self.out_dropout(self.out(y))


class MLP(nn.Module):
    """W2 gelu(W1 x), four times as wide inside; GELU in its tanh form, as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.out = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.out_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.out_dropout(self.out(self.gelu(self.up(x))))


class Block(nn.Module):
    """Attention, then feed-forward, each in its placement."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        placement = PLACEMENTS[config.norm.placement]
        self.attention = placement(config, CausalSelfAttention(config))
        self.mlp = placement(config, MLP(config))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.mlp(self.attention(x))


class GPT(nn.Module):
    """A decoder-only transformer language model (Radford et al. 2019).

    Args:
        config: shape and norms.
        vocab_size: V, from the tokenizer.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        has_final_norm = PLACEMENTS[config.norm.placement].final_norm
        self.final_norm = make_norm(config) if has_final_norm else nn.Identity()
        self.head = None if config.tied_head else nn.Linear(config.width, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position: (B, T) integers -> (B, T, V).

        T may be at most `config.context`, less what the caches hold (see `attach_caches`).
        """
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The stream after the final norm: (B, T) integers -> (B, T, d)."""
        start = self.cached
        end = start + tokens.shape[1]
        assert end <= self.config.context, f"{end} tokens in a context of {self.config.context}"
        positions = torch.arange(start, end, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., d) after the final norm -> (..., V)."""
        return F.linear(x, self.token_embedding.weight) if self.head is None else self.head(x)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, a float32 scalar. Both (B, T) integers."""
        logits = self(tokens).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    # -- Generation: a key/value cache in every attention layer ---------------------------------

    def attentions(self) -> list[CausalSelfAttention]:
        """The attention layers, first block first."""
        return [module for module in self.modules() if isinstance(module, CausalSelfAttention)]

    def attach_caches(self, batch: int) -> None:
        """From here on, `forward` continues the `batch` sequences that it was given before."""
        for attention in self.attentions():
            attention.cache = KVCache(batch, self.config, like=attention.qkv.weight)

    def detach_caches(self) -> None:
        """Back to `forward` on whole sequences."""
        for attention in self.attentions():
            attention.cache = None

    @property
    def cached(self) -> int:
        """Tokens in the caches."""
        cache = self.attentions()[0].cache
        return 0 if cache is None else cache.length

    # -- Size ------------------------------------------------------------------------------------

    def num_parameters(self) -> int:
        """Trained numbers, embeddings included; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def num_embedding_parameters(self) -> int:
        """Numbers in the token and position embeddings."""
        return self.token_embedding.weight.numel() + self.position_embedding.weight.numel()

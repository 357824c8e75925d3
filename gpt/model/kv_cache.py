"""Key/value caches for generation: keys and values of earlier tokens, a cache per attention layer.

With them, generating a token takes a forward pass of one token. A cache usually returns the part
that is filled, which grows. With a `DecodePosition` it returns its whole buffer, so that shapes
are fixed and a step can be compiled or replayed as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt.config import ModelConfig


class DecodePosition:
    """The position of the next token as tensors, so that one-token steps have fixed shapes.

    Attention then runs over the whole cache, and `attn_mask` hides the part that is not filled.

    Args:
        size: S, the tokens that the caches can hold.

    Attributes:
        index: (1,), the position of the next token.
        attn_mask: (1, S), true up to and including that position.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.attn_mask = torch.zeros(1, size, dtype=torch.bool, device=device)
        self._all = torch.arange(size, device=device)[None]

    def move(self, index: int) -> None:
        """Change both tensors in place."""
        self.index.fill_(index)
        torch.le(self._all, self.index, out=self.attn_mask)


class KVCache:
    """Keys and values of one attention layer.

    Args:
        batch: B, the sequences.
        like: a tensor of the wanted dtype and device.
        size: S, the tokens that it can hold; by default the model's context.

    Attributes:
        keys, values: (B, h, S, d/h), of which the first `length` positions are filled.
        position: where the next token goes, for steps of fixed shape; it then replaces `length`,
            which is not updated.
    """

    def __init__(
        self, batch: int, config: ModelConfig, like: Tensor, size: int | None = None
    ) -> None:
        shape = (batch, config.heads, size or config.context, config.width // config.heads)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.length = 0
        self.position: DecodePosition | None = None

    @property
    def attn_mask(self) -> Tensor | None:
        """(1, S), the keys that the next token sees; None: all that `extend` returns."""
        return None if self.position is None else self.position.attn_mask

    def positions(self, count: int) -> Tensor:
        """Positions of the next `count` tokens: (count,) integers."""
        if self.position is not None:
            return self.position.index
        end, size = self.length + count, self.keys.shape[2]
        assert end <= size, f"{end} tokens in a cache of {size}"
        return torch.arange(self.length, end, device=self.keys.device)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, h, t, d/h) keys and values; returns all so far, (B, h, length, d/h).

        With a `position`, t is 1 and the whole cache is returned, (B, h, S, d/h).
        """
        if self.position is not None:
            self.keys.index_copy_(2, self.position.index, keys)
            self.values.index_copy_(2, self.position.index, values)
            return self.keys, self.values
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

"""Sampling: the next token from the logits, again and again, with a key/value cache.

`generate` is a loop over two steps, `restrict` (temperature, top-k, top-p, min-p) and a draw. Each
sample draws from a generator of its own, so that the first of five samples is the same text as a
single one with that seed.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import tiktoken
import torch
from torch import Tensor

from gpt.config import Sampling
from gpt.model import GPT
from gpt.rng import generator
from gpt.tokenizer import encode


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities to draw from, after temperature, top-k, top-p and min-p: (..., V) -> (..., V).

    Temperature comes first and the others act on the tempered distribution, each on what the one
    before it left. The likeliest token always stays.
    """
    likeliest = logits.amax(-1, keepdim=True)
    logits = (logits - likeliest) / max(sampling.temperature, 1e-6)  # no overflow, however cold
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # what the likelier tokens hold already
        cut = (before >= sampling.top_p).gather(-1, places.argsort(-1))
        logits = logits.masked_fill(cut, -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits.softmax(-1)


def draw(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """One token for each row: (N, V) logits and N generators -> (N,) integers.

    With E_v exponential, argmax of p_v / E_v is a draw from p (the exponential race).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    race = [torch.empty_like(logits[0]).exponential_(generator=g) for g in generators]
    return (restrict(logits, sampling) / torch.stack(race)).argmax(-1)


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: list[int],
    *,
    samples: int,
    tokens: int,
    sampling: Sampling,
    seed: int,
    stop: int,
) -> Iterator[list[int]]:
    """Continue `prompt` in `samples` independent ways, at most `tokens` tokens each.

    Yields one list a step: the next token of each sample; a sample that has ended repeats `stop`.
    Ends when all have. A prompt or text longer than the context is seen through a window: when the
    cache is full, the last half of the context is read again and the text goes on from there.

    Args:
        model: on any device; its training mode is put back at the end.
        prompt: at least one token id.
        seed: sample i draws from (seed, i), whatever their number.
        stop: the token that ends a sample, end of text.
    """
    assert prompt, "a prompt has at least one token; end of text starts a new document"
    device = model.token_embedding.weight.device
    context = model.config.context
    generators = [generator(seed, "sample", i, device=device) for i in range(samples)]
    window = torch.tensor([prompt[-context:]] * samples, device=device)  # what the cache will hold
    ended = torch.zeros(samples, dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    model.attach_caches(samples)
    try:
        fresh = window
        for _ in range(tokens):
            if model.cached + fresh.shape[1] > context:
                window = window[:, -max(1, context // 2) :]
                model.attach_caches(samples)
                fresh = window
            hidden = model.hidden(fresh)[:, -1]  # (N, d)
            token = draw(model.logits(hidden).float(), sampling, generators)
            token = token.masked_fill(ended, stop)
            ended |= token == stop
            yield token.tolist()
            if bool(ended.all()):
                return
            fresh = token[:, None]
            window = torch.cat([window, fresh], dim=1)[:, -context:]
    finally:
        model.detach_caches()
        model.train(was_training)


def continue_text(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompt: str,
    *,
    tokens: int,
    sampling: Sampling,
    seed: int,
) -> str:
    """`prompt` and at most `tokens` tokens more; an empty prompt starts a new document."""
    decoder = TextDecoder(encoding)
    steps = generate(
        model,
        encode(encoding, prompt, "sampling.prompt") or [encoding.eot_token],
        samples=1,
        tokens=tokens,
        sampling=sampling,
        seed=seed,
        stop=encoding.eot_token,
    )
    made = "".join(decoder.feed(token) for (token,) in steps if token != encoding.eot_token)
    return prompt + made + decoder.close()


class TextDecoder:
    """Token by token to text; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes."""
        return self._bytes.decode(self._encoding.decode_single_token_bytes(token))

    def close(self) -> str:
        """What is left, a broken character as U+FFFD."""
        return self._bytes.decode(b"", final=True)

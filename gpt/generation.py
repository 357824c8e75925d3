"""Sampling: generate text token by token, with a key/value cache.

`generate_tokens` repeats two steps: a `Decoder` computes the logits of the next token, and
`sample_tokens` draws it after temperature, top-k, top-p and min-p. Each sample has its own random
generator, so the first of five samples is the same text as a single sample with that seed.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Generator
from typing import Self

import torch
from torch import Tensor

from gpt.config import Sampling
from gpt.data.tokenizer import Encoding, encode
from gpt.model.gpt2 import GPT
from gpt.model.kv_cache import DecodePosition
from gpt.rng import generator


def logits_to_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p: (..., V) -> (..., V).

    Temperature comes first; the filters follow in this order, each on the tokens that the previous
    one kept. The likeliest token is always kept.
    """
    likeliest = logits.amax(-1, keepdim=True)
    logits = (logits - likeliest) / max(sampling.temperature, 1e-6)  # at most 0: no overflow
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        dropped = (before >= sampling.top_p).gather(-1, order.argsort(-1))
        logits = logits.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits.softmax(-1)


def sample_tokens(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """One token for each row: (N, V) logits and N generators -> (N,) integers.

    For exponential E_v, argmax of p_v / E_v is distributed as p (the exponential race). Rounding of
    the logits varies with the number of samples; it changes the token only if two nearly tie.
    E = -log(1 - uniform) is in fp64, since fp32 is too coarse for the rarest tokens.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no fp64
    uniform = torch.empty_like(logits, dtype=dtype)
    for row, own in zip(uniform, generators, strict=True):
        row.uniform_(generator=own)
    exponential = uniform.neg_().log1p_().neg_()
    return (logits_to_probs(logits, sampling) / exponential).argmax(-1)


class Decoder:
    """Computes the next token's logits with a key/value cache.

    A context manager: inside it the model is in evaluation mode and uses the caches; on exit its
    previous state is restored.

    Args:
        model: on any device.
        samples: N, the sequences that are continued in parallel.
        size: S, the tokens that the caches can hold; by default the model's context.
        fixed: give one-token steps fixed shapes. On a GPU they are then replayed as one CUDA graph,
            which avoids launching kernels one by one. The default on a GPU, and if `compiled`.
        compiled: compile those steps with torch.compile, which takes up to a minute at first.

    Attributes:
        length: tokens in the caches.
    """

    def __init__(
        self,
        model: GPT,
        samples: int,
        *,
        size: int | None = None,
        fixed: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.samples, self.length = model, samples, 0
        self.device = model.token_embedding.weight.device
        self.size = min(size or model.config.context, model.config.context)
        if fixed is None:
            fixed = compiled or self.device.type == "cuda"
        self._position = DecodePosition(self.size, self.device) if fixed else None
        self._caches = model.make_caches(samples, self.size)
        self._step: Callable[[Tensor], Tensor] = self._logits
        if compiled:
            self._step = torch.compile(self._logits, fullgraph=True, dynamic=False)
        self._graph: Graph | None = None

    def __enter__(self) -> Self:
        self._was_training = self.model.training
        self.model.eval()
        self.model.attach_caches(self._caches)
        return self

    def __exit__(self, *error: object) -> None:
        self.model.detach_caches()
        self.model.train(self._was_training)

    def reset(self) -> None:
        """Empty the caches."""
        self.length = 0

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Append T tokens to each sample: (N, T) integers -> (N, V) logits of the next token.

        The next call may overwrite these logits.
        """
        position = self._position if tokens.shape[1] == 1 else None
        for cache in self._caches:
            cache.length, cache.position = self.length, position
        if position is None:
            logits = self._logits(tokens)
        else:
            position.move(self.length)
            if self._graph is None and self.device.type == "cuda":
                self._graph = Graph(self._step, tokens)
            logits = (self._graph or self._step)(tokens)
        self.length += tokens.shape[1]
        return logits

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self.model.hidden(tokens)[:, -1])


class Graph:
    """A function captured as one CUDA graph: its kernels are launched together, on fixed memory.

    Args:
        function: its shapes must be fixed, and extra calls must do no harm.
        x: an argument to capture it with.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # warm up: compile, and let libraries allocate their workspaces
                function(self._x)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._y = function(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value, overwritten by the next call."""
        self._x.copy_(x)
        self._graph.replay()
        return self._y


@torch.inference_mode()
def generate_tokens(
    model: GPT,
    prompt: list[int],
    *,
    samples: int,
    tokens: int,
    sampling: Sampling,
    seed: int,
    stop: int,
    decoder: Decoder | None = None,
) -> Generator[list[int]]:
    """Continue `prompt` with `samples` independent samples of at most `tokens` tokens each.

    Yields a list per step, the next token of each sample. A sample that has ended repeats `stop`;
    the generator returns when all have ended. Text longer than the context is seen through a
    window: when the cache is full, it is refilled with the last half of the context.

    Args:
        model: on any device; its training mode is restored at the end.
        prompt: at least one token id.
        seed: sample i draws from (seed, i), independently of the number of samples.
        stop: the end-of-text token, which ends a sample.
        decoder: one to reuse, of this model and number of samples; its size is the window.
    """
    assert prompt, "a prompt has at least one token; end of text starts a new document"
    decoder = decoder or Decoder(model, samples, size=len(prompt) + tokens)
    device, size = decoder.device, decoder.size
    generators = [generator(seed, "sample", i, device=device) for i in range(samples)]
    window = torch.tensor([prompt[-size:]] * samples, device=device)  # the last tokens
    ended = torch.zeros(samples, dtype=torch.bool, device=device)
    decoder.reset()
    with decoder:
        fresh = window
        for _ in range(tokens):
            if decoder.length + fresh.shape[1] > size:
                window = window[:, -max(1, size // 2) :]
                decoder.reset()
                fresh = window
            token = sample_tokens(decoder.read(fresh).float(), sampling, generators)
            token = token.masked_fill(ended, stop)
            ended |= token == stop
            row: list[int] = token.tolist()
            yield row
            if all(each == stop for each in row):
                return
            fresh = token[:, None]
            window = torch.cat([window, fresh], dim=1)[:, -size:]


def continue_text(
    model: GPT,
    encoding: Encoding,
    prompt: str,
    *,
    tokens: int,
    sampling: Sampling,
    seed: int,
    on_token: Callable[[], object] = lambda: None,
    origin: str = "sampling.prompt",
) -> str:
    """`prompt` and at most `tokens` more tokens; an empty prompt starts a new document.

    Args:
        on_token: called for each token; an exception that it raises stops generation.
        origin: what a message calls the prompt.
    """
    decoder = TextDecoder(encoding)
    text = [prompt]
    steps = generate_tokens(
        model,
        encode(encoding, prompt, origin) or [encoding.eot_token],
        samples=1,
        tokens=tokens,
        sampling=sampling,
        seed=seed,
        stop=encoding.eot_token,
    )
    with contextlib.closing(steps):
        for (token,) in steps:
            on_token()
            if token != encoding.eot_token:
                text.append(decoder.feed(token))
    return "".join([*text, decoder.close()])


class TextDecoder:
    """Decodes token by token; bytes of an incomplete character are held back until it is whole."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that is complete with this token; may be empty."""
        return self._bytes.decode(self._encoding.decode_single_token_bytes(token))

    def close(self) -> str:
        """The rest; an incomplete character becomes U+FFFD."""
        return self._bytes.decode(b"", final=True)

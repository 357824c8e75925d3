"""Sampling: the next token from the logits, again and again, with a key/value cache.

`generate` is a loop over two steps: a `Decoder` reads on, and a token is drawn from what `restrict`
(temperature, top-k, top-p, min-p) leaves. Each
sample draws from a generator of its own, so that the first of five samples is the same text as a
single one with that seed.
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
from gpt.model import GPT, Place
from gpt.rng import generator


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

    With E_v exponential, argmax of p_v / E_v is a draw from p (the exponential race). Rounding
    changes it only where two tokens are nearly level, so that a text is the same however many are
    made beside it. E = -log(1 - uniform) in fp64: fp32 has too few numbers for the rarest tokens.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # which mps lacks
    uniform = torch.empty_like(logits, dtype=dtype)
    for row, own in zip(uniform, generators, strict=True):
        row.uniform_(generator=own)
    exponential = uniform.neg_().log1p_().neg_()
    return (restrict(logits, sampling) / exponential).argmax(-1)


class Decoder:
    """A model that reads on and tells the next token's logits, with a key/value cache.

    It is a context: within it the model is in evaluation mode and has the caches; after it the
    model is as it was before.

    Args:
        model: on any device.
        samples: N, sequences side by side.
        size: S, tokens that the caches hold at most; the model's context unless given.
        fixed: one-token steps have shapes that never change, and on a GPU are replayed as one CUDA
            graph, so that no time goes into launching their kernels; by default so on a GPU, and
            if compiled.
        compiled: those steps are compiled by torch.compile, which takes up to a minute at first.

    Attributes:
        length: tokens that the caches hold.
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
        self._place = Place(self.size, self.device) if fixed else None
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

    def restart(self) -> None:
        """Forget what was read."""
        self.length = 0

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Read T more tokens of each sample: (N, T) integers -> (N, V) logits of the next.

        They may be overwritten by the next call.
        """
        place = self._place if tokens.shape[1] == 1 else None
        for cache in self._caches:
            cache.length, cache.place = self.length, place
        if place is None:
            logits = self._logits(tokens)
        else:
            place.move(self.length)
            if self._graph is None and self.device.type == "cuda":
                self._graph = Graph(self._step, tokens)
            logits = (self._graph or self._step)(tokens)
        self.length += tokens.shape[1]
        return logits

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self.model.hidden(tokens)[:, -1])


class Graph:
    """A function's kernels as one CUDA graph: launched together, on the same memory every time.

    Args:
        function: one whose shapes never change, and which may be called more than once.
        x: its argument, the first time.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile, and let libraries take the memory that they work in
                function(self._x)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._y = function(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value, which the next call overwrites."""
        self._x.copy_(x)
        self._graph.replay()
        return self._y


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
    decoder: Decoder | None = None,
) -> Generator[list[int]]:
    """Continue `prompt` in `samples` independent ways, at most `tokens` tokens each.

    Yields one list a step: the next token of each sample; a sample that has ended repeats `stop`.
    Ends when all have. A prompt or text longer than the context is seen through a window: when the
    cache is full, the last half of the context is read again and the text goes on from there.

    Args:
        model: on any device; its training mode is put back at the end.
        prompt: at least one token id.
        seed: sample i draws from (seed, i), whatever their number.
        stop: the token that ends a sample, end of text.
        decoder: of this model and so many samples, to be used again; its size is the window.
    """
    assert prompt, "a prompt has at least one token; end of text starts a new document"
    decoder = decoder or Decoder(model, samples, size=len(prompt) + tokens)
    device, size = decoder.device, decoder.size
    generators = [generator(seed, "sample", i, device=device) for i in range(samples)]
    window = torch.tensor([prompt[-size:]] * samples, device=device)  # what the cache will hold
    ended = torch.zeros(samples, dtype=torch.bool, device=device)
    decoder.restart()
    with decoder:
        fresh = window
        for _ in range(tokens):
            if decoder.length + fresh.shape[1] > size:
                window = window[:, -max(1, size // 2) :]
                decoder.restart()
                fresh = window
            token = draw(decoder.read(fresh).float(), sampling, generators)
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
    drawn: Callable[[], object] = lambda: None,
) -> str:
    """`prompt` and at most `tokens` tokens more; an empty prompt starts a new document.

    Args:
        drawn: called after each token; what it raises ends the text.
    """
    decoder = TextDecoder(encoding)
    text = [prompt]
    steps = generate(
        model,
        encode(encoding, prompt, "sampling.prompt") or [encoding.eot_token],
        samples=1,
        tokens=tokens,
        sampling=sampling,
        seed=seed,
        stop=encoding.eot_token,
    )
    with contextlib.closing(steps):
        for (token,) in steps:
            drawn()
            if token != encoding.eot_token:
                text.append(decoder.feed(token))
    return "".join([*text, decoder.close()])


class TextDecoder:
    """Token by token to text; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes."""
        return self._bytes.decode(self._encoding.decode_single_token_bytes(token))

    def close(self) -> str:
        """What is left, a broken character as U+FFFD."""
        return self._bytes.decode(b"", final=True)

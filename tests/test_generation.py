from __future__ import annotations

import math
from collections import Counter

import pytest
import tiktoken
import torch

from gpt.config import DataConfig, ModelConfig, Sampling
from gpt.data.tokenizer import bytes_tokenizer
from gpt.generation import (
    TextDecoder,
    continue_text,
    generate_tokens,
    logits_to_probs,
    sample_tokens,
)
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.rng import generator

CONTEXT = 12
EOT = 256


@pytest.fixture(scope="module")
def model() -> GPT:
    made = GPT(ModelConfig(layers=2, heads=2, width=16, context=CONTEXT), EOT + 1)
    initialize(made, made.config, seed=0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5)  # far from a uniform guess
    return made.eval()


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return bytes_tokenizer(DataConfig(), ())


def run(
    model: GPT, prompt: list[int], n: int, count: int = 1, **options: object
) -> list[list[int]]:
    seed = int(options.pop("seed", 0))
    stop = int(options.pop("stop", -1))
    sampling = Sampling.model_validate(options)
    steps = generate_tokens(
        model, prompt, samples=count, tokens=n, sampling=sampling, seed=seed, stop=stop
    )
    return [list(column) for column in zip(*steps, strict=True)]


def test_greedy_takes_the_likeliest_token_of_the_uncached_model(model: GPT):
    (made,) = run(model, [1, 2, 3], 8, temperature=0)
    text = [1, 2, 3]
    for token in made:
        assert token == model(torch.tensor([text]))[0, -1].argmax().item()
        text.append(token)


def test_beyond_the_context_the_window_moves_by_half(model: GPT):
    (made,) = run(model, list(range(10)), 30, temperature=0)
    text, window = list(range(10)), list(range(10))
    for token in made:
        if len(window) > CONTEXT:
            window = text[-CONTEXT // 2 :]
        assert token == model(torch.tensor([window]))[0, -1].argmax().item()
        text.append(token)
        window.append(token)
    assert len(made) == 30


def test_of_a_prompt_longer_than_the_context_the_end_counts(model: GPT):
    long = list(range(100))
    assert run(model, long, 5, temperature=0) == run(model, long[-CONTEXT:], 5, temperature=0)


def test_a_sample_depends_only_on_its_seed_and_index(model: GPT):
    alone = run(model, [5], 10, seed=3)
    four = run(model, [5], 10, count=4, seed=3)
    assert four[0] == alone[0]
    assert len({tuple(sample) for sample in four}) == 4
    assert run(model, [5], 10, seed=4) != alone


def test_a_sample_stops_at_end_of_text_and_the_others_continue(model: GPT):
    samples = run(model, [5], 12, count=3, temperature=2.0)
    stop = samples[0][4]
    first = [sample.index(stop) if stop in sample else 99 for sample in samples]
    ended = run(model, [5], 12, count=3, temperature=2.0, stop=stop)
    for sample, whole, end in zip(ended, samples, first, strict=True):
        assert sample[:end] == whole[: min(end, len(sample))]
        assert set(sample[end:]) <= {stop}
    (alone,) = run(model, [5], 12, temperature=2.0, stop=stop)
    assert alone[-1] == stop
    assert len(alone) == first[0] + 1


def test_the_models_mode_and_cache_are_restored(model: GPT):
    model.train()
    steps = generate_tokens(model, [1], samples=1, tokens=5, sampling=Sampling(), seed=0, stop=-1)
    next(steps)
    steps.close()
    assert model.training
    assert model.cache is None
    model.eval()


def test_text_is_drawn_in_evaluation_mode(model: GPT):
    dropping = GPT(model.config.model_copy(update={"dropout": 0.5}), EOT + 1)
    dropping.load_state_dict(model.state_dict())
    assert run(dropping.train(), [1, 2], 8, temperature=0) == run(model, [1, 2], 8, temperature=0)


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1.0, "top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.4}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "min_p": 1.0}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "min_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_temperature_and_filters_by_hand(options: dict[str, float], expected: list[float]):
    found = logits_to_probs(LOGITS, Sampling.model_validate(options))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    batch = logits_to_probs(torch.stack([LOGITS, LOGITS.flip(0)]), Sampling.model_validate(options))
    assert batch[1].tolist() == pytest.approx(expected[::-1], abs=1e-6)


def test_sampled_tokens_have_the_right_distribution():
    generators = [generator(0, "test")]
    sampling = Sampling(temperature=1.0, top_k=3)
    counts = Counter(int(sample_tokens(LOGITS[None], sampling, generators)) for _ in range(4000))
    assert counts[0] == 0
    for token, share in ((1, 4 / 9), (2, 2 / 9), (3, 3 / 9)):
        error = 4 * math.sqrt(share * (1 - share) / 4000)
        assert counts[token] / 4000 == pytest.approx(share, abs=error)


def test_rounding_of_the_logits_does_not_change_a_text():
    logits = torch.randn(200, 50257, generator=torch.Generator().manual_seed(0))
    noise = 1e-3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=1.0)
    texts = [
        sample_tokens(each, sampling, [generator(0, i) for i in range(200)])
        for each in (logits, logits + noise)
    ]
    assert len(set(texts[0].tolist())) > 150
    assert torch.equal(*texts)


@pytest.mark.parametrize(("uniform", "expected"), [(2**-42, 7), (2**-38, 0)])
def test_the_rarest_tokens_can_be_drawn(uniform: float, expected: int, monkeypatch):
    """Token 7, of probability 1e-12, wins if its number is below 1e-12 / 1.44."""
    numbers = torch.full((50257,), 0.5, dtype=torch.float64)
    numbers[7] = uniform

    def uniform_(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        assert x.dtype == torch.float64  # fp32 would have none between 0 and 6e-8
        return x.copy_(numbers)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    logits = torch.full((1, 50257), math.log(1e-12))
    logits[0, 0] = 0
    assert sample_tokens(logits, Sampling(temperature=1.0), [generator(0)]).item() == expected


def test_text_is_held_back_until_a_character_is_complete(encoding: tiktoken.Encoding):
    decoder = TextDecoder(encoding)
    pieces = [decoder.feed(byte) for byte in "aé🙂".encode()]
    assert pieces == ["a", "", "é", "", "", "", "🙂"]
    decoder.feed(0xC3)
    assert decoder.close() == "\ufffd"


def test_continue_text_keeps_the_prompt(model: GPT, encoding: tiktoken.Encoding):
    text = continue_text(model, encoding, "abc", tokens=4, sampling=Sampling(), seed=0)
    assert text.startswith("abc")
    (new_document,) = run(model, [EOT], 4, stop=EOT)
    empty = continue_text(model, encoding, "", tokens=4, sampling=Sampling(), seed=0)
    assert empty == encoding.decode([token for token in new_document if token != EOT])

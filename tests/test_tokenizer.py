from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from gpt import tokenizer
from gpt.config import DataConfig
from gpt.errors import InputError
from gpt.tokenizer import TOKENIZERS, encode, to_json

TEXTS = [
    "def f(x):\n    return x + 1\n" * 20,
    "naïve café — 日本語 🙂\n" * 5,
    "<|endoftext|> is text",
]


def make(name: str, vocab_size: int = 300, **options: str) -> tiktoken.Encoding:
    config = DataConfig.model_validate({"tokenizer": name, "vocab_size": vocab_size, **options})
    try:
        return TOKENIZERS[name](config, TEXTS)
    except InputError:
        pytest.skip("GPT-2's vocabulary is not in tiktoken's cache, and the network has none")


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def encoding(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tiktoken.Encoding:
    if request.param != "file":
        return make(request.param)
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    path.write_text(to_json(make("bpe")), "utf-8")
    return make("file", vocabulary=str(path))


def test_round_trip(encoding: tiktoken.Encoding):
    for text in TEXTS:
        assert encoding.decode(encode(encoding, text)) == text


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_any_text_makes_the_round_trip(name: str):
    encoding = make(name)

    @given(st.text())
    def check(text: str) -> None:
        assert encoding.decode(encode(encoding, text)) == text

    check()


def test_end_of_text_is_an_id_and_is_never_read_from_the_text(encoding: tiktoken.Encoding):
    assert encoding.eot_token == encoding.n_vocab - 1
    ids = encode(encoding, "<|endoftext|> is text")
    assert encoding.eot_token not in ids
    assert encoding.decode([encoding.eot_token]) == "<|endoftext|>"


def test_saved_and_loaded_it_encodes_the_same(encoding: tiktoken.Encoding, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(to_json(encoding), "utf-8")
    again = tokenizer.load(path)
    assert (again.name, again.n_vocab) == (encoding.name, encoding.n_vocab)
    for text in TEXTS:
        assert encode(again, text) == encode(encoding, text)


def test_bytes_are_their_values():
    encoding = make("bytes")
    assert encoding.n_vocab == 257
    assert encode(encoding, "aé") == [97, 0xC3, 0xA9]


def test_chars_are_the_texts_characters_in_order():
    encoding = make("chars")
    characters = sorted(set("".join(TEXTS)))
    assert encoding.n_vocab == len(characters) + 1
    assert encode(encoding, "日a") == [characters.index("日"), characters.index("a")]


def test_chars_refuses_a_character_that_it_never_saw():
    with pytest.raises(InputError, match="'ß'"):
        encode(make("chars"), "fiß")


def test_bpe_has_the_size_asked_for_and_merges():
    encoding = make("bpe", 300)
    assert encoding.n_vocab == 300
    assert len(encode(encoding, TEXTS[0])) < len(TEXTS[0]) / 2


def test_gpt2_is_tiktokens_own():
    assert encode(make("gpt2"), "Hello world") == [15496, 995]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 99, "end_of_text": 0, "tokens": []}', "not json"],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer.load(path)


def test_the_file_is_json_with_the_tokens_in_order():
    tree = json.loads(to_json(make("bytes")))
    assert tree["tokens"][65] == "A"
    assert tree["end_of_text"] == 256

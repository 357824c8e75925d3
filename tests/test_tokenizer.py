from __future__ import annotations

import json
import os
import pickle
import random
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiktoken
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import DataConfig, validate
from gpt.data import tokenizer
from gpt.data.preparation import prepare
from gpt.data.tokenizer import (
    GPT2_FILES,
    GPT2_PATTERN,
    GPT2_URL,
    LONGEST,
    PIECE,
    TOKENIZERS,
    Encoding,
    Tokenizer,
    copy,
    encode,
    gpt2_file,
    pieces,
    to_json,
    train_bpe,
)
from gpt.errors import InputError, UnreachableError

TEXTS = [
    "def f(x):\n    return x + 1\n" * 20,
    "naïve café — 日本語 🙂\n" * 5,
    "<|endoftext|> is text",
]


def make(name: str, vocab_size: int = 300, **options: str) -> Encoding:
    config = DataConfig.model_validate({"tokenizer": name, "vocab_size": vocab_size, **options})
    try:
        return TOKENIZERS[name].make(config, TEXTS)
    except InputError:
        pytest.skip("GPT-2's vocabulary is not in tiktoken's cache, and the network has none")


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def encoding(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoding:
    if request.param != "file":
        return make(request.param)
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    path.write_text(to_json(make("bpe")), "utf-8")
    return make("file", vocabulary=str(path))


def test_round_trip(encoding: Encoding):
    for text in TEXTS:
        assert encoding.decode(encode(encoding, text)) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_text_makes_the_round_trip(name: str, tmp_path: Path):
    (tmp_path / "t.json").write_text(to_json(make("bpe")), "utf-8")
    options = {"vocabulary": str(tmp_path / "t.json")} if name == "file" else {}

    @given(st.text())
    def check(text: str) -> None:
        if name == "chars":  # it knows what it was made from
            encoding = TOKENIZERS[name].make(DataConfig(tokenizer="chars"), [text, "a"])
        else:
            encoding = made
        assert encoding.decode(encode(encoding, text)) == text

    made = make(name, **options)
    check()


def test_end_of_text_is_an_id_and_is_never_read_from_the_text(encoding: Encoding):
    assert encoding.eot_token == encoding.n_vocab - 1
    ids = encode(encoding, "<|endoftext|> is text")
    assert encoding.eot_token not in ids
    assert encoding.decode([encoding.eot_token]) == "<|endoftext|>"


def test_a_saved_and_loaded_tokenizer_encodes_the_same(encoding: Encoding, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(to_json(encoding), "utf-8")
    again = tokenizer.load(path)
    assert (again.name, again.n_vocab) == (encoding.name, encoding.n_vocab)
    for text in TEXTS:
        assert encode(again, text) == encode(encoding, text)


def test_the_ids_of_bytes_are_their_values():
    encoding = make("bytes")
    assert encoding.n_vocab == 257
    assert encode(encoding, "aé") == [97, 0xC3, 0xA9]


def test_chars_are_the_characters_of_the_text_in_order():
    encoding = make("chars")
    characters = sorted(set("".join(TEXTS)))
    assert encoding.n_vocab == len(characters) + 1
    assert encode(encoding, "日a") == [characters.index("日"), characters.index("a")]


def test_chars_rejects_an_unknown_character():
    with pytest.raises(InputError, match="'ß'"):
        encode(make("chars"), "fiß")


def test_bpe_has_the_size_asked_for_and_merges():
    encoding = make("bpe", 300)
    assert encoding.n_vocab == 300
    assert len(encode(encoding, TEXTS[0])) < len(TEXTS[0]) / 2


HARD = [
    "", " ", "  ", "\n", "\r\n\r\n", " \n ", "\t\t x", "a b", "a  b", "a   b ", "trailing   ",
    "I'm you're he'll we've they'd it's 'S 'LL don't", "''s'", "x's-'re", "1234567890", "1 000,5",
    "½ ⅷ ٣ 一二三", "naïve café", "e\u0301", "日本語の文章", "한국어", "العربية", "हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈", "\u200b\u200d\ufeff", "\u00a0\u3000\u2028\u0085\x0b\x0c\x1c\x1f", "\x00\x7f",
    "<|endoftext|>", " <|endoftext|>x", "def f(x):\n\treturn x**2  # why?\n\n\n", "https://a.b/c?d=e&f#g",
    "=" * 500, "ab" * 3000, " " * 5000 + "x", "\n" * 3000, "\U0010ffff\uffff", "ß ſ İ ı",
]  # fmt: skip


def test_gpt2_is_the_encoding_of_tiktoken():
    """Also as a copy for a thread, and in pieces as preparation encodes it."""
    encoding = make("gpt2")
    reference = tiktoken.get_encoding("gpt2")
    assert encode(encoding, "Hello world") == [15496, 995]
    every_character = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]
    long = " ".join(HARD) + "".join(every_character) + " x".join(every_character[::7])
    for text in (*HARD, long, long[::-1]):
        expected = reference.encode_ordinary(text)
        assert encode(encoding, text) == expected
        assert encode(copy(encoding), text) == expected
        pieced = [token for piece in pieces([text]) for token in encode(encoding, piece)]
        assert pieced == expected


def test_gpt2_from_a_file_is_the_same(tmp_path: Path):
    encoding = make("gpt2")
    (tmp_path / "t.json").write_text(to_json(encoding), "utf-8")
    again = tokenizer.load(tmp_path / "t.json")
    assert again.tokens == encoding.tokens
    for text in HARD:
        assert encode(again, text) == encode(encoding, text)


def test_bpe_encodes_as_the_library_that_trained_it():
    corpus = [(ROOT / name).read_text("utf-8") for name in ("README.md", "gpt/config/options.py")]
    corpus += [*TEXTS, *HARD]
    ours = TOKENIZERS["bpe"].make(DataConfig(vocab_size=1500), corpus)
    library = train_bpe(corpus, 1500)
    assert ours.n_vocab == 1500

    @given(st.text() | st.text(alphabet="abc'st \n1é日.") | st.sampled_from(corpus))
    def check(text: str) -> None:
        assert encode(ours, text) == library.encode(text).ids

    check()


@given(st.lists(st.text(alphabet="ab", max_size=40), max_size=8), st.text(alphabet="ab"))
def test_bpe_encodes_as_the_library_on_few_letters(texts: list[str], text: str):
    """Few letters and many merges: the same token can be reached by different merges."""
    ours = TOKENIZERS["bpe"].make(DataConfig(vocab_size=400), texts)
    assert encode(ours, text) == train_bpe(texts, 400).encode(text).ids


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 99, "end_of_text": 0, "tokens": []}', "not json"],
)
def test_a_file_that_is_not_a_tokenizer_is_rejected(tmp_path: Path, text: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer.load(path)


def tree(**changed: object) -> dict[str, object]:
    return {**json.loads(to_json(make("bpe"))), **changed}


BYTES = [chr(byte) for byte in range(256)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pattern": ""}, "its pattern is not that of the bpe tokenizer"),  # tiktoken panics
        ({"pattern": "x"}, "its pattern is not"),  # the rest of the text would be lost
        ({"pattern": "(a+)+(?=b)|(?s:.)"}, "its pattern is not"),
        ({"pattern": ["a"]}, "its pattern is not"),
        ({"name": "words"}, "its name is not one of bytes, chars, bpe, gpt2"),
        ({"name": ["bpe"]}, "its name is not one of"),
        ({"tokens": [*BYTES, ""], "end_of_text": 257}, "non-empty strings"),
        ({"tokens": [*BYTES, 3], "end_of_text": 257}, "tokens is not a list of non-empty strings"),
        (
            {"tokens": "".join(BYTES), "end_of_text": 256},
            "tokens is not a list of non-empty strings",
        ),
        ({"end_of_text": 10**30}, "end_of_text is not"),
        (
            {"name": "chars", "pattern": "(?s:.)", "tokens": ["ab"], "end_of_text": 1},
            "not one character",
        ),
        (
            {"name": "chars", "pattern": "(?s:.)", "tokens": [], "end_of_text": 0},
            "not one character",
        ),
    ],
)
def test_tokenizer_files_of_other_contents_are_rejected(
    tmp_path: Path, changed: dict[str, object], message: str
):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree(**changed)))
    with pytest.raises(InputError, match=message):
        tokenizer.load(path)


def test_a_vocabulary_that_is_not_a_regular_file_is_rejected(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    os.mkdir(tmp_path / "tokenizer.json")
    kinds = {"/dev/zero": "a device", tmp_path / "pipe": "a named pipe", tmp_path: "a folder"}
    for path, kind in kinds.items():
        with pytest.raises(InputError, match=f"is {kind}"):
            tokenizer.load(Path(path))


def test_an_encoding_can_be_pickled(encoding: Encoding):
    again = pickle.loads(pickle.dumps(encoding))
    assert (again.name, again.pattern, again.tokens) == (
        encoding.name,
        encoding.pattern,
        encoding.tokens,
    )


def test_training_takes_linear_time_on_text_without_white_space():
    text = "".join(random.Random(0).choices("ACGT", k=200_000))
    began = time.process_time()
    assert TOKENIZERS["bpe"].make(DataConfig(vocab_size=2048), [text]).n_vocab == 2048
    assert time.process_time() - began < 5  # 0.4 s; with one word of 200,000 letters 11 s


def test_words_of_ordinary_text_are_not_cut(monkeypatch: pytest.MonkeyPatch):
    corpus = [path.read_text("utf-8") for path in sorted((ROOT / "gpt").glob("*.py"))]
    cut = to_json(TOKENIZERS["bpe"].make(DataConfig(vocab_size=1000), corpus))
    monkeypatch.setattr(tokenizer, "WORD", 10**6)
    assert cut == to_json(TOKENIZERS["bpe"].make(DataConfig(vocab_size=1000), corpus))


def test_the_file_is_json_with_the_tokens_in_order():
    tree = json.loads(to_json(make("bytes")))
    assert tree["tokens"][65] == "A"
    assert tree["end_of_text"] == 256


# -- Pieces ------------------------------------------------------------------------------------


@given(st.lists(st.text(alphabet="ab 1.\n\t\u3000é日", max_size=30)), st.integers(1, 8))
def test_pieces_are_tokenized_as_the_whole_would_be(texts: list[str], size: int):
    """With small bounds on a GPT-2 pattern: the split of the whole is the split of the pieces."""
    import regex

    pattern = regex.compile(GPT2_PATTERN)
    whole = "".join(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONGEST", 10**6)
        cut = list(pieces(texts, size))
    assert "".join(cut) == whole
    assert "" not in cut
    assert [m for piece in cut for m in pattern.findall(piece)] == pattern.findall(whole)


def test_long_text_comes_in_bounded_pieces():
    text = "some words, and more words\n" * 40_000
    cut = list(pieces(text[at : at + 300_000] for at in range(0, len(text), 300_000)))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= PIECE
    assert len(cut) < 1.1 * len(text) / PIECE + 1


@pytest.mark.parametrize("char", [" ", "\n", "a", "日", "."])
@pytest.mark.parametrize("before", ["", "x", " "])
def test_endless_runs_are_cut(char: str, before: str):
    text = before + char * 1_000_000 + "x y"
    cut = list(pieces([text[:600_000], text[600_000:]]))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= LONGEST


@pytest.mark.parametrize("char", [" ", "\n", "a", "日", ".", "7", "\u3000", "'s"])
def test_the_longest_piece_is_not_too_long_for_the_tokenizers(char: str):
    piece = (char * LONGEST)[: LONGEST - 1] + "x"
    for name in ("bytes", "bpe"):
        encoding = TOKENIZERS[name].make(DataConfig(vocab_size=300), ["abc"])
        ids = encoding.encode_to_numpy(piece, disallowed_special=())
        assert encoding.decode(ids.tolist()) == piece


def test_a_million_spaces_in_a_prompt(encoding: Encoding):
    text = "e" + " " * 1_200_000 + "f"
    assert encoding.decode(encode(encoding, text)) == text


def test_a_tokenizer_is_one_function_and_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lower(config: DataConfig, documents: Iterable[str]) -> Encoding:
        return Encoding("lower", [char.encode() for char in sorted(set("".join(documents)))])

    monkeypatch.setitem(TOKENIZERS, "lower", Tokenizer(lower, "(?s:.)", "everything", True))
    (tmp_path / "a.txt").write_text("abc" * 10)
    tree = {
        "source": "text",
        "path": str(tmp_path / "a.txt"),
        "tokenizer": "lower",
        "holdout": "tail",
    }
    dataset = prepare(DataConfig.model_validate({**tree, "cache_dir": str(tmp_path / ".cache")}))
    assert dataset.encoding.n_vocab == 4
    with pytest.raises(InputError, match="no text to train a lower tokenizer on"):
        validate(DataConfig, {**tree, "source": "tokens"})


def test_a_wrong_download_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer, "_download", lambda url: b"<html>please log in</html>")
    with pytest.raises(UnreachableError, match=r"vocab\.bpe and encoder\.json"):
        TOKENIZERS["gpt2"].make(DataConfig(), ())
    assert not (tmp_path / "cache").exists()


def test_a_download_goes_where_tiktoken_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make("gpt2")
    files = {GPT2_URL + name: gpt2_file(name).read_bytes() for name in GPT2_FILES}
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer, "_download", files.__getitem__)
    TOKENIZERS["gpt2"].make(DataConfig(), ())
    for name in GPT2_FILES:
        assert gpt2_file(name).read_bytes() == files[GPT2_URL + name]
        assert gpt2_file(name).parent == tmp_path / "cache"


def test_the_error_names_an_empty_cache_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR: is empty"):
        TOKENIZERS["gpt2"].make(DataConfig(), ())

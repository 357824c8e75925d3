"""Tokenizers. Each one is a tiktoken `Encoding`, however its vocabulary was made.

So the rest of the program has one interface, one end-of-text token (`encoding.eot_token`) and one
file format: a JSON list of the tokens' bytes in the order of their ids, with the pattern that
splits text before merging. Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) repeatedly
merges, among adjacent tokens, the pair whose concatenation has the lowest id, until no pair is in
the vocabulary. Hugging Face's format is read as well (hf_tokenizer.py), and `to_hf` writes it.

Which text a tokenizer is trained on is decided in vocabulary.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tiktoken
import tiktoken.load

from gpt.config import DataConfig
from gpt.data import hf_tokenizer
from gpt.data.hf_tokenizer import END_OF_TEXT
from gpt.errors import InputError, UnreachableError
from gpt.io.files import read_small, reading, write_bytes
from gpt.io.wait import TIMEOUT, wait_for

if TYPE_CHECKING:
    import tokenizers

FORMAT = 1
PIECE = 2**14  # maximum characters of a piece, unless it cannot be cut
LONGEST = 2**18  # maximum characters of any piece; tiktoken fails on a match of over a million
WORD = 512  # maximum bytes of a word that BPE learns from; a longer one counts as several

# GPT-2's split: contractions; words, numbers and symbols with the space before them; white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The same split, as tiktoken spells it.
TIKTOKEN_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)


class Encoding(tiktoken.Encoding):
    """A name in `TOKENIZERS`, and a vocabulary: the bytes of each token, in the order of ids."""

    def __init__(self, name: str, tokens: Iterable[bytes]) -> None:
        self.pattern = TOKENIZERS[name].pattern
        self.tokens = {token: rank for rank, token in enumerate(tokens)}
        super().__init__(
            name,
            pat_str=self.pattern,
            mergeable_ranks=self.tokens,
            special_tokens={END_OF_TEXT: len(self.tokens)},
        )

    def __reduce__(self) -> tuple[type[Encoding], tuple[str, list[bytes]]]:
        return Encoding, (self.name, list(self.tokens))


def bytes_tokenizer(config: DataConfig, documents: Iterable[str]) -> Encoding:
    """One token per byte of UTF-8: 256, and end of text."""
    return Encoding("bytes", (bytes([byte]) for byte in range(256)))


def chars_tokenizer(config: DataConfig, documents: Iterable[str]) -> Encoding:
    """One token per distinct character of `documents`, in code-point order, and end of text."""
    characters = set[str]()
    for text in documents:
        characters.update(text)
    if not characters:
        raise InputError("data: contains no text, so the chars tokenizer would have no characters")
    return Encoding("chars", (char.encode() for char in sorted(characters)))


def bpe_tokenizer(config: DataConfig, documents: Iterable[str]) -> Encoding:
    """A byte-level BPE trained on `documents`, with `config.vocab_size` tokens in total."""
    vocabulary = train_bpe(documents, config.vocab_size).get_vocab()
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return Encoding("bpe", map(hf_tokenizer.from_printable, ordered))


def train_bpe(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A tokenizer of the `tokenizers` library, with `vocab_size` tokens including end of text.

    `bpe_tokenizer` converts it into an encoding that gives the same ids. Each merge visits all
    words in which it occurs, so training takes near-linear time only if words are short. Text
    without white space, such as DNA, would be one word; it is cut into words of `WORD` bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([by_gpt2, pre_tokenizers.FixedLength(WORD)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(documents, trainer)
    trained.pre_tokenizer = by_gpt2
    return trained


def gpt2_tokenizer(config: DataConfig, documents: Iterable[str]) -> Encoding:
    """GPT-2's own vocabulary of 50,257 tokens, from tiktoken's cache or the network."""
    missing = [name for name in GPT2_FILES if not _is_cached(gpt2_file(name), name)]
    for name in missing:
        try:
            contents = _download(GPT2_URL + name)
            if hashlib.sha256(contents).hexdigest() != GPT2_FILES[name]:
                raise ValueError("the server sent a different file")
        except Exception as error:  # whatever the network library raises; no code of ours runs here
            raise _unavailable(missing, error) from None
        path = gpt2_file(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, contents)
        except OSError as error:
            raise InputError(f"{path.parent}: tiktoken's cache: {error.strerror}") from None
    bpe, encoder = (GPT2_URL + name for name in GPT2_FILES)  # now in the cache
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(bpe, encoder)
    return Encoding("gpt2", sorted(ranks, key=ranks.__getitem__))


def file_tokenizer(config: DataConfig, documents: Iterable[str]) -> Encoding:
    """The tokenizer in the file or folder `config.vocabulary`, see `load`."""
    return load(Path(str(config.vocabulary)))


# GPT-2's vocabulary: the files, their SHA-256, and where OpenAI hosts them.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def gpt2_file(name: str) -> Path:
    """The path of one of `GPT2_FILES` in tiktoken's cache: named by the SHA-1 of its URL."""
    hashed = hashlib.sha1(f"{GPT2_URL}{name}".encode(), usedforsecurity=False).hexdigest()
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            if not os.environ[variable]:
                raise InputError(f"{variable}: is empty, which disables tiktoken's cache; unset it")
            return Path(os.environ[variable]) / hashed
    return Path(tempfile.gettempdir()) / "data-gym-cache" / hashed


def _is_cached(path: Path, name: str) -> bool:
    """Whether the file `name` is at `path`. Checked here because tiktoken deletes a wrong file.

    Raises:
        InputError: there is a different file.
    """
    with reading(path):
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            return False
    if found != GPT2_FILES[name]:
        raise InputError(
            f"{path}: is not GPT-2's {name}: its SHA-256 is {found},\n"
            f"but should be {GPT2_FILES[name]}; move it away or replace it"
        )
    return True


def _download(url: str) -> bytes:
    """A small file; fails within `TIMEOUT` seconds if the server stops responding."""
    import requests

    get = functools.partial(requests.get, url, stream=True, timeout=TIMEOUT / 2)
    response: requests.Response = wait_for(get, TIMEOUT)
    response.raise_for_status()
    return wait_for(lambda: response.content, 60)


def _unavailable(missing: list[str], error: Exception) -> InputError:
    """The error about missing files of GPT-2's vocabulary, with the remedies."""
    folder = gpt2_file(missing[0]).parent
    files = "; ".join(
        f"{name} as {gpt2_file(name).name} (SHA-256 {GPT2_FILES[name]})" for name in missing
    )
    return UnreachableError(
        f"data.tokenizer: gpt2 needs {' and '.join(missing)}, which could not be found in {folder} "
        f"or downloaded from {GPT2_URL} ({type(error).__name__}).\n"
        f"Save in that folder, or in one that TIKTOKEN_CACHE_DIR names: {files}.\n"
        "Or train a BPE on your own text (data.tokenizer: bpe); or use a corpus that every "
        "machine has (data.source: stdlib, with data.tokenizer: bpe or bytes)"
    )


@dataclass(frozen=True)
class Tokenizer:
    """One way to make an encoding.

    Attributes:
        make: builds it from the options and, if it is trained, from the documents.
        pattern: splits text before merging; empty if `make` reads another tokenizer's encoding.
            Files with other patterns are rejected: they could lose text, or hang or crash tiktoken,
            and `pieces` cuts only where these patterns allow it.
        trained_on: "sample": `vocab_size` tokens from at most `learn_bytes` of the training text;
            "everything": all text, validation included. None: it is not trained.
        of_characters: whether each token is a character, so that one may be missing; otherwise
            every byte is a token.
    """

    make: Callable[[DataConfig, Iterable[str]], Encoding]
    pattern: str = ""
    trained_on: Literal["sample", "everything"] | None = None
    of_characters: bool = False


TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": Tokenizer(bytes_tokenizer, r"(?s:.{1,64})"),
    "chars": Tokenizer(chars_tokenizer, r"(?s:.)", "everything", of_characters=True),
    "bpe": Tokenizer(bpe_tokenizer, GPT2_PATTERN, "sample"),
    "gpt2": Tokenizer(gpt2_tokenizer, TIKTOKEN_PATTERN),
    "file": Tokenizer(file_tokenizer),
}


# The last position where text may be cut: between a character that is not white space and one that
# is. No match of GPT-2's pattern contains both in that order, so both sides are tokenized as they
# would be together. (Python's \S is a subset of what other engines consider not white space.)
_CUT = re.compile(r"(?s:.*\S)(?=[ \n\r\t])")


def pieces(texts: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """The same text in pieces of at most `size` characters, cut where no token can cross.

    If there is no such position, a piece may be longer; at `LONGEST` it is cut anyway. No piece is
    empty.
    """
    rest = ""
    for text in texts:
        rest, start = rest + text, 0
        while len(rest) - start > size:
            found = _CUT.match(rest, start, start + size + 1)
            if found is None and len(rest) - start > LONGEST:
                found = _CUT.match(rest, start, start + LONGEST + 1)
                end = start + LONGEST if found is None else found.end()
            elif found is None:
                break
            else:
                end = found.end()
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def encode(encoding: Encoding, text: str, origin: str = "the text") -> list[int]:
    """Token ids of `text`; "<|endoftext|>" in it is encoded like any other text.

    Args:
        origin: what a message calls the text, such as "--prompt".

    Raises:
        InputError: the text is not valid Unicode, or contains a character that is not in the
            vocabulary (possible only with a tokenizer of characters).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: contains an invalid character at position {error.start}"
        ) from None
    check_characters(encoding, text, origin)
    return [token for piece in pieces([text]) for token in encoding.encode_ordinary(piece)]


def check_characters(encoding: Encoding, text: str, origin: str) -> None:
    """Check that the tokenizer can encode all of `text`.

    Raises:
        InputError: names the first character of `text` that is not in the vocabulary.
    """
    if TOKENIZERS[encoding.name].of_characters:
        known = encoding.tokens
        unknown = {char for char in set(text) if char.encode() not in known}
        if unknown:
            first = next(char for char in text if char in unknown)
            raise InputError(
                f"{origin}: the character {first!r} is not among the {len(known)} characters of "
                "the tokenizer"
            )


def byte_lengths(encoding: Encoding) -> list[int]:
    """UTF-8 bytes of each token, by id; 0 for end of text."""
    return [*map(len, encoding.tokens), 0]


def copy(encoding: Encoding) -> Encoding:
    """An equal encoding that shares no state, for use in another thread.

    Two threads that share an encoding were measured to run at two thirds of the speed, because they
    compete for the caches of its regular expression.
    """
    return Encoding(encoding.name, encoding.tokens)


def to_json(encoding: Encoding) -> str:
    """`encoding` as JSON; the bytes of each token are written as the code points 0-255."""
    tree = {
        "format": FORMAT,
        "name": encoding.name,
        "pattern": encoding.pattern,
        "end_of_text": encoding.eot_token,
        "tokens": [token.decode("latin-1") for token in encoding.tokens],
    }
    return json.dumps(tree, ensure_ascii=False) + "\n"


def to_hf(encoding: Encoding, context: int) -> dict[str, str]:
    """The files, by name, from which `transformers.AutoTokenizer` gives the same ids, offline.

    Args:
        context: tokens to which `truncation=True` shortens a text.

    Raises:
        InputError: the vocabulary is not a BPE; one that was trained here always is.
    """
    try:
        return hf_tokenizer.write(encoding.name, list(encoding.tokens), context)
    except ValueError as error:
        raise InputError(f"the tokenizer cannot be written for Hugging Face: {error}") from None


def load(path: Path) -> Encoding:
    """The encoding in a file written by `to_json` or `to_hf`, or in a folder with such a file.

    Of Hugging Face's tokenizers, GPT-2's own (also as vocab.json and merges.txt) and others that
    split text as it does are accepted.

    Raises:
        InputError: the file is missing or is not such a tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        return _from_hf(hf_tokenizer.read_gpt2_files(path), path)
    with reading(file):
        contents = read_small(file)
    try:
        tree = json.loads(contents.decode("utf-8"))
        if isinstance(tree, dict) and isinstance(tree.get("model"), dict):
            return _from_hf(tree, file)
        return _from_tree(tree)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{file}: is not a tokenizer file: it has no {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: is not a tokenizer file: {error}") from None


def _from_hf(tree: dict[str, Any], origin: Path) -> Encoding:
    """The encoding in the contents of Hugging Face's tokenizer.json.

    Raises:
        InputError: it splits or merges text in another way than ours.
    """
    try:
        name, tokens, merges = hf_tokenizer.read(tree)
        if hashlib.sha256(hf_tokenizer.merges_txt(merges)).hexdigest() == GPT2_FILES["vocab.bpe"]:
            name = "gpt2"
        return _checked(name, tokens)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{origin}: is a Hugging Face tokenizer that steadygpt cannot use: {error};\n"
            "use GPT-2's (data.tokenizer: gpt2), one that steadygpt has exported, or train one "
            "(data.tokenizer: bpe)"
        ) from None


def _from_tree(tree: Any) -> Encoding:
    """The encoding that `to_json` wrote as `tree`; raises ValueError, TypeError or KeyError."""
    if not isinstance(tree, dict):
        raise TypeError("its JSON is not an object")
    if tree["format"] != FORMAT:
        raise ValueError(f"its format is {tree['format']!r}, not {FORMAT}")
    name, texts = tree["name"], tree["tokens"]
    known = [each for each, tokenizer in TOKENIZERS.items() if tokenizer.pattern]
    if name not in known:
        raise ValueError(f"its name is not one of {', '.join(known)}")
    if tree["pattern"] != TOKENIZERS[name].pattern:
        raise ValueError(f"its pattern is not that of the {name} tokenizer")
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise TypeError("tokens is not a list of non-empty strings")
    if tree["end_of_text"] != len(texts):
        raise ValueError("end_of_text is not the id after the last token")
    return _checked(name, [text.encode("latin-1") for text in texts])


def _checked(name: str, tokens: list[bytes]) -> Encoding:
    """The encoding with these tokens; raises ValueError if it could not encode every text."""
    if len(set(tokens)) < len(tokens):
        raise ValueError("duplicate token")
    if TOKENIZERS[name].of_characters:
        if not tokens or any(len(token.decode()) != 1 for token in tokens):
            raise ValueError(f"a token of the {name} tokenizer is not one character")
    elif not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise ValueError("it lacks a token for some byte")
    return Encoding(name, tokens)

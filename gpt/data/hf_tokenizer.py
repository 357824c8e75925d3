"""Hugging Face's `tokenizer.json`: how each of our tokenizers is written in it, and read back.

The `tokenizers` library splits text with a pre-tokenizer and then looks up each part (WordLevel) or
merges it (BPE). With the settings below it gives the same ids as tiktoken does. A BPE needs its
merges in order, which our vocabularies do not contain; they are recovered from the ranks.

This module knows only the file format: it reads and writes the name of a tokenizer and the bytes of
its tokens, in the order of their ids. The id after the last is end of text.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from gpt.errors import InputError
from gpt.io.files import read_small, reading

END_OF_TEXT = "<|endoftext|>"
LONGEST_TOKEN = 512  # bytes, as in training; finding a merge takes time quadratic in them
GPT2_FILES = ("vocab.json", "merges.txt")  # the same as a tokenizer.json, in GPT-2's first format

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_CHARACTERS = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},
    "behavior": "Isolated",
    "invert": False,
}

# With these, the library splits text as our tokenizers do; `use_regex` stands for GPT-2's pattern.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "bytes": {**_BYTE_LEVEL, "use_regex": False},
    "chars": _CHARACTERS,
    "bpe": {**_BYTE_LEVEL, "use_regex": True},
    "gpt2": {**_BYTE_LEVEL, "use_regex": True},
}

# The library writes each byte as a printable character: bytes 33-126, 161-172 and 174-255 as
# themselves, and the other 68 as the characters from U+0100 on (Radford et al. 2019).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE}
_TO_CHARACTER |= {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_TO_BYTE = {character: byte for byte, character in _TO_CHARACTER.items()}


def printable(token: bytes) -> str:
    """A token in byte-level notation: " é" is "ĠÃ©"."""
    return "".join(map(_TO_CHARACTER.__getitem__, token))


def from_printable(text: str) -> bytes:
    """The token that `printable` wrote; raises ValueError if it did not."""
    try:
        return bytes(map(_TO_BYTE.__getitem__, text))
    except KeyError as error:
        raise ValueError(f"{error} does not stand for a byte") from None


# ---------------------------------------------------------------------------------------------
# Writing


def write(name: str, tokens: list[bytes], context: int) -> dict[str, str]:
    """The files of a tokenizer that `transformers` loads, by name.

    Text is never searched for "<|endoftext|>" (`split_special_tokens`), as in training. `context`
    is the model's, in tokens.

    Raises:
        ValueError: the tokens are not those of a BPE.
    """
    vocabulary = [_to_text(name, token) for token in tokens]
    end = len(tokens)
    added = {"id": end, "content": END_OF_TEXT, "special": True, "normalized": False}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[name],
        "post_processor": None,
        "decoder": {"type": "Fuse"} if name == "chars" else PRE_TOKENIZERS[name],
        "model": {
            **_model(name, tokens),
            "vocab": {token: rank for rank, token in enumerate([*vocabulary, END_OF_TEXT])},
        },
    }
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": context,
    }
    files = {"tokenizer.json": tree, "tokenizer_config.json": options}
    return {
        file: json.dumps(contents, ensure_ascii=False, indent=2) + "\n"
        for file, contents in files.items()
    }


def _to_text(name: str, token: bytes) -> str:
    return token.decode() if name == "chars" else printable(token)


def _model(name: str, tokens: list[bytes]) -> dict[str, Any]:
    """The model without its vocabulary. An unknown character is an error, as it is in training."""
    if name == "chars":
        return {"type": "WordLevel", "unk_token": "<unk>"}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "merges": recover_merges(tokens),
    }


def recover_merges(tokens: list[bytes]) -> list[str]:
    """The merges that made a byte-level BPE, in order: "Ġt he" makes " the".

    Merging a token's own bytes, as in any text but with only the tokens before it, leaves the two
    parts whose merge made it. While a BPE is trained, the ends of the new token are boundaries that
    no merge has crossed, so what is around it does not matter.

    Raises:
        ValueError: a token is longer than `LONGEST_TOKEN` bytes, or is not made of two others.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _merge(token, ranks, rank) if len(token) <= LONGEST_TOKEN else []
            if len(parts) != 2:
                raise ValueError(f"its token {rank} is not the merge of two before it")
            merges.append(" ".join(map(printable, parts)))
    return merges


def merges_txt(merges: list[str]) -> bytes:
    """GPT-2's merges.txt."""
    return "".join(f"{line}\n" for line in ["#version: 0.2", *merges]).encode()


def _merge(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The bytes of `token` after all merges whose results have ranks below `limit`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest >= limit:
            break
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ---------------------------------------------------------------------------------------------
# Reading


def read_gpt2_files(folder: Path) -> dict[str, Any]:
    """GPT-2's vocab.json and merges.txt, in the form of a tokenizer.json.

    Raises:
        InputError: one of them is missing, or is not such a file.
    """
    vocabulary, merges = folder / GPT2_FILES[0], folder / GPT2_FILES[1]
    if not (vocabulary.is_file() and merges.is_file()):
        raise InputError(f"{folder}: has no tokenizer.json, nor vocab.json and merges.txt")
    try:
        with reading(vocabulary):
            vocab = json.loads(read_small(vocabulary))
        with reading(merges):
            lines = read_small(merges).decode().splitlines()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder}: vocab.json or merges.txt is damaged: {error}") from None
    pairs = [line for line in lines if line and not line.startswith("#version")]
    model = {"type": "BPE", "vocab": vocab, "merges": pairs}
    return {"model": model, "pre_tokenizer": PRE_TOKENIZERS["gpt2"]}


def read(tree: dict[str, Any]) -> tuple[str, list[bytes], list[str]]:
    """The name of the tokenizer in the contents of a tokenizer.json, its tokens and its merges.

    All settings that change an id must be those that `write` writes. GPT-2's tokenizer is a "bpe".

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is something else.
    """
    name, model = _name(tree), tree["model"]
    vocabulary = model["vocab"]
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[text] for text in texts] != list(range(len(texts))):
        raise ValueError("its ids are not 0, 1, 2, ...")
    end = len(texts) - 1 if END_OF_TEXT in vocabulary else len(texts)
    added = {token["content"]: token["id"] for token in tree.get("added_tokens", [])}
    if {END_OF_TEXT: end} != {END_OF_TEXT: vocabulary.get(END_OF_TEXT, end)} | added:
        raise ValueError(f"its only special token must be {END_OF_TEXT}, with the last id")
    if name == "chars":
        return name, [text.encode() for text in texts[:end]], []
    tokens = [from_printable(text) for text in texts[:end]]
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    if name == "bytes" and merges:
        raise ValueError("it merges bytes of text that is not split into words first")
    if merges != recover_merges(tokens):
        raise ValueError("its merges are not in the order of the ids")
    return name, tokens, merges


def _name(tree: dict[str, Any]) -> str:
    """Which of our tokenizers splits and merges text like this one."""
    model, split = tree["model"], tree.get("pre_tokenizer")
    kind = model.get("type", "BPE")  # the oldest files, GPT-2's among them, do not say so
    if isinstance(split, dict) and split.get("type") == "ByteLevel":
        split = {**PRE_TOKENIZERS["bpe"], **split, "trim_offsets": True}  # which changes no id
    found = next((name for name, each in PRE_TOKENIZERS.items() if each == split), None)
    if found is None or kind != ("WordLevel" if found == "chars" else "BPE"):
        splitting = split.get("type") if isinstance(split, dict) else split
        raise ValueError(
            f"steadygpt has no tokenizer of type {kind} with pre-tokenizer {splitting}"
        )
    after = tree.get("post_processor")
    settings = {
        "normalizer": tree.get("normalizer"),
        "post_processor": None if after and after["type"] == "ByteLevel" else after,
        **{key: model.get(key) for key in ("dropout", "continuing_subword_prefix")},
        "end_of_word_suffix": model.get("end_of_word_suffix"),
    }
    given = next((setting for setting, value in settings.items() if value), None)
    if given is not None:
        raise ValueError(f"it has a {given}, which steadygpt does not support")
    return found

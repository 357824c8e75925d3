"""Vocabularies in the Hugging Face format. Minimal: bytes only."""

from __future__ import annotations

import json
from pathlib import Path

from gpt.data.tokenizer import END_OF_TEXT, Encoding
from gpt.errors import InputError
from gpt.io.files import read_small, reading

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SPELLED = {byte: chr(byte) for byte in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}


def to_hf(encoding: Encoding) -> dict[str, str]:
    """The contents of tokenizer.json and tokenizer_config.json, by file name."""
    if encoding.name != "bytes":
        raise InputError(f"data.tokenizer: {encoding.name} cannot be exported yet")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    end = {"id": encoding.eot_token, "content": END_OF_TEXT, "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    tree = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": {**level, "use_regex": False},
        "decoder": {**level, "use_regex": False},
        "model": {"type": "BPE", "vocab": {SPELLED[b]: b for b in range(256)}, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": json.dumps(tree), "tokenizer_config.json": json.dumps(config)}


def from_hf(folder: Path) -> Encoding:
    """The encoding in a folder.

    Raises:
        InputError: it is of another kind.
    """
    path = folder / "tokenizer.json"
    with reading(path):
        tree = json.loads(read_small(path))
    found = Encoding("bytes", (bytes([byte]) for byte in range(256)))
    if len(tree.get("model", {}).get("vocab", {})) != 256:
        raise InputError(f"{path}: is not a tokenizer of bytes")
    return found

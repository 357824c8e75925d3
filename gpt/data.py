"""From text to batches: source -> documents -> token files on disk -> sequences.

A corpus is tokenized once, into a folder of `data.cache_dir` whose name is a hash of the source's
files and of the options: `train.bin` and `val.bin` (token ids, uint16 or uint32, each document
followed by end of text), `tokenizer.json`, and `meta.json`, which is written last. Training reads
the token files by memory map.

A batch is a pure function of (seed, step): every epoch draws each non-overlapping window of the
training tokens once, in an order and from an offset of its own. Validation sequences never change.

Not here: the vocabulary (gpt/tokenizer.py), and tensors; batches are NumPy arrays.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tiktoken

from gpt import tokenizer
from gpt.config import DataConfig
from gpt.errors import InputError
from gpt.rng import derive

FORMAT = 1
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
Tokens = npt.NDArray[np.unsignedinteger[Any]]
Batch = npt.NDArray[np.int64]


# ---------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class Source:
    """Where documents come from: the files, and the documents in one of them."""

    files: Callable[[DataConfig], list[Path]]
    documents: Callable[[Path], Iterator[str]]


def _stdlib_files(config: DataConfig) -> list[Path]:
    """The Python sources of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts)]
    if not files:
        raise InputError(
            f"data.source: stdlib found no Python sources in {root};\n"
            "use data.source: text with data.path, the files or folders to read"
        )
    return sorted(files)


def _stdlib_documents(path: Path) -> Iterator[str]:
    """One file a document; of `pydoc_data`'s reference, kept as a dict literal, one topic each."""
    text = _read_text(path)
    if path.parent.name == "pydoc_data" and path.name == "topics.py":
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                yield from ast.literal_eval(node.value).values()
    else:
        yield text


def _text_files(config: DataConfig) -> list[Path]:
    """The files that `data.path` names, and all files below the folders that it names."""
    files: list[Path] = []
    for name in config.path:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
        if not found:
            raise InputError(
                f"data.path: {name}: no such file, folder or pattern with files "
                f"(looked from {Path.cwd()})"
            )
        files += found
    return files


def _text_documents(path: Path) -> Iterator[str]:
    """One file, one document."""
    yield _read_text(path)


SOURCES: dict[str, Source] = {
    "stdlib": Source(_stdlib_files, _stdlib_documents),
    "text": Source(_text_files, _text_documents),
}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no UTF-8 text: byte {error.start} is wrong") from None


# ---------------------------------------------------------------------------------------------
# Preparation


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus: token ids and what they mean.

    Attributes:
        train, val: token ids, memory-mapped.
        encoding: the tokenizer.
        fingerprint: SHA-256 of the token files and the tokenizer.
    """

    train: Tokens
    val: Tokens
    encoding: tiktoken.Encoding
    fingerprint: str


def find(config: DataConfig) -> Path | None:
    """The folder in which this corpus stands prepared, or None."""
    folder = _folder(config, SOURCES[config.source].files(config))
    return folder if (folder / "meta.json").is_file() else None


def prepare(config: DataConfig, say: Callable[[str], None] = lambda line: None) -> Dataset:
    """The corpus that `config` describes, tokenized now unless that was done before.

    Raises:
        InputError: a path is missing, a file is no text, or a split has no document.
    """
    source = SOURCES[config.source]
    files = source.files(config)
    folder = _folder(config, files)
    if not (folder / "meta.json").is_file():
        number = f"{len(files):,} file{'' if len(files) == 1 else 's'}"
        say(f"preparing {number} with the {config.tokenizer} tokenizer -> {folder}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        except OSError as error:
            raise InputError(f"data.cache_dir: {folder.parent}: {error.strerror}") from None
        try:
            _build(config, source, files, building)
            try:
                building.rename(folder)
            except OSError:  # someone else prepared the same corpus meanwhile: use theirs
                if not (folder / "meta.json").is_file():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        made = _open(folder).encoding.n_vocab
        if config.tokenizer == "bpe" and made < config.vocab_size:
            say(f"the text gave {made:,} of the {config.vocab_size:,} tokens of data.vocab_size")
    return _open(folder)


def vocab_size(config: DataConfig) -> int:
    """Tokens that the tokenizer will have once the corpus is prepared.

    Raises:
        InputError: as `prepare`, where the text must be read to know.
    """
    if config.tokenizer == "bpe":
        return config.vocab_size
    source = SOURCES[config.source]
    files = source.files(config)
    documents = (text for path in files for text in source.documents(path))
    return tokenizer.TOKENIZERS[config.tokenizer](config, documents).n_vocab


def _folder(config: DataConfig, files: list[Path]) -> Path:
    stamps = [(str(p.absolute()), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    options = config.model_dump(mode="json", exclude={"cache_dir", "seed", "path"})
    if config.tokenizer != "bpe":
        del options["vocab_size"]
    key = hashlib.sha256(json.dumps([FORMAT, options, stamps]).encode()).hexdigest()
    return Path(config.cache_dir) / f"{config.source}-{config.tokenizer}-{key[:12]}"


def _split(config: DataConfig, document: str) -> tuple[str, str]:
    """A document's training part and validation part."""
    if config.holdout == "tail":
        cut = int(len(document) * (1 - config.val_fraction))
        return document[:cut], document[cut:]
    digest = hashlib.sha256(document.encode()).digest()
    held_out = int.from_bytes(digest[:8], "little") < config.val_fraction * 2**64
    return ("", document) if held_out else (document, "")


def _build(config: DataConfig, source: Source, files: list[Path], folder: Path) -> None:
    def documents(split: Literal["train", "val", "all"]) -> Iterator[str]:
        for path in files:
            for document in source.documents(path):
                train, val = _split(config, document)
                text = {"train": train, "val": val, "all": document}[split]
                if text:
                    yield text

    # A tokenizer learns from the training text; but every character must have its token.
    learnt_from: Literal["train", "all"] = "all" if config.tokenizer == "chars" else "train"
    encoding = tokenizer.TOKENIZERS[config.tokenizer](config, documents(learnt_from))
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
    meta: dict[str, Any] = {"format": FORMAT, "dtype": dtype.name, "vocab_size": encoding.n_vocab}
    fingerprint = hashlib.sha256()

    def encode(text: str) -> tuple[Tokens, int]:
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        return np.append(ids, encoding.eot_token).astype(dtype), len(text.encode())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split in SPLITS:
            totals = {"documents": 0, "tokens": 0, "bytes": 0}
            with (folder / f"{split}.bin").open("wb") as file:
                for ids, size in pool.map(encode, documents(split)):
                    file.write(ids.tobytes())
                    fingerprint.update(ids.tobytes())
                    totals["documents"] += 1
                    totals["tokens"] += len(ids)
                    totals["bytes"] += size
            if not totals["documents"]:
                name = "training" if split == "train" else "validation"
                raise InputError(
                    f"data: no text was left for {name} (holdout: {config.holdout}, "
                    f"val_fraction: {config.val_fraction});\n"
                    "with few documents use data.holdout: tail, which splits each of them"
                )
            meta[split] = totals

    tokenizer.save(encoding, folder / "tokenizer.json")
    fingerprint.update((folder / "tokenizer.json").read_bytes())
    meta["fingerprint"] = fingerprint.hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")


def _open(folder: Path) -> Dataset:
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        splits: dict[str, Tokens] = {}
        for split in SPLITS:
            splits[split] = np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
            if len(splits[split]) != meta[split]["tokens"]:
                raise ValueError(
                    f"{split}.bin holds {len(splits[split]):,} tokens, "
                    f"{meta[split]['tokens']:,} were written"
                )
        return Dataset(
            encoding=tokenizer.load(folder / "tokenizer.json"),
            fingerprint=meta["fingerprint"],
            **splits,
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{folder}: is damaged ({error}); delete the folder to prepare it again"
        ) from None


# ---------------------------------------------------------------------------------------------
# Sequences


class TrainingSequences:
    """The training tokens as an endless, seeded stream of windows of `context` tokens.

    Args:
        tokens: token ids.
        context: T, tokens of a sequence; each has T inputs and T targets, one position on.
        seed: seed of the order.

    Raises:
        InputError: there are fewer tokens than one window needs.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int) -> None:
        if len(tokens) <= context:
            raise InputError(
                f"model.context: {context} needs more than the {len(tokens):,} training tokens"
            )
        self.tokens = tokens
        self.context = context
        self.seed = seed
        self.per_epoch = max(1, len(tokens) // context - 1)
        self._epochs: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}  # the newest two

    def batch(self, step: int, size: int) -> tuple[Batch, Batch]:
        """Inputs and targets of update `step` (from 1), (size, T) each: a function of the seed."""
        first = (step - 1) * size
        starts = [self._start(index) for index in range(first, first + size)]
        return _windows(self.tokens, starts, self.context)

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.per_epoch)
        offset, order = self._epoch(epoch)
        return offset + int(order[place]) * self.context

    def _epoch(self, epoch: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Offset of the windows, and their order."""
        if epoch not in self._epochs:
            room = len(self.tokens) - self.per_epoch * self.context  # at least 1: the last target
            random = np.random.default_rng(derive(self.seed, "data", epoch))
            offset = int(random.integers(min(self.context, room)))
            newest = list(self._epochs.items())[-1:]
            self._epochs = dict([*newest, (epoch, (offset, random.permutation(self.per_epoch)))])
        return self._epochs[epoch]


def validation_sequences(tokens: Tokens, context: int, limit: int | None) -> tuple[Batch, Batch]:
    """The fixed inputs and targets to evaluate on, (n, T) each: all windows, or `limit` of them.

    Raises:
        InputError: there are fewer tokens than one window needs.
    """
    windows = (len(tokens) - 1) // context
    if windows < 1:
        raise InputError(
            f"model.context: {context} needs more than the {len(tokens):,} validation tokens; "
            "raise data.val_fraction"
        )
    count = min(windows, limit or windows)
    starts = [index * windows // count * context for index in range(count)]
    return _windows(tokens, starts, context)


def _windows(tokens: Tokens, starts: list[int], context: int) -> tuple[Batch, Batch]:
    rows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64)
    return rows[:, :-1], rows[:, 1:]

"""Preparation: documents -> token files on disk, once, in constant memory and on all cores.

The folder CACHE_DIR/SOURCE-TOKENIZER-KEY belongs to a config: KEY is a hash of its options and of
the source files' names, sizes and times, so a second start finds the folder at once and a changed
file makes a new one. The work happens in a hidden folder beside it, under a lock, and is renamed
when it is whole. Every few seconds it notes how far it has come, and a start after an interruption
goes on from there. What the folder holds in the end: prepared.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from gpt.config import DataConfig, SourceConfig
from gpt.data import tokenizer
from gpt.data.prepared import ANEW, FORMAT, Dataset, Natural, open_dataset, seal, train_names
from gpt.data.sources import SOURCES, Document, Found, Read, commit
from gpt.data.token_files import Tokens
from gpt.data.tokenizer import Encoding, pieces
from gpt.errors import InputError, StoppedError, UnreachableError, printable
from gpt.io.console import Console, duration
from gpt.io.files import flush, only_one, open_own, read_json, refuse_link, refuse_links, write_text
from gpt.io.wait import Stop, interruptible, wait_for

T = TypeVar("T")

JOB = 2**17  # characters or tokens that a worker is given at a time; larger ones ran slower
NOTE = "progress.json"
REVISIONS = "revisions.json"
NOTE_EVERY = 5.0  # seconds between notes of how far the work has come
SAY_EVERY = 10.0  # seconds between lines that say so, where there is no terminal
DIFFERENT = 2**23  # bytes of different long words that bpe learns from: it needs 100 times as much
LONG = 16  # characters of a long word, between white space; what has more is rarely met again
STOPPED = "stopped while preparing data; start again to continue from what is on disk"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a disk that is, or that fails
KEPT = "; what is prepared is kept, and the next start continues from it"
HASHED = 2**20  # characters or tokens of a document, at its beginning, that decide on its side


# ---------------------------------------------------------------------------------------------
# Preparing, or finding what is prepared


def find(config: DataConfig) -> Path | None:
    """The folder in which this corpus stands prepared, or None."""
    folder, _ = _plan(config)
    return folder if (folder / "meta.json").is_file() else None


def prepare(
    config: DataConfig,
    console: Console | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Dataset:
    """The corpus that `config` describes, tokenized now unless that was done before.

    Args:
        console: says how far it is; without one, nothing is said.
        stop: asked again and again; once true, the work ends and is kept for the next start.

    Raises:
        InputError: the source is missing, damaged or empty; another process prepares the same
            corpus; the disk is full.
        StoppedError: `stop` said so.
    """
    return interruptible(lambda stop: _prepare(config, console, stop), stop, STOPPED)


_PREPARING = defaultdict[Path, threading.Lock](threading.Lock)  # threads wait for each other


def _prepare(config: DataConfig, console: Console | None, stop: Stop) -> Dataset:
    """`prepare`, in a thread of its own."""
    try:
        folder, plan = _plan(config)
        if not (folder / "meta.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = folder.with_name(f".{folder.name}.lock")
            refusal = (
                f"{folder}: another process is preparing this data; start again when it is done"
            )
            with _PREPARING[folder.absolute()], only_one(lock, refusal):
                if not (folder / "meta.json").is_file():  # or it was finished a moment ago
                    if folder.exists() or folder.is_symlink():
                        raise InputError(
                            f"{folder}: is damaged (it has no meta.json); delete the folder to "
                            "prepare it again"
                        )
                    console = console or Console(quiet=True)
                    _Preparation(config, plan, folder, console, stop).run()
    except OSError as error:
        place = error.filename or f"data.cache_dir: {config.cache_dir}"
        raise InputError(f"{place}: {error.strerror}") from None
    return open_dataset(config, folder)


def vocab_size(config: DataConfig) -> int:
    """Tokens that the tokenizer will have once the corpus is prepared.

    Raises:
        InputError: as `prepare`, where the text must be read to know.
    """
    if config.tokenizer == "bpe":
        return config.vocab_size
    _, files = _plan(config)
    return _learn(config, files).n_vocab


@dataclass(frozen=True)
class _SourceFiles:
    """One source, the files that it reads, and the token file that its documents go to."""

    config: SourceConfig
    found: Found
    target: str

    @property
    def files(self) -> list[Path]:
        return self.found.files

    def at(self, revision: str | None) -> _SourceFiles:
        """The same, of a dataset of the hub at one commit."""
        hub = self.config.hub.model_copy(update={"revision": revision})
        return replace(self, config=self.config.model_copy(update={"hub": hub}))

    def stamps(self) -> list[tuple[str, int, int]]:
        """What tells that a file has changed: its size and time."""
        stats = [(path, path.stat()) for path in self.files]
        return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


def _plan(config: DataConfig) -> tuple[Path, list[_SourceFiles]]:
    """The folder that belongs to `config`, and what is read to fill it."""
    places = [f"data.mix.{index}" for index in range(len(config.mix))] or ["data"]
    plan = [
        _source_files(config, source, target, place)
        for source, target, place in zip(config.sources, train_names(config), places, strict=True)
    ]
    if config.validation is not None:
        plan.append(_source_files(config, config.validation, "val", "data.validation"))
    options = config.model_dump(
        mode="json",
        include={
            *("tokenizer", "vocab_size", "learn_bytes", "vocabulary", "holdout", "val_fraction")
        },
    )
    if config.tokenizer != "bpe":
        del options["vocab_size"], options["learn_bytes"]
    if config.validation is not None:
        del options["holdout"], options["val_fraction"]
    if config.vocabulary is not None:
        options["vocabulary"] = tokenizer.to_json(tokenizer.load(Path(config.vocabulary)))
    fields = set(SourceConfig.model_fields) - {"path"}
    sources = [
        [source.target, source.config.model_dump(mode="json", include=fields), source.stamps()]
        for source in plan
    ]
    key = hashlib.sha256(json.dumps([FORMAT, options, sources]).encode()).hexdigest()
    name = "mix" if config.mix else config.source
    return Path(config.cache_dir) / f"{name}-{config.tokenizer}-{key[:12]}", plan


def _source_files(
    config: DataConfig, source: SourceConfig, target: str, place: str
) -> _SourceFiles:
    """The files of the source at the option `place`."""
    try:
        found = SOURCES[source.source].find(source)
    except InputError as error:
        raise InputError(f"{place}.{error}") from None
    cache = Path(os.path.realpath(config.cache_dir))  # which, unlike resolve, lets a loop be
    for folder in (cache, *cache.parents):
        if folder.exists() and found.has_searched(folder):
            raise InputError(
                f"{place}.path: {', '.join(source.path)} holds data.cache_dir "
                f"({config.cache_dir}), where prepared files go;\n"
                "name the texts more closely, or another data.cache_dir"
            )
    return _SourceFiles(source, found, target)


# ---------------------------------------------------------------------------------------------
# The work

Piece = str | Tokens
Item = tuple[str, Piece, bool]  # token file, text or tokens, whether the document ends with it


class _Preparation:
    """Making `final`, in a hidden folder beside it: vocabulary, token files, what they hold."""

    def __init__(
        self,
        config: DataConfig,
        plan: list[_SourceFiles],
        final: Path,
        console: Console,
        stop: Callable[[], bool],
    ) -> None:
        self.config, self.plan, self.final = config, plan, final
        self.folder = final.with_name(f".{final.name}.building")
        self.console, self.stop = console, stop
        self.names = [*train_names(config), "val"]
        self.total = sum(source.size() for source in plan) or None
        self.read: int | None = None
        self.skipped, self.first_skipped = 0, ""

    def run(self) -> None:
        """Make the folder, whole; what a failure leaves is kept if the next start can use it."""
        refuse_link(self.folder)
        if self.folder.exists():
            refuse_links(self.folder)
        try:
            self._fill()
            if _plan(self.config)[0] != self.final:
                raise InputError(f"data: a file of {self.final.name} changed while it was read")
            self.folder.rename(self.final)
            flush(self.final.parent)
        except Exception as error:
            is_full = isinstance(error, OSError) and error.errno in FULL
            can_go_on = is_full or isinstance(error, UnreachableError | StoppedError)
            if not (can_go_on and (self.folder / NOTE).is_file()):
                shutil.rmtree(self.folder, ignore_errors=True)
            elif isinstance(error, OSError):
                error.strerror = f"{error.strerror}{KEPT}"
            raise

    def _fill(self) -> None:
        """Do all that an earlier start has not done."""
        number = sum(len(source.files) for source in self.plan)
        what = f"{number:,} file{'' if number == 1 else 's'}" if number else "a dataset of the hub"
        self.console.say(
            f"preparing {what} with the {self.config.tokenizer} tokenizer -> {self.final}"
        )
        for source in self.plan:
            if left_out := source.found.describe_left_out():
                self.console.say(f"left out: {left_out}")
        self.folder.mkdir(exist_ok=True)
        self._pin()
        encoding = self._vocabulary()
        dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
        self._write(encoding, dtype)
        for name in self.names:
            if not (self.folder / f"{name}.bin").stat().st_size:
                raise self._nothing_for(name)
        revisions = [source.config.hub.revision for source in self.plan]
        seal(self.folder, self.names, dtype, encoding, revisions)
        (self.folder / NOTE).unlink()
        (self.folder / REVISIONS).unlink()

    def _pin(self) -> None:
        """Read datasets of the hub at one commit from the first start to the last."""
        path = self.folder / REVISIONS
        revisions = [commit(source.config) for source in self.plan]  # or it is out of reach
        if path.exists():
            with _left_by_an_earlier_start():
                revisions = read_json(path, list[str | None])
                if len(revisions) != len(self.plan):
                    raise InputError(f"{path}: is damaged")
        else:
            write_text(path, json.dumps(revisions) + "\n")
        self.plan = [s.at(revision) for s, revision in zip(self.plan, revisions, strict=True)]

    def _nothing_for(self, name: str) -> InputError:
        config = self.config
        if name == "val" and config.validation is not None:
            return InputError("data.validation: holds no text")
        where = f"data.mix.{name.rpartition('-')[2]}" if config.mix else "data"
        if not any((self.folder / f"{each}.bin").stat().st_size for each in self.names):
            return InputError(f"{where}: holds no text")
        kind, change = ("validation", "raise") if name == "val" else ("training", "lower")
        tail = ", or use data.holdout: tail, which splits each document"
        return InputError(
            f"{where}: no text was left for {kind} (holdout: {config.holdout}, "
            f"val_fraction: {config.val_fraction});\n"
            f"{change} data.val_fraction{tail if config.holdout == 'documents' else ''}"
        )

    # -- The vocabulary --------------------------------------------------------------------------

    def _vocabulary(self) -> Encoding:
        """The tokenizer of an earlier start, or a new one, learnt from the text if it must be."""
        path = self.folder / "tokenizer.json"
        if path.exists():
            with _left_by_an_earlier_start():
                return tokenizer.load(path)
        self._start("learning a vocabulary from")
        encoding = wait_for(
            lambda: _learn(self.config, self.plan, self._has_read, self.stop),
            meanwhile=self._say_still_learning,
        )
        self.console.close()
        if self.config.tokenizer == "bpe" and encoding.n_vocab < self.config.vocab_size:
            self.console.say(
                f"the text gave {encoding.n_vocab:,} of the {self.config.vocab_size:,} tokens of "
                "data.vocab_size"
            )
        write_text(path, tokenizer.to_json(encoding))
        return encoding

    # -- The token files -------------------------------------------------------------------------

    def _write(self, encoding: Encoding, dtype: np.dtype[Any]) -> None:
        """Append every document's tokens to its token file, in order."""
        own = threading.local()  # an encoding each: threads that share one wait for each other

        def begin() -> None:
            own.encoding = tokenizer.copy(encoding)

        def encode(job: list[Item]) -> tuple[int, dict[str, Tokens]]:
            return _encode(job, own.encoding, dtype)

        with contextlib.ExitStack() as stack:
            count, files = self._open_files(stack, dtype)
            self._start("encoding")
            stack.callback(self.console.close)
            pool = stack.enter_context(ThreadPoolExecutor(_workers(), initializer=begin))
            stack.callback(pool.shutdown, cancel_futures=True)
            items = _items(
                self.config, self.plan, self._has_read, encoding.eot_token, self._has_skipped
            )
            noted = time.monotonic()
            try:
                for number, arrays in _in_order(
                    pool, encode, _jobs(itertools.islice(items, count, None))
                ):
                    for name, ids in arrays.items():
                        files[name].write(ids.data)
                    count += number
                    if self.stop():
                        raise StoppedError(STOPPED)
                    if time.monotonic() - noted > NOTE_EVERY:
                        self._note(count, files)
                        noted = time.monotonic()
                self._note(count, files)  # the files are yet to be hashed, which can take long
            except (StoppedError, UnreachableError):
                if count:
                    self._note(count, files)
                raise
        if self.skipped:
            s, also = ("", "") if self.skipped == 1 else ("s", " and others")
            self.console.say(
                f"skipped {self.skipped:,} record{s} without a text: {self.first_skipped}{also}"
            )

    def _open_files(
        self, stack: contextlib.ExitStack, dtype: np.dtype[Any]
    ) -> tuple[int, dict[str, BinaryIO]]:
        """The number of items that an earlier start wrote, and the token files after these."""
        note = self.folder / NOTE
        done = dict.fromkeys(["items", *self.names], 0)
        files: dict[str, BinaryIO] = {}
        with _left_by_an_earlier_start():
            if note.exists():
                done = self._noted(note, dtype)
                self.console.say("going on where an earlier start was stopped")
            for name in self.names:
                path = self.folder / f"{name}.bin"
                files[name] = stack.enter_context(open_own(path))
                files[name].truncate(done[name])
                files[name].seek(done[name])
        return done["items"], files

    def _noted(self, path: Path, dtype: np.dtype[Any]) -> dict[str, int]:
        """What an earlier start noted: items written, and the sizes of the token files after it."""
        done = read_json(path, dict[str, Natural])
        if done.keys() != {"items", *self.names} or any(
            done[name] > (self.folder / f"{name}.bin").stat().st_size or done[name] % dtype.itemsize
            for name in self.names
        ):
            raise InputError(f"{path}: is damaged")
        return done

    def _note(self, count: int, files: dict[str, BinaryIO]) -> None:
        """Note that `count` items are written, so that the next start can go on from there."""
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in files.items()}
        write_text(self.folder / NOTE, json.dumps({"items": count, **sizes}) + "\n")

    # -- What is said ----------------------------------------------------------------------------

    def _start(self, what: str) -> None:
        self.read, self.what = None, what
        self.began = self.heard = time.monotonic()

    def _say_still_learning(self) -> None:
        """Say that work goes on, as the trainer is silent once it has read the text."""
        now = time.monotonic()
        if now - self.heard > SAY_EVERY:
            self.heard = now
            self.console.say(f"still learning a vocabulary, for {duration(now - self.began)}")

    def _has_skipped(self, where: str) -> None:
        self.skipped += 1
        self.first_skipped = self.first_skipped or printable(where)

    def _has_read(self, count: int) -> None:
        self.heard = time.monotonic()
        if self.read is None:
            self.read = 0
            self.console.start(self.total, what=self.what, unit="B", every=SAY_EVERY)
        self.read += count
        self.console.progress(self.read)


@contextlib.contextmanager
def _left_by_an_earlier_start() -> Iterator[None]:
    """Say of what cannot be used that it is deleted."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        raise InputError(f"{error.filename}: {error.strerror}; {ANEW}") from None
    except InputError as error:
        raise InputError(f"{error}; {ANEW}") from None


def _learn(
    config: DataConfig,
    plan: list[_SourceFiles],
    read: Read = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
) -> Encoding:
    """The tokenizer: chars from all text, as each one needs a token; bpe from training text."""

    place = 0  # how much of the files is read

    def has_read(count: int) -> None:
        nonlocal place
        place += count
        read(count)

    def texts() -> Iterator[str]:
        for target, piece, _ in _items(config, plan, has_read, end_of_text=-1):
            if stop():
                raise StoppedError(STOPPED)
            if isinstance(piece, str) and (target != "val" or config.tokenizer == "chars"):
                yield piece

    def sample() -> Iterator[str]:
        """At most `learn_bytes`, spread evenly over the files; of the hub the first.

        Less where long words hardly repeat, such as DNA or scripts without white space, as the
        trainer's memory grows with the different words. In small parts, with which it was measured
        to need less.
        """
        most, taken = config.learn_bytes, 0
        words, different = set[str](), 0
        size = sum(source.size() for source in plan if source.target != "val")
        for text in texts():
            for part in pieces([text], 2**12):
                if taken >= most or different >= DIFFERENT:
                    return
                if taken * size <= most * place:
                    taken += _size(part)
                    new = {word for word in part.split() if len(word) > LONG} - words
                    different += sum(map(_size, new))
                    words |= new
                    yield part

    wanted = sample() if config.tokenizer == "bpe" else texts()
    return tokenizer.TOKENIZERS[config.tokenizer](config, wanted)


def _items(
    config: DataConfig,
    plan: list[_SourceFiles],
    read: Read,
    end_of_text: int,
    skipped: Callable[[str], None] = lambda where: None,
) -> Iterator[Item]:
    """Every piece of every document with the token file that it goes to, always in one order."""
    for source in plan:
        kind = SOURCES[source.config.source]
        for document in kind.documents(source.config, source.files, read, end_of_text):
            if document.skipped is not None:
                skipped(document.skipped)
            elif config.validation is not None:
                yield from _one_target(source.target, document.pieces)
            elif config.holdout == "documents":
                yield from _by_hash(source.target, document, config.val_fraction)
            else:
                yield from _by_tail(source.target, document, config.val_fraction)


def _one_target(target: str, pieces: Iterable[Piece]) -> Iterator[Item]:
    before: Piece | None = None
    for piece in pieces:
        if before is not None:
            yield target, before, False
        before = piece
    if before is not None:
        yield target, before, True


def _by_hash(target: str, document: Document, fraction: float) -> Iterator[Item]:
    """All of a document to one side, by a hash of its beginning, whatever else there is."""
    pieces: Iterator[Piece] = iter(document.pieces)
    beginning: list[Piece] = []
    length, digest = 0, hashlib.sha256()
    for piece in pieces:
        beginning.append(piece)
        digest.update(piece.encode() if isinstance(piece, str) else piece.astype("<u4").data)
        length += len(piece)
        if length >= HASHED:
            break
    held_out = int.from_bytes(digest.digest()[:8], "little") < fraction * 2**64
    yield from _one_target("val" if held_out else target, itertools.chain(beginning, pieces))


def _by_tail(target: str, document: Document, fraction: float) -> Iterator[Item]:
    """The last `fraction` of a document to validation, by UTF-8 bytes or by tokens."""
    left = int(document.size() * (1 - fraction))
    pieces: Iterator[Piece] = iter(document.pieces)
    head: list[Piece] = []

    def training() -> Iterator[Piece]:
        nonlocal left
        for piece in pieces:
            size = _size(piece)
            if size <= left:
                left -= size
                yield piece
                continue
            cut = _cut(piece, left)
            if len(piece[:cut]):
                yield piece[:cut]
            head.append(piece[cut:])
            return

    yield from _one_target(target, training())
    yield from _one_target("val", itertools.chain(head, pieces))


def _size(piece: Piece) -> int:
    if not isinstance(piece, str) or piece.isascii():
        return len(piece)
    return len(piece.encode())


def _cut(piece: Piece, size: int) -> int:
    """Where the first `size` bytes or tokens of `piece` end, between two characters."""
    if not isinstance(piece, str) or piece.isascii():
        return size
    return len(piece.encode()[:size].decode(errors="ignore"))


def _jobs(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of about `JOB` characters or tokens."""
    job: list[Item] = []
    size = 0
    for item in items:
        job.append(item)
        size += len(item[1])
        if size >= JOB:
            yield job
            job, size = [], 0
    if job:
        yield job


def _encode(
    job: list[Item], encoding: Encoding, dtype: np.dtype[Any]
) -> tuple[int, dict[str, Tokens]]:
    """The number of items, and their tokens for each token file. Runs without the GIL, mostly."""
    end = np.array([encoding.eot_token], np.uint32)
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for name, piece, last in job:
        part = parts.setdefault(name, [])
        if isinstance(piece, str):
            tokenizer.check_characters(encoding, piece, f"data: a document for {name}.bin")
            part.append(encoding.encode_to_numpy(piece, disallowed_special=()))
        else:
            part.append(piece)
        if last:
            part.append(end)
    joined = {name: np.concatenate(part).astype(dtype) for name, part in parts.items()}
    return len(job), joined


def _workers() -> int:
    """Threads that encode: one a core, up to 16, as each holds an encoding (gpt2: 11 MB)."""
    return min(os.cpu_count() or 1, 16)


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[list[Item]], tuple[int, dict[str, Tokens]]],
    jobs: Iterable[list[Item]],
) -> Iterator[tuple[int, dict[str, Tokens]]]:
    """`map(work, jobs)` on all workers, with no more jobs in memory than keep them busy."""
    ahead = 2 * _workers()
    waiting: deque[Future[tuple[int, dict[str, Tokens]]]] = deque()
    for job in jobs:
        waiting.append(pool.submit(work, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

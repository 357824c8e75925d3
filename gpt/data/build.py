"""Filling the cache folder of a corpus: tokenizer, token files, and their description.

The work happens in a hidden folder next to the final one, which is renamed when it is complete.
Every few seconds the build saves how far it has come, so that after an interruption the next run
continues from there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt.config import DataConfig
from gpt.data import tokenizer
from gpt.data.cache import PlannedSource, plan
from gpt.data.encode import encode_items
from gpt.data.prepared import train_names, write_meta
from gpt.data.sources.hub import resolve_commit
from gpt.data.split import holds_out_tail, split_documents
from gpt.data.token_files import FROM_SCRATCH
from gpt.data.tokenizer import Encoding
from gpt.data.vocabulary import train_tokenizer
from gpt.errors import InputError, StoppedError, UnreachableError, printable
from gpt.io.console import Console, duration
from gpt.io.files import (
    Natural,
    fsync,
    open_for_update,
    read_json,
    refuse_link,
    refuse_links,
    write_text,
)
from gpt.io.wait import wait_for

PROGRESS = "progress.json"  # items encoded so far, and the token files' sizes at that point
REVISIONS = "revisions.json"  # the commit of each source
SAVE_EVERY = 5.0  # seconds between updates of PROGRESS
PRINT_EVERY = 10.0  # seconds between progress lines, where there is no terminal
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a full or failing disk
STOPPED = "stopped while preparing data; the same command resumes"
KEPT = "; the work so far is kept, and the next run resumes from it"


class Build:
    """One build of the folder `final`.

    Args:
        config: the options.
        sources: what to read, as `plan` returns it with `final`.
        final: the folder to create.
        console: where progress is shown.
        stop: called regularly; once true, the build ends with `StoppedError`.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: list[PlannedSource],
        final: Path,
        console: Console,
        stop: Callable[[], bool],
    ) -> None:
        self.config, self.sources, self.final = config, sources, final
        self.folder = final.with_name(f".{final.name}.building")
        self.console, self.stop = console, stop
        self.names = [*train_names(config), "val"]
        self.progress = _ReadProgress(console, sum(source.size() for source in sources) or None)
        self.skipped, self.first_skipped = 0, ""

    def run(self) -> None:
        """Create the folder; after a failure, keep what the next run can continue from.

        Raises:
            InputError: see `gpt.data.preparation.prepare`.
            StoppedError: `stop()` became true.
            OSError: the disk is full or fails.
        """
        refuse_link(self.folder)
        if self.folder.exists():
            refuse_links(self.folder)
        try:
            self._fill()
            if plan(self.config)[0] != self.final:
                raise InputError(f"data: an input of {self.final.name} changed while it was read")
            self.folder.rename(self.final)
            fsync(self.final.parent)
        except Exception as error:
            disk_error = isinstance(error, OSError) and error.errno in DISK_ERRORS
            resumable = disk_error or isinstance(error, UnreachableError | StoppedError)
            if not (resumable and (self.folder / PROGRESS).is_file()):
                shutil.rmtree(self.folder, ignore_errors=True)
            elif isinstance(error, OSError):
                error.strerror = f"{error.strerror}{KEPT}"
            raise

    def _fill(self) -> None:
        """Do everything that remains to be done."""
        number = sum(len(source.files) for source in self.sources)
        what = f"{number:,} file{'' if number == 1 else 's'}" if number else "a dataset on the hub"
        self.console.say(
            f"preparing {what} with the {self.config.tokenizer} tokenizer -> {self.final}"
        )
        for source in self.sources:
            if left_out := source.found.describe_left_out():
                self.console.say(f"left out: {left_out}")
        self.folder.mkdir(exist_ok=True)
        self._fix_revisions()
        encoding = self._tokenizer()
        self.tail = holds_out_tail(self.config, self.sources, encoding.eot_token)
        if self.tail and self.config.holdout == "documents" and self.config.validation is None:
            self.console.say("one document: its end is held out, as by data.holdout: tail")
        dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
        self._write_tokens(encoding, dtype)
        for name in self.names:
            if not self._size(name):
                raise self._empty(name)
        revisions = [source.config.hub.revision for source in self.sources]
        write_meta(self.folder, self.names, dtype, encoding, revisions)
        (self.folder / PROGRESS).unlink()
        (self.folder / REVISIONS).unlink()

    def _size(self, name: str) -> int:
        """Bytes of a token file."""
        return (self.folder / f"{name}.bin").stat().st_size

    def _fix_revisions(self) -> None:
        """Read datasets of the hub at the same commit in all runs of a build."""
        path = self.folder / REVISIONS
        revisions = [resolve_commit(source.config) for source in self.sources]  # checks access too
        if path.exists():
            with _left_by_an_interrupted_run():
                revisions = read_json(path, list[str | None])
                if len(revisions) != len(self.sources):
                    raise InputError(f"{path}: is damaged")
        else:
            write_text(path, json.dumps(revisions) + "\n")
        self.sources = [s.at(commit) for s, commit in zip(self.sources, revisions, strict=True)]

    def _empty(self, name: str) -> InputError:
        """The error about a token file that no document went to."""
        config = self.config
        if name == "val" and config.validation is not None:
            return InputError("data.validation: contains no text")
        where = f"data.mix.{name.rpartition('-')[2]}" if config.mix else "data"
        if not any(map(self._size, self.names)):
            return InputError(f"{where}: contains no text")
        kind, change = ("validation", "raise") if name == "val" else ("training", "lower")
        tail = ", or use data.holdout: tail, which splits each document"
        return InputError(
            f"{where}: no text is left for {kind} (holdout: {config.holdout}, "
            f"val_fraction: {config.val_fraction});\n"
            f"{change} data.val_fraction{'' if self.tail else tail}"
        )

    def _tokenizer(self) -> Encoding:
        """The tokenizer of an interrupted build, or a new one, trained if need be."""
        path = self.folder / "tokenizer.json"
        if path.exists():
            with _left_by_an_interrupted_run():
                return tokenizer.load(path)
        self.progress.start("training the tokenizer on")
        encoding = wait_for(
            lambda: train_tokenizer(
                self.config, self.sources, self.progress.on_read, self._check_stop
            ),
            meanwhile=self.progress.say_still_training,
        )
        self.console.close()
        trained_on = tokenizer.TOKENIZERS[self.config.tokenizer].trained_on
        if trained_on == "sample" and encoding.n_vocab < self.config.vocab_size:
            self.console.say(
                f"the text yields only {encoding.n_vocab:,} of the {self.config.vocab_size:,} "
                "tokens of data.vocab_size"
            )
        write_text(path, tokenizer.to_json(encoding))
        return encoding

    # -- The token files -------------------------------------------------------------------------

    def _write_tokens(self, encoding: Encoding, dtype: np.dtype[Any]) -> None:
        """Append the tokens of every document to its token file, in order."""
        with contextlib.ExitStack() as stack:
            done, files = self._open_files(stack, dtype)
            self.progress.start("encoding")
            stack.callback(self.console.close)
            items = split_documents(
                self.config, self.sources, self.progress.on_read, encoding.eot_token, self._skip
            )
            encoded = encode_items(itertools.islice(items, done, None), encoding, dtype)
            stack.enter_context(contextlib.closing(encoded))
            saved = time.monotonic()
            try:
                for number, arrays in encoded:
                    for name, ids in arrays.items():
                        files[name].write(ids.data)
                    done += number
                    self._check_stop()
                    if time.monotonic() - saved > SAVE_EVERY:
                        self._save_progress(done, files)
                        saved = time.monotonic()
                self._save_progress(done, files)  # the hashing that follows can take a while
            except (StoppedError, UnreachableError):
                if done:
                    self._save_progress(done, files)
                raise
        if self.skipped:
            s, also = ("", "") if self.skipped == 1 else ("s", " and others")
            self.console.say(
                f"skipped {self.skipped:,} record{s} without text: {self.first_skipped}{also}"
            )

    def _check_stop(self) -> None:
        if self.stop():
            raise StoppedError(STOPPED)

    def _skip(self, origin: str) -> None:
        self.skipped += 1
        self.first_skipped = self.first_skipped or printable(origin)

    def _open_files(
        self, stack: contextlib.ExitStack, dtype: np.dtype[Any]
    ) -> tuple[int, dict[str, BinaryIO]]:
        """How many items an interrupted build wrote, and the token files, open for appending."""
        path = self.folder / PROGRESS
        done = dict.fromkeys(["items", *self.names], 0)
        files: dict[str, BinaryIO] = {}
        with _left_by_an_interrupted_run():
            if path.exists():
                done = self._read_progress(path, dtype)
                self.console.say("resuming an interrupted preparation")
            for name in self.names:
                file = stack.enter_context(open_for_update(self.folder / f"{name}.bin"))
                file.truncate(done[name])
                file.seek(done[name])
                files[name] = file
        return done["items"], files

    def _read_progress(self, path: Path, dtype: np.dtype[Any]) -> dict[str, int]:
        """The number of items written, and the sizes of the token files at that point."""
        done = read_json(path, dict[str, Natural])
        if done.keys() != {"items", *self.names} or any(
            done[name] > self._size(name) or done[name] % dtype.itemsize for name in self.names
        ):
            raise InputError(f"{path}: is damaged")
        return done

    def _save_progress(self, items: int, files: dict[str, BinaryIO]) -> None:
        """Save that `items` are written, so that the next run can continue from there."""
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in files.items()}
        write_text(self.folder / PROGRESS, json.dumps({"items": items, **sizes}) + "\n")


class _ReadProgress:
    """Shows how much of the files has been read.

    Args:
        total: bytes of all files; None if not known.
    """

    def __init__(self, console: Console, total: int | None) -> None:
        self.console, self.total = console, total

    def start(self, what: str) -> None:
        """Begin to read from the start, for the activity `what`."""
        self.what = what
        self.read: int | None = None
        self.began = self.active = time.monotonic()

    def on_read(self, count: int) -> None:
        """Count bytes that were just read."""
        self.active = time.monotonic()
        if self.read is None:
            self.read = 0
            self.console.start(self.total, what=self.what, unit="B", every=PRINT_EVERY)
        self.read += count
        self.console.progress(self.read)

    def say_still_training(self) -> None:
        """Print now and then that training continues, since the trainer is silent after reading."""
        now = time.monotonic()
        if now - self.active > PRINT_EVERY:
            self.active = now
            self.console.say(f"still training the tokenizer ({duration(now - self.began)})")


@contextlib.contextmanager
def _left_by_an_interrupted_run() -> Iterator[None]:
    """Make errors about a leftover file say that the next run starts from scratch."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        raise InputError(f"{error.filename}: {error.strerror}; {FROM_SCRATCH}") from None
    except InputError as error:
        raise InputError(f"{error}; {FROM_SCRATCH}") from None

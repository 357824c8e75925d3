"""Preparation: a corpus as token files on disk, made once, in constant memory and on all cores.

A prepared corpus is opened at once, if neither its files nor its options have changed (cache.py).
Otherwise it is built, under a lock (build.py).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from gpt.config import DataConfig
from gpt.data.build import STOPPED, Build
from gpt.data.cache import PlannedSource, plan
from gpt.data.prepared import Dataset, open_dataset
from gpt.data.sources.hub import resolve_commit
from gpt.data.tokenizer import TOKENIZERS
from gpt.data.vocabulary import train_tokenizer
from gpt.errors import InputError
from gpt.io.console import Console
from gpt.io.files import lock_file
from gpt.io.wait import Stop, interruptible


def find(config: DataConfig) -> Path | None:
    """The folder of this corpus if it has been prepared, otherwise None."""
    folder, _ = plan(config)
    return folder if _is_prepared(folder) else None


def prepare(
    config: DataConfig,
    console: Console | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Dataset:
    """The corpus that `config` describes, tokenized now unless that was done before.

    Args:
        console: where progress is shown; by default it is not.
        stop: called regularly; once true, the work ends and is kept for the next run.

    Raises:
        InputError: the source is missing, damaged or empty; another process is preparing the same
            corpus; the disk is full.
        StoppedError: `stop()` became true.
    """
    return interruptible(lambda stop: _prepare(config, console, stop), stop, STOPPED)


def _prepare(config: DataConfig, console: Console | None, stop: Stop) -> Dataset:
    try:
        folder, sources = plan(config)
        if not _is_prepared(folder):
            _build(config, sources, folder, console or Console(quiet=True), stop)
    except OSError as error:
        path = error.filename or f"data.cache_dir: {config.cache_dir}"
        raise InputError(f"{path}: {error.strerror}") from None
    return open_dataset(config, folder)


_THREAD_LOCKS = defaultdict[Path, threading.Lock](threading.Lock)  # threads wait for each other


def _build(
    config: DataConfig, sources: list[PlannedSource], folder: Path, console: Console, stop: Stop
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    refusal = f"{folder}: another process is preparing this data; try again when it has finished"
    with _THREAD_LOCKS[folder.absolute()], lock_file(lock, refusal):
        if _is_prepared(folder):  # finished a moment ago
            return
        if folder.exists() or folder.is_symlink():
            raise InputError(
                f"{folder}: is damaged (it has no meta.json); delete the folder to prepare it again"
            )
        Build(config, sources, folder, console, stop).run()


def _is_prepared(folder: Path) -> bool:
    return (folder / "meta.json").is_file()  # written last


def vocab_size(config: DataConfig) -> int:
    """The number of tokens that the tokenizer will have once the corpus is prepared.

    With bpe this is the maximum: a small corpus may yield fewer.

    Raises:
        InputError: as `prepare`; never for bpe, whose size is an option.
    """
    if TOKENIZERS[config.tokenizer].trained_on == "sample":
        return config.vocab_size
    _, sources = plan(config)
    sources = [source.at(resolve_commit(source.config)) for source in sources]  # checks access
    return train_tokenizer(config, sources).n_vocab

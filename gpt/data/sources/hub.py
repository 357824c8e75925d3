"""Datasets of the Hugging Face hub, or of a local folder that `datasets` understands."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from gpt.config import HubConfig, SourceConfig
from gpt.data.sources.document import Document, OnRead, document_from_field, missing_field
from gpt.data.sources.paths import SourceFiles, walk
from gpt.errors import InputError, UnreachableError
from gpt.io.wait import TIMEOUT, wait_for

ROW_TIMEOUT = 60.0  # seconds without a row after which a dataset counts as unreachable


def find(config: SourceConfig) -> SourceFiles:
    """The files of a local folder; none for a dataset on the hub.

    Links to folders are left out, since `datasets` does not follow them.
    """
    found = SourceFiles([])
    folder = Path(config.hub.name or "")
    if folder.is_dir():
        found.files.extend(sorted(walk(folder, found, follow=False)))
    return found


def resolve_commit(config: SourceConfig) -> str | None:
    """The current commit of a hub dataset; offline or for other sources, the config's revision.

    Raises:
        InputError: there is no such dataset, or the hub does not respond within `TIMEOUT` seconds.
    """
    hub = config.hub
    if config.source != "hub" or find(config).files:
        return hub.revision
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return hub.revision
    name = str(hub.name)
    try:
        return wait_for(
            lambda: HfApi().dataset_info(name, revision=hub.revision, timeout=TIMEOUT).sha,
            TIMEOUT,
        )
    except Exception as error:  # whatever the library raises; no code of ours runs here
        raise _dataset_error(hub, error) from None


def documents(
    config: SourceConfig, files: list[Path], on_read: OnRead, end: int
) -> Iterator[Document]:
    """One document per row: the text in the field `text_field`.

    Raises:
        InputError: there is no such dataset, split or field.
        UnreachableError: the hub does not respond, or no row arrives within `ROW_TIMEOUT` seconds.
    """
    import datasets

    hub, row = config.hub, 0
    load = functools.partial(
        datasets.load_dataset,
        *(hub.name, hub.config),
        split=hub.split,
        revision=hub.revision,
        streaming=hub.streaming,
    )
    try:
        batches = wait_for(load, ROW_TIMEOUT if hub.streaming else None).iter(batch_size=256)
        while (batch := wait_for(lambda: next(batches, None), ROW_TIMEOUT)) is not None:
            if config.text_field not in batch:
                raise missing_field(f"{hub.name}: row {row + 1}", config, list(batch))
            for value in batch[config.text_field]:
                row += 1
                document = document_from_field(value, f"{hub.name}: row {row}", config)
                on_read(document.size())
                yield document
    except InputError:
        raise
    except Exception as error:  # as above, also while rows are read
        raise _dataset_error(hub, error, row) from None


def _dataset_error(hub: HubConfig, error: Exception, rows: int = 0) -> InputError:
    """The error about a dataset, with the remedy."""
    from huggingface_hub import constants, errors

    reasons = dict.fromkeys(str(e) for e in (error, error.__cause__) if e is not None)
    reason = " ".join("; ".join(reasons).split())[:200]
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"data.hub.revision: {hub.name} has no {hub.revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return InputError(
            f"data.hub.name: {hub.name!r} is neither a local folder nor a dataset on the hub "
            "(or it is private, and HF_TOKEN does not grant access)"
        )
    if isinstance(error, ValueError) and not rows:  # there is no such configuration or split
        return InputError(f"data.hub: {hub.name}: {reason}")
    return UnreachableError(
        f"data.hub: {hub.name} cannot be read from {constants.ENDPOINT}"
        + (f" beyond row {rows:,}" if rows else "")
        + f" ({type(error).__name__}: {reason}).\nWithout a network, use its Parquet or JSONL "
        "files, downloaded elsewhere, with data.source: parquet or jsonl; or the cache of "
        "`datasets`,\nwith HF_HUB_OFFLINE=1 and data.hub.streaming: false; or your own text, with "
        "data.source: text and a BPE trained on it (data.tokenizer: bpe)"
    )

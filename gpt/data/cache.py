"""The cache folder of a corpus, and the sources that are read to fill it.

The folder CACHE_DIR/SOURCE-TOKENIZER-KEY belongs to a config: KEY is a hash of its options and of
the source files' names, sizes and times. So a second run finds the folder at once, and a changed
file leads to a new folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from gpt.config import DataConfig, MixedSource, SourceConfig
from gpt.data import tokenizer
from gpt.data.prepared import FORMAT, train_names
from gpt.data.sources import SOURCES
from gpt.data.sources.paths import SourceFiles
from gpt.errors import InputError


@dataclass(frozen=True)
class PlannedSource:
    """One source, the files that it reads, and the token file that its documents go to.

    Attributes:
        target: name of the token file, such as "train-0" or "val".
    """

    config: SourceConfig
    found: SourceFiles
    target: str

    @property
    def files(self) -> list[Path]:
        return self.found.files

    def at(self, revision: str | None) -> PlannedSource:
        """The same source, at one commit of its dataset on the hub."""
        hub = self.config.hub.model_copy(update={"revision": revision})
        return replace(self, config=self.config.model_copy(update={"hub": hub}))

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of each file, by which a change is noticed."""
        stats = [(path, path.stat()) for path in self.files]
        return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


def plan(config: DataConfig) -> tuple[Path, list[PlannedSource]]:
    """The folder that belongs to `config`, and the sources that are read to fill it.

    Raises:
        InputError: names the option of a source that has no files or whose path contains the cache.
    """
    options = [f"data.mix.{index}" for index in range(len(config.mix))] or ["data"]
    sources = [
        _planned(config, source, target, option)
        for source, target, option in zip(config.sources, train_names(config), options, strict=True)
    ]
    if config.validation is not None:
        sources.append(_planned(config, config.validation, "val", "data.validation"))
    name = "mix" if config.mix else config.source
    folder = f"{name}-{config.tokenizer}-{_key(config, sources)}"
    return Path(config.cache_dir) / folder, sources


def _planned(config: DataConfig, source: SourceConfig, target: str, option: str) -> PlannedSource:
    """The source that `option` describes, such as "data.validation"."""
    try:
        found = SOURCES[source.source].find(source)
    except InputError as error:
        raise InputError(f"{option}.{error}") from None
    cache = Path(os.path.realpath(config.cache_dir))  # unlike resolve(), accepts a loop of links
    for folder in (cache, *cache.parents):
        if folder.exists() and found.has_searched(folder):
            raise InputError(
                f"{option}.path: {', '.join(source.path)} contains data.cache_dir "
                f"({config.cache_dir}), where prepared data is written;\n"
                "choose a narrower path, or another data.cache_dir"
            )
    return PlannedSource(source, found, target)


# Options that cannot change the tokens: they decide which tokens a step sees, or where files are (a
# changed file is noticed by its stamp). All others, new ones included, are part of the key.
WITHOUT_EFFECT = {"weight", "windows", "seed", "path", "cache_dir"}
OF_SOURCES = set(MixedSource.model_fields)  # described for each source


def _key(config: DataConfig, sources: list[PlannedSource]) -> str:
    """A hash of everything that the token files depend on."""
    excluded = OF_SOURCES | WITHOUT_EFFECT | {"mix", "validation"}  # both are in `sources`
    options = config.model_dump(mode="json", exclude=excluded)
    if tokenizer.TOKENIZERS[config.tokenizer].trained_on != "sample":
        del options["vocab_size"], options["learn_bytes"]
    if config.validation is not None:
        del options["holdout"], options["val_fraction"]
    if config.vocabulary is not None:
        options["vocabulary"] = tokenizer.to_json(tokenizer.load(Path(config.vocabulary)))
    fields = OF_SOURCES - WITHOUT_EFFECT
    described = [
        [source.target, source.config.model_dump(mode="json", include=fields), source.stamps()]
        for source in sources
    ]
    text = json.dumps([FORMAT, options, described])
    return hashlib.sha256(text.encode()).hexdigest()[:12]

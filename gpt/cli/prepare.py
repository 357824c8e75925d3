"""`steadygpt prepare CONFIG.yaml`, also `python -m gpt.data`: prepare data without training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from gpt.cli.common import StopSignals
from gpt.cli.flags import parse
from gpt.cli.paths import explained
from gpt.config import Config, FileName, Section, load
from gpt.config.shipped import names
from gpt.io.console import Console, aligned, show

if TYPE_CHECKING:
    from gpt.data.prepared import Dataset


# The options that `--help` shows; `--help-all` shows all.
COMMON = (
    "data.source", "data.path", "data.text_field", "data.tokenizer", "data.vocab_size",
    "data.val_fraction", "data.cache_dir",
)  # fmt: skip


class Arguments(Section):
    """Prepare a config's data without training, and describe it.

    Examples:
      %(prog)s quickstart
      %(prog)s own-text --data.path my-texts --data.tokenizer gpt2
    """

    config: FileName = Field(
        title="CONFIG.yaml",
        description="A YAML file, or the name of a shipped config: " + ", ".join(names("config")),
    )


def main(argv: Sequence[str], prog: str = "python -m gpt.data") -> int:
    """`steadygpt prepare CONFIG.yaml ...`; returns the exit code."""
    arguments, options = parse(Arguments, prog, argv, Config, common=COMMON)
    with explained(arguments.config, prog, "config"):
        config = load(arguments.config, options)
    dataset = prepare(config)

    from gpt.run.cautions import cautions

    show(_describe(dataset))
    Console().warn(cautions(config, dataset))
    return 0


def prepare(config: Config) -> Dataset:
    """Prepare the data, unless that is already done."""
    from gpt.data import preparation

    with StopSignals() as stop, contextlib.closing(Console()) as console:
        return preparation.prepare(config.data, console, stop)


def _describe(dataset: Dataset) -> str:
    """What a prepared corpus contains, as a table."""
    rows = [["", "documents", "bytes", "tokens", "bytes/token", "longest document"]]
    for file in dataset.files:
        per_token = f"{file.bytes / (file.tokens - file.documents):.2f}"
        numbers = [f"{n:,}" for n in (file.documents, file.bytes, file.tokens)]
        rows.append([file.name, *numbers, per_token, f"{file.longest:,} tokens"])
    lines = [str(dataset.folder), *(f"  {line}" for line in aligned(rows))]
    val = dataset.files[-1]
    nats = dataset.unigram_entropy()
    bits = nats * val.tokens / math.log(2) / val.bytes
    encoding = dataset.encoding
    lines += [
        f"  vocabulary        {encoding.n_vocab:,} tokens ({encoding.name}), {dataset.val.dtype}",
        f"  unigram entropy   {nats:.4f} nats per token, {bits:.4f} bits per byte: the loss of "
        "guessing the",
        "                    whole validation text by the token frequencies of the training text",
        f"  fingerprint       {dataset.fingerprint}",
    ]
    return "\n".join(lines)

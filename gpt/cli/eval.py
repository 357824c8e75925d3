"""`steadygpt eval RUN_DIR ...`: how well trained models predict a text, with standard errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from gpt.cli import prepare
from gpt.cli.flags import parse
from gpt.cli.paths import find_checkpoint
from gpt.config import Config, Count, Device, FileName, FileNames, Section, SourceConfig, validate
from gpt.config.values import Choice
from gpt.errors import InputError
from gpt.io.console import Console, aligned, show, write_result

if TYPE_CHECKING:
    from gpt.data.token_files import Tokens
    from gpt.data.tokenizer import Encoding
    from gpt.evaluation import Estimate, Evaluation

PIECE = 2**16  # tokens of a prepared validation text that are read at a time
FEW = 10  # with fewer documents, a standard error is itself uncertain by a quarter or more
FEW_TOKENS = 30  # of fewer, the mean loss at a position is not shown
PRINT_EVERY = 10.0  # seconds between progress lines, where there is no terminal


# The options that `--help` shows; `--help-all` shows all.
COMMON = (
    "checkpoint", "stride", "device", "json_", "data.source", "data.path",
)  # fmt: skip


class Arguments(Section):
    """Measure how well runs predict a text: loss, perplexity and bits per byte.

    Examples:
      %(prog)s runs/quickstart
      %(prog)s runs/quickstart runs/other --data.path book.txt --stride 64
      %(prog)s runs/quickstart --checkpoint latest --json
    """

    runs: FileNames = Field(title="RUN_DIR ...")
    """Run directories, such as runs/quickstart, or checkpoints in them."""
    checkpoint: FileName = Field("best", title="best|latest|STEP")
    """best (by validation loss), latest, or a step such as 250."""
    stride: Count | None = None
    """Tokens between the starts of two windows, which score their last STRIDE tokens. A smaller
    stride gives each token more context, and takes longer (default: the whole context)."""
    device: Device = "auto"
    """auto picks cuda, then mps, then cpu."""
    json_: bool = False
    """Print the results as JSON."""


class Text(SourceConfig):
    """The text, encoded with each run's own tokenizer; by default, the run's validation text."""

    source: Annotated[str, Choice("gpt.data.sources", "SOURCES")] = "text"
    """Text, JSONL or Parquet files, Python's standard library, the hub, or token files."""


class _Options(Section):  # the options that are flags too
    data: Text


@dataclass(frozen=True)
class Result:
    """The evaluation of a run, and what was evaluated.

    Attributes:
        step: of the checkpoint.
        text: "validation", or the source that the flags name.
        text_sha256: of the documents, as UTF-8 with a byte 0xff after each; the same for all
            tokenizers.
        vocabulary_sha256: of tokenizer.json.
        training_loss: the validation loss that training logged at this step, if that was of the
            same text; nats per token.
    """

    run: str
    step: int
    text: str
    text_sha256: str
    tokenizer: str
    vocabulary: int
    vocabulary_sha256: str
    context: int
    stride: int
    training_loss: float | None
    evaluation: Evaluation


def main(argv: Sequence[str], prog: str = "steadygpt eval") -> int:
    """`steadygpt eval RUN_DIR ...`; returns the exit code."""
    arguments, text = load(argv, prog)
    results = evaluate(arguments, text, prog)
    if arguments.json_:
        write_result(_as_json(results))
    else:
        show(_describe(results))
    return 0


def load(argv: Sequence[str], prog: str = "steadygpt eval") -> tuple[Arguments, Text | None]:
    """Read the command line: the arguments, and the text if one is given.

    Raises:
        InputError: either is invalid.
    """
    arguments, options = parse(Arguments, prog, argv, _Options, common=COMMON)
    if not options:
        return arguments, None
    return arguments, validate(_Options, options, lambda key: f"--{key}").data


def evaluate(arguments: Arguments, text: Text | None, prog: str) -> list[Result]:
    """Evaluate every run, on `text` or on its own validation text."""
    from gpt.run.directory import RunDirectory

    given = arguments.checkpoint if "checkpoint" in arguments.model_fields_set else None
    chosen = [find_checkpoint(path, given, prog) for path in arguments.runs]
    configs = {run: RunDirectory(run).read_config() for run, _ in chosen}
    for run, config in configs.items():
        if arguments.stride is not None and arguments.stride > config.model.context:
            raise InputError(
                f"--stride: {arguments.stride} is more than the context of {run}, "
                f"{config.model.context} tokens"
            )
    return [_evaluate(arguments, *each, configs[each[0]], text, prog) for each in chosen]


def _evaluate(
    arguments: Arguments, path: Path, checkpoint: str, config: Config, text: Text | None, prog: str
) -> Result:
    from gpt import evaluation, metrics
    from gpt.data import tokenizer
    from gpt.hardware.device import autocast, flush_denormals, pick_device
    from gpt.hardware.memory import micro_batch
    from gpt.run.directory import RunDirectory
    from gpt.run.loading import load_run

    run, device = RunDirectory(path), pick_device(arguments.device)
    model, encoding, step = load_run(path, checkpoint, device)
    model.loss_chunk = config.training.loss_chunk
    context = config.model.context
    stride = arguments.stride or context
    training_loss, digest = None, hashlib.sha256()
    show(f"{prog}: {path}, step {step}", sys.stderr)
    with contextlib.closing(Console()) as console, flush_denormals():
        if text is None:
            tokens = _own_validation(run.read_environment(), path, config, console)
            lines = metrics.read_up_to(run.metrics, step)
            at_step = [r["val_loss"] for r in lines if r["step"] == step and "val_loss" in r]
            training_loss = at_step[-1] if at_step else None
        else:
            tokens = _given_text(text, encoding, console)
        with autocast(device, config.training.precision):
            result = evaluation.evaluate(
                model,
                _hashed(tokens, encoding, digest),
                byte_lengths=tokenizer.byte_lengths(encoding),
                stride=stride,
                batch=micro_batch(config, encoding.n_vocab, device),
            )
    return Result(
        run=str(path),
        step=step,
        text="validation" if text is None else " ".join([text.source, *text.path]),
        text_sha256=digest.hexdigest(),
        tokenizer=encoding.name,
        vocabulary=encoding.n_vocab,
        vocabulary_sha256=hashlib.sha256(tokenizer.to_json(encoding).encode()).hexdigest(),
        context=context,
        stride=stride,
        training_loss=training_loss,
        evaluation=result,
    )


def _own_validation(
    environment: dict[str, Any], path: Path, config: Config, console: Console
) -> Iterator[Tokens]:
    """The validation tokens of a run, in pieces.

    Raises:
        InputError: the text is missing, or is not the one on which the run was trained.
    """
    try:
        dataset = prepare.prepare(config)
    except InputError as error:
        raise InputError(
            f"{path}: its text cannot be read: {error}\nto evaluate another text, name it: "
            "--data.path FILE"
        ) from None
    if dataset.fingerprint != environment.get("data_fingerprint"):
        raise InputError(
            f"{path}: the text has changed since the run was trained on it; to evaluate it as it "
            "is now, name it: --data.path FILE"
        )

    def pieces() -> Iterator[Tokens]:
        console.start(dataset.val.nbytes, what="evaluating", unit="B", every=PRINT_EVERY)
        for start in range(0, len(dataset.val), PIECE):
            yield dataset.val[start : start + PIECE]
            console.progress(min(start + PIECE, len(dataset.val)) * dataset.val.itemsize)

    return pieces()


def _hashed(
    tokens: Iterable[Tokens], encoding: Encoding, digest: hashlib._Hash
) -> Iterator[Tokens]:
    """The same tokens; their text is added to the digest, with a byte 0xff for end of text."""
    texts = [*encoding.tokens, b"\xff"]  # which UTF-8 never contains
    for piece in tokens:
        digest.update(b"".join(map(texts.__getitem__, piece.tolist())))
        yield piece


def _given_text(text: Text, encoding: Encoding, console: Console) -> Iterator[Tokens]:
    """The tokens of the text that the flags name, in pieces.

    Raises:
        InputError: it cannot be read, or has a character that the tokenizer lacks.
    """
    from gpt.data.encode import encode_text
    from gpt.data.sources import SOURCES

    try:
        found = SOURCES[text.source].find(text)
    except InputError as error:
        raise InputError(f"--data.{error}") from None
    if left_out := found.describe_left_out():
        console.say(f"left out: {left_out}")
    total = sum(file.stat().st_size for file in found.files) or None
    console.start(total, what="evaluating", unit="B", every=PRINT_EVERY)
    read = skipped = 0

    def on_read(count: int) -> None:
        nonlocal read
        read += count
        console.progress(read)

    def on_skip(origin: str) -> None:
        nonlocal skipped
        skipped += 1

    origin = f"--data.path {' '.join(text.path)}" if text.path else f"--data.source {text.source}"
    yield from encode_text(text, found.files, encoding, origin, on_read, on_skip)
    if skipped:
        console.say(f"skipped {skipped:,} record{'s' if skipped > 1 else ''} without text")


# ---------------------------------------------------------------------------------------------
# What is printed


def _as_json(results: Sequence[Result]) -> str:
    runs = [asdict(result) for result in results]
    runs = [{**run, **run.pop("evaluation")} for run in runs]
    return json.dumps({"runs": runs, "notes": _notes(results)}, indent=2, allow_nan=False) + "\n"


def _describe(results: Sequence[Result]) -> str:
    """A table of the runs, one of their losses by position, and what one has to know about them."""
    of_text = ("context", "stride", "tokens", "documents")
    rows = [["run", "step", "loss", "perplexity", "bits per byte", *of_text]]
    for each in results:
        found = each.evaluation
        estimates = (found.loss, found.perplexity, found.bits_per_byte)
        counts = (each.context, each.stride, found.tokens, found.documents)
        numbers = [*map(_with_error, estimates), *(f"{count:,}" for count in counts)]
        rows.append([each.run, f"{each.step:,}", *numbers])
    longest = max((each.evaluation.by_position for each in results), key=len)
    ranges = [f"{p.first}" if p.first == p.last else f"{p.first}-{p.last}" for p in longest]
    positions = [["loss by tokens of context", *ranges]]
    for label, each in zip(_labels(results), results, strict=True):
        losses = [
            "-" if p.loss is None or p.tokens < FEW_TOKENS else f"{p.loss:.3f}"
            for p in each.evaluation.by_position
        ]
        positions.append([label, *losses, *[""] * (len(longest) - len(losses))])
    notes = [line for note in _notes(results) for line in _wrapped(f"note: {note}")]
    shown = any(cell not in ("-", "") for row in positions[1:] for cell in row[1:])
    numbers = min(aligned(rows), aligned(list(zip(*rows, strict=True))), key=_excess)
    tables = [numbers, aligned(positions) if shown else [], notes]
    return "\n\n".join("\n".join(lines) for lines in tables if lines)


def _excess(table: Sequence[str]) -> int:
    """By how many columns a table is wider than a terminal."""
    return max(0, max(map(len, table)) - 80)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False)


def _with_error(estimate: Estimate) -> str:
    """Such as `1.8704 ± 0.0123`: the error has two digits, and the value as many decimals."""
    if estimate.value is None:
        return "-"
    if not estimate.error:
        return f"{estimate.value:.4f}"
    decimals = max(0, 1 - _exponent(estimate.error))
    return f"{estimate.value:.{decimals}f} ± {estimate.error:.{decimals}f}"


def _exponent(value: float) -> int:
    """The decimal exponent of a positive number as it is written with two digits."""
    return int(f"{value:.1e}".partition("e")[2])


def _labels(results: Sequence[Result]) -> list[str]:
    """The run of each result, with its step if there are several of that run."""
    runs = [result.run for result in results]
    return [
        f"{result.run} step {result.step}" if runs.count(result.run) > 1 else result.run
        for result in results
    ]


def _notes(results: Sequence[Result]) -> list[str]:
    """What one has to know in order to read the numbers of these runs."""
    notes: list[str] = []
    if len({result.text_sha256 for result in results}) > 1:
        notes.append(
            "the runs were evaluated on different texts; --data.path FILE evaluates all on one text"
        )
    if len({result.vocabulary_sha256 for result in results}) > 1:
        notes.append(
            "losses per token and perplexities of different vocabularies are not comparable; bits "
            "per byte are"
        )
    labels = _labels(results)
    of_errors: dict[str, list[str]] = {}  # note -> the runs that it is about
    for label, result in zip(labels, results, strict=True):
        of_errors.setdefault(_note_on_errors(result), []).append(label)
    for note, about in of_errors.items():
        if note:
            notes.append(note if len(about) == len(results) else f"{', '.join(about)}: {note}")
    logged = [
        f"{result.training_loss:.4f} for {label}"
        for label, result in zip(labels, results, strict=True)
        if _differs_from_training(result)
    ]
    if logged:
        notes.append(
            f"training logged {', '.join(logged)}; it measures whole windows side by side, at most "
            "evaluation.sequences of them"
        )
    return notes


def _note_on_errors(result: Result) -> str:
    """What the standard errors of a run rest on; empty if on enough documents."""
    found = result.evaluation
    if found.units is None:
        return "the text is one short document, so there are no standard errors"
    if found.units == "blocks":
        return (
            f"the text is one document; the standard errors come from {found.unit_count} "
            "contiguous blocks, and say nothing about other documents"
        )
    if found.effective_units >= FEW:
        return ""
    unequal = f" of {found.unit_count:,} very unequal" if found.unit_count >= FEW else ""
    number = f"effectively {found.effective_units:.1f}" if unequal else f"{found.unit_count}"
    return f"the standard errors are rough, as they rest on {number}{unequal} documents"


def _differs_from_training(result: Result) -> bool:
    """Whether training logged another loss at this step, as it is printed."""
    logged, loss = result.training_loss, result.evaluation.loss.value
    return logged is not None and loss is not None and f"{logged:.4f}" != f"{loss:.4f}"

"""`sample.py RUN_DIR`: generate text."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from pydantic import Field

from gpt.cli.flags import parse
from gpt.cli.paths import find_checkpoint
from gpt.config import Device, FileName, Generation, SampleCount, Weights
from gpt.errors import InputError
from gpt.hardware.size import check_sampling
from gpt.io.console import show, write_result
from gpt.io.files import open_regular
from gpt.io.text import decoded, decompressed

if TYPE_CHECKING:
    from gpt.data.tokenizer import Encoding

MAX_PROMPT = 2**26  # bytes


# The options that `--help` shows; `--help-all` shows all.
COMMON = (
    "prompt", "prompt_file", "num_samples", "max_new_tokens", "temperature", "top_k",
    "seed", "checkpoint", "device",
)  # fmt: skip


class Arguments(Generation):
    """Generate text from a run directory; it goes to stdout as it is generated.

    Examples:
      %(prog)s runs/quickstart
      %(prog)s runs/quickstart --prompt 'def main(' --num-samples 3
      %(prog)s runs/quickstart --checkpoint latest --prompt-file start.txt
    """

    run_dir: FileName = Field(title="RUN_DIR")
    """A run directory, such as runs/quickstart, or one of its checkpoints."""
    prompt: str | None = None
    """Text to continue. Unset: --prompt-file or stdin if piped, else a new document."""
    prompt_file: FileName | None = Field(None, title="FILE")
    """A UTF-8 file with the text to continue."""
    num_samples: SampleCount = 1
    """Number of texts, generated in one batch."""
    checkpoint: FileName = Field("best", title="best|latest|STEP")
    """best (by validation loss), latest, a step such as 250, or the path of a checkpoint."""
    device: Device = "auto"
    """auto picks cuda, then mps, then cpu."""
    weights: Weights = "fp32"
    """fp32 is exact; bf16 (on a GPU) and int8 (on a CPU, for few samples) round but are faster."""
    compile: bool = False
    """Compile the decoding steps on a GPU: takes up to a minute, pays off for long texts."""


def main(argv: Sequence[str], prog: str = "sample.py") -> int:
    """`sample.py RUN_DIR ...`; returns the exit code."""
    arguments, prompt = load(argv, prog)
    pieces = sample(arguments, prompt, prog)
    return write(pieces)


def load(argv: Sequence[str], prog: str = "sample.py") -> tuple[Arguments, str]:
    """Read the command line and the prompt: from its flag, a file or a pipe, else empty.

    Raises:
        InputError: either is invalid.
    """
    arguments, _ = parse(Arguments, prog, argv, common=COMMON)
    return arguments, _read_prompt(arguments, prog)


def _read_prompt(arguments: Arguments, prog: str) -> str:
    if arguments.prompt is not None:
        if arguments.prompt_file is not None:
            raise InputError("give --prompt or --prompt-file, not both")
        return arguments.prompt.removeprefix("\ufeff")  # a byte-order mark, from "$(cat FILE)"
    if arguments.prompt_file is not None:
        origin = f"--prompt-file {arguments.prompt_file}"
    elif _is_piped(sys.stdin):
        origin = "stdin"
        print(f"{prog}: reading the prompt from stdin", file=sys.stderr)
    else:
        return ""
    try:
        with _open_prompt(arguments.prompt_file) as file:
            raw = file.read(MAX_PROMPT + 1)
        size, chunks = 0, []
        for chunk in decompressed(io.BytesIO(raw), origin):
            size += len(chunk)
            if size > MAX_PROMPT:
                raise InputError(f"{origin}: is longer than {MAX_PROMPT:,} bytes")
            chunks.append(chunk)
        return "".join(decoded(chunks, origin))
    except OSError as error:
        raise InputError(f"{origin}: {error.strerror}") from None


def _open_prompt(path: str | None) -> contextlib.AbstractContextManager[BinaryIO]:
    """Open the prompt's file, or stdin; a named pipe only if it is the shell's `<(command)`."""
    if path is None:
        return contextlib.nullcontext(sys.stdin.buffer)
    if path.startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")):
        return open(path, "rb")
    return open_regular(Path(path))


def _is_piped(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe or a file, rather than a terminal or closed."""
    try:
        mode = os.fstat(stream.fileno()).st_mode if stream is not None else 0
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def sample(arguments: Arguments, prompt: str, prog: str = "sample.py") -> Iterator[str]:
    """Load the model and generate; returns the text in pieces, as `_to_text` yields them."""
    given = arguments.checkpoint if "checkpoint" in arguments.model_fields_set else None
    run, checkpoint = find_checkpoint(arguments.run_dir, given, prog)

    from gpt.data.tokenizer import encode
    from gpt.generation import Decoder, generate_tokens
    from gpt.hardware.device import pick_device
    from gpt.hardware.memory import total_memory
    from gpt.inference import optimize_for_inference
    from gpt.run.loading import load_run

    device = pick_device(arguments.device)
    if arguments.compile and device.type != "cuda":
        raise InputError(f"--compile: needs a CUDA GPU, and the device is {device.type}")
    model, encoding, step = load_run(run, checkpoint, device)
    tokens = encode(encoding, prompt, "the prompt") or [encoding.eot_token]
    length = len(tokens) + arguments.max_new_tokens
    context = model.config.context
    show(f"{prog}: {run}, step {step}", sys.stderr)
    if length > context:
        print(
            f"{prog}: the text exceeds the context of {context} tokens: the model sees a window "
            f"that moves by {context - context // 2} tokens whenever it is full",
            file=sys.stderr,
        )
    count = arguments.num_samples
    optimize_for_inference(model, arguments.weights, count)
    check_sampling(
        model.config,
        encoding.n_vocab,
        samples=count,
        tokens=length,
        size=model.token_embedding.weight.element_size(),
        memory=total_memory(device),
    )
    rows = generate_tokens(
        model,
        tokens,
        samples=count,
        tokens=arguments.max_new_tokens,
        sampling=arguments,
        seed=arguments.seed,
        stop=encoding.eot_token,
        decoder=Decoder(model, count, size=length, compiled=arguments.compile),
    )
    return _to_text(rows, encoding, prompt, count)


def _to_text(
    rows: Iterable[Sequence[int]], encoding: Encoding, prompt: str, count: int
) -> Iterator[str]:
    """Yield the first text as it is generated, and the others when all are done.

    Args:
        rows: the next token of each of the `count` texts.
    """
    from gpt.generation import TextDecoder

    decoders = [TextDecoder(encoding) for _ in range(count)]
    texts = [prompt] * count
    yield prompt
    for row in rows:
        for index, token in enumerate(row):
            piece = decoders[index].feed(token) if token != encoding.eot_token else ""
            texts[index] += piece
            if index == 0:
                yield piece
    yield decoders[0].close()
    for text, decoder in zip(texts[1:], decoders[1:], strict=True):
        yield f"\n{'-' * 60}\n{text}{decoder.close()}"
    yield "\n"


def write(pieces: Iterator[str]) -> int:
    """Write text to stdout piece by piece, and return the exit code."""
    for piece in pieces:
        write_result(piece)
    return 0

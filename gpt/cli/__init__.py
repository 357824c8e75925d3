"""The command line: `train.py`, `sample.py`, `compare.py`, `python -m gpt.data`, `gpt.diagnostics`.

`steadygpt train`, `sample`, `compare`, `prepare` and `diagnose` are the same doors.

Progress goes to stderr, results to stdout. torch is imported only once there is something to run,
so that `--help` and a complaint about the input come at once.

Exit codes: 0 finished, 1 a fault of the program (traceback), 2 wrong input, 3 diverged,
75 interrupted and saved; 130 for Ctrl-C where there is nothing to save.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import shlex
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TextIO

from tyro.conf import Positional, arg

from gpt.cli.flags import as_flag, parse
from gpt.config import (
    Config,
    Count,
    Device,
    FileName,
    Samples,
    Sampling,
    Seconds,
    Section,
    Seed,
    Weights,
    Workers,
    expand_user,
    load,
    validate,
)
from gpt.errors import InputError, StoppedError, nearest, told
from gpt.hardware.size import check_cpu_training, check_sampling
from gpt.io.console import set_encoding, show, write_result
from gpt.io.files import open_regular, read_small
from gpt.io.text import decoded, unpacked
from gpt.io.wait import leave

if TYPE_CHECKING:
    from gpt.compare.grid import Cell, Grid
    from gpt.data.prepared import Dataset
    from gpt.run.directory import RunResult

EXIT_CODES = {"finished": 0, "diverged": 3, "interrupted": 75}
LONGEST_PROMPT = 2**26  # bytes
_RUNS = "(default: runs/NAME)"
MaxSeconds = Annotated[
    str,
    arg(
        metavar="SECONDS",
        help="save and end with exit code 75 after that long, for batch queues",
        help_behavior_hint="(default: no limit)",
    ),
]


def main() -> int:
    """`steadygpt COMMAND ...`."""
    commands = {
        "train": train,
        "sample": sample,
        "compare": compare,
        "prepare": prepare,
        "checkpoint": checkpoint,
        "diagnose": diagnose,
    }
    set_encoding()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in commands:
        return commands[name](sys.argv[2:], prog=f"steadygpt {name}")
    usage = (
        "usage: steadygpt train CONFIG.yaml ... | sample RUN_DIR ... | compare GRID.yaml ... | "
        "prepare CONFIG.yaml ... | checkpoint verify DIR | diagnose RUN_DIR   (--help for each)"
    )
    if name in ("-h", "--help"):
        show(usage)
        return 0
    show(f"steadygpt: {name}: no such command{nearest(name, commands)}\n{usage}", sys.stderr)
    return 2


# What the machine, not the program, is to blame for: rights, space, names.
_ENVIRONMENT = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO"),
        *("ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP"),
    )
    if hasattr(errno, name)
}


@contextlib.contextmanager
def _door(prog: str) -> Iterator[None]:
    """Wrong input ends the program with its message and exit code 2."""
    set_encoding()
    try:
        with _handled({signal.SIGINT: lambda number, frame: os._exit(130)}):  # nothing is to save
            yield
    except InputError as error:
        show("\n".join(f"{prog}: {line}" for line in told(error)), sys.stderr)
        raise SystemExit(2) from None
    except StoppedError as stopped:
        show(f"{prog}: {stopped}", sys.stderr)
        leave(75)
    except KeyboardInterrupt:  # while starting up, or sampling: there is nothing to save
        leave(130)
    except BrokenPipeError:  # the reader of stdout, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        show(f"{prog}: {error.filename or 'writing'}: {error.strerror}", sys.stderr)
        raise SystemExit(2) from None


def _path(argument: str, flag: str) -> Path:
    """A path of the command line."""
    if not argument:
        raise InputError(f"{flag}: is empty, and must name a file or folder")
    return Path(expand_user(argument))


@contextlib.contextmanager
def _handled(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Signal handlers for the time being; only the main thread can have any.

    KeyboardInterrupt, the default for Ctrl-C, is lost or turned into another error if it comes
    while torch is imported.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------
# train


@dataclass(kw_only=True)
class TrainFlags:
    """Train a GPT from a YAML config. Every option of the config is a flag too."""

    config: Annotated[Positional[str], arg(metavar="CONFIG.yaml", help="the YAML file")]
    out_dir: Annotated[
        str | None, arg(metavar="DIR", help="the run directory", help_behavior_hint=_RUNS)
    ] = None
    resume: Annotated[
        str,
        arg(
            metavar="auto|never|CHECKPOINT",
            help="auto goes on with an unfinished run in the directory; never wants a fresh "
            "directory; a checkpoint folder starts a fresh one from there",
        ),
    ] = "auto"
    dry_run: Annotated[bool, arg(help="say what would be trained, and write nothing")] = False
    print_config: Annotated[bool, arg(help="print the resolved config as YAML")] = False
    max_seconds: MaxSeconds = ""


def train(argv: list[str] | None = None, prog: str = "train.py") -> int:
    """`train.py CONFIG.yaml ...`; returns the exit code."""
    with _door(prog):
        flags, options = parse(TrainFlags, Config, prog, argv)
        config = load(_path(flags.config, "CONFIG.yaml"), options)
        if flags.print_config:
            write_result(config.to_yaml())
            return 0
        check_cpu_training(config)
        out_dir = Path("runs") / config.name
        if flags.out_dir is not None:
            out_dir = _path(flags.out_dir, "--out-dir")
        resume = expand_user(flags.resume)
        if flags.dry_run:
            show(_dry_run(config, out_dir, resume))
            return 0
        import torch

        from gpt.training import train as run

        torch.set_flush_denormal(True)  # before torch starts its other threads, which inherit it
        with StopSignals(flags.max_seconds) as stop:
            result = run(config, out_dir, resume=resume, stop=stop)
        show(_report(result, prog))
    return EXIT_CODES[result.status]


def _dry_run(config: Config, out_dir: Path, resume: str) -> str:
    import torch

    from gpt.data import preparation
    from gpt.data.sequences import TrainingSequences, ValidationSequences
    from gpt.model import GPT
    from gpt.run import plan
    from gpt.run.directory import open_run

    opened = open_run(config, out_dir, resume)
    if opened.result is not None:
        return f"{out_dir}: {opened.result.status}, nothing is left to do: {opened.result.reason}"
    device = plan.pick_device(config.training.device)
    train_tokens = None
    if preparation.find(config.data) is not None:
        dataset = preparation.prepare(config.data)
        train_tokens, vocab_size = dataset.train_tokens, dataset.encoding.n_vocab
        TrainingSequences(dataset.train, config.model.context, config.data_seed)
        ValidationSequences(dataset.val, config.model.context, config.evaluation.sequences)
    else:
        vocab_size = preparation.vocab_size(config.data)
    plan.check_fits(config, device, vocab_size)
    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
    described = plan.describe(
        config,
        model,
        device=device,
        micro_batch=plan.micro_batch(config, vocab_size, device),
        train_tokens=train_tokens,
        directory=out_dir,
        done=opened.checkpoint.step if opened.checkpoint else 0,
    )
    return "\n".join([*opened.describe_changes(config), described])


def _report(result: RunResult, prog: str) -> str:
    lines = [f"{result.status}: {result.reason}"]
    if result.status == "finished":
        lines.append(
            f"  validation loss  {result.val_loss:.4f} nats per token, "
            f"{result.val_bits_per_byte:.4f} bits per byte (lowest {result.best_val_loss:.4f} nats)"
        )
    if (result.directory / "loss.png").is_file():
        lines.append(f"  picture          {result.directory / 'loss.png'}")
    samples = sorted((result.directory / "samples").glob("step-*.txt"))
    if samples:
        lines.append(f"  sample           {samples[-1]}:")
        text = read_small(samples[-1]).decode("utf-8", "replace").removesuffix("\n")
        lines += ["  | " + line for line in text.split("\n")]
    saved = (result.directory / "checkpoints" / "latest").is_file()
    if result.status == "diverged" and saved:
        lines.append("  The last good checkpoint is kept.")
    if result.failure is not None:
        lines.append(
            "  To try next, one at a time, in place of what was given, in another --out-dir:"
        )
        lines += [f"    {tip}" for tip in result.failure.advice]
    if result.status == "interrupted":
        lines.append("  Start it again with --resume auto to go on.")
    elif saved:
        door = [_python(), "sample.py"] if prog == "train.py" else ["steadygpt", "sample"]
        command = shlex.join([*door, str(result.directory), "--num-samples", "3"])
        lines.append(f"  more samples     {command}")
    return "\n".join(lines)


def _python() -> str:
    """The interpreter as a user here would type it."""
    here, python = Path.cwd(), Path(sys.executable)
    return str(python.relative_to(here)) if python.is_relative_to(here) else "python"


class StopSignals:
    """Ctrl-C, SIGTERM and time as a request to end in good order; calling it says if one came.

    A second signal meets the default action and ends the process at once.

    Args:
        max_seconds: from now, as given on the command line; empty is no limit.

    Raises:
        InputError: `max_seconds` is no time.
    """

    def __init__(self, max_seconds: str = "") -> None:
        seconds = Seconds.read(max_seconds, "--max-seconds") if max_seconds else math.inf
        self._asked = False
        self._end, self._seconds = time.monotonic() + seconds, seconds
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        if not self._asked and time.monotonic() > self._end:
            self._asked = True
            print(f"\n{self._seconds:g} s are over: stopping", file=sys.stderr)
        return self._asked

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping; a second signal ends at once\n".encode())


# ---------------------------------------------------------------------------------------------
# prepare


@dataclass(kw_only=True)
class PrepareFlags:
    """Prepare a config's data without training, and say what was found."""

    config: Annotated[Positional[str], arg(metavar="CONFIG.yaml", help="the YAML file")]


def prepare(argv: list[str] | None = None, prog: str = "prepare") -> int:
    """`steadygpt prepare CONFIG.yaml ...`; returns the exit code."""
    with _door(prog):
        flags, options = parse(PrepareFlags, Config, prog, argv)
        config = load(_path(flags.config, "CONFIG.yaml"), options)
        from gpt.data.preparation import prepare as run
        from gpt.io.console import Console

        with StopSignals() as stop, contextlib.closing(Console()) as console:
            dataset = run(config.data, console, stop)
        show(_found(dataset))
    return 0


def _found(dataset: Dataset) -> str:
    """What a prepared corpus holds, as a table."""
    rows = [["", "documents", "bytes", "tokens", "bytes/token", "longest document"]]
    for file in dataset.files:
        per_token = f"{file.bytes / (file.tokens - file.documents):.2f}"
        numbers = [f"{n:,}" for n in (file.documents, file.bytes, file.tokens)]
        rows.append([file.name, *numbers, per_token, f"{file.longest:,} tokens"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [str(dataset.folder)]
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"  {name.ljust(widths[0])}  {'  '.join(cells)}")
    val = dataset.files[-1]
    nats = dataset.unigram_entropy()
    bits = nats * val.tokens / math.log(2) / val.bytes
    encoding = dataset.encoding
    lines += [
        f"  vocabulary        {encoding.n_vocab:,} tokens ({encoding.name}), {dataset.val.dtype}",
        f"  unigram entropy   {nats:.4f} nats per token, {bits:.4f} bits per byte: the validation "
        "loss of guessing",
        "                    by the tokens' frequencies in the training text (H\u2081)",
        f"  fingerprint       {dataset.fingerprint}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# sample


class SampleOptions(Sampling):
    """Generate text from a run directory."""

    prompt: str | None = None
    """Text to continue; without it, --prompt-file or what is piped in, else a new document."""
    prompt_file: FileName | None = None
    """A UTF-8 file whose text is continued."""
    num_samples: Samples = 1
    """Texts to write, made side by side in one batch."""
    max_new_tokens: Count = 200
    """Tokens to add to the prompt, unless end of text comes first."""
    seed: Seed = 0
    """Seed of the draws; sample i is the same whatever the number of samples."""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a step."""
    device: Device = "auto"
    """auto takes cuda, then mps, then cpu."""
    weights: Weights = "fp32"
    """fp32 is exact; bf16 is for a GPU, int8 for a few samples on a CPU: rounded, but faster."""
    compile: bool = False
    """Compile the steps on a GPU: up to a minute at first, which pays for long texts."""


@dataclass(kw_only=True)
class SampleFlags:
    """Generate text from a run directory; it goes to stdout as it is made."""

    run_dir: Annotated[
        Positional[str], arg(metavar="RUN_DIR", help="a run directory, such as runs/quickstart")
    ]


def sample(argv: list[str] | None = None, prog: str = "sample.py") -> int:
    """`sample.py RUN_DIR ...`; returns the exit code."""
    with _door(prog):
        flags, given = parse(SampleFlags, SampleOptions, prog, argv)
        options = validate(SampleOptions, given, origin=as_flag)
        if options.prompt is not None and options.prompt_file is not None:
            raise InputError("give --prompt or --prompt-file, not both")
        _sample(_path(flags.run_dir, "RUN_DIR"), _prompt(options, prog), options, prog)
    return 0


def _prompt(options: SampleOptions, prog: str) -> str:
    """The text to continue: from the flag, the file, or what is piped in; else empty."""
    if options.prompt is not None:
        return options.prompt.removeprefix("\ufeff")  # of a file, by "$(cat FILE)"
    if options.prompt_file is not None:
        origin = f"--prompt-file {options.prompt_file}"
    elif _is_piped(sys.stdin):
        origin = "stdin"
        print(f"{prog}: reading the prompt from stdin", file=sys.stderr)
    else:
        return ""
    try:
        path = options.prompt_file
        with contextlib.nullcontext(sys.stdin.buffer) if path is None else _opened(path) as file:
            raw = file.read(LONGEST_PROMPT + 1)
        size, chunks = 0, []
        for chunk in unpacked(io.BytesIO(raw), origin):
            size += len(chunk)
            if size > LONGEST_PROMPT:
                raise InputError(f"{origin}: is longer than {LONGEST_PROMPT:,} bytes")
            chunks.append(chunk)
        return "".join(decoded(chunks, origin))
    except OSError as error:
        raise InputError(f"{origin}: {error.strerror}") from None


def _opened(prompt_file: str) -> BinaryIO:
    """The prompt's file; a pipe only if the shell opened it, as `<(command)` does."""
    if prompt_file.startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")):
        return open(prompt_file, "rb")
    return open_regular(Path(prompt_file))


def _is_piped(stream: TextIO | None) -> bool:
    """Whether `stream` is a pipe or a file, as against a terminal, or nothing at all."""
    try:
        mode = os.fstat(stream.fileno()).st_mode if stream is not None else 0
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _sample(run_dir: Path, prompt: str, options: SampleOptions, prog: str) -> None:
    from gpt.data.tokenizer import encode
    from gpt.generate import Decoder, TextDecoder, generate
    from gpt.run.directory import load_run
    from gpt.run.plan import pick_device, total_memory
    from gpt.weights import prepare

    device = pick_device(options.device)
    if options.compile and device.type != "cuda":
        raise InputError(f"--compile: is for a GPU, and the device is {device.type}")
    model, encoding, step = load_run(run_dir, options.checkpoint, device)
    tokens = encode(encoding, prompt, "the prompt") or [encoding.eot_token]
    context = model.config.context
    show(f"{prog}: {run_dir}, step {step}", sys.stderr)
    if len(tokens) + options.max_new_tokens > context:
        print(
            f"{prog}: longer than the model's context of {context} tokens: the text is seen "
            f"through a window that slides on by {context - context // 2} tokens when it is full",
            file=sys.stderr,
        )
    count = options.num_samples
    prepare(model, options.weights, count)
    check_sampling(
        model.config,
        encoding.n_vocab,
        samples=count,
        tokens=len(tokens) + options.max_new_tokens,
        size=model.token_embedding.weight.element_size(),
        memory=total_memory(device),
    )
    decoders = [TextDecoder(encoding) for _ in range(count)]
    texts = [prompt] * count
    steps = generate(
        model,
        tokens,
        samples=count,
        tokens=options.max_new_tokens,
        sampling=options,
        seed=options.seed,
        stop=encoding.eot_token,
        decoder=Decoder(
            model, count, size=len(tokens) + options.max_new_tokens, compiled=options.compile
        ),
    )
    shown = 0  # characters of the first text; it streams, the others follow when all are done

    def stream() -> None:
        nonlocal shown
        write_result(texts[0][shown:])
        shown = len(texts[0])

    stream()
    for row in steps:
        for index, token in enumerate(row):
            if token != encoding.eot_token:
                texts[index] += decoders[index].feed(token)
        stream()
    texts = [text + decoder.close() for text, decoder in zip(texts, decoders, strict=True)]
    stream()
    for text in texts[1:]:
        write_result(f"\n{'-' * 60}\n{text}")
    write_result("\n")


# ---------------------------------------------------------------------------------------------
# compare


@dataclass(kw_only=True)
class CompareFlags:
    """Compare arms over rates, places and seeds. Every option of the cells is a flag too."""

    grid: Annotated[
        Positional[str],
        arg(metavar="GRID.yaml", help="the grid file, or the directory of a comparison"),
    ]
    out_dir: Annotated[
        str | None,
        arg(metavar="DIR", help="the comparison directory", help_behavior_hint=_RUNS),
    ] = None
    workers: Annotated[
        str,
        arg(
            metavar="INT",
            help="processes; on a CPU each has one thread",
            help_behavior_hint="(default: one for each core, on a GPU at most 8)",
        ),
    ] = ""
    runner: Annotated[
        Literal["auto", "processes", "batched"] | None,
        arg(
            help="batched: all cells of one shape as one; processes: one each",
            help_behavior_hint="(default: the grid's; auto is batched on a GPU)",
        ),
    ] = None
    dry_run: Annotated[
        bool, arg(help="list the cells, their tokens, FLOPs and time, and write nothing")
    ] = False
    report_only: Annotated[bool, arg(help="write the report again from what was run")] = False
    beside: Annotated[
        str | None,
        arg(
            metavar="DIR",
            help="show another comparison next to this one in the report",
            help_behavior_hint="(default: none)",
        ),
    ] = None
    max_seconds: MaxSeconds = ""


def compare(argv: list[str] | None = None, prog: str = "compare.py") -> int:
    """`compare.py GRID.yaml ...`; returns the exit code."""
    with _door(prog):
        flags, options = parse(CompareFlags, Config, prog, argv)
        if flags.dry_run and flags.report_only:
            raise InputError("give --dry-run or --report-only, not both")
        path = _path(flags.grid, "GRID.yaml")
        directory = Path("runs") / path.stem
        if flags.out_dir is not None:
            directory = _path(flags.out_dir, "--out-dir")
        if path.is_dir():
            if flags.out_dir is not None:
                raise InputError(f"--out-dir: {path} is a comparison directory already")
            path, directory = path / "grid.yaml", path
            if not path.is_file():
                raise InputError(f"{directory}: holds no comparison (no grid.yaml)")
        from gpt.compare import grid as grids

        grid, cells = grids.load(path, options)
        if flags.runner is not None:
            grid = grid.model_copy(update={"runner": flags.runner})
        if not flags.report_only:
            grids.check_sizes(cells)
        return _compare(grid, cells, directory, flags)


def _compare(grid: Grid, cells: list[Cell], directory: Path, flags: CompareFlags) -> int:
    workers = int(Workers.read(flags.workers, "--workers")) if flags.workers else 0
    from gpt.compare import comparison
    from gpt.compare.tasks import default_workers
    from gpt.io.console import Console

    beside = _path(flags.beside, "--beside") if flags.beside is not None else None
    if beside is not None:
        comparison.read_comparison(beside)  # now or never
    if flags.report_only:
        comparison.check_directory(grid, directory)
        summary = comparison.report(grid, cells, directory, beside)
    else:
        workers = workers or default_workers(cells)
        if flags.dry_run:
            show(comparison.dry_run(grid, cells, directory, workers))
            return 0
        with StopSignals(flags.max_seconds) as stop, contextlib.closing(Console()) as console:
            done = comparison.compare(
                grid, cells, directory, workers=workers, console=console, stop=stop, beside=beside
            )
        if done is None:
            print("interrupted: cells are saved; the same command goes on", file=sys.stderr)
            return EXIT_CODES["interrupted"]
        summary = done
    show(comparison.format_summary(summary, directory))
    return 1 if "error" in summary.lost.values() else 0


# ---------------------------------------------------------------------------------------------
# checkpoint


@dataclass(kw_only=True)
class CheckpointFlags:
    """Hold checkpoints against their manifests: is every file what was written?"""

    command: Annotated[Positional[Literal["verify"]], arg(metavar="verify", help="the only one")]
    directory: Annotated[
        Positional[str],
        arg(metavar="DIR", help="a run directory, its checkpoints/, or one of them"),
    ]


def checkpoint(argv: list[str] | None = None, prog: str = "gpt.checkpoint") -> int:
    """`python -m gpt.checkpoint verify DIR`; exit code 2 if one of them is damaged."""
    with _door(prog):
        flags, _ = parse(CheckpointFlags, Section, prog, argv)
        from gpt import checkpoint as checkpoints

        given = _path(flags.directory, "DIR")
        folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
        found = list(checkpoints.steps(folder).values())
        if checkpoints.STEP_NAME.fullmatch(given.absolute().name):
            found = [given]
        if not found:
            raise InputError(f"{given}: holds no checkpoint")
        damaged = 0
        for path in found:
            try:
                checkpoints.load(path)
                show(f"{path}: whole")
            except checkpoints.PrunedError as gone:  # by the run, which is still going
                show(str(gone))
            except InputError as error:
                damaged += 1
                show("\n".join(told(error)))
        if damaged:
            raise InputError(f"{given}: {damaged} of {len(found)} checkpoints damaged")
    return 0


# ---------------------------------------------------------------------------------------------
# diagnose


@dataclass(kw_only=True)
class DiagnoseFlags:
    """Draw what a run's layers did: pictures of the measures that diagnostics.every wrote."""

    run_dir: Annotated[
        Positional[str], arg(metavar="RUN_DIR", help="a run directory, such as runs/pre-norm")
    ]


def diagnose(argv: list[str] | None = None, prog: str = "diagnose") -> int:
    """`python -m gpt.diagnostics RUN_DIR`; returns the exit code."""
    with _door(prog):
        flags, _ = parse(DiagnoseFlags, Section, prog, argv)
        from gpt.run import metrics
        from gpt.run.directory import RunDirectory
        from gpt.run.plot import has_layers, plot_layers

        run = RunDirectory(_path(flags.run_dir, "RUN_DIR"))
        run.read_config()  # this is a run
        records = metrics.read(run.metrics)
        if not has_layers(records):
            raise InputError(
                f"{run.path}: has no measures of its layers; train with --diagnostics.every 50"
            )
        plot_layers(records, run.layers, title=str(run.path))
        show(str(run.layers))
    return 0

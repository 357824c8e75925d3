"""Loading a trained model from its run directory, and generating text with it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import torch

from gpt import checkpoint as store
from gpt.checkpoint import Checkpoint, PrunedError
from gpt.checkpoint.weights import load_weights
from gpt.config import Generation, validate
from gpt.data import tokenizer
from gpt.data.tokenizer import Encoding
from gpt.errors import InputError, option
from gpt.generation import continue_text
from gpt.hardware.device import pick_device
from gpt.hardware.size import check_loading, parameters
from gpt.model.gpt2 import GPT
from gpt.run.directory import AnyRun, RunDirectory, path_of

ATTEMPTS = 100  # to read a checkpoint of a run that is still training and pruning


class TrainedRun(NamedTuple):
    """A trained model with its tokenizer, and the number of updates it has had."""

    model: GPT
    encoding: Encoding
    step: int


def load_run(
    run: AnyRun, checkpoint: str | int = "best", device: torch.device | str = "cpu"
) -> TrainedRun:
    """The model, tokenizer and step of a run, from its directory alone.

    Args:
        run: a run directory, or a result of `train`.
        checkpoint: "best" (the saved one with the lowest validation loss; the newest if none was
            evaluated), "latest", a step, or the path of one of the run's checkpoints.

    Raises:
        InputError: there is no such run, checkpoint or device, or it is damaged.
    """
    path, checkpoint, device = path_of(run), str(checkpoint), _device(device)
    directory = RunDirectory(path)
    config = directory.read_config()
    for _ in range(ATTEMPTS):  # a run that trains may prune what was just chosen
        folder = _choose(directory, checkpoint)
        with contextlib.suppress(PrunedError):
            loaded, encoding = _read(directory, folder)
            break
    else:
        raise InputError(f"{path}: checkpoints are deleted faster than they can be read")
    check_loading(config.model, encoding.n_vocab, str(directory.config))
    held = sum(tensor.numel() for tensor in loaded.model.values())
    least = parameters(config.model, encoding.n_vocab)
    if held < least:  # checked before thousands of blocks are built for nothing
        raise InputError(
            f"{folder}: does not fit {directory.config}: it holds {held:,} parameters, but "
            f"at least {least:,} are needed"
        )
    model = GPT(config.model, encoding.n_vocab)
    try:
        load_weights(model, loaded.model)
    except ValueError as error:
        raise InputError(f"{folder}: does not fit {directory.config}: {error}") from None
    return TrainedRun(model.to(device).eval(), encoding, loaded.step)


def generate(
    run: TrainedRun | AnyRun,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> str:
    """`prompt` and the text with which a run continues it, as `sample.py` prints it.

    Args:
        run: a result of `load_run`; or a result of `train` or a run directory, whose best
            checkpoint is then loaded at each call.
        prompt: text to continue; empty starts a new document.
        max_new_tokens, temperature, top_k, top_p, min_p, seed: see `gpt.config.Generation` and its
            base. Another seed gives another text; temperature 0 always takes the most likely token.

    Raises:
        InputError: an option is out of range, the prompt has a character that the vocabulary
            lacks, or the run cannot be loaded.
    """
    options = validate(
        Generation,
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
        },
    )
    if not isinstance(prompt, str):
        raise InputError(f"prompt: must be text, found {prompt!r}")
    if not isinstance(run, TrainedRun):
        run = load_run(run)
    return continue_text(
        run.model,
        run.encoding,
        prompt,
        tokens=options.max_new_tokens,
        sampling=options,
        seed=options.seed,
        origin="prompt",
    )


def _device(device: torch.device | str) -> torch.device:
    """The device of that name, if there is one."""
    if device in ("auto", "cpu", "cuda", "mps"):
        return pick_device(str(device))
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device: {device!r} is not a device; try cpu, cuda or cuda:1") from None


def _choose(run: RunDirectory, checkpoint: str) -> Path:
    """The folder of the checkpoint that is asked for."""
    available = store.steps(run.checkpoints)
    if not available:
        raise InputError(f"{run.path}: holds no checkpoint yet")
    if checkpoint in store.POINTERS:
        return store.read_pointer(run.checkpoints, checkpoint) or available[max(available)]
    found = store.named(checkpoint, run.checkpoints)
    if found is None or found.resolve().parent != run.checkpoints.resolve():
        raise InputError(
            f"{option('checkpoint')} {checkpoint}: no such checkpoint; {run.path} has best, "
            f"latest, {', '.join(map(str, available))}"
        )
    return found


def _read(run: RunDirectory, folder: Path) -> tuple[Checkpoint, Encoding]:
    """The parts of a checkpoint that sampling needs.

    Raises:
        PrunedError: it was deleted meanwhile.
        InputError: it is damaged; the message names an intact one, if there is one.
    """

    def read(folder: Path) -> tuple[Checkpoint, Encoding]:
        with store.reading(folder):
            loaded = store.load(folder, optimizer=False)
            return loaded, tokenizer.load(folder / "tokenizer.json")

    try:
        return read(folder)
    except PrunedError:
        raise
    except InputError as error:
        others = {s: p for s, p in store.steps(run.checkpoints).items() if p != folder}
        for step, other in reversed(others.items()):
            try:
                read(other)
            except InputError:
                continue
            raise InputError(f"{error};\n{option('checkpoint')} {step} is intact") from None
        raise

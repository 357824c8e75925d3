"""The weights that `init_from` names: found, checked by names and shapes, and then loaded.

Only safetensors files are read. Their headers have the names and shapes of all tensors, so that the
first one that is missing or has another shape is named before anything is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt import checkpoint as store
from gpt.config import Config, DataConfig, ModelConfig, validate
from gpt.config.layouts import Layout, Part
from gpt.config.source import INDEX, Source, describe, locate, weight_files
from gpt.data.tokenizer import TOKENIZERS
from gpt.errors import InputError
from gpt.io.files import size_and_hash
from gpt.model.gpt2 import GPT

FORMATS = ("F32", "F16", "BF16")  # of numbers; fp32 holds all of them exactly

EMBEDDING, POSITIONS = "token_embedding.weight", "position_embedding.weight"
TIED_HEAD = "lm_head.weight"  # a copy of the token embedding, in some files

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A tensor in a file, not loaded."""

    file: Path
    shape: Shape
    format: str


@dataclass(frozen=True)
class Pretrained:
    """Weights that fit a config, not loaded yet.

    Attributes:
        source: what `init_from` names.
        folder: the folder with the weights; of a run, its checkpoint.
        headers: all tensors in the folder.
        context, vocab_size: of the weights.
        parts: for each of our parameters, the names of the tensors that hold its numbers. Biases of
            a network without biases are included: they must be 0.
    """

    source: Source
    folder: Path
    headers: Mapping[str, Header]
    context: int
    vocab_size: int
    parts: Mapping[str, tuple[Part, list[str]]]

    def load(self, model: ModelConfig) -> dict[str, Tensor]:
        """The parameters of `model` by name, on the CPU; fewer positions if its context is smaller.

        Raises:
            InputError: a file is damaged, or a bias is not 0 in a network without biases.
        """
        if self.source.layout is None:
            store.verify(self.folder)
        loaded: dict[str, Tensor] = {}
        own = _shapes(model, self.vocab_size)
        for ours, (part, names) in self.parts.items():
            with _reading(self.folder):
                tensor = self._read(part, names)
            if ours in own:
                loaded[ours] = tensor
            elif tensor.any():
                raise InputError(
                    f"{self.folder}: {names[0]}: is not 0, but config.json says that the network "
                    "has no such bias"
                )
        loaded[POSITIONS] = loaded[POSITIONS][: model.context].clone()
        return loaded

    def _read(self, part: Part, names: list[str]) -> Tensor:
        found = []
        for name in names:
            with safe_open(self.headers[name].file, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
            tensor = tensor.float() if tensor.is_floating_point() else tensor  # a count
            tensor = tensor[part.extra_rows :] if part.extra_rows else tensor
            found.append(tensor.T if part.transposed and tensor.dim() == 2 else tensor)
        return (torch.cat(found) if len(found) > 1 else found[0]).contiguous()

    def check_vocabulary(self, config: DataConfig) -> None:
        """Check that the vocabulary that `config` describes is that of the weights.

        This needs no data, so a wrong vocabulary is reported before a large corpus is prepared.

        Raises:
            InputError: it is another one, or would be trained on the new text.
        """
        kind, theirs = TOKENIZERS[config.tokenizer], self.source.data
        weights = f"the weights of init_from {self.source.name}"
        same = all(getattr(config, option) == value for option, value in theirs.items())
        own = " and ".join(f"data.{option}: {value}" for option, value in theirs.items())
        advice = "set data.vocabulary to that of the weights" if same else f"set {own}"
        if kind.trained_on is not None:
            raise InputError(
                f"data.tokenizer: {config.tokenizer} makes a vocabulary from the new text, but "
                f"{weights} belong to another;\n{advice}"
            )
        encoding = kind.make(config, ())
        if encoding.n_vocab != self.vocab_size:
            raise InputError(
                f"data.tokenizer: {config.tokenizer} has {encoding.n_vocab:,} tokens, but "
                f"{weights} are for {self.vocab_size:,};\n{advice}"
            )
        if not same:
            source = DataConfig.model_validate(theirs)
            if list(TOKENIZERS[source.tokenizer].make(source, ()).tokens) != list(encoding.tokens):
                raise InputError(
                    f"data.tokenizer: {config.tokenizer} has other tokens than {weights};\n{advice}"
                )

    def summary(self, model: ModelConfig) -> str:
        """The weights, and how much of their context is used, in a line."""
        shorter = f", the first {model.context:,} of their {self.context:,} positions"
        return f"initial weights: {self.folder}{shorter if model.context < self.context else ''}"

    def facts(self) -> dict[str, Any]:
        """The source, and the SHA-256 of each of its files, for environment.json."""
        files = dict.fromkeys(header.file for header in self.headers.values())
        digests = {str(file): size_and_hash(file)["sha256"] for file in files}
        return {"source": self.source.name, "sha256": digests}


def find(config: Config, *, fetch: bool = True) -> Pretrained | None:
    """The weights that `config.init_from` names, checked but not loaded.

    Args:
        fetch: whether weights on the hub may be fetched; if not, None is returned for them.

    Raises:
        InputError: there are none; or a tensor is missing, has another shape or number format, or
            is not part of the network. The message names the first.
        UnreachableError: the hub does not respond.
    """
    source = describe(str(config.init_from))
    if source.repository is not None and not fetch:
        return None
    layout, folder = source.layout, locate(source)
    folder = folder if layout is not None else _checkpoint(folder)
    headers = _headers(folder)
    context = validate(ModelConfig, source.model, source.origin).context
    model = config.model.model_copy(update={"context": context})
    parts = _parts(layout, model, headers)
    embedding = headers.get(parts[EMBEDDING][1][0]) if EMBEDDING in parts else None
    vocab_size = embedding.shape[0] if embedding is not None and embedding.shape else 1
    _check(folder, layout, headers, parts, _shapes(model, vocab_size))
    return Pretrained(source, folder, headers, context, vocab_size, parts)


def _checkpoint(folder: Path) -> Path:
    """The folder of a checkpoint: `folder` itself, or that of a run's best, as for sampling."""
    named = store.named(str(folder), folder)
    if named is not None:
        return named
    available = store.steps(folder / "checkpoints")
    if not available:
        raise InputError(f"init_from: {folder}: holds no checkpoint yet")
    best = store.read_pointer(folder / "checkpoints", "best")
    return best or available[max(available)]


def _shapes(model: ModelConfig, vocab_size: int) -> dict[str, Shape]:
    """The shapes of a network's parameters, by name."""
    with torch.device("meta"):
        network = GPT(model, vocab_size)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _parts(
    layout: Layout | None, model: ModelConfig, headers: Mapping[str, Header]
) -> dict[str, tuple[Part, list[str]]]:
    """For each parameter of ours, the names that its tensors should have in the files."""
    if layout is None:
        return {name: (Part(name, (name,)), [name]) for name in _shapes(model, 1)}
    parts = {}
    bare = not any(name.startswith(layout.prefix) for name in headers)
    for part in layout.modules(model.layers):
        if part.ours == "head" and model.tied_head:
            continue
        for kind in ("weight", "bias") if part.biased else ("weight",):
            names = [f"{name}.{kind}" for name in part.theirs]
            names = [name.removeprefix(layout.prefix) for name in names] if bare else names
            parts[f"{part.ours}.{kind}"] = part, names
    return parts


def _check(
    folder: Path,
    layout: Layout | None,
    headers: Mapping[str, Header],
    parts: Mapping[str, tuple[Part, list[str]]],
    own: Mapping[str, Shape],
) -> None:
    """Check that the tensors of a folder are those of a network.

    Args:
        own: the shapes of its parameters.

    Raises:
        InputError: names the first that is missing, has another shape or number format, or is not
            part of the network.
    """
    expected = {
        name: _shape_of(ours, part, own) for ours, (part, names) in parts.items() for name in names
    }
    for name, shape in expected.items():
        header = headers.get(name)
        if header is None:
            raise InputError(f"{folder}: has no tensor {name}, of shape {list(shape)}")
        if header.shape != shape:
            found = f"{name} has the shape {list(header.shape)}, not {list(shape)}"
            raise InputError(f"{header.file}: {found} as the config requires")
        if layout is not None and header.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise InputError(f"{header.file}: {name} has {header.format} numbers, not {known}")
    ignored = (*layout.ignored, TIED_HEAD) if layout is not None else ()
    for name in headers:
        if name not in expected and not name.endswith(ignored):
            kind = layout.architecture if layout is not None else "network"
            raise InputError(
                f"{headers[name].file}: {name} is not part of the {kind} that the config describes"
            )


def _shape_of(ours: str, part: Part, own: Mapping[str, Shape]) -> Shape:
    """The shape of each tensor in the files that has numbers of our parameter `ours`."""
    shape = own.get(ours) or own[f"{part.ours}.weight"][:1]  # of a bias that ours does not have
    if not shape:  # a count of batches
        return shape
    rows, *columns = shape
    shape = (rows // len(part.theirs) + part.extra_rows, *columns)
    return shape[::-1] if part.transposed else shape


# ---------------------------------------------------------------------------------------------
# Files


def _headers(folder: Path) -> dict[str, Header]:
    """The tensors in a folder's safetensors files, without their numbers.

    Raises:
        InputError: there is no such file, or one is damaged or missing.
    """
    headers = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise InputError(f"{file}: is missing, but {INDEX} names it")
        with _reading(file), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is not a mapping
                tensor = opened.get_slice(name)
                headers[name] = Header(file, tuple(tensor.get_shape()), tensor.get_dtype())
    return headers


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of reading safetensors into an `InputError`."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is damaged: {reason}") from None

"""The configuration: YAML and command-line overrides in, one validated `Config` out.

A file may name one `base:` (a path relative to itself) whose values it overrides; flags override
the file; what nobody sets has the default below. The classes mirror the YAML's nesting, and every
option of the program is listed here. All errors are reported at once, by dotted path.

This module imports no torch, so that `--help`, `--print-config` and error messages are immediate.
Options that pick a variant by name (`placement`, `optimizer.name`, ...) take the keys of the table
that holds the variants; see `Choice`.

`python -m gpt.config` prints the JSON schema that editors use to complete and check the YAML.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from gpt.errors import InputError, nearest
from gpt.io.console import set_encoding
from gpt.io.files import read_small
from gpt.io.text import decode
from gpt.shipped import find

# ---------------------------------------------------------------------------------------------
# Kinds of value


@dataclass(frozen=True)
class Choice:
    """A string that must be a key of the dict `table` in `module`, such as `gpt.norm.PLACEMENTS`.

    The variants live in one visible dict beside their code, and that dict is the only list of
    their names. Before its module is imported the keys are read from the module's source, because
    importing it would import torch: 1.3 s that `--help` and a misspelt option need not wait for.
    """

    module: str
    table: str

    def names(self) -> tuple[str, ...]:
        """The valid values, in the table's order."""
        unread = None if self.module in sys.modules else _keys(self.module, self.table)
        return unread or tuple(getattr(importlib.import_module(self.module), self.table))

    def _check(self, value: str) -> str:
        names = self.names()
        if value not in names:
            raise PydanticCustomError(
                "choice",
                "is none of {names}{hint}",
                {"names": ", ".join(names), "hint": nearest(value, names)},
            )
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.names())}


@functools.cache
def _keys(module: str, table: str) -> tuple[str, ...] | None:
    """The keys of a dict display in a module's source; None if there is no such display."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None:
        for node in ast.parse(Path(spec.origin).read_text("utf-8")).body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id == table
                and isinstance(node.value, ast.Dict)
            ):
                return tuple(ast.literal_eval(key) for key in node.value.keys if key)
    return None


@dataclass(frozen=True)
class Between:
    """A number from `least` to `most`, both included.

    A whole number may be written as `1e6`, which YAML 1.1 reads as text; a truth value is not one.
    """

    least: float
    most: float

    def check(self, value: object) -> object:
        """The number that `value` is or spells; what is neither is left to the type's own check."""
        if isinstance(value, bool):
            raise PydanticCustomError("number", "is a truth value where a number is needed")
        number = _spelt(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and not self.least <= number <= self.most:
            raise PydanticCustomError("range", "is not {range}", {"range": str(self)})
        return number

    def read(self, text: str, origin: str) -> float:
        """The number that the text of a flag spells; a whole one if `least` is.

        Raises:
            InputError: it spells none, or one that is not in between.
        """
        number, whole = _spelt(text), isinstance(self.least, int)
        fits = isinstance(number, int if whole else int | float)
        if isinstance(number, str) or not fits or not self.least <= number <= self.most:
            kind = "a whole number" if whole else "a number"
            raise InputError(f"{origin} {text}: must be {kind} {self}")
        return number

    def __str__(self) -> str:
        written = (f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in (self.least, self.most))
        return "between {} and {}".format(*written)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "minimum": self.least, "maximum": self.most}


def _spelt(text: str) -> int | float | str:
    """The number that a text spells, a whole one as an int; the text itself if it spells none."""
    try:
        return int(text)
    except ValueError:  # also of thousands of digits, which are infinite as a float
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _several(value: object) -> object:
    """One string stands for a list of one."""
    return [value] if isinstance(value, str) else value


def expand_user(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that user's home directory.

    Raises:
        InputError: there is no such user.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise InputError(f"{path}: there is no user {user[1:]}; a file of that name is ./{user}")
    return expanded


def _file_name(value: str) -> str:
    if not value:
        raise PydanticCustomError("empty", "is empty, and must name a file or folder")
    if "\0" in value:
        raise PydanticCustomError("nul", "holds a NUL character, as no file's name does")
    return expand_user(value)


def is_reserved(name: str) -> bool:
    """Whether Windows reserves a file's name, which it does whatever the ending."""
    return name.partition(".")[0].rstrip().lower() in RESERVED


def _run_name(name: str) -> str:
    if is_reserved(name) or name.endswith("."):
        raise PydanticCustomError("reserved", "is not a file's name on Windows")
    return name


RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}
FileName = Annotated[str, AfterValidator(_file_name)]
Strings = Annotated[
    tuple[FileName, ...], BeforeValidator(_several, json_schema_input_type=str | list[str])
]
# What numbers may be: more than anybody trains, less than what overflows or never ends. Whether a
# machine has the memory for a combination of them is another question, for gpt/hardware/size.py.
Count = Annotated[int, Between(1, 10**9)]
Amount = Annotated[int, Between(0, 10**9)]
Layers = Annotated[int, Between(1, 2_000)]
Channels = Annotated[int, Between(1, 100_000)]
Context = Annotated[int, Between(1, 10_000_000)]
Vocabulary = Annotated[int, Between(257, 1_000_000)]
Samples = Annotated[int, Between(1, 10_000)]
Seed = Annotated[int, Between(0, 2**63 - 1)]
Rate = Annotated[float, Between(1e-30, 1e30)]
Epsilon = Annotated[float, Between(1e-30, 1e3)]
Factor = Annotated[float, Between(0.0, 1e3)]  # of a loss, a weight or a logit
Ratio = Annotated[float, Between(1e-6, 1e6)]  # to other numbers of its kind
Cap = Annotated[float, Between(1e-3, 1e6)]
Multiple = Annotated[float, Between(1e-5, 1e3)]
Hours = Annotated[float, Between(1e-6, 1e6)]
Share = Annotated[float, Between(0.0, 1.0)]
Some = Annotated[float, Between(1e-6, 1.0)]  # a share that is not 0
Part = Annotated[float, Between(1e-6, 0.999999)]  # a share that leaves something
Decay = Annotated[float, Between(0.0, 0.999999)]  # what is kept or lost of something at each step
Workers = Between(1, 1000)
Seconds = Between(1e-3, 1e9)
Device = Literal["auto", "cpu", "cuda", "mps"]
Weights = Literal["fp32", "bf16", "int8"]  # as sampling reads them


def _switch(value: object) -> object:
    """`on` and `off` are true and false to a reader of YAML 1.1."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


def _parsed(value: object, name: str) -> object:
    """A flag's text as the YAML that it is, such as `{path: a.txt}`; other values unchanged."""
    return _parse_yaml(value, f"{name}: as YAML") if isinstance(value, str) else value


class Section(BaseModel):
    """One mapping of the YAML. Unknown keys are errors; an empty mapping means the defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: object) -> object:
        return {} if value is None else value


# ---------------------------------------------------------------------------------------------
# The options


class HubConfig(Section):
    """A dataset on the Hugging Face hub (source: hub), read with the `datasets` library."""

    name: FileName | None = None
    """The dataset, such as roneneldan/TinyStories, or a local folder that holds one."""
    config: str | None = None
    """Which of the dataset's configurations, where it has several."""
    split: str = "train"
    """Which of its splits."""
    revision: str | None = None
    """Branch, tag or commit; only a commit pins the text for good. Unset, the main branch."""
    streaming: bool = True
    """Read over the network while preparing; false downloads all of it to the library's cache."""


class SourceConfig(Section):
    """Where documents come from."""

    source: Annotated[str, Choice("gpt.data.sources", "SOURCES")] = "stdlib"
    """This Python's standard library, text, jsonl or parquet files, the hub, or token files."""
    path: Strings = ()
    """Files, folders or glob patterns to read, from the working directory; compressed as well."""
    text_field: str = "text"
    """The field that holds the text (source: jsonl, parquet, hub)."""
    invalid_text: Literal["refuse", "replace"] = "refuse"
    """Whether what is not UTF-8 text is an error or becomes U+FFFD, the replacement character."""
    missing_text: Literal["refuse", "skip"] = "refuse"
    """Whether a record whose text is null or missing is an error or is left out and counted."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the token ids in files that do not tell it, little-endian (source: tokens)."""
    hub: HubConfig = HubConfig()

    @model_validator(mode="after")
    def _source_is_whole(self) -> Self:
        self._check_source()
        return self

    def _check_source(self) -> None:
        """What the source needs is given, and a path is not given in vain."""
        wanted = {"stdlib": "", "hub": "hub.name"}.get(self.source, "path")
        if wanted == "path" and not self.path:
            raise ValueError(f"source: {self.source} needs path, the files or folders to read")
        if wanted == "hub.name" and not self.hub.name:
            raise ValueError("source: hub needs hub.name, such as roneneldan/TinyStories")
        if wanted != "path" and self.path:
            raise ValueError(f"source: {self.source} reads no path; source: text does")


class MixedSource(SourceConfig):
    """One of several sources."""

    weight: Ratio = 1.0
    """Share of the training sequences that come from it, relative to the other weights."""


class DataConfig(SourceConfig):
    """What is read, how it becomes tokens, and what is held out."""

    mix: tuple[MixedSource, ...] = ()
    """Several sources in place of one, each with a weight; what they leave out stands above."""
    validation: SourceConfig | None = None
    """The validation text's own source, in place of a held-out share."""
    tokenizer: Annotated[str, Choice("gpt.data.tokenizer", "TOKENIZERS")] = "bpe"
    """How text becomes tokens; bpe is trained on the corpus, file reads data.vocabulary."""
    vocab_size: Vocabulary = 2048
    """Tokens of the bpe tokenizer: 256 bytes, the merges, and end of text."""
    learn_bytes: Count = 100_000_000
    """Bytes of training text, spread evenly over it, that the bpe tokenizer learns from at most."""
    vocabulary: FileName | None = None
    """A tokenizer.json of an earlier run or preparation (tokenizer: file)."""
    holdout: Literal["documents", "tail"] = "documents"
    """Validation is whole documents, chosen by a hash of their text, or the tail of each."""
    val_fraction: Part = 0.03
    """Share of the text that is held out for validation."""
    windows: Literal["epochs", "random"] = "epochs"
    """Training sequences: each window once an epoch, or drawn at random places as in nanoGPT."""
    seed: Seed | None = None
    """Seed of the order in which training sequences are drawn; unset, the run's seed."""
    cache_dir: FileName = "cache"
    """Folder for prepared token files, one sub-folder a combination of corpus and tokenizer."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, tree: object) -> object:
        """Give each source of `mix`, and `validation`, the options that it leaves to the whole."""
        if not isinstance(tree, Mapping):
            return tree
        shared = {k: tree[k] for k in SourceConfig.model_fields if k in tree and k != "path"}

        validation = _parsed(tree.get("validation"), "validation")

        def fill(own: object) -> object:
            return merge(shared, own) if isinstance(own, Mapping) else own

        filled: dict[str, object] = {**tree, "validation": fill(validation)}
        mix = _parsed(tree.get("mix", ()), "mix")
        mix = (mix,) if isinstance(mix, Mapping) else mix
        filled["mix"] = tuple(map(fill, mix)) if isinstance(mix, list | tuple) else mix
        return filled

    def _check_source(self) -> None:
        if self.mix and self.path:
            raise ValueError("path and mix are both given; each source of mix has a path")
        if not self.mix:
            super()._check_source()

    @model_validator(mode="after")
    def _has_vocabulary(self) -> Self:
        if (self.tokenizer == "file") != (self.vocabulary is not None):
            raise ValueError("tokenizer: file and vocabulary, the file, go together")
        everything = [*self.sources, *([self.validation] if self.validation else [])]
        if self.tokenizer in ("bpe", "chars") and any(s.source == "tokens" for s in everything):
            raise ValueError(
                f"source: tokens has no text that a {self.tokenizer} tokenizer could learn from; "
                "tokenizer must be the one that made the tokens: gpt2, bytes, or file"
            )
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the training text."""
        return self.mix or (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Shares of the training sequences that come from the sources; they add up to 1."""
        total = sum(source.weight for source in self.mix)
        return tuple(source.weight / total for source in self.mix) or (1.0,)


class NormConfig(Section):
    """Normalisation: where it stands, which one, and its constants."""

    placement: Annotated[str, Choice("gpt.placement", "PLACEMENTS")] = "pre"
    """Where the norms stand relative to the residual connections."""
    type: Annotated[str, Choice("gpt.norm", "NORMS")] | None = None
    """What they compute; unset, layer norm (nothing where the placement has no norms)."""
    eps: Epsilon = 1e-5
    """Added to the variance inside the root (layer, rms, batch); the least length (scale)."""
    bias: bool | None = None
    """Whether layer, batch and dyt have a shift, beta; unset, as model.bias."""
    final_norm: Switch = "auto"
    """A norm after the last block; auto is the placement's own."""
    embedding: bool = False
    """A norm on the embeddings, before the first block, as in Peri-LN."""


class InitConfig(Section):
    """How weights start: a controlled factor of a comparison."""

    regime: Annotated[str, Choice("gpt.init", "REGIMES")] = "gpt2"
    """Standard deviations: GPT-2's 0.02, Xavier's of the theory, or SmallInit's."""
    depth_scaled: Switch = "auto"
    """1/sqrt(2L) on what writes into the stream; auto: gpt2 has it, where the placement lets it."""


class AttentionConfig(Section):
    """Switches of attention."""

    qk_norm: bool = False
    """Normalise each head's queries and keys, by the norm of norm.type."""
    soft_cap: Cap | None = None
    """Bound attention's logits by c tanh(z/c); null does not. Slower: torch's kernel has none."""


class MLPConfig(Section):
    """The feed-forward network."""

    activation: Annotated[str, Choice("gpt.model", "ACTIVATIONS")] = "gelu_tanh"
    """What stands between its matrices; gelu_tanh is GPT-2's, swiglu has a third matrix."""
    multiple: Multiple = 4
    """Its inner width, as a multiple of model.width; swiglu takes two thirds of it."""


class ModelConfig(Section):
    """The GPT. Vocabulary size comes from the tokenizer."""

    layers: Layers = 4
    """Number of blocks, L."""
    heads: Channels = 4
    """Attention heads in a block; must divide the width."""
    width: Channels = 128
    """Channels of the residual stream, d."""
    context: Context = 128
    """Longest sequence that the model sees, T, in tokens."""
    dropout: Decay = 0.0
    """Chance that an activation is dropped while training: embeddings, attention, sublayers."""
    bias: bool = True
    """Biases in linear layers and norms, as in GPT-2."""
    tied_head: bool = True
    """The output layer shares its weights with the token embedding, as in GPT-2."""
    logit_soft_cap: Cap | None = None
    """Bound the logits of the next token by c tanh(z/c); null does not."""
    norm: NormConfig = NormConfig()
    init: InitConfig = InitConfig()
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()

    @model_validator(mode="after")
    def _shape_is_whole(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.width * self.mlp.multiple < 1:
            raise ValueError(f"mlp.multiple ({self.mlp.multiple:g}) leaves no channel inside")
        return self


class ScheduleConfig(Section):
    """Learning rate at each step, as a share of optimizer.learning_rate: warm-up, then body."""

    warmup: Annotated[str, Choice("gpt.schedule", "WARMUPS")] = "linear"
    """Shape of the rise; none starts at the full rate, whatever warmup_steps says."""
    warmup_steps: Amount = 100
    """Updates until the full rate is reached; the first update is never at rate 0."""
    body: Annotated[str, Choice("gpt.schedule", "BODIES")] = "cosine"
    """Shape of what follows the warm-up."""
    final_ratio: Share = 0.1
    """Share of the full rate that cosine, linear and wsd end at."""
    decay_fraction: Some = 0.2
    """Share of the steps after warm-up in which wsd (warm-up, stable, decay) falls."""


class OptimizerConfig(Section):
    """The update rule and its constants. All are torch's, but for muon's own step."""

    name: Annotated[str, Choice("gpt.optim", "OPTIMIZERS")] = "adamw"
    """Update rule. muon is for the blocks' matrices, with adamw for everything else."""
    learning_rate: Rate = 1e-3
    """The full rate, which the schedule scales."""
    beta1: Decay = 0.9
    """Decay of the first moment (adamw, radam; adamw's part of muon)."""
    beta2: Decay = 0.99
    """Decay of the second moment (adamw, radam; adamw's part of muon)."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment (adamw, radam; adamw's part of muon)."""
    momentum: Decay = 0.95
    """Momentum of sgd and muon, both with Nesterov's form."""
    weight_decay: Factor = 0.1
    """Weight decay, times the rate, on matrices and embeddings, never on norms and biases."""
    independent_decay: bool = False
    """Decay times the schedule alone, so that a sweep of rates sweeps no decay; 1e-4 is usual."""
    clip: Rate | None = 1.0
    """Largest global gradient norm; null does not clip."""

    @model_validator(mode="after")
    def _decay_leaves_weights(self) -> Self:
        if self.independent_decay and self.weight_decay > 0.01:
            raise ValueError(
                f"weight_decay ({self.weight_decay:g}): with independent_decay that share of the "
                "weights is lost at each step; at most 0.01 makes sense, and 1e-4 is usual"
            )
        return self


class TrainingConfig(Section):
    """How long, how much at a time, and on what."""

    steps: Count = 1000
    """Updates in all."""
    batch_sequences: Count | None = None
    """Sequences of one update; 16 if neither this nor batch_tokens is given."""
    batch_tokens: Count | None = None
    """Tokens of one update, a multiple of model.context, in place of batch_sequences."""
    micro_batch: Literal["auto"] | Count = "auto"
    """Sequences of one forward pass; gradients accumulate over the batch. Must divide it."""
    device: Device = "auto"
    """auto takes cuda, then mps, then cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights stay fp32. fp16 scales its loss."""
    z_loss: Factor = 0.0
    """Weight of log² Z of the softmax beside the cross-entropy; 1e-4 is usual."""
    loss_chunk: Count | None = None
    """Tokens of a micro-batch whose logits exist at a time: less memory, slower; null is all."""
    compile: bool = False
    """Compile the model with torch.compile: pays on a GPU, costs half a minute or more on a CPU."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Whether a non-finite loss or gradient ends the run, loses the update, or rolls it back."""
    nonfinite_limit: Count = 20
    """Updates skipped in a row, fp16's too, or rollbacks, after which the run has diverged."""
    log_every: Count = 10
    """Steps between progress lines, and between reads of the metrics from a GPU."""


class EvaluationConfig(Section):
    """Validation loss on fixed sequences; never disturbs training."""

    every: Count = 250
    """Steps between evaluations; there is always one before the first step and after the last."""
    sequences: Count | None = None
    """Sequences to evaluate on, spread evenly over the validation text; unset, all of it."""
    give_up_after: Count | None = None
    """Evaluations in a row within 0.05 nats of guessing by token frequency that end a run."""


class DiagnosticsConfig(Section):
    """Looks at what the network does inside, layer by layer; they never disturb training."""

    every: Count | None = None
    """Steps between looks, the first step included; unset, none, which costs nothing."""
    sequences: Count = 8
    """Sequences of the batch on which activations are measured, at most a micro-batch of them."""


class CheckpointConfig(Section):
    """When training's state is saved and what is kept."""

    every: Count | None = None
    """Steps between checkpoints; unset, those of evaluation. There is always one at the end."""
    keep: Count = 2
    """Newest checkpoints to keep, beside the best."""
    keep_every: Count | None = None
    """Checkpoints at multiples of this step are kept too; unset, only the newest and the best."""
    spare_dir: FileName | None = None
    """Takes the state when the run's directory cannot be written; unset, the temporary folder."""


class Sampling(Section):
    """How the next token is drawn from the logits; each step acts on what the one before left."""

    temperature: Factor = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: Count | None = None
    """Draw among the k likeliest tokens; unset, among all."""
    top_p: Some = 1.0
    """Draw among the fewest tokens that hold this probability (Holtzman et al. 2020)."""
    min_p: Share = 0.0
    """Draw among tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""


class SamplingConfig(Sampling):
    """Text written by the model on the way, into samples/."""

    every: Count | None = None
    """Steps between samples; unset, those of evaluation."""
    tokens: Amount = 200
    """Length of a sample; 0 writes none."""
    prompt: str = ""
    """Text to continue; empty starts a new document."""


class Config(Section):
    """Everything that determines a run."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100),
        AfterValidator(_run_name),
    ] = "run"
    """Name of the run, and of its folder under runs/; the config file's name unless given."""
    seed: Seed = 0
    """Seed of initial weights, data order, dropout and samples."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        training = self.training
        if training.batch_sequences is not None and training.batch_tokens is not None:
            raise ValueError(
                "training.batch_sequences and training.batch_tokens are both given; "
                "set one of them to null"
            )
        if training.batch_tokens is not None and training.batch_tokens % self.model.context:
            raise ValueError(
                f"training.batch_tokens ({training.batch_tokens}) must be a multiple of "
                f"model.context ({self.model.context})"
            )
        if training.micro_batch != "auto" and self.batch_sequences % training.micro_batch:
            raise ValueError(
                f"training.micro_batch ({training.micro_batch}) must divide the batch of "
                f"{self.batch_sequences} sequences"
            )
        return self

    @model_validator(mode="after")
    def _kept_is_saved(self) -> Self:
        kept, saved = self.checkpoint.keep_every, self.save_every
        if kept is not None and kept % saved:
            raise ValueError(
                f"checkpoint.keep_every ({kept}) must be a multiple of the {saved} steps between "
                "checkpoints (checkpoint.every, or else evaluation.every)"
            )
        return self

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.checkpoint.every or self.evaluation.every

    @property
    def batch_sequences(self) -> int:
        """Sequences of one update."""
        if self.training.batch_tokens is not None:
            return self.training.batch_tokens // self.model.context
        return self.training.batch_sequences or 16

    @property
    def data_seed(self) -> int:
        """Seed of the data order."""
        return self.seed if self.data.seed is None else self.data.seed

    def to_yaml(self) -> str:
        """The resolved config, every option spelt out, as YAML that `load` reads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def differences(self, other: Config) -> list[str]:
        """The options in which two configs differ, as `path: mine -> theirs` lines."""
        mine, theirs = dict(leaves(self.model_dump())), dict(leaves(other.model_dump()))
        return [
            f"{key}: {mine.get(key)} -> {theirs.get(key)}"
            for key in dict.fromkeys([*mine, *theirs])
            if mine.get(key) != theirs.get(key)
        ]


# What a run may be told anew when it goes on: its length, what is logged and saved, and where
# things are. Everything else would make it another run.
MAY_CHANGE = (
    "name",
    "data.path",  # the tokens must be the same ones
    "data.cache_dir",
    "data.vocabulary",
    "training.steps",
    "training.micro_batch",
    "training.loss_chunk",
    "training.device",
    "training.compile",
    "training.nonfinite",
    "training.nonfinite_limit",
    "training.log_every",
    "evaluation.every",
    "evaluation.give_up_after",
    "diagnostics",
    "checkpoint",
    "sampling",
)


def changed(differences: Iterable[str], option: str) -> bool:
    """Whether an option is among what `Config.differences` says."""
    return any(difference.startswith(f"{option}:") for difference in differences)


def may_change(difference: str) -> bool:
    """Whether a run can go on with what `Config.differences` says has changed."""
    key = difference.partition(":")[0]
    return any(key == each or key.startswith(f"{each}.") for each in MAY_CHANGE)


# ---------------------------------------------------------------------------------------------
# Reading


LONGEST = 2**17  # bytes of a YAML file, which PyYAML reads in two seconds at worst
LONGEST_NUMBER = 100  # digits
MOST_BASES = 16  # files in a row


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, and aliases (a few lines of them can fill memory).

    As in YAML 1.2, `1:30`, `010` and dates are text, and `<<` is an ordinary key. So is a number of
    more digits than any has: it is left to the option, which knows its range.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases are not supported; a file may name one other as its base:",
                problem_mark=mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > LONGEST_NUMBER:
            raise ValueError("a number of so many digits")
        return int(text.replace("_", ""), 0)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [
        kind for kind in kinds if kind[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:bool")
    ]
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(0|[1-9][0-9_]{0,99}|0x[0-9a-fA-F_]{1,99}|0b[01_]{1,99})$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
        r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file cannot be read, is no valid YAML, or holds no mapping.
    """
    try:
        tree = _parse_yaml(decode(read_small(path, LONGEST), str(path)), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InputError(f"{path}: must be a mapping of options, such as `model: {{layers: 4}}`")
    return tree


def _parse_yaml(text: str, origin: str) -> object:
    """The value that YAML `text` describes; `origin` is what a message calls it."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise InputError(f"{origin}: is nested too deeply") from None
    except (
        *(yaml.YAMLError, ValueError, TypeError),
        *(ArithmeticError, LookupError, AttributeError),
    ) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or f"is no valid YAML: {error}".splitlines()[0]
        raise InputError(f"{origin}:{line} {problem}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` on top, mapping by mapping.

    A mapping does not hide what is not one, such as `model: 5`, so that `validate` can refuse it.
    """
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        elif isinstance(value, Mapping) and below is not None:
            pass
        elif value is not None or not isinstance(below, Mapping):  # `model:` alone changes nothing
            merged[key] = value
    return merged


def read(path: Path) -> dict[str, Any]:
    """What a YAML file and its bases say, not validated.

    Raises:
        InputError: a file is missing or no valid YAML, a base leads back to its file, or there are
            too many.
    """
    trees: list[dict[str, Any]] = []  # the file's own, its base's, and so on
    seen: set[Path] = set()
    while True:
        tree = read_yaml(path)
        if path.resolve() in seen:
            raise InputError(f"{path}: base: leads back to this file")
        seen.add(path.resolve())
        base = tree.pop("base", None)
        trees.append(tree)
        if base is None:
            break
        if not isinstance(base, str):
            raise InputError(f"{path}: base: must be the path of one YAML file, found {base!r}")
        if len(seen) > MOST_BASES:
            raise InputError(f"{path}: base: at most {MOST_BASES} files in a row may have one")
        path = base_of(path, base)
    merged = trees.pop()
    while trees:
        merged.pop("name", None)
        merged = merge(merged, trees.pop())
    return merged


def base_of(path: Path, base: str) -> Path:
    """The file that the file `path` names as its base, or the config of that name that ships.

    Raises:
        InputError: there is neither.
    """
    try:
        return find(expand_user(base), "config", start=path.parent)
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config in the YAML file `path`, its bases, and `overrides` (a nested mapping) on top.

    Args:
        path: a file, or the name of a config that comes with steadygpt, such as `quickstart`.

    Raises:
        InputError: with every error at once, by dotted path, and the nearest valid name.
    """
    path, overrides = find(path, "config"), overrides or {}
    tree = {"name": path.stem, **read(path)}
    flags = {key for key, _ in leaves(overrides)}
    origin = lambda key: f"--{key}" if key in flags else f"{path}: {key}" if key else str(path)  # noqa: E731
    return validate(Config, merge(tree, overrides), origin)


SectionType = TypeVar("SectionType", bound=Section)


def validate(
    section: type[SectionType],
    tree: Mapping[str, Any],
    origin: Callable[[str], str] = lambda key: key,
) -> SectionType:
    """The options that the nested mapping `tree` describes.

    Args:
        origin: how a message names the option at a dotted path ("" for the whole).

    Raises:
        InputError: all errors at once, a line each, or three lines if there are more.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        options = option_paths(section)
        for details in error.errors(include_url=False)[:MOST_ERRORS]:
            key, text = _explain(details, options)
            found.setdefault(key, []).append(text)
        unsaid = max(0, error.error_count() - MOST_ERRORS)
    problems = [
        f"{origin(key)}: {'; or '.join(texts)}".lstrip(": ") for key, texts in found.items()
    ]
    if len(problems) > 3:
        more = f"and {len(problems) - 2 + unsaid:,} more: "
        problems = [*problems[:2], more + "; ".join(problems[2:])]
    raise InputError("\n".join(problems))


MOST_ERRORS = 100  # that are put into words


def _explain(error: ErrorDetails, options: list[str]) -> tuple[str, str]:
    """One of pydantic's errors as (dotted path, what is wrong with it)."""
    parts = [str(part) for part in error["loc"]]
    sections = sorted({option.rpartition(".")[0] for option in options} - {""})
    key, found = ".".join(parts), error["input"]
    if error["type"] == "extra_forbidden":
        parent = key.rpartition(".")[0]
        valid = [*sections, *options]
        if parent and parent not in sections:  # a source within data.mix or data.validation
            valid = [f"{parent}.{name}" for name in MixedSource.model_fields]
        return key, f"no such option{nearest(key, valid)}"
    names = {*MixedSource.model_fields, *(part for place in options for part in place.split("."))}
    while parts and not (parts[-1] in names or "." in parts[-1] or parts[-1].isdecimal()):
        parts.pop()  # a union's branches
    key = ".".join(parts)
    if error["type"] == "value_error":
        return key, str(error["ctx"]["error"])
    try:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
    except ValueError:  # an int of thousands of digits
        shown = "a very long number"
    if error["type"] in ("choice", "number", "range", "empty", "nul", "reserved", "characters"):
        return key, f"{shown} {error['msg']}"
    if error["type"] == "string_unicode":
        return key, f"{shown} is not Unicode text"
    if error["type"] == "model_type":
        return key, f"must be a mapping of options, found {shown}"
    message = error["msg"].partition(", unable to parse")[0]
    return key, f"{message[0].lower()}{message[1:]}, found {shown}"


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of a dumped config as (dotted path, value)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def option_paths(section: type[Section]) -> list[str]:
    """Dotted paths of every option, such as `model.norm.placement`."""
    paths: list[str] = []
    for name, field in section.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Section):
            paths += [f"{name}.{path}" for path in option_paths(below)]
        else:
            paths.append(name)
    return paths


def schema() -> str:
    """The JSON schema of a config file, for editors."""
    tree = Config.model_json_schema()
    tree["properties"]["base"] = {
        "type": "string",
        "description": "A YAML file, relative to this one, or the name of a config that comes with "
        "steadygpt; this file overrides its values.",
    }
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    set_encoding()
    sys.stdout.write(schema())

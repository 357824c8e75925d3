"""Every option of a run: its name, type, default and meaning.

The classes mirror the YAML's nesting. An option that picks a variant by name (`placement`,
`optimizer.name`, ...) takes the keys of the table that holds the variants; see `Choice`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, PrivateAttr, model_validator

from gpt import variants
from gpt.config.strict_yaml import parse_yaml
from gpt.config.trees import leaves, merge
from gpt.config.values import (
    BelowOne,
    Channels,
    Choice,
    ContextLength,
    Count,
    CountOrZero,
    Device,
    Epsilon,
    Factor,
    FileName,
    FileNames,
    Fraction,
    From,
    Layers,
    Multiple,
    Only,
    Positive,
    PositiveFraction,
    Rate,
    Ratio,
    RunName,
    Seconds,
    Section,
    Seed,
    Sequences,
    SoftCap,
    SplitFraction,
    Steps,
    StepsOrZero,
    Switch,
    Tokens,
    TunedFor,
    Unit,
    VocabularySize,
    as_list,
    unquoted,
)


class HubConfig(Section):
    """A dataset on the Hugging Face hub (source: hub), read with the `datasets` library."""

    name: Annotated[FileName | None, From("Hugging Face datasets")] = None
    """The dataset, such as roneneldan/TinyStories, or a local folder that contains one."""
    config: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Branch, tag or commit; only a commit pins the text for good. Unset: the main branch."""
    streaming: bool = True
    """Stream while preparing; false downloads the whole dataset to the library's cache first."""


RECORDS = ("jsonl", "parquet", "hub")  # sources whose documents are records with fields


class SourceConfig(Section):
    """Where the documents come from."""

    source: Annotated[str, Choice("gpt.data.sources", "SOURCES")] = "stdlib"
    """Python's standard library, text, JSONL or Parquet files, the hub, or token files."""
    path: FileNames = ()
    """Files, folders or glob patterns, relative to the working directory; may be compressed."""
    text_field: Annotated[str, Only("source", RECORDS)] = "text"
    """Field that contains the text (source: jsonl, parquet, hub)."""
    invalid_text: Annotated[
        Literal["refuse", "replace"], Only("source", ("stdlib", "text", *RECORDS))
    ] = "refuse"
    """Whether bytes that are not UTF-8 are an error or become U+FFFD, the replacement character."""
    missing_text: Annotated[Literal["refuse", "skip"], Only("source", RECORDS)] = "refuse"
    """Whether a record without text is an error, or is skipped and counted."""
    dtype: Annotated[Literal["uint16", "uint32"], Only("source", ("tokens",))] = "uint16"
    """Type of the token IDs, little-endian, in files that do not state it (source: tokens)."""
    hub: Annotated[HubConfig, Only("source", ("hub",))] = HubConfig()

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        self._check_source()
        return self

    def _check_source(self) -> None:
        """Require what the source reads, and refuse a path that it would ignore."""
        reads_path = self.source not in ("stdlib", "hub")
        if reads_path and not self.path:
            raise ValueError(f"source: {self.source} needs path, the files or folders to read")
        if self.source == "hub" and not self.hub.name:
            raise ValueError("source: hub needs hub.name, such as roneneldan/TinyStories")
        if self.path and not reads_path:
            raise ValueError(f"source: {self.source} does not read path; source: text does")


class MixedSource(SourceConfig):
    """One source of several."""

    weight: Ratio = 1.0
    """Proportion of training sequences drawn from it, relative to the other sources' weights."""


def _parse_flag(value: object, name: str) -> object:
    """The value of a flag's YAML text, such as `{path: a.txt}`; other values unchanged."""
    return parse_yaml(value, f"{name}: as YAML") if isinstance(value, str) else value


class DataConfig(SourceConfig):
    """The text, its tokenizer, and the split into training and validation."""

    mix: tuple[MixedSource, ...] = ()
    """Several sources in place of one, each with a weight; they inherit the options of data."""
    validation: SourceConfig | None = None
    """A separate source for the validation text, in place of a held-out fraction."""
    tokenizer: Annotated[
        str, Choice("gpt.data.tokenizer", "TOKENIZERS"), From("Sennrich et al. 2016")
    ] = "bpe"
    """How text becomes tokens; bpe is trained on the corpus, file reads data.vocabulary."""
    vocab_size: Annotated[VocabularySize, Only("tokenizer", ("bpe",))] = 2048
    """Tokens of the bpe tokenizer: 256 bytes, the merges, and end of text."""
    learn_bytes: Annotated[Count, Only("tokenizer", ("bpe",)), Unit("bytes")] = 100_000_000
    """Train the bpe tokenizer on at most this many bytes of training text, spread evenly."""
    vocabulary: FileName | None = None
    """The tokenizer.json of a run, preparation or export, or its folder (tokenizer: file)."""
    holdout: Annotated[Literal["documents", "tail"], Only("validation", (None,))] = "documents"
    """Validation text: whole documents, by hash, or the tail of each; of a single one, its tail."""
    val_fraction: Annotated[SplitFraction, Only("validation", (None,))] = 0.03
    """Fraction of the text that is held out for validation."""
    windows: Annotated[Literal["epochs", "random", "fixed"], From("nanoGPT")] = "epochs"
    """Each window once per epoch, at random offsets as in nanoGPT, or always the first batch."""
    seed: Seed | None = None
    """Seed of the order of training sequences. Unset: the run's seed."""
    cache_dir: FileName = "cache"
    """Folder for prepared token files: one subfolder per combination of corpus and tokenizer."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, tree: object) -> object:
        """Let each source of `mix`, and `validation`, inherit the options that it does not set."""
        if not isinstance(tree, Mapping):
            return tree
        shared = {k: tree[k] for k in SourceConfig.model_fields if k in tree and k != "path"}

        def inherit(own: object) -> object:
            return merge(shared, own) if isinstance(own, Mapping) else own

        validation = _parse_flag(tree.get("validation"), "validation")
        mix = _parse_flag(tree.get("mix", ()), "mix")
        mix = (mix,) if isinstance(mix, Mapping) else mix
        mix = tuple(map(inherit, mix)) if isinstance(mix, list | tuple) else mix
        return {**tree, "validation": inherit(validation), "mix": mix}

    def _check_source(self) -> None:
        if self.mix and self.path:
            raise ValueError("path and mix are both given; each source of mix has its own path")
        if not self.mix:
            super()._check_source()

    @model_validator(mode="after")
    def _tokenizer_fits_the_data(self) -> Self:
        if (self.tokenizer == "file") != (self.vocabulary is not None):
            raise ValueError("tokenizer: file and vocabulary (its path) must be given together")
        everything = [*self.sources, *([self.validation] if self.validation else [])]
        trained_on = ("gpt.data.tokenizer", "TOKENIZERS", self.tokenizer, "trained_on")
        if any(s.source == "tokens" for s in everything) and variants.attribute(*trained_on):
            raise ValueError(
                f"source: tokens has no text to train a {self.tokenizer} tokenizer on; "
                "tokenizer must be the one that made the tokens: gpt2, bytes or file"
            )
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the training text."""
        return self.mix or (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Fractions of the training sequences drawn from each source; they sum to 1."""
        total = sum(source.weight for source in self.mix)
        return tuple(source.weight / total for source in self.mix) or (1.0,)


class NormConfig(Section):
    """Normalization: placement, type and constants."""

    placement: Annotated[
        str, Choice("gpt.model.placement", "PLACEMENTS"), From("Xiong et al. 2020")
    ] = "pre"
    """Where the norms are, relative to the residual connections."""
    type: Annotated[
        Annotated[str, Choice("gpt.model.norm", "NORMS")] | None,
        From("Ba et al. 2016", "Zhang and Sennrich 2019"),
    ] = None
    """Type of norm. Unset: layer norm (none, if the placement has no norms)."""
    eps: Epsilon = 1e-5
    """Added to the variance under the root (layer, rms, batch); for scale, the minimum of ||x||."""
    alpha0: Annotated[Positive, From("Zhu et al. 2025")] = 0.5
    """Initial alpha of dyt, the scale of its input (Zhu et al. 2025)."""
    bias: bool | None = None
    """Whether layer, batch and dyt have a shift, beta. Unset: as model.bias."""
    final_norm: Switch = "auto"
    """A norm after the last block; auto: as the placement defines."""
    embedding: Annotated[bool, From("Kim et al. 2025")] = False
    """A norm on the embeddings, before the first block, as in Peri-LN."""


class InitConfig(Section):
    """Initial weights: a controlled factor of a comparison."""

    regime: Annotated[
        str,
        Choice("gpt.model.init", "REGIMES"),
        From("Radford et al. 2019", "Glorot and Bengio 2010"),
    ] = "gpt2"
    """Standard deviations: GPT-2's 0.02, Xavier's (Glorot and Bengio 2010), or SmallInit's."""
    depth_scaled: Annotated[Switch, From("Radford et al. 2019")] = "auto"
    """Scale each sublayer's last matrix by 1/sqrt(2L); auto: as regime and placement define."""


class AttentionConfig(Section):
    """Variations of attention."""

    qk_norm: Annotated[bool, From("Henry et al. 2020")] = False
    """Normalize each head's queries and keys, with the norm of norm.type."""
    soft_cap: Annotated[SoftCap | None, From("Gemma Team 2024")] = None
    """Bound the attention logits by c tanh(z/c); null: no bound. Slow: torch's kernel lacks it."""


class MLPConfig(Section):
    """The feed-forward network."""

    activation: Annotated[
        str,
        Choice("gpt.model.gpt2", "ACTIVATIONS"),
        From("Hendrycks and Gimpel 2016", "Shazeer 2020"),
    ] = "gelu_tanh"
    """The nonlinearity; gelu_tanh is GPT-2's, swiglu adds a third matrix."""
    multiple: Annotated[Multiple, From("Vaswani et al. 2017")] = 4
    """Hidden width, as a multiple of model.width; swiglu uses two thirds of it."""


class ModelConfig(Section):
    """The GPT. The vocabulary size comes from the tokenizer."""

    layers: Layers = 4
    """Number of blocks, L."""
    heads: Channels = 4
    """Attention heads per block; must divide the width."""
    width: Annotated[Channels, Unit("channels")] = 128
    """Channels of the residual stream, d."""
    context: ContextLength = 128
    """Longest sequence, T, in tokens."""
    dropout: Annotated[BelowOne, From("Srivastava et al. 2014")] = 0.0
    """Dropout probability in training: embeddings, attention weights, sublayer outputs."""
    bias: bool = True
    """Biases in linear layers and norms, as in GPT-2."""
    tied_head: Annotated[bool, From("Press and Wolf 2017")] = True
    """The output layer shares its weights with the token embedding, as in GPT-2."""
    logit_soft_cap: Annotated[SoftCap | None, From("Gemma Team 2024")] = None
    """Bound the logits of the next token by c tanh(z/c); null: no bound."""
    norm: NormConfig = NormConfig()
    parametrization: Annotated[Literal["standard", "mup"], From("Yang et al. 2022")] = "standard"
    """Whether initial weights, learning rates and logits scale with the width; mup: they do."""
    mup_base_width: Annotated[Channels | None, Unit("channels"), From("Yang et al. 2022")] = None
    """The width at which mup is the standard parametrization; the number of heads is the same."""
    init: InitConfig = InitConfig()
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()

    @model_validator(mode="after")
    def _shape_is_valid(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.width * self.mlp.multiple < 1:
            raise ValueError(f"mlp.multiple ({self.mlp.multiple:g}) gives a hidden width of 0")
        return self

    @model_validator(mode="after")
    def _norms_fit(self) -> Self:
        """Refuse combinations in which an option would contradict another or have no effect."""
        norm, name = self.norm, self.norm.placement
        of_placement = partial(variants.attribute, "gpt.model.placement", "PLACEMENTS", name)
        conflicts: dict[str, str] = {}

        def refuse(option: str, value: object, other: str) -> None:
            conflicts[option] = f"{value} conflicts with {other}"

        wanted = {  # options that ask for a norm, and their values
            "norm.type": norm.type if norm.type not in (None, "none") else None,
            "norm.final_norm": "on" if norm.final_norm == "on" else None,
            "norm.embedding": "true" if norm.embedding else None,
            "norm.bias": "true" if norm.bias else None,
            "norm.eps": norm.eps if norm.eps != NormConfig.model_fields["eps"].default else None,
            "attention.qk_norm": "true" if self.attention.qk_norm else None,
        }
        for option, value in wanted.items():
            if value and not of_placement("has_norms"):
                refuse(
                    option, value, f"placement {name}, which has no norms; leave it at its default"
                )
            elif value and norm.type == "none":
                refuse(option, value, "norm.type none; leave one of them out")
        if norm.type == "none" and of_placement("needs_norms"):
            refuse("norm.type", "none", f"placement {name}: {of_placement('needs_norms')}")
        if norm.bias and (norm.type or "layer") not in variants.names("gpt.model.norm", "BIASED"):
            refuse("norm.bias", "true", f"norm.type {norm.type}, which has no bias; leave it null")
        if norm.alpha0 != NormConfig.model_fields["alpha0"].default and norm.type != "dyt":
            refuse("norm.alpha0", norm.alpha0, "any norm.type but dyt; leave it at its default")
        if norm.eps != NormConfig.model_fields["eps"].default and norm.type in ("dyt", "none"):
            refuse("norm.eps", norm.eps, f"norm.type {norm.type}; leave it at its default")
        least = of_placement("min_layers")
        if self.layers < least:
            refuse("layers", self.layers, f"placement {name}, which needs at least {least} layers")
        if norm.type in variants.names("gpt.model.norm", "ACROSS_TOKENS") and self.context == 1:
            refuse("context", 1, f"norm.type {norm.type}, which needs more than one token")
        self.refuse(conflicts)
        return self

    @model_validator(mode="after")
    def _parametrization_fits(self) -> Self:
        base = self.mup_base_width
        if self.parametrization == "standard":
            if base is not None:
                raise ValueError(
                    f"mup_base_width ({base}) has no effect in parametrization standard; "
                    "set parametrization: mup"
                )
            return self
        if base is None:
            raise ValueError(
                "parametrization: mup needs mup_base_width, the width at which rates were tuned"
            )
        if base % self.heads:
            raise ValueError(
                f"heads ({self.heads}) must divide mup_base_width ({base}): "
                "the network of the base width has the same number of heads"
            )
        if self.norm.type == "scale":
            raise ValueError(
                "norm.type scale conflicts with parametrization mup, which has no rule for that "
                "norm's only weight, initially sqrt(width)"
            )
        return self


class ScheduleConfig(Section):
    """Learning rate at each step, as a multiple of optimizer.learning_rate: warm-up, then body."""

    warmup: Annotated[str, Choice("gpt.schedule", "WARMUPS"), From("Goyal et al. 2017")] = "linear"
    """Shape of the warm-up; none: start at the full learning rate and ignore warmup_steps."""
    warmup_steps: Annotated[StepsOrZero, Only("warmup", ("linear", "cosine"))] = 100
    """Updates until the full rate is reached; the first update is never at rate 0."""
    body: Annotated[
        str, Choice("gpt.schedule", "BODIES"), From("Loshchilov and Hutter 2017", "Hu et al. 2024")
    ] = "cosine"
    """Shape of the decay after the warm-up."""
    final_ratio: Annotated[Fraction, Only("body", ("cosine", "linear", "wsd"))] = 0.1
    """Final learning rate of cosine, linear and wsd, as a fraction of the full one."""
    decay_fraction: Annotated[PositiveFraction, Only("body", ("wsd",)), From("Hu et al. 2024")] = (
        0.2
    )
    """Fraction of the steps after warm-up in which wsd (warm-up, stable, decay) decays."""
    rewarm: Annotated[StepsOrZero, From("Ibrahim et al. 2024")] = 0
    """When training.steps changes: updates in which the rate moves gradually from its last value to
    the new schedule (Ibrahim et al. 2024); 0: it jumps."""
    scale: Multiple = 1.0
    """Factor on the rate of every update, such as one that gives two arms equal summed rates."""

    @property
    def effective_warmup_steps(self) -> int:
        """Updates of the warm-up; 0 if there is none, whatever `warmup_steps` is."""
        return 0 if self.warmup == "none" else self.warmup_steps


ADAM = ("adamw", "radam", "muon")  # muon uses adamw for what is not a matrix of a block


class OptimizerConfig(Section):
    """The update rule and its constants. All rules are torch's, except Muon."""

    name: Annotated[str, Choice("gpt.optim", "OPTIMIZERS"), From("Loshchilov and Hutter 2019")] = (
        "adamw"
    )
    """Update rule. muon updates the blocks' matrices, with adamw for everything else."""
    learning_rate: Annotated[Rate, TunedFor("name", alike=("adamw", "radam"))] = 1e-3
    """The full learning rate, which the schedule scales."""
    beta1: Annotated[BelowOne, Only("name", ADAM), From("Kingma and Ba 2015")] = 0.9
    """Decay of the first moment (adamw, radam; adamw's part of muon)."""
    beta2: Annotated[BelowOne, Only("name", ADAM), From("Kingma and Ba 2015")] = 0.99
    """Decay of the second moment (adamw, radam; adamw's part of muon)."""
    eps: Annotated[Epsilon, Only("name", ADAM), From("Kingma and Ba 2015")] = 1e-8
    """Added to the root of the second moment (adamw, radam; adamw's part of muon)."""
    momentum: Annotated[BelowOne, Only("name", ("muon", "sgd")), From("Sutskever et al. 2013")] = (
        0.95
    )
    """Momentum of sgd and muon, both in Nesterov's form."""
    weight_decay: Annotated[Factor, From("Loshchilov and Hutter 2019")] = 0.1
    """Weight decay of matrices and embeddings, not of norms and biases; decoupled except in sgd."""
    independent_decay: Annotated[bool, From("Wortsman et al. 2023")] = False
    """Scale the decay by the schedule alone, not by learning_rate; then 1e-4 is typical."""
    clip: Annotated[Positive | None, From("Pascanu et al. 2013")] = 1.0
    """Gradient clipping: largest global gradient norm; null: no clipping."""

    @model_validator(mode="after")
    def _decay_leaves_weights(self) -> Self:
        if self.independent_decay and self.weight_decay > 0.01:
            raise ValueError(
                f"weight_decay ({self.weight_decay:g}): with independent_decay this fraction of "
                "the weights is lost at each step; use at most 0.01 (1e-4 is typical)"
            )
        return self


class TrainingConfig(Section):
    """Duration, batch, device and precision."""

    steps: Steps = 1000
    """Total number of updates."""
    batch_sequences: Sequences | None = None
    """Sequences per update; 16 if neither this nor batch_tokens is given."""
    batch_tokens: Tokens | None = None
    """Tokens per update, a multiple of model.context, in place of batch_sequences."""
    micro_batch: Literal["auto"] | Sequences = "auto"
    """Sequences per forward pass; must divide the batch. Gradients accumulate over the batch."""
    device: Device = "auto"
    """auto picks cuda, then mps, then cpu."""
    processes: Literal["auto"] | Count = 1
    """Processes that share each batch; auto: one per GPU, or on a CPU one, or one per core, as a
    short timing decides. Started by torchrun, a run uses those that torchrun started."""
    parallel: Annotated[Literal["ddp", "fsdp"], From("Li et al. 2020", "Zhao et al. 2023")] = "ddp"
    """How several processes share the work: ddp, each with a whole model (Li et al. 2020); fsdp,
    FSDP2, which divides weights, gradients and optimizer state (Zhao et al. 2023)."""
    process_timeout: Seconds = 1800.0
    """Seconds after which a process that does not respond ends a run of several processes; also if
    it is rank 0, alone with a sample or a checkpoint."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"], From("Micikevicius et al. 2018")] = "fp32"
    """Precision of the forward and backward pass; weights stay fp32. fp16 uses loss scaling."""
    z_loss: Annotated[Factor, From("Chowdhery et al. 2022")] = 0.0
    """Weight of the z-loss, log² Z of the softmax, in the total loss; 1e-4 is typical."""
    loss_chunk: Tokens | None = None
    """Compute logits for this many tokens at a time: less memory, slower. Unset: all at once."""
    compile: bool = False
    """Use torch.compile: pays off on a GPU, takes half a minute or more on a CPU."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """On a non-finite loss or gradient: stop the run, skip the update, or roll back."""
    nonfinite_limit: Count = 20
    """Skipped updates in a row (fp16's too), or rollbacks, after which a run counts as diverged."""
    log_every: Steps = 10
    """Steps between progress lines (or 10 seconds), and between reads of metrics from a GPU."""


class EvaluationConfig(Section):
    """Validation loss on fixed sequences; never disturbs training."""

    every: Steps = 250
    """Steps between evaluations; there is always one before the first step and after the last."""
    sequences: Sequences | None = None
    """Sequences to evaluate on, spread evenly over the validation text. Unset: all of it."""
    give_up_after: Annotated[Count | None, Unit("evaluations")] = None
    """Stop after this many evaluations in a row no better than guessing by token frequency."""
    patience: Annotated[Count | None, Unit("evaluations")] = None
    """Early stopping: stop after this many evaluations in a row without a new lowest loss."""


class DiagnosticsConfig(Section):
    """Statistics of the layers and of the whole model; measuring never disturbs training."""

    every: Steps | None = None
    """Steps between measurements, starting at the first step. Unset: none, at no cost."""
    sequences: Annotated[Sequences, Only("every")] = 8
    """Sequences of the batch to measure activations on, at most a micro-batch."""
    sharpness: Annotated[CountOrZero, Unit("sequences"), From("Cohen et al. 2021")] = 0
    """Sequences of the batch for the Hessian's largest eigenvalue; 0: not measured."""
    noise_scale: Annotated[bool, From("McCandlish et al. 2018")] = False
    """The gradient noise scale (McCandlish et al. 2018), from gradients of parts of the batch."""


class CheckpointConfig(Section):
    """When the training state is saved, and which checkpoints are kept."""

    every: Steps | None = None
    """Steps between checkpoints. Unset: as evaluation.every. There is always one at the end."""
    keep: Annotated[Count, Unit("checkpoints")] = 2
    """Number of newest checkpoints to keep, in addition to the best."""
    keep_every: Steps | None = None
    """Also keep checkpoints at multiples of this many steps. Unset: only newest and best."""
    spare_dir: FileName | None = None
    """Where to save when the run directory is not writable. Unset: the temporary folder."""


class Sampling(Section):
    """How the next token is drawn from the logits; the filters apply in this order."""

    temperature: Factor = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: Annotated[Tokens | None, From("Fan et al. 2018")] = None
    """Draw from the k most likely tokens. Unset: from all."""
    top_p: Annotated[PositiveFraction, From("Holtzman et al. 2020")] = 1.0
    """Draw from the smallest set of tokens with this total probability (Holtzman et al. 2020)."""
    min_p: Annotated[Fraction, From("Nguyen et al. 2024")] = 0.0
    """Drop tokens below this fraction of the largest probability (Nguyen et al. 2024)."""


class Generation(Sampling):
    """How a text is generated, apart from its prompt."""

    max_new_tokens: Tokens = 200
    """Tokens to add to the prompt, unless end of text comes first."""
    seed: Seed = 0
    """Random seed; sample i does not depend on the number of samples."""


class SamplingConfig(Sampling):
    """Text that the model writes during training, into samples/."""

    every: Annotated[Steps | None, Only("tokens")] = None
    """Steps between samples. Unset: as evaluation.every."""
    tokens: Annotated[CountOrZero, Unit("tokens")] = 200
    """Tokens per sample; 0 writes none."""
    prompt: Annotated[str, Only("tokens")] = ""
    """Text to continue; empty starts a new document."""


Tracker = Annotated[str, Choice("gpt.tracking", "TRACKERS")]
Trackers = Annotated[
    tuple[Tracker, ...],
    BeforeValidator(as_list, json_schema_input_type=Tracker | list[Tracker] | None),
    AfterValidator(lambda names: tuple(dict.fromkeys(names))),
]
Differences = dict[str, tuple[object, object]]  # dotted path of an option -> before and after


class Config(Section):
    """Everything that determines a run."""

    name: RunName = "run"
    """Name of the run and of its folder under runs/ (default: the config file's name)."""
    seed: Seed = 0
    """Seed of the initial weights, data order, dropout and samples."""
    init_from: FileName | None = None
    """Pretrained weights to start from: a run, a Hugging Face folder, or a hub name like gpt2."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    tracking: Trackers = ()
    """Where else the metrics are shown, besides metrics.jsonl (docs/tracking.md)."""
    _cautions: tuple[str, ...] = PrivateAttr(())

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
        if self.data.windows == "fixed" and training.nonfinite == "rollback":
            raise ValueError(
                "training.nonfinite rollback conflicts with data.windows fixed, which has no "
                "other batch to continue with; use stop or skip"
            )
        return self

    @model_validator(mode="after")
    def _measures_of_the_model_apply(self) -> Self:
        diagnostics, norm, batch = self.diagnostics, self.model.norm.type, self.batch_sequences
        conflicts: dict[str, str] = {}
        for option in ("sharpness", "noise_scale"):
            if not getattr(diagnostics, option):
                continue
            if diagnostics.every is None:
                conflicts[option] = "has no effect without diagnostics.every"
            elif norm in variants.names("gpt.model.norm", "ACROSS_TOKENS"):
                conflicts[option] = (
                    f"conflicts with model.norm.type {norm}, which in evaluation mode computes "
                    "another loss than in training"
                )
        if diagnostics.sharpness > batch:
            conflicts["sharpness"] = f"{diagnostics.sharpness} is more than the batch of {batch}"
        if diagnostics.noise_scale and batch == 1:
            conflicts["noise_scale"] = "needs a batch of at least 2 sequences"
        if diagnostics.noise_scale and self.data.windows == "fixed":
            conflicts["noise_scale"] = (
                "conflicts with data.windows fixed, whose batch is all of the training data"
            )
        self.refuse({f"diagnostics.{option}": text for option, text in conflicts.items()})
        return self

    @model_validator(mode="after")
    def _optimizer_has_mup_rates(self) -> Self:
        known = variants.names("gpt.model.parametrization", "HIDDEN_RATES")
        if self.model.parametrization == "mup" and self.optimizer.name not in known:
            raise ValueError(
                f"optimizer.name {self.optimizer.name} conflicts with model.parametrization mup, "
                f"which has learning rates for {', '.join(known)}"
            )
        return self

    @model_validator(mode="after")
    def _kept_steps_are_saved(self) -> Self:
        kept, saved = self.checkpoint.keep_every, self.save_every
        if kept is not None and kept % saved:
            raise ValueError(
                f"checkpoint.keep_every ({kept}) must be a multiple of the {saved} steps between "
                "checkpoints (checkpoint.every, or else evaluation.every)"
            )
        return self

    @model_validator(mode="after")
    def _best_step_is_saved(self) -> Self:
        every, saved = self.evaluation.every, self.save_every
        if self.evaluation.patience is not None and every % saved:
            raise ValueError(
                f"evaluation.patience needs a checkpoint at every evaluation, to save the best: "
                f"checkpoint.every ({saved}) must divide evaluation.every ({every}), or be null"
            )
        return self

    @property
    def cautions(self) -> tuple[str, ...]:
        """Lines about options that are valid but may not be meant; see gpt/config/cautions.py."""
        return self._cautions

    def set_cautions(self, lines: Sequence[str]) -> None:
        """Keep what `load` found in the files and flags, which the values alone do not show."""
        self._cautions = tuple(lines)

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.checkpoint.every or self.evaluation.every

    @property
    def batch_sequences(self) -> int:
        """Sequences per update."""
        if self.training.batch_tokens is not None:
            return self.training.batch_tokens // self.model.context
        return self.training.batch_sequences or 16

    @property
    def data_seed(self) -> int:
        """Seed of the data order."""
        return self.seed if self.data.seed is None else self.data.seed

    def to_yaml(self) -> str:
        """The resolved config, every option included, as YAML that `load` reads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def differences(self, other: Config) -> Differences:
        """The options in which two configs differ, and their values in this one and the other."""
        mine, theirs = dict(leaves(self.model_dump())), dict(leaves(other.model_dump()))
        pairs = {key: (mine.get(key), theirs.get(key)) for key in [*mine, *theirs]}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


# Options that may change when a run is resumed: its length, how it is computed, what is logged and
# saved, and where files are. A change of any other option would make it a different run.
MAY_CHANGE = (
    "name",
    "data.path",  # the tokens must be the same ones
    "data.cache_dir",
    "data.vocabulary",
    "schedule.rewarm",
    "training.steps",
    "training.micro_batch",
    "training.loss_chunk",
    "training.device",
    "training.processes",
    "training.parallel",
    "training.process_timeout",
    "training.compile",
    "training.nonfinite",
    "training.nonfinite_limit",
    "training.log_every",
    "evaluation.every",
    "evaluation.give_up_after",
    "evaluation.patience",
    "diagnostics",
    "checkpoint",
    "sampling",
    "tracking",
)


def may_change(option: str) -> bool:
    """Whether a run can be resumed with another value of the option."""
    return any(option == each or option.startswith(f"{each}.") for each in MAY_CHANGE)


def describe_differences(differences: Differences) -> list[str]:
    """Lines `option: before -> after`."""

    return [
        f"{option}: {unquoted(old)} -> {unquoted(new)}"
        for option, (old, new) in differences.items()
    ]

"""The Hugging Face layouts that can hold our networks: their options and tensors, and ours.

A layout is a kind of `config.json` and the names of the tensors in `model.safetensors`, both of
which the `transformers` library defines. `LAYOUTS` is the only list of them. It serves both ways:
`init_from` reads such a folder, and `steadygpt export` writes one. Nothing here imports torch.

Which options a layout can express is not listed: they are those that survive the way there and
back, see `without_counterpart`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt import variants
from gpt.config.options import ModelConfig
from gpt.config.trees import leaves, nest
from gpt.errors import InputError

# Our activations, as transformers spells them; the first name is the one that is written.
ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"),
    "gelu": ("gelu", "gelu_python"),
    "relu": ("relu",),
    "relu2": ("relu2",),
}
OWN = "steadygpt"  # a key of config.json, for options that none of the layout's keys expresses
OWN_OPTIONS = ("bias", "norm.bias")  # without biases, the layout's are zeros

# Options without counterpart that a trained network does not need. Export folds their
# only effect, a scale of the logits, into the last norm.
OF_INITIALIZATION = ("init.", "norm.alpha0")


class Option(NamedTuple):
    """A key of `config.json`: the option of ours that it sets, and its value if it is absent."""

    ours: str
    default: Any


class Part(NamedTuple):
    """A module of ours, and the modules of theirs with the same numbers.

    Attributes:
        ours, theirs: names, with `{}` for the block's number; if there are several of theirs, ours
            has their outputs one after another.
        transposed: whether their matrices are (n_in, n_out).
        biased: whether theirs has a bias, which is 0 if ours has none.
        extra_rows: rows of their table before those of ours.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    biased: bool = True
    extra_rows: int = 0


@dataclass(frozen=True)
class Layout:
    """One kind of folder.

    Attributes:
        architecture: the class in transformers.
        placement: the placement of the norms that it computes.
        options: keys of `config.json` and the options that they set.
        activation: the value of `activation_function` if it is absent.
        inner: the key of the hidden width of the feed-forward network, and its value if it is
            absent; None: 4 times the width.
        fixed: other keys that matter, with the only value that our network can compute; the second
            value is the one that an absent key has.
        prefix: of all tensors but the head's; some files leave it out.
        parts: the modules.
        ignored: endings of tensors that hold no weights.
    """

    architecture: str
    placement: str
    options: Mapping[str, Option]
    activation: str
    inner: tuple[str, int | None]
    fixed: Mapping[str, tuple[Any, Any]]
    prefix: str
    parts: tuple[Part, ...]
    ignored: tuple[str, ...] = ()

    def modules(self, layers: int) -> Iterator[Part]:
        """The parts with the names of each block in place of `{}`."""
        for part in self.parts:
            for layer in range(layers if "{}" in part.ours else 1):
                theirs = tuple(name.format(layer) for name in part.theirs)
                yield part._replace(ours=part.ours.format(layer), theirs=theirs)

    def to_config(self, model: ModelConfig) -> dict[str, Any]:
        """The `config.json` of a network of ours, without its vocabulary.

        Options without a counterpart are left out; see `without_counterpart`.
        """
        ours = dict(leaves(model.model_dump()))
        tree: dict[str, Any] = {key: ours[option.ours] for key, option in self.options.items()}
        tree["activation_function"] = ACTIVATIONS.get(model.mlp.activation, ("",))[0]
        tree[self.inner[0]] = _hidden_width(model)
        tree |= {key: only for key, (only, _) in self.fixed.items()}
        biases = {option: ours[option] for option in OWN_OPTIONS}
        return tree if _has_all_biases(model) else {**tree, OWN: nest(biases)}

    def to_options(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the model, nested and not validated, that a `config.json` sets.

        Raises:
            InputError: a key has a value that our network cannot compute; names the key.
        """
        for key, (only, default) in self.fixed.items():
            if tree.get(key, default) != only:
                found = tree.get(key, default)
                raise InputError(f"{key}: {found!r} is not supported, only {only!r}")
        ours = {o.ours: tree.get(key, o.default) for key, o in reversed(list(self.options.items()))}
        spelled = tree.get("activation_function", self.activation)
        names = [ours for ours, theirs in ACTIVATIONS.items() if spelled in theirs]
        if not names:
            known = ", ".join(name for theirs in ACTIVATIONS.values() for name in theirs)
            raise InputError(f"activation_function: {spelled!r} is not one of {known}")
        ours |= {"mlp.activation": names[0], "norm.placement": self.placement}
        width, (key, default) = ours["width"], self.inner
        inner = tree.get(key, default)
        if inner is not None and type(inner) is not int:
            raise InputError(f"{key}: {inner!r} is not a whole number")
        if inner is not None and type(width) is int and width > 0 and inner != 4 * width:
            ours["mlp.multiple"] = inner / width
        own = dict(leaves(tree[OWN])) if isinstance(tree.get(OWN), Mapping) else {}
        return nest(ours | {option: own[option] for option in OWN_OPTIONS if option in own})

    def key_of(self, option: str) -> str:
        """The key of `config.json` that sets an option, for messages; the option if none does."""
        keys = {o.ours: key for key, o in self.options.items()} | {"mlp.multiple": self.inner[0]}
        return keys.get(option, option)


LAYOUTS: dict[str, Layout] = {  # by `model_type`
    "gpt2": Layout(
        architecture="GPT2LMHeadModel",
        placement="pre",
        options={
            "n_layer": Option("layers", 12),
            "n_head": Option("heads", 12),
            "n_embd": Option("width", 768),
            "n_positions": Option("context", 1024),
            "resid_pdrop": Option("dropout", 0.1),
            "embd_pdrop": Option("dropout", 0.1),
            "attn_pdrop": Option("dropout", 0.1),
            "layer_norm_epsilon": Option("norm.eps", 1e-5),
            "tie_word_embeddings": Option("tied_head", True),
        },
        activation="gelu_new",
        inner=("n_inner", None),
        fixed={
            "scale_attn_weights": (True, True),
            "scale_attn_by_inverse_layer_idx": (False, False),
            "add_cross_attention": (False, False),
        },
        prefix="transformer.",
        parts=(
            Part("token_embedding", ("transformer.wte",), biased=False),
            Part("position_embedding", ("transformer.wpe",), biased=False),
            Part("blocks.{}.attention_norm", ("transformer.h.{}.ln_1",)),
            Part("blocks.{}.attention.qkv", ("transformer.h.{}.attn.c_attn",), transposed=True),
            Part("blocks.{}.attention.out", ("transformer.h.{}.attn.c_proj",), transposed=True),
            Part("blocks.{}.mlp_norm", ("transformer.h.{}.ln_2",)),
            Part("blocks.{}.mlp.up", ("transformer.h.{}.mlp.c_fc",), transposed=True),
            Part("blocks.{}.mlp.out", ("transformer.h.{}.mlp.c_proj",), transposed=True),
            Part("final_norm", ("transformer.ln_f",)),
            Part("head", ("lm_head",), biased=False),
        ),
        ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks, in files of old versions
    ),
    "opt": Layout(
        architecture="OPTForCausalLM",
        placement="post",
        options={
            "num_hidden_layers": Option("layers", 12),
            "num_attention_heads": Option("heads", 12),
            "hidden_size": Option("width", 768),
            "max_position_embeddings": Option("context", 2048),
            "dropout": Option("dropout", 0.1),
            "attention_dropout": Option("dropout", 0.0),
            "tie_word_embeddings": Option("tied_head", True),
        },
        activation="relu",
        inner=("ffn_dim", 3072),
        fixed={
            "do_layer_norm_before": (False, True),
            "enable_bias": (True, True),
            "layer_norm_elementwise_affine": (True, True),
        },
        prefix="model.",
        parts=(
            Part("token_embedding", ("model.decoder.embed_tokens",), biased=False),
            Part(
                "position_embedding", ("model.decoder.embed_positions",), biased=False, extra_rows=2
            ),
            Part(
                "blocks.{}.attention.qkv",
                tuple(f"model.decoder.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
            ),
            Part("blocks.{}.attention.out", ("model.decoder.layers.{}.self_attn.out_proj",)),
            Part("blocks.{}.attention_norm", ("model.decoder.layers.{}.self_attn_layer_norm",)),
            Part("blocks.{}.mlp.up", ("model.decoder.layers.{}.fc1",)),
            Part("blocks.{}.mlp.out", ("model.decoder.layers.{}.fc2",)),
            Part("blocks.{}.mlp_norm", ("model.decoder.layers.{}.final_layer_norm",)),
            Part("head", ("lm_head",), biased=False),
        ),
    ),
}

# GPT-2's published sizes (Radford et al. 2019), by their names on the hub; each context is 1,024.
SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


def effective(model: ModelConfig) -> dict[str, Any]:
    """The options by dotted path, with null and auto replaced by the values that they stand for.

    Two networks that compute the same function from the same weights have equal values, except for
    the options of the initial weights.
    """
    norm, options = model.norm, dict(leaves(model.model_dump()))
    of_placement = ("gpt.model.placement", "PLACEMENTS", norm.placement)
    has_norms = variants.attribute(*of_placement, "has_norms")
    options["norm.type"] = (norm.type or "layer") if has_norms else "none"
    if norm.final_norm == "auto":
        final = variants.attribute(*of_placement, "final_norm")
        options["norm.final_norm"] = "on" if final else "off"
    biased = options["norm.type"] in variants.names("gpt.model.norm", "BIASED")
    options["norm.bias"] = biased and (model.bias if norm.bias is None else norm.bias)
    if model.mlp.activation in ACTIVATIONS:  # others round it in their own way
        options["mlp.multiple"] = _hidden_width(model) / model.width
    return options


def without_counterpart(layout: Layout, model: ModelConfig) -> dict[str, Any]:
    """The options, with their values, that a layout cannot express; by dotted path.

    An option has a counterpart if it is the same after the way to `config.json` and back.
    """
    tree = layout.to_config(model)
    if not tree["activation_function"]:
        return {"mlp.activation": model.mlp.activation}
    back = effective(ModelConfig.model_validate(layout.to_options(tree)))
    return {
        option: value
        for option, value in effective(model).items()
        if back[option] != value and not option.startswith(OF_INITIALIZATION)
    }


def _hidden_width(model: ModelConfig) -> int:
    """Channels inside the feed-forward network, unless it is gated."""
    return round(model.width * model.mlp.multiple)


def _has_all_biases(model: ModelConfig) -> bool:
    return model.bias and model.norm.bias is not False

"""The valid name that a mistyped or foreign name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names of options and values in other programs (nanoGPT, litgpt, torch, and TrainingArguments and
# the model configs of transformers), by the name that they have here. A name may have several.
ALIASES = {
    "out-dir": (
        *("output_dir", "overwrite_output_dir", "log_dir", "logging_dir", "run_dir", "save_dir"),
    ),
    "max-seconds": ("max_time", "time_limit", "timeout"),
    "name": ("run_name", "output_dir", "out_dir", "wandb_run_name", "experiment_name"),
    "resume": ("resume_from_checkpoint", "load", "ckpt", "ckpt_path"),
    "seed": ("random_seed", "manual_seed"),
    "max-new-tokens": ("max_tokens", "max_length", "n_tokens", "num_tokens", "tokens", "length"),
    "num-samples": ("n_samples", "samples", "num_return_sequences", "n"),
    "prompt": ("start", "text", "input"),
    "checkpoint": ("ckpt", "ckpt_path", "checkpoint_dir", "step"),
    "weights": ("dtype", "torch_dtype", "precision", "quantize"),
    "workers": ("jobs", "n_jobs", "num_workers", "processes"),
    "init_from": (
        *("model_name", "model_name_or_path", "pretrained", "initial_checkpoint_dir"),
        *("checkpoint_dir", "resume_from_checkpoint", "load_from", "base_model", "finetune_from"),
    ),
    "tracking": ("wandb_log", "wandb", "wandb_project", "report_to", "logger", "logger_name"),
    "training": ("train", "trainer", "training_args"),
    "evaluation": ("eval", "validation"),
    "sampling": ("generation", "generate", "sample"),
    "schedule": ("scheduler", "lr_scheduler"),
    "data.source": ("dataset", "dataset_type", "data_type"),
    "data.path": (
        *("data", "data_dir", "data_path", "dataset_dir", "train_file", "train_data_path", "input"),
        *("text", "file", "files", "corpus"),
    ),
    "data.hub.name": ("dataset_name", "hf_dataset", "dataset_id"),
    "data.hub.config": ("dataset_config_name", "dataset_config", "subset"),
    "data.text_field": ("text_column", "text_key", "column", "field"),
    "data.tokenizer": ("tokenizer_name", "tokenizer_type", "encoding"),
    "data.vocabulary": ("tokenizer_dir", "tokenizer_path", "tokenizer_file", "vocab_file", "vocab"),
    "data.windows": ("shuffle", "sampler"),
    "data.val_fraction": (
        *("validation_fraction", "val_split_fraction", "val_split", "validation_split"),
        *("val_ratio", "test_size", "validation_split_percentage"),
    ),
    "model.layers": (
        *("n_layer", "n_layers", "num_layers", "num_hidden_layers", "num_blocks", "depth"),
        *("n_block", "n_blocks", "blocks"),
    ),
    "model.heads": ("n_head", "n_heads", "num_heads", "num_attention_heads", "nhead"),
    "model.width": (
        *("n_embd", "n_embed", "embed_dim", "emb_dim", "embedding_dim", "d_model", "dim"),
        *("hidden_size", "hidden_dim", "model_dim"),
    ),
    "model.context": (
        *("block_size", "n_positions", "n_ctx", "context_length", "context_size", "seq_len"),
        *("sequence_length", "max_seq_len", "max_seq_length", "max_position_embeddings"),
    ),
    "model.dropout": (
        *("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout"),
        *("p_dropout", "drop_rate"),
    ),
    "model.bias": ("attention_bias", "add_bias", "use_bias", "mlp_bias"),
    "model.tied_head": ("tie_word_embeddings", "tie_weights", "tie_embeddings", "weight_tying"),
    "model.norm.type": ("norm", "norm_class_name", "norm_type", "normalization"),
    "model.norm.placement": (
        *("norm_position", "post_attention_norm", "norm_first", "pre_norm", "prenorm"),
    ),
    "model.norm.eps": (
        *("layer_norm_epsilon", "layer_norm_eps", "norm_eps", "rms_norm_eps", "model.eps"),
    ),
    "model.init.regime": ("init", "initialization", "initializer_range", "init_std"),
    "model.attention.qk_norm": ("norm_qk", "qk_layernorm", "qknorm"),
    "model.mlp.activation": (
        *("activation_function", "hidden_act", "act_fn", "nonlinearity", "mlp_class_name"),
        *("hidden_activation", "act"),
    ),
    "model.mlp.multiple": ("n_inner", "intermediate_size", "mlp_ratio", "dim_feedforward", "d_ff"),
    "optimizer.name": ("optimizer", "optim", "optimizer_type", "opt"),
    "optimizer.learning_rate": ("lr", "max_lr", "base_lr", "peak_lr", "step_size"),
    "optimizer.beta1": ("adam_beta1", "betas"),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.eps": ("eps", "adam_epsilon", "epsilon", "adam_eps"),
    "optimizer.weight_decay": ("wd", "decay", "l2"),
    "optimizer.clip": (
        *("grad_clip", "gradient_clip", "max_grad_norm", "max_norm", "clip_grad_norm"),
        *("clip_grad", "gradient_clip_val"),
    ),
    "schedule.warmup_steps": ("warmup_iters", "lr_warmup_steps", "warmup_ratio", "warmup_fraction"),
    "schedule.body": (
        *("schedule", "scheduler", "lr_schedule", "lr_scheduler", "lr_scheduler_type"),
        *("decay_lr", "lr_decay", "schedule_type", "lr_scheduler_kwargs"),
    ),
    "schedule.final_ratio": ("min_lr", "min_lr_ratio", "final_lr", "lr_min", "eta_min"),
    "training.steps": (
        *("max_iters", "iters", "n_iters", "num_iters", "num_iterations", "iterations"),
        *("max_steps", "num_steps", "n_steps", "train_steps", "total_steps", "lr_decay_iters"),
        *("epochs", "num_epochs", "num_train_epochs", "max_epochs", "max_tokens", "t_max"),
    ),
    "training.batch_sequences": ("batch_size", "global_batch_size", "train_batch_size", "bs"),
    "training.batch_tokens": ("total_batch_size", "tokens_per_batch", "tokens_per_step"),
    "training.micro_batch": (
        *("micro_batch_size", "per_device_train_batch_size", "device_batch_size"),
        *("gradient_accumulation_steps", "gradient_accumulation_iters", "grad_accum"),
        "grad_accum_steps",
    ),
    "training.precision": ("dtype", "torch_dtype", "amp", "mixed_precision", "fp16", "bf16"),
    "training.compile": ("torch_compile",),
    "training.processes": ("nproc_per_node", "nproc", "num_processes", "world_size", "devices"),
    "training.parallel": ("strategy", "fsdp", "ddp", "distributed"),
    "training.device": ("use_cpu", "no_cuda", "accelerator"),
    "training.log_every": ("log_interval", "logging_steps", "log_freq", "log_every_n_steps"),
    "evaluation.every": (
        *("eval_interval", "eval_steps", "eval_every", "val_interval", "val_check_interval"),
        *("eval.interval", "eval_freq", "val_every", "eval_strategy", "evaluation_strategy"),
    ),
    "evaluation.sequences": (
        *("eval_iters", "eval_batches", "val_iters", "max_eval_samples", "eval.max_iters"),
        "eval_accumulation_steps",
    ),
    "evaluation.patience": ("early_stopping", "early_stopping_patience"),
    "checkpoint.every": (
        *("save_every", "save_steps", "save_interval", "ckpt_interval", "checkpoint_interval"),
        *("checkpoint_every", "always_save_checkpoint", "save_strategy"),
    ),
    "checkpoint.keep": ("save_total_limit", "keep_last", "max_checkpoints", "max_to_keep"),
    "temperature": ("temp",),
    "sampling.temperature": ("temp",),
    "sampling.every": ("sample_every", "sample_interval"),
    "sampling.prompt": ("start", "sample_prompt"),
    "sampling.tokens": ("max_new_tokens", "max_tokens", "eval.max_new_tokens"),
    # Commands
    "train": ("pretrain", "finetune", "fine_tune", "fit"),
    "sample": ("generate", "chat", "complete"),
    "eval": ("evaluate", "evaluation", "test", "validate"),
    "prepare": ("prepare_data", "preprocess", "tokenize", "data"),
    "compare": ("sweep", "grid"),
    "runs": ("list", "ls", "status"),
    "plan": ("estimate", "dry_run", "budget"),
    "export": ("convert", "convert_to_litgpt", "save"),
    # Values
    "adamw": (
        *("adam", "adamw_torch", "adamw_hf", "adamw_torch_fused", "fused_adamw", "adamw_8bit"),
        *("adamw_bnb_8bit", "paged_adamw", "paged_adamw_8bit", "paged_adamw_32bit"),
    ),
    "muon": ("muonclip", "normuon"),
    "bpe": ("byte_level_bpe", "bytelevel", "sentencepiece"),
    "bytes": ("byte", "byte_level", "utf_8", "utf8"),
    "chars": ("char", "character", "characters"),
    "gpt2": ("gpt_2", "tiktoken", "r50k_base"),
    "text": ("txt", "file", "files", "folder", "utf_8"),
    "file": ("hf", "huggingface", "hugging_face", "pretrained", "tokenizers"),
    "hub": (
        *("hf", "huggingface", "hugging_face", "datasets", "openwebtext", "fineweb", "wikitext"),
        "tinystories",
    ),
    "tensorboard": ("tb", "tensor_board"),
    "wandb": ("weights_and_biases", "weights&biases"),
    "layer": ("ln", "layernorm", "layer_norm"),
    "rms": ("rmsnorm", "rms_norm"),
    "batch": ("bn", "batchnorm", "batch_norm"),
    "pre": ("preln", "pre_ln", "prenorm", "pre_norm"),
    "post": ("postln", "post_ln", "postnorm", "post_norm"),
    "peri": ("sandwich", "sandwich_ln", "both"),
    "res_post": ("olmo2", "reordered", "swin2"),
    "relu2": ("squared_relu", "relu_squared", "sqrelu", "relu^2"),
    "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh", "quick_gelu"),
    "swiglu": ("silu", "swish", "glu", "geglu"),
    "small": ("smallinit", "small_init"),
    "xavier": ("glorot", "xavier_normal", "xavier_uniform"),
    "constant": ("constant_with_warmup", "flat", "none", "null", "false", "off"),
    "cosine": ("cosine_with_warmup", "cosine_annealing", "cosineannealinglr", "cos"),
    "wsd": ("warmup_stable_decay", "trapezoid", "trapezoidal"),
    "inverse_sqrt": ("rsqrt", "noam", "isqrt"),
    "none": ("null", "false", "off", "no", "identity"),
    "off": ("none", "null", "no"),
    "cuda": ("gpu", "nvidia"),
    "mps": ("metal", "apple"),
    "fp32": ("float32", "float", "32", "32_true", "full", "tf32"),
    "bf16": ("bfloat16", "bf16_true", "bf16_mixed"),
    "fp16": ("float16", "half", "fp16_mixed", "16", "16_mixed", "16_true"),
    "int8": ("8bit", "int4", "bnb.int8"),
}  # fmt: skip

# Options of other programs that have no counterpart here, but resemble a name here.
WITHOUT_COUNTERPART = {
    *("dampening", "dataloader_num_workers", "do_eval", "do_train", "fused"),
    *("gradient_checkpointing", "preprocessing_num_workers"),
}


def nearest(name: str, names: Iterable[str]) -> str:
    """`"; perhaps you meant X"` for the valid name closest to `name`, or an empty string."""
    found = closest(name, names)
    return "" if found is None else f"; perhaps you meant {found}"


def closest(name: str, names: Iterable[str]) -> str | None:
    """The valid name that `name` may have meant, or None.

    A name that ends with `name` comes first, so that `norm.eps` finds `model.norm.eps`; next an
    option whose value was typed as a section, so that `data.tokenizer.type` finds `data.tokenizer`;
    then what other programs call an option or a value (`ALIASES`). Then a name with the same last
    part wins, so that `optim.learning_rate` finds `optimizer.learning_rate`; next comes a similar
    name, and then one with which `name` begins, so that `prenorm` finds `pre`.
    """
    name = _plain(name)
    known = {_plain(valid): valid for valid in reversed(list(names))}
    last = name.rpartition(".")[2]
    by_last = {plain.rpartition(".")[2]: plain for plain in known}
    by_alias = {
        alias: _plain(valid)
        for valid, aliases in reversed(ALIASES.items())
        for alias in aliases
        if _plain(valid) in known
    }
    prefixes = [p for p in reversed(known) if "." not in name and len(p) > 2 and name.startswith(p)]

    def alike(near: str) -> bool:  # not only because both are in the same section
        parts = "." in name and difflib.SequenceMatcher(a=last, b=near.rpartition(".")[2])
        return not parts or parts.ratio() >= 0.5

    if last in WITHOUT_COUNTERPART:
        return None
    found = [  # the surest first
        *(plain for plain in known if "." in name and plain.endswith(f".{name}")),
        *(plain for plain in known if plain == name.rpartition(".")[0]),
        by_alias.get(name) or by_alias.get(last),
        by_last.get(last),
        *difflib.get_close_matches(name, known, n=1, cutoff=0.8),
        *(plain for plain in known if sorted(plain) == sorted(name)),  # letters swapped
        *prefixes,
        *(near for near in difflib.get_close_matches(name, known, n=1, cutoff=0.6) if alike(near)),
        *(by_last[near] for near in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)),
        *(by_alias[near] for near in difflib.get_close_matches(last, by_alias, n=1, cutoff=0.8)),
    ]
    return next((known[plain] for plain in found if plain), None)


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_")

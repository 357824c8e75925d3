"""Tokenizers in Hugging Face's format: the same ids and text in that library, and read back."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gpt.config import DataConfig
from gpt.data import hf_tokenizer, tokenizer
from gpt.data.cache import plan
from gpt.data.tokenizer import GPT2_FILES, TOKENIZERS, Encoding, encode, gpt2_file, to_hf, train_bpe
from gpt.errors import InputError

NAMES = [name for name, each in TOKENIZERS.items() if each.pattern]
TRAINING = [
    Path(importlib.util.__file__).read_text("utf-8"),
    "naïve café, the façade — 日本語\n" * 20,
]
MIXED = "".join(
    random.Random(0).choices(
        "etaoin shrdlu\n\t'(0.7éàüßñ日本語中文한국어🙂🚀👍🏽العربيةक्षि\u00a0\u2028", k=20_000
    )
)
MEAN = [
    "",
    " ",
    "   ",
    "\n",
    "\r\n\r\n \t x  ",
    "<|endoftext|>",
    "a<|endoftext|> <|endoftext|>b",
    "it's I'LL 'twas",
    "\x00\x85\u2028 \u3000x\u180ey\u200b\ufeff",
    "e\u0301\u0301 👩‍👩‍👧 ١٢ⅷ²",
    "x" * 2000 + " " * 2000,
]


@functools.cache
def make(name: str) -> Encoding:
    known = [*TRAINING, *MEAN, MIXED] if name == "chars" else TRAINING
    try:
        return TOKENIZERS[name].make(DataConfig(tokenizer=name, vocab_size=400), known)
    except InputError:
        pytest.skip("GPT-2's vocabulary is not in tiktoken's cache, and the network has none")


@pytest.fixture(scope="module", params=NAMES)
def encoding(request: pytest.FixtureRequest) -> Encoding:
    return make(request.param)


def written(encoding: Encoding, folder: Path) -> Path:
    for name, text in to_hf(encoding, 64).items():
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def exported(encoding: Encoding, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(encoding, tmp_path_factory.mktemp(encoding.name))


def test_the_library_gives_the_same_ids_and_text(encoding: Encoding, exported: Path):
    theirs = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    theirs.encode_special_tokens = True  # tokenizer_config.json's split_special_tokens
    assert theirs.get_vocab_size() == encoding.n_vocab
    for text in [*MEAN, MIXED]:
        ids = encode(encoding, text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    any_ids = random.Random(1).choices(range(encoding.n_vocab), k=2000)  # not valid UTF-8
    assert theirs.decode(any_ids, skip_special_tokens=False) == encoding.decode(any_ids)
    assert theirs.token_to_id("<|endoftext|>") == encoding.eot_token


def test_it_is_read_back(encoding: Encoding, exported: Path):
    again = tokenizer.load(exported)
    assert (again.name, list(again.tokens)) == (encoding.name, list(encoding.tokens))


def test_a_character_that_the_vocabulary_lacks_is_an_error_there_too(tmp_path: Path):
    folder = written(make("chars"), tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("Ω")


def test_the_merges_are_those_that_the_library_learned():
    trained = json.loads(train_bpe(TRAINING, 400).to_str())["model"]
    ordered = sorted(trained["vocab"], key=trained["vocab"].get)
    tokens = [hf_tokenizer.from_printable(text) for text in ordered]
    merges = [" ".join(pair) for pair in trained["merges"]]
    assert len(merges) == 399 - 256
    assert hf_tokenizer.recover_merges(tokens) == merges


def test_gpt2_as_its_first_files(tmp_path: Path):
    expected = make("gpt2")
    for name, file in zip(("merges.txt", "vocab.json"), GPT2_FILES, strict=True):
        (tmp_path / name).write_bytes(gpt2_file(file).read_bytes())
    read = tokenizer.load(tmp_path)
    assert (read.name, list(read.tokens)) == ("gpt2", list(expected.tokens))


def test_older_files_leave_out_what_is_usual(tmp_path: Path):
    """GPT-2's own tokenizer.json has no model type, no use_regex, and a post-processor."""
    path = written(make("bpe"), tmp_path) / "tokenizer.json"
    tree = json.loads(path.read_text("utf-8"))
    del (
        tree["model"]["type"],
        tree["pre_tokenizer"]["use_regex"],
        tree["model"]["vocab"]["<|endoftext|>"],
    )
    tree["model"] |= {"unk_token": "<|endoftext|>", "continuing_subword_prefix": ""}
    tree["model"]["merges"] = [merge.split(" ") for merge in tree["model"]["merges"]]
    tree["post_processor"] = {"type": "ByteLevel", "trim_offsets": False}
    path.write_text(json.dumps(tree), "utf-8")
    assert list(tokenizer.load(path).tokens) == list(make("bpe").tokens)


def test_a_folder_is_a_vocabulary_like_the_file_of_a_run(tmp_path: Path):
    encoding, keys = make("bpe"), set()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tokenizer.json").write_text(tokenizer.to_json(encoding), "utf-8")
    written(encoding, tmp_path)
    for path in ("run", "run/tokenizer.json", "", "tokenizer.json"):
        config = DataConfig(tokenizer="file", vocabulary=str(tmp_path / path))
        assert list(TOKENIZERS["file"].make(config, []).tokens) == list(encoding.tokens)
        keys.add(plan(config)[0])
    assert len(keys) == 1  # they share prepared data


def swap_merges(tree: Any) -> None:
    merges = tree["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def rename_a_token(tree: Any) -> None:
    vocab = tree["model"]["vocab"]
    vocab["語"] = vocab.pop("a")


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "normalizer": (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer"),
    "space before": (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "ByteLevel"),
    "another split": (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "no split": (lambda t: t.update(pre_tokenizer=None), "pre-tokenizer None"),
    "merges of whole texts": (
        lambda t: t["pre_tokenizer"].update(use_regex=False),
        "not split into words",
    ),
    "another model": (lambda t: t["model"].update(type="Unigram"), "Unigram"),
    "suffix": (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "dropout": (lambda t: t["model"].update(dropout=0.1), "dropout"),
    "adds tokens": (lambda t: t.update(post_processor={"type": "Bert"}), "post_processor"),
    "merges": (swap_merges, "merges"),
    "merges of numbers": (lambda t: t["model"].update(merges=[1]), "cannot use"),
    "a token more": (
        lambda t: t["added_tokens"].append({"id": 400, "content": "<pad>"}),
        "special",
    ),
    "end elsewhere": (lambda t: t["added_tokens"][0].update(id=5), "special"),
    "gap": (lambda t: t["model"]["vocab"].update(zzz=500), "0, 1, 2"),
    "not a byte": (rename_a_token, "'語' does not stand for a byte"),
    "list": (lambda t: t["model"].update(vocab=["a"]), "cannot use"),
    "nothing": (lambda t: t["model"].clear(), "cannot use"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_tokenizers_that_would_give_other_ids_are_refused(what: str, tmp_path: Path):
    path = written(make("bpe"), tmp_path) / "tokenizer.json"
    tree = json.loads(path.read_text("utf-8"))
    change, message = REFUSED[what]
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")
    with pytest.raises(InputError, match=f"(?s)Hugging Face tokenizer.*{message}"):
        tokenizer.load(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(InputError, match=r"has no tokenizer\.json, nor vocab\.json and merges"):
        tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("[")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match="damaged"):
        tokenizer.load(tmp_path)


def test_a_vocabulary_that_is_not_a_bpe_cannot_be_written():
    tokens = [bytes([byte]) for byte in range(256)]
    for more, what in (([b"abc"], "token 256"), ([b"a" * 600], "token 256")):
        with pytest.raises(InputError, match=what):
            to_hf(Encoding("bpe", [*tokens, *more]), 64)


# ---------------------------------------------------------------------------------------------
# With transformers and lm_eval


@pytest.mark.slow
def test_transformers_loads_it_offline(encoding: Encoding, exported: Path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)
    for text in [*MEAN, MIXED]:
        ids = encode(encoding, text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    end = encoding.eot_token
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (end, end, end)
    assert len(theirs) == encoding.n_vocab
    assert len(theirs("word " * 100, truncation=True)["input_ids"]) == 64


TASK = """\
task: my_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: extra eval"
)
def test_lm_eval_measures_the_same_loss(tmp_path: Path):
    """Bits per byte of documents that fit the context, each after an end of text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    encoding, end = make("bpe"), make("bpe").eot_token
    torch.manual_seed(0)
    ids = {"bos_token_id": end, "eos_token_id": end}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=encoding.n_vocab, n_positions=64, n_embd=32, n_layer=1, n_head=2, **ids
        )
    ).eval()
    exported = tmp_path / "exported"
    model.save_pretrained(exported)
    written(encoding, exported)
    documents = ["def f(x):\n    return x", "naïve café", "<|endoftext|> is text"]
    data, tasks = tmp_path / "text.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tasks.mkdir()
    (tasks / "my_text.yaml").write_text(TASK.format(path=data))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "my_text"]
    command += ["--model_args", f"pretrained={exported}", "--include_path", str(tasks)]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "results.json")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, env={**os.environ, **offline}, check=True, capture_output=True)
    (path,) = tmp_path.rglob("results*.json")
    measured = json.loads(path.read_text())["results"]["my_text"]["bits_per_byte,none"]
    nats = 0.0
    for text in documents:
        tokens = torch.tensor([[end, *encode(encoding, text)]])
        with torch.no_grad():
            nats += float(model(tokens, labels=tokens).loss) * (tokens.shape[1] - 1)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in documents)
    assert measured == pytest.approx(expected, rel=1e-4)

"""Speed of preparation and of reading batches: `python benchmarks/data.py`.

Three ways to turn a JSONL file into a file of token ids, each in its own process, taking turns:

    steadygpt       gpt.data.preparation.prepare: all cores
    plain loop      one process over tiktoken's encode_ordinary, as most scripts do
    datasets.map    `datasets` with the fast tokenizer of `transformers`, one process per core

Each runs with GPT-2's vocabulary and with a BPE of 16,384 tokens trained beforehand. The text is a
sample of the Python sources of this interpreter and its packages. Times include loading the
vocabulary, parsing the JSON and writing the ids, but not start-up and imports; steadygpt's include
its checksums and counts. Memory is the peak of all processes of a contestant together, counting
shared pages once (PSS), polled every 50 ms.

Finally, the time to read a training batch is compared with the time of a training step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gpt.config import Config, DataConfig, load, validate
from gpt.data import tokenizer
from gpt.data.hf_tokenizer import END_OF_TEXT

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 16384


# ---------------------------------------------------------------------------------------------
# The contestants: each writes token ids to a file and returns their number


def steadygpt(corpus: Path, kind: str, folder: Path) -> int:
    """`prepare` with a validation file of one word, so that all of `corpus` goes to one file."""
    from gpt.data.preparation import prepare

    tree = {
        "source": "jsonl",
        "path": str(corpus),
        "validation": {"source": "text", "path": str(folder / "one-word.txt")},
        "cache_dir": str(folder / "cache"),
        **({"tokenizer": "gpt2"} if kind == "gpt2" else {"tokenizer": "file"}),
        "vocabulary": None if kind == "gpt2" else str(folder / "bpe.json"),
    }
    return prepare(validate(DataConfig, tree)).train_tokens


def plain_loop(corpus: Path, kind: str, folder: Path) -> int:
    """Encode line by line in one process, as a short script does."""
    if kind == "gpt2":
        encoding = tokenizer.gpt2_tokenizer(DataConfig(), ())
    else:
        encoding = tokenizer.load(folder / "bpe.json")
    count = 0
    with corpus.open() as lines, (folder / "plain.bin").open("wb") as file:
        for line in lines:
            ids = encoding.encode_ordinary(json.loads(line)["text"])
            ids.append(encoding.eot_token)
            np.array(ids, dtype=np.uint16).tofile(file)
            count += len(ids)
    return count


def datasets_map(corpus: Path, kind: str, folder: Path) -> int:
    """Tokenize with `map`, one process per core, then write the ids in batches."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / f"{kind}-library.json"), model_max_length=10**12
    )
    end = len(fast)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*ids, end] for ids in fast(batch["text"])["input_ids"]]}

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "json", data_files=str(corpus), split="train", cache_dir=str(folder / "datasets")
    )
    rows = rows.map(encode, batched=True, remove_columns=["text"], num_proc=os.cpu_count())
    count = 0
    with (folder / "datasets.bin").open("wb") as file:
        for batch in rows.with_format("numpy").iter(batch_size=1000):
            ids = np.concatenate(list(batch["ids"])).astype(np.uint16)
            ids.tofile(file)
            count += len(ids)
    return count


CONTESTANTS: dict[str, Callable[[Path, str, Path], int]] = {
    "steadygpt": steadygpt,
    "plain loop": plain_loop,
    "datasets.map": datasets_map,
}


def run_contestant(name: str, corpus: Path, kind: str, folder: Path) -> dict[str, float]:
    """Run a contestant in a fresh process: its tokens, seconds and peak memory in MB."""
    command = [sys.executable, __file__, "--contestant", name, kind, str(corpus), str(folder)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    watched = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        total = 0
        for each in [watched, *_children(watched)]:
            try:
                total += each.memory_full_info().pss
            except (psutil.Error, OSError):
                continue  # it has just ended
        peak = max(peak, total)
        time.sleep(0.05)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"{name} failed")
    result: dict[str, float] = json.loads(process.stdout.read().splitlines()[-1])
    return {**result, "memory": peak / 1e6}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def contestant(name: str, kind: str, corpus: str, folder: str) -> None:
    """Run one contestant and print its result; imports are not timed."""
    import gpt.data.preparation  # noqa: F401

    if name == "datasets.map":
        import datasets  # noqa: F401
        import transformers  # noqa: F401
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        for path in Path(folder).glob("*.*"):
            os.link(path, Path(fresh) / path.name)
        began = time.perf_counter()
        tokens = CONTESTANTS[name](Path(corpus), kind, Path(fresh))
        seconds = time.perf_counter() - began
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


# ---------------------------------------------------------------------------------------------
# The corpus and the vocabularies


def write_corpus(path: Path, megabytes: float) -> int:
    """Write an even sample of all Python sources as JSONL; returns its text's size in bytes."""
    roots = {Path(os.__file__).parent, *(Path(p) for p in sys.path if p.endswith("-packages"))}
    files = sorted({p for root in roots for p in root.rglob("*.py")})
    texts = []
    for file in files:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text and "\0" not in text:
            texts.append(text)
    every = max(1.0, sum(map(len, texts)) / (megabytes * 1e6))
    chosen = [texts[int(i * every)] for i in range(int(len(texts) / every))]
    with path.open("w") as corpus:
        corpus.writelines(json.dumps({"text": text}) + "\n" for text in chosen)
    return sum(len(text.encode()) for text in chosen)


def write_vocabularies(corpus: Path, folder: Path) -> None:
    """Write the BPE for steadygpt and for `tokenizers`, and GPT-2's vocabulary for the latter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = (json.loads(line)["text"] for line in corpus.open())
    sample = [text for number, text in enumerate(texts) if number % 5 == 0]
    tokenizer.train_bpe(sample, VOCAB_SIZE).save(str(folder / "bpe-library.json"))
    ours = tokenizer.bpe_tokenizer(DataConfig(vocab_size=VOCAB_SIZE), sample)
    (folder / "bpe.json").write_text(tokenizer.to_json(ours), "utf-8")
    tokenizer.gpt2_tokenizer(DataConfig(), ())  # fetches the files unless they are there
    merges, vocabulary = (tokenizer.gpt2_file(name) for name in ("vocab.bpe", "encoder.json"))
    ids = json.loads(vocabulary.read_text("utf-8"))
    del ids[END_OF_TEXT]
    lines = merges.read_text("utf-8").splitlines()[1:]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    library = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.save(str(folder / "gpt2-library.json"))
    (folder / "one-word.txt").write_text("word")


# ---------------------------------------------------------------------------------------------
# Batches


def batch_reading(name: str, config: Config, folder: Path) -> dict[str, Any]:
    """Median seconds to read a batch, mean seconds of a training step, and their ratio."""
    from gpt.data.preparation import prepare
    from gpt.data.sequences import TrainingSequences
    from gpt.training import train

    dataset = prepare(config.data)
    sequences = TrainingSequences(dataset.train, config.model.context, config.data_seed)
    times = []
    for step in range(1, 301):
        began = time.perf_counter()
        sequences.batch(step, config.batch_sequences)
        times.append(time.perf_counter() - began)
    result = train(config, folder / name, quiet=True)
    seconds = config.batch_sequences * config.model.context / result.tokens_per_second
    read = statistics.median(times)
    return {"config": name, "read": read, "step": seconds, "share": read / seconds}


def main() -> None:
    """Run both benchmarks and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100, help="of text, roughly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--contestant", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contestant(*options.contestant)
        return
    packages = ("steadygpt", "tiktoken", "tokenizers", "transformers", "datasets", "torch")
    figures: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "preparation": [],
        "batches": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_corpus(folder / "corpus.jsonl", options.megabytes)
        figures["bytes"] = size
        write_vocabularies(folder / "corpus.jsonl", folder)
        for kind in ("gpt2", "bpe"):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
            for _ in range(options.rounds):
                for name in CONTESTANTS:
                    runs[name].append(run_contestant(name, folder / "corpus.jsonl", kind, folder))
                    print(f"{kind} {name}: {runs[name][-1]}", file=sys.stderr)
            assert len({run["tokens"] for each in runs.values() for run in each}) == 1
            for name, each in runs.items():
                seconds = statistics.median(run["seconds"] for run in each)
                figures["preparation"].append(
                    {
                        "vocabulary": kind,
                        "contestant": name,
                        "tokens": each[0]["tokens"],
                        "seconds": [run["seconds"] for run in each],
                        "tokens_per_second": each[0]["tokens"] / seconds,
                        "megabytes_per_second": size / 1e6 / seconds,
                        "peak_memory_megabytes": max(run["memory"] for run in each),
                    }
                )
        short = {"training": {"steps": 30}, "evaluation": {"sequences": 1}}
        quick = load(ROOT / "configs/quickstart.yaml", short)
        chars = {"data": {"source": "stdlib", "path": [], "tokenizer": "bytes"}, **short}
        small = load(ROOT / "configs/tiny-shakespeare-char.yaml", chars)
        for name, config in (("quickstart", quick), ("nanoGPT's CPU setting", small)):
            figures["batches"].append(batch_reading(name, config, folder))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))


def table(figures: dict[str, Any]) -> str:
    """The figures as text: median speeds over the rounds, and the largest peaks."""
    lines = [
        f"{figures['machine']}; Python {figures['python']}; "
        + ", ".join(f"{name} {version}" for name, version in figures["versions"].items()),
        f"{figures['bytes'] / 1e6:,.1f} MB of text",
        "",
        f"{'':20}{'tokens/s':>14}{'MB/s':>8}{'peak MB':>9}{'steadygpt is':>14}",
    ]
    rows = figures["preparation"]
    for row in rows:
        ours = next(r for r in rows if r["vocabulary"] == row["vocabulary"])
        ratio = ours["tokens_per_second"] / row["tokens_per_second"]
        lines.append(
            f"{row['vocabulary']:6}{row['contestant']:14}{row['tokens_per_second']:14,.0f}"
            f"{row['megabytes_per_second']:8.1f}{row['peak_memory_megabytes']:9.0f}"
            + (f"{ratio:13.2f}x" if row is not ours else "")
        )
    lines += ["", f"{'':26}{'batch read':>12}{'step':>10}{'share':>9}"]
    for row in figures["batches"]:
        lines.append(
            f"{row['config']:26}{row['read'] * 1e6:9.0f} µs{row['step'] * 1e3:7.0f} ms"
            f"{row['share']:9.2%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

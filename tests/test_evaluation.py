"""Evaluation: against a plain loop in float64, against training, and as a user calls it."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_cli import called
from torch.nn import functional as F

from gpt import evaluation
from gpt.config import Config, ModelConfig
from gpt.data.preparation import prepare
from gpt.data.sequences import ValidationSequences
from gpt.data.tokenizer import byte_lengths
from gpt.errors import InputError
from gpt.evaluation import Estimate, evaluate, windows
from gpt.model.gpt2 import GPT
from gpt.run.loading import load_run
from gpt.training import train

CONTEXT, VOCABULARY = 8, 12
LENGTHS = [1, 2, 1, 3, 1, 1, 4, 1, 1, 1, 2, 0]  # bytes; the last token is end of text
END = VOCABULARY - 1
Run = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> GPT:
    """A network in float64 whose predictions differ from token to token."""
    network = GPT(ModelConfig(layers=2, heads=2, width=8, context=CONTEXT), VOCABULARY).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5, generator=generator)
    return network.eval()


def text(*lengths: int) -> np.ndarray:
    """Documents of these lengths, end of text included."""
    random = np.random.default_rng(len(lengths))
    return np.concatenate([[*random.integers(END, size=n - 1), END] for n in lengths])


def by_loop(model: GPT, tokens: np.ndarray, stride: int) -> np.ndarray:
    """The loss of tokens 1, 2, ...: each from the window that scores it, one window per token."""
    losses = []
    for target in range(1, len(tokens)):
        late = max(0, target - CONTEXT)  # targets that no longer fit into the first window
        start = -(-late // stride) * stride
        with torch.no_grad():
            logits = model(torch.tensor(tokens[start:target])[None])[0, -1]
        losses.append(-logits.log_softmax(-1)[tokens[target]].item())
    return np.array(losses)


def in_pieces(tokens: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (tokens[at : at + size].astype(np.uint16) for at in range(0, len(tokens), size))


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("lengths", [(2,), (9,), (10, 2, 3), (30, 1, 25, 40, 7)])
def test_every_number_is_that_of_a_plain_loop(
    model: GPT, lengths: tuple[int, ...], stride: int, monkeypatch: pytest.MonkeyPatch
):
    tokens = text(*lengths)
    monkeypatch.setattr(model, "loss_chunk", 5)
    found = evaluate(model, in_pieces(tokens, 6), byte_lengths=LENGTHS, stride=stride, batch=3)

    losses, targets = by_loop(model, tokens, stride), tokens[1:]
    sizes = np.array(LENGTHS)[targets]
    assert (found.tokens, found.bytes) == (len(targets), sizes.sum())
    loss, bits = losses.mean(), losses.sum() / math.log(2) / max(1, sizes.sum())
    assert found.loss.value == pytest.approx(loss, rel=1e-12)
    assert found.perplexity.value == pytest.approx(math.exp(loss), rel=1e-12)
    if sizes.sum():
        assert found.bits_per_byte.value == pytest.approx(bits, rel=1e-12)

    document = np.cumsum(tokens == END)[:-1]
    documents = [np.flatnonzero(document == d) for d in np.unique(document)]
    assert found.documents == len(documents)
    if len(documents) == 1:
        assert found.loss.error is None
        return
    D = len(documents)
    misfit = [losses[d].sum() - loss * len(d) for d in documents]
    error = math.sqrt(D / (D - 1) * sum(m * m for m in misfit)) / len(targets)
    assert found.units == "documents"
    assert found.loss.error == pytest.approx(error, rel=1e-9)
    assert found.perplexity.error == pytest.approx(error * math.exp(loss), rel=1e-9)
    misfit = [losses[d].sum() / math.log(2) - bits * sizes[d].sum() for d in documents]
    error = math.sqrt(D / (D - 1) * sum(m * m for m in misfit)) / sizes.sum()
    assert found.bits_per_byte.error == pytest.approx(error, rel=1e-9)


def test_the_loss_by_position_is_that_of_a_plain_loop(model: GPT):
    tokens, stride = text(50, 20), 3
    found = evaluate(model, [tokens], byte_lengths=LENGTHS, stride=stride).by_position
    losses = by_loop(model, tokens, stride)
    seen = [t if t <= CONTEXT else t - -(-(t - CONTEXT) // stride) * stride for t in range(1, 70)]
    ranges = [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert [(p.first, p.last) for p in found] == ranges
    for position, (first, last) in zip(found, ranges, strict=True):
        own = [x for x, n in zip(losses, seen, strict=True) if first <= n <= last]
        assert position.tokens == len(own)
        assert position.loss == pytest.approx(np.mean(own), rel=1e-12)
    assert sum(position.tokens for position in found) == len(losses)


def test_windows_score_every_token_but_the_first_once():
    tokens = np.arange(30)
    for stride in (1, 3, CONTEXT):
        scored: list[int] = []
        for ids, count in windows(in_pieces(tokens, 7), CONTEXT, stride):
            assert len(ids) <= CONTEXT + 1
            scored += ids[-count:].tolist()
        assert scored == list(range(1, 30))


def test_the_standard_error_is_that_of_resampled_documents():
    random = np.random.default_rng(0)
    sizes = random.integers(5, 60, 80)
    level = random.normal(3, 0.4, 80)  # tokens of a document share a level
    sums = evaluation._Sums(CONTEXT, LENGTHS)
    losses, targets = [], []
    for size, mean in zip(sizes, level, strict=True):
        losses += list(random.normal(mean, 1, size))
        targets += [0] * (size - 1) + [END]
    for loss, target in zip(losses, targets, strict=True):  # windows of one target
        sums.add(np.array([[loss]]), np.array([[target]]), 0)
    ends = np.cumsum(sizes)
    totals = np.array([sum(losses[e - n : e]) for e, n in zip(ends, sizes, strict=True)])
    drawn = random.integers(80, size=(4000, 80))
    ratios = totals[drawn].sum(1) / sizes[drawn].sum(1)
    found = sums.evaluation()
    assert found.loss.error == pytest.approx(ratios.std(), rel=0.06)
    naive = np.std(losses) / math.sqrt(len(losses))  # as if tokens were independent
    assert found.loss.error > 1.5 * naive


@pytest.mark.parametrize(("length", "blocks"), [(60, None), (90, 12), (513, 64), (4097, 64)])
def test_one_document_is_cut_into_contiguous_blocks(model: GPT, length: int, blocks: int | None):
    found = evaluate(model, [text(length)], byte_lengths=LENGTHS)
    assert found.documents == 1
    if blocks is None:
        assert (found.units, found.loss.error) == (None, None)
        return
    assert (found.units, found.unit_count) == ("blocks", blocks)
    losses = by_loop(model, text(length), CONTEXT) if length < 1000 else None
    if losses is not None:
        parts = np.array_split(losses, range(CONTEXT, len(losses), CONTEXT))
        misfit = [part.sum() - losses.mean() * len(part) for part in parts]
        n = len(parts)
        error = math.sqrt(n / (n - 1) * sum(m * m for m in misfit)) / len(losses)
        assert found.loss.error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_blocks_are_no_shorter_for_a_smaller_stride(model: GPT, stride: int):
    short = evaluate(model, [text(60)], byte_lengths=LENGTHS, stride=stride)
    assert (short.units, short.loss.error) == (None, None)
    side_by_side, strided = (
        evaluate(model, [text(2100)], byte_lengths=LENGTHS, stride=n) for n in (CONTEXT, stride)
    )
    assert 32 <= strided.unit_count <= 64
    assert strided.effective_units > 32
    assert strided.loss.error == pytest.approx(side_by_side.loss.error, rel=0.5)


def test_identical_documents_have_no_error(model: GPT):
    tokens = np.tile(text(CONTEXT), 20)
    tokens = np.concatenate([[END], tokens])  # windows begin where documents begin
    assert evaluate(model, [tokens], byte_lengths=LENGTHS).loss.error == pytest.approx(0, abs=1e-7)


def test_an_overflowing_loss_is_not_a_number():
    sums = evaluation._Sums(CONTEXT, LENGTHS)
    sums.add(np.array([[800.0, 900.0]]), np.array([[0, END]]), 0)
    assert sums.evaluation().perplexity == Estimate(None, None)
    sums.add(np.array([[math.nan, 1.0]]), np.array([[0, END]]), 0)
    assert sums.evaluation().loss == Estimate(None, None)


def test_an_empty_text_is_an_error(model: GPT):
    for tokens in (np.array([], int), np.array([END])):
        with pytest.raises(InputError, match="is empty"):
            evaluate(model, [tokens], byte_lengths=LENGTHS)


def test_memory_does_not_grow_with_the_text(model: GPT, monkeypatch: pytest.MonkeyPatch):
    fake = lambda model, inputs, targets: torch.ones(targets.shape)  # noqa: E731
    monkeypatch.setattr(evaluation, "token_losses", fake)
    piece = text(*[50] * 40)

    def peak(pieces: int) -> int:
        tracemalloc.start()
        evaluate(model, (piece for _ in range(pieces)), byte_lengths=LENGTHS)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(8) < peak(2) + 20_000  # 8 bytes for each of the 12,000 more tokens are 96,000


# -- The command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that validates on whole windows of all of its validation text: 4 of 16 tokens."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "val.txt").write_text("The lazy dog jumps; " * 3 + "end.")  # 64, and end of text
    data = {"validation": {"path": [str(folder / "val.txt")]}}
    train(tiny(data=data, evaluation={"sequences": None}), folder / "run", quiet=True)
    return folder / "run"


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> Run:
    code, out, err = called(capsys, "eval", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("checkpoint", ["best", "latest", "10", "20"])
def test_the_loss_is_the_one_that_training_logged(
    run: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
):
    (found,) = evaluated(capsys, run, "--checkpoint", checkpoint)["runs"]
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (logged,) = [r for r in lines if r["step"] == found["step"] and "val_loss" in r]
    assert found["tokens"] == 64
    assert found["loss"]["value"] == pytest.approx(logged["val_loss"], rel=2e-7)  # fp32 sums
    bits = found["bits_per_byte"]["value"]
    assert bits == pytest.approx(logged["val_bits_per_byte"], rel=2e-7)


def test_it_computes_as_training_does(
    run: Path,
    tmp_path: Path,
    tiny: Callable[..., Config],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """In the run's precision, with as many logits at a time."""
    data = {"validation": {"path": [str(run.parent / "val.txt")]}}
    training = {"steps": 2, "precision": "bf16", "loss_chunk": 7}
    config = tiny(data=data, training=training, evaluation={"sequences": None})
    logged = train(config, tmp_path / "run", quiet=True).val_loss
    chunks, token_losses = [], evaluation.token_losses

    def noted(model: GPT, *rest: torch.Tensor) -> torch.Tensor:
        chunks.append(model.loss_chunk)
        return token_losses(model, *rest)

    monkeypatch.setattr(evaluation, "token_losses", noted)
    (found,) = evaluated(capsys, tmp_path / "run")["runs"]
    assert found["loss"]["value"] == pytest.approx(logged, rel=2e-7)
    assert set(chunks) == {7}


def test_it_evaluates_whole_windows_as_training_does(tiny_run: Path, tiny: Callable[..., Config]):
    network, encoding, _ = load_run(tiny_run)
    dataset = prepare(tiny().data)
    sequences = ValidationSequences(dataset.val, network.config.context, None)
    targets = np.concatenate([y for _, y in sequences.batches(4)])
    whole = dataset.val[: targets.size + 1]
    found = evaluate(network, [whole], byte_lengths=byte_lengths(encoding), batch=4)
    with torch.no_grad():
        losses = [
            F.cross_entropy(network(torch.from_numpy(x)).flatten(0, 1), torch.from_numpy(y.ravel()))
            for x, y in ((x.copy(), y.copy()) for x, y in sequences.batches(1))
        ]
    assert found.loss.value == pytest.approx(torch.stack(losses).double().mean().item(), rel=1e-6)


def test_a_run_and_a_file_with_the_same_text_agree(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = evaluated(capsys, run, "--stride", "5")["runs"][0]
    path = run.parent / "val.txt"
    given = evaluated(capsys, run, "--stride", "5", "--data.path", path)["runs"][0]
    assert given["text"] == f"text {path}"
    assert own["text"] == "validation"
    for key in ("loss", "perplexity", "bits_per_byte", "tokens", "by_position"):
        assert own[key] == given[key]
    (tmp_path / "a.jsonl").write_text('{"body": "The lazy dog"}\n{"body": null}\n{"body": ""}\n')
    arguments = ("--data.source", "jsonl", "--data.path", tmp_path, "--data.text-field", "body")
    found = evaluated(capsys, run, *arguments, "--data.missing-text", "skip")["runs"][0]
    assert (found["documents"], found["tokens"], found["bytes"]) == (1, 12, 11)


def test_several_runs_are_one_table(
    run: Path, tiny_run: Path, tmp_path: Path, tiny: Callable[..., Config], capsys
):
    train(tiny(data={"tokenizer": "chars"}, training={"steps": 1}), tmp_path / "chars", quiet=True)
    code, out, _ = called(capsys, "eval", tiny_run, tmp_path / "chars", run)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:4]] == [
        str(tiny_run),
        str(tmp_path / "chars"),
        str(run),
    ]
    assert "evaluated on different texts" in out
    assert "bits per byte are" in out
    found = evaluated(capsys, tiny_run, tmp_path / "chars")  # one text, two vocabularies
    assert len({each["text_sha256"] for each in found["runs"]}) == 1
    assert not any("different texts" in note for note in found["notes"])
    (tmp_path / "a.txt").write_text("The quick brown fox.")
    code, out, _ = called(capsys, "eval", tiny_run, run, "--data.path", tmp_path / "a.txt")
    assert code == 0
    assert "different" not in out
    assert out.count("one short document, so there are no standard errors") == 1


def test_checkpoints_of_one_run_are_told_apart(run: Path, capsys: pytest.CaptureFixture[str]):
    early, late = (run / f"checkpoints/step-{step:08d}" for step in (10, 20))
    code, out, _ = called(capsys, "eval", early, late, "--stride", "3")
    assert code == 0
    tables, notes = out.split("note: ", 1)
    notes = " ".join(notes.split())
    assert [line.split() for line in tables.splitlines()[:2]] == [
        ["run", str(run), str(run)],  # a column each, as rows would be too wide
        ["step", "10", "20"],
    ]
    assert f"\n{run} step 10 " in tables
    assert re.search(rf"training logged [\d.]+ for {run} step 10, [\d.]+ for {run} step 20;", notes)
    assert notes.count("one short document") == 1


def test_errors_are_shown_with_two_digits():
    from gpt.cli.eval import _with_error

    shown = [_with_error(Estimate(*each)) for each in ((1.87041, 0.01234), (123.456, 9.99))]
    assert shown == ["1.870 ± 0.012", "123 ± 10"]
    assert [_with_error(Estimate(2.5, None)), _with_error(Estimate(None, None))] == ["2.5000", "-"]


def test_bad_input_is_one_line(
    run: Path, tmp_path: Path, tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.txt").write_text("naïve")
    (tmp_path / "empty.txt").touch()
    train(tiny(data={"tokenizer": "chars"}, training={"steps": 1}), tmp_path / "c", quiet=True)
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "c", "--data.path", tmp_path / "a.txt"], "'ï' is not among the"),
        ([run, "--data.path", tmp_path / "empty.txt"], "the text to evaluate is empty"),
        ([run, "--data.path", tmp_path / "none.txt"], "--data.path: "),
        ([run, "--data.source", "jsonl"], "--data: source: jsonl needs path"),
        ([run, "--stride", "17"], f"--stride: 17 is more than the context of {run}, 16 tokens"),
        ([run, "--data.val-fraction", "0.5"], "--data.val-fraction: no such option"),
        ([run, tmp_path / "none"], "no such directory"),
        ([run, "--checkpoint", "7"], "no such checkpoint"),
        ([], "RUN_DIR"),
    ]
    for arguments, message in cases:
        code, out, err = called(capsys, "eval", *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert "Traceback" not in err


def test_a_text_that_has_changed_is_not_the_run_s(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.txt").write_text("One two three four five. " * 40)
    data = {"path": [str(tmp_path / "a.txt")], "cache_dir": str(tmp_path / "cache")}
    train(tiny(data=data, training={"steps": 1}), tmp_path / "run", quiet=True)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["path"]
    (tmp_path / "a.txt").unlink()
    code, _, err = called(capsys, "eval", tmp_path / "run")
    assert code == 2
    assert f"{tmp_path / 'run'}: its text cannot be read: data.path" in err
    assert "--data.path FILE" in err
    (tmp_path / "a.txt").write_text("Six seven eight nine ten. " * 40)
    code, _, err = called(capsys, "eval", tmp_path / "run")
    assert code == 2
    assert "the text has changed" in err

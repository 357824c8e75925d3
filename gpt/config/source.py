"""What `init_from` names, and the options that it sets: those of its network and its vocabulary.

    a run directory      the checkpoint with its lowest validation loss; config.yaml has the options
    a checkpoint         RUN/checkpoints/step-00001000, or RUN/checkpoints/latest (or best)
    a folder             in one of the layouts of layouts.py; config.json has the options
    a name on the hub    such as gpt2, whose options are known offline; see `SIZES`

So a config says only what it changes. `loading.load` takes the other options from the source, and
refuses values with which the weights would not compute what they were trained to compute. The
weights themselves are read by gpt/exchange/pretrained.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config.layouts import LAYOUTS, SIZES, Layout
from gpt.config.strict_yaml import read_yaml
from gpt.config.values import expand_user
from gpt.errors import InputError, UnreachableError, closest, nearest, option
from gpt.io.files import read_json
from gpt.io.wait import TIMEOUT, wait_for

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
STEP = re.compile(r"step-\d+")  # the name of a checkpoint's folder
POINTERS = ("latest", "best")  # files of a run that name one
DESCRIPTION = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
RUNS = Path("runs")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # which of several files holds a tensor
RESPONSE = TIMEOUT / 2  # seconds, so that a start that is offline ends within ten
ALLOWED = (
    "set init_from to a run directory, a checkpoint of one, a folder in the Hugging Face layout "
    f"(config.json, model.safetensors), or a name on the hub such as {', '.join(SIZES)}"
)


@dataclass(frozen=True)
class Source:
    """Where weights come from, and what is known of them without reading them.

    Attributes:
        name: as `init_from` gives it.
        folder: the folder; None: not known before its files are downloaded from the hub.
        repository: its name on the hub; None: a local folder.
        model, data: options that it sets, nested and not validated.
        layout: of a folder in a Hugging Face layout; None: a run or checkpoint of ours.
        origin: how a message names the source of an option of the model, by its dotted path.
    """

    name: str
    folder: Path | None
    repository: str | None
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    layout: Layout | None
    origin: Callable[[str], str]


def describe(name: str) -> Source:
    """What `init_from: name` means.

    Raises:
        InputError: it is nothing of that kind, or of another architecture.
        UnreachableError: the hub does not respond within `RESPONSE` seconds.
    """
    path = Path(expand_user(name))
    if path.is_dir():
        return _of_checkpoint(name, path) if STEP.fullmatch(path.name) else _of_folder(name, path)
    if path.name in POINTERS and path.is_file():
        return _of_checkpoint(name, path)
    if path.exists():
        raise InputError(f"{name}: is a file;\n{ALLOWED}")
    repository = name.removeprefix("openai-community/")
    if repository in SIZES:
        tree = {"model_type": "gpt2", **SIZES[repository]}
        data = {"tokenizer": "gpt2"}
        return _of_layout(name, None, f"openai-community/{repository}", tree, data, name)
    local = path.parts[:1] == ("runs",) or (path.parent != Path() and path.parent.is_dir())
    if local or (RUNS / path).is_dir() or not HUB_NAME.fullmatch(name):
        raise InputError(f"{name}: no such folder{_similar(path)};\n{ALLOWED}")
    folder = download(name, DESCRIPTION, lambda folder: (folder / "config.json").is_file())
    tree = _read_config(folder)
    return _of_layout(name, folder, name, tree, _vocabulary(folder), f"{name}: config.json")


def _similar(path: Path) -> str:
    """`"; perhaps you meant X"` for the folder or run whose name is like that of `path`."""
    folders = [each for each in (RUNS, path.parent) if each.is_dir()]
    known = {each.name: each for folder in folders for each in folder.iterdir() if each.is_dir()}
    found = closest(path.name, known)
    return "" if found is None else f"; perhaps you meant {known[found]}"


def _of_checkpoint(name: str, path: Path) -> Source:
    run = path.absolute().parents[1]
    if not (run / "config.yaml").is_file():
        raise InputError(f"{name}: its run's config is missing: {run / 'config.yaml'}")
    holder = path if path.is_dir() else run
    return _of_run(name, path, run / "config.yaml", holder / "tokenizer.json")


def _of_folder(name: str, path: Path) -> Source:
    if (path / "config.yaml").is_file():
        return _of_run(name, path, path / "config.yaml", path / "tokenizer.json")
    if not (path / "config.json").is_file():
        runs = (path.absolute().parent, *sorted(path.glob("*")), *sorted(path.glob("cells/*")))
        run = next((str(each) for each in runs if (each / "config.yaml").is_file()), None)
        hint = "" if run is None else f"; perhaps you meant {os.path.relpath(run)}"
        raise InputError(f"{name}: has neither config.yaml nor config.json{hint};\n{ALLOWED}")
    tree, data = _read_config(path), _vocabulary(path)
    return _of_layout(name, path, None, tree, data, str(path / "config.json"))


def _of_run(name: str, folder: Path, config: Path, vocabulary: Path) -> Source:
    model = read_yaml(config).get("model")
    data = {"tokenizer": "file", "vocabulary": str(vocabulary)}
    model = model if isinstance(model, Mapping) else {}
    return Source(name, folder, None, model, data, None, lambda key: f"{config}: model.{key}")


def _of_layout(
    name: str,
    folder: Path | None,
    repository: str | None,
    tree: Mapping[str, Any],
    data: Mapping[str, Any],
    origin: str,
) -> Source:
    """The source that a `config.json` describes; messages begin with `origin`."""
    kind = tree.get("model_type")
    layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
    if layout is None:
        raise InputError(
            f"{origin}: model_type: {kind!r} is another architecture; init_from reads "
            + " and ".join(f"{known} ({each.architecture})" for known, each in LAYOUTS.items())
        )
    try:
        model = layout.to_options(tree)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    return Source(
        name, folder, repository, model, data, layout, lambda key: f"{origin}: {layout.key_of(key)}"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", dict[str, Any])


def _vocabulary(folder: Path) -> dict[str, str]:
    """The options for the vocabulary in a folder; none if it holds only weights."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return {}
    return {"tokenizer": "file", "vocabulary": str(folder)}


# ---------------------------------------------------------------------------------------------
# The weights


def locate(source: Source) -> Path:
    """The folder with the weights of a source, fetched from the hub if need be.

    Raises:
        InputError: there is no such repository, or it holds no safetensors.
        UnreachableError: the hub does not respond within `RESPONSE` seconds.
    """
    if source.repository is not None:
        try:
            folder = download(source.repository, ("model*.safetensors", INDEX), _is_complete)
        except InputError as error:
            raise type(error)(f"{option('init_from')}: {error}") from None
        if not _is_complete(folder):
            raise InputError(
                f"{option('init_from')}: {source.repository}: has no {WEIGHTS} on the hub, and no "
                "other format is read (loading a .bin can execute code);\n"
                "convert it, in Python with transformers: "
                f"AutoModelForCausalLM.from_pretrained({source.repository!r}).save_pretrained('NEW')"
            )
        return folder
    assert source.folder is not None
    return source.folder


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, which may be missing.

    Raises:
        InputError: the folder has no safetensors, or their index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX, dict[str, Any]).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{folder / INDEX}: is damaged: it has no weight_map")
        return sorted({folder / Path(str(name)).name for name in names.values()})
    pickled = sorted(folder.glob("*.bin"))
    if pickled:
        raise InputError(
            f"{pickled[0]}: is not read, because loading a .bin can execute code; convert it to "
            "safetensors,\nin Python with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('NEW')"
        )
    raise InputError(f"{folder}: has no {WEIGHTS}, the file of the weights")


def _is_complete(folder: Path) -> bool:
    """Whether all files with the weights are there."""
    try:
        return all(file.is_file() for file in weight_files(folder))
    except InputError:
        return False


def download(repository: str, patterns: tuple[str, ...], complete: Callable[[Path], bool]) -> Path:
    """The local folder with the files of a repository on the hub that match `patterns`.

    Args:
        complete: whether a folder fetched earlier has all of them; then the network is not used.

    Raises:
        InputError: there is no such repository.
        UnreachableError: the hub does not respond within `RESPONSE` seconds.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    def snapshot(**options: Any) -> Path:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))

    try:
        folder = snapshot(local_files_only=True)
        if complete(folder):
            return folder
    except errors.LocalEntryNotFoundError:
        pass
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        wait_for(lambda: HfApi().model_info(repository, timeout=RESPONSE), RESPONSE)
        return wait_for(snapshot)
    except Exception as error:  # whatever the library raises; no code of ours runs here
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            raise InputError(
                f"{repository}: is neither a local folder nor a model on the hub (or it is "
                f"private, and HF_TOKEN does not grant access);\n{ALLOWED}"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UnreachableError(
            f"{repository}: is not a local folder, and cannot be fetched from "
            f"{constants.ENDPOINT} ({type(error).__name__}: {reason})"
            f"{nearest(repository, SIZES)}.\n"
            "Without a network, download the repository elsewhere, copy it here, and set "
            "init_from to its folder;\nor use a run directory of your own"
        ) from None

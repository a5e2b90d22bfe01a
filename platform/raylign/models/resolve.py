"""A model path of a recipe becomes a local folder of safetensors."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from raylign.errors import ModelError
from raylign.models.embedded import PREFIX, embedded_folder
from raylign.reading import Refused
from raylign.reading.files import read_text, require_plain_files
from raylign.reading.json_text import ANY_INTEGER, parse_json
from raylign.run.checkpoints import is_checkpoint
from raylign.run.fingerprints import sealed_damage

CONFIG = "config.json"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
HUB_EXCEPT = ["*/*", "consolidated*"]
FACTS = (CONFIG, "adapter_config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files whose every key counts; libraries would take the last of two."""
Shapes = dict[str, tuple[int, ...]]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_model(path: str, revision: str | None = None, option: str = "model") -> str:
    """Absolute path of a folder in transformers format for `embedded:<name>`, a local folder or a hub id.

    Only safetensors are accepted, every shard must be there and its header whole. `revision` is for hub ids; `option`
    is the block of the recipe that errors name. Raises ModelError with the cure.
    """
    folder = locate(path, revision, option)
    _check_folder(folder, option)
    return str(folder.resolve())


def locate(path: str, revision: str | None, option: str) -> Path:
    """The folder that `path` names, downloaded if need be. Raises ModelError.

    What is in it is not looked at, but that a checkpoint of a run is as it was written.
    """
    is_local = path.startswith((PREFIX, ".", "/", "~")) or os.path.exists(path)
    if is_local and revision is not None:
        raise ModelError(f"{option}.revision={revision} has no meaning for {path}, which is not a hub id; remove it")
    if path.startswith(PREFIX):
        return embedded_folder(path.removeprefix(PREFIX))
    return _whole(Path(path).expanduser(), option) if is_local else _downloaded(path, revision, option)


def _whole(folder: Path, option: str) -> Path:
    if is_checkpoint(folder) and (damage := sealed_damage(folder, below=False)):
        raise ModelError(
            f"{option}.path: {folder} is a damaged checkpoint of a run: {damage}; restore it from a copy, or give what "
            "`raylign export` writes of a whole one"
        )
    return folder


def _downloaded(hub_id: str, revision: str | None, option: str) -> Path:
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_EXCEPT)
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{hub_id} has no revision {revision!r}; correct {option}.revision or remove it") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {hub_id!r}, or it is private; correct {option}.path, or log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ModelError(
            f"{option}.path={hub_id!r} is neither a folder that exists nor a hub id of the form org/name"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id} is no folder here, not in the hub cache, and the hub cannot be reached; check the network, "
            "HTTPS_PROXY and HF_HUB_OFFLINE, or give a local folder (or embedded:smollm2-135m)"
        ) from error
    except OSError as error:
        raise ModelError(f"{hub_id}: download failed ({error}); run again, finished files are kept") from error
    return Path(folder)


def read_facts(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises ModelError."""
    try:
        found = parse_json(read_text(file), ANY_INTEGER)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not a JSON object that can be read ({error}); copy the model again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: a {type(found).__name__} instead of a JSON object; copy the model again")
    return found


def check_facts(folder: Path) -> None:
    """Raises ModelError when a file in the folder of a model or an adapter is none, or none that JSON can be."""
    try:
        require_plain_files(folder)
    except Refused as error:
        raise ModelError(f"{folder}: {error}") from error
    for name in FACTS:
        if (folder / name).is_file():
            read_facts(folder / name)


def stored_shapes(folder: Path) -> Shapes:
    """Shapes of all tensors in the safetensors files of `folder`, by name."""
    found: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{file}: not a whole safetensors file ({error}); save the model again") from error
    return found


def _check_folder(folder: Path, option: str) -> None:
    if not os.path.exists(folder):
        raise ModelError(f"{folder}: no such folder (from {Path.cwd()}); correct {option}.path")
    if not folder.is_dir():
        raise ModelError(f"{folder}: a file; {option}.path is a folder with {CONFIG} and *.safetensors")
    if not (folder / CONFIG).is_file():
        cure = "an adapter alone; merge it into its base model with `raylign export` first"
        other = f"not a model in transformers format; give the folder that holds {CONFIG} and *.safetensors"
        raise ModelError(f"{folder}: no {CONFIG}, {cure if (folder / 'adapter_config.json').is_file() else other}")
    check_facts(folder)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"{folder}: no *.safetensors{_pickle_hint(folder)}")
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(index)
    for shard in shards:
        _check_shard(shard)


def _pickle_hint(folder: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        return "; download the model again, weights included"
    return (
        f", only {pickles[0]}: pickled weights can run code when loaded and are refused; take a revision in "
        "safetensors, or convert it on a machine you can lose with model.save_pretrained(folder)"
    )


def _check_index(index: Path) -> None:
    shards = read_facts(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ModelError(f"{index}: not an index of shards (no names of files in weight_map); copy the model again")
    names = set(shards.values())
    if missing := sorted(name for name in names if not (index.parent / name).is_file()):
        raise ModelError(f"{index.parent}: {len(missing)} of {len(names)} shards missing, first {missing[0]}; copy it")


def _check_shard(shard: Path) -> None:
    try:
        with safe_open(shard, framework="np"):
            return
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard}: not a whole safetensors file ({error}); copy it again") from error

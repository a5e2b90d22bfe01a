"""From a trained policy to a folder that transformers, vLLM and the hub read."""

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from raylign.config.blocks import ModelBlock
from raylign.errors import ModelError
from raylign.export.card import PolicyFacts, card_text
from raylign.models.load import DTYPES, load_policy, open_adapter, open_model
from raylign.models.open import open_config, read_chat_template
from raylign.models.resolve import Shapes, check_facts, read_facts, stored_shapes
from raylign.run.files import disk_errors, require_free
from raylign.run.tensor_file import tensor_errors
from raylign.training.weights import checkpoint_weights

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""Where transformers looks first, before the template in the tokenizer's config."""
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
)

_TO = "--to"


def export_model(
    source: Path,
    base: str | None,
    to: Path,
    merge: bool,
    card: PolicyFacts,
    in_4bit: ModelBlock | None = None,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the policy in `source` to the folder `to` with tokenizer, chat template, generation config and README.md.

    `source` is a PEFT adapter folder or a full model in safetensors; `base` is the folder of the base model, needed to
    merge, and for a tokenizer or config that `source` lacks. An adapter stays one unless `merge`; full weights are
    copied.
    Merging adds the update in float32 and rounds once to the base model's dtype, so against the adapter on the base in
    float32 a merged weight is off by at most half a unit in the last place of that dtype (bfloat16: 2^-9 relative).
    An adapter that was trained on a base in 4 bits, as `in_4bit` says, is merged into what those unpack to, in the
    run's dtype: the weights that the run evaluated. The file `chat_template` takes the place of the tokenizer's own.
    Code that ships with the base model goes with it, and is run to load the model, only with `trust_remote_code`.

    `to` appears whole or not at all, after its tensors were read back and compared by name and shape. Raises ModelError
    when `source` is no such folder, a part is missing, `to` is not empty, or the tensors differ.
    """
    refuse_occupied(to)
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    companions = _companions(source, base)
    merged = Path(base) if is_adapter and merge and base is not None else None
    with appearing_whole(to, weights_size(source) if merged is None else weights_size(merged, in_4bit)) as staging:
        if trust_remote_code and (merge or not is_adapter):
            copy_code(base or source, staging)
        if is_adapter and merge:
            _write_merged(source, required_base(base, source), staging, in_4bit, trust_remote_code)
        elif is_adapter:
            _write_adapter(source, card.base_model, staging)
        else:
            _write_full(source, base, staging, trust_remote_code)
        for file in companions:
            _copy(file, staging / file.name)
        template = None if chat_template is None else read_chat_template(chat_template)
        text = card_text(card, is_adapter=is_adapter and not merge, in_4bit=in_4bit)
        with disk_errors(to, _TO):
            if template is not None:
                (staging / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
            (staging / "README.md").write_text(text, encoding="utf-8")
    return to


def require_place(to: Path) -> None:
    """Raises ModelError or DiskError when nothing can be exported to `to`, which stays as it is."""
    refuse_occupied(to)
    staging = _staging(to)
    with disk_errors(to, _TO):
        missing = [folder for folder in to.parents if not folder.exists()]
        try:
            staging.mkdir(parents=True)
        finally:
            for folder in (staging, *missing):
                if folder.is_dir():
                    folder.rmdir()


def refuse_occupied(to: Path) -> None:
    """Raises ModelError when `to` holds something, or is a link or a mount, whose place nothing can take."""
    if to.is_symlink():
        raise ModelError(f"{to}: a link to {os.readlink(to)}; give that folder itself if it is empty, or a new one")
    if os.path.ismount(to):
        raise ModelError(f"{to}: a file system is mounted there; give a new folder in it")
    with disk_errors(to, _TO):
        occupied = os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir()))
    if occupied:
        raise ModelError(f"{to}: already there and not an empty folder; nothing is overwritten, give a new folder")


@contextmanager
def appearing_whole(to: Path, needed_bytes: int) -> Iterator[Path]:
    """A staging folder beside `to` that becomes `to` on success and is removed on failure.

    Raises DiskError when it cannot be made or less than `needed_bytes` are free.
    """
    staging = _staging(to)
    with disk_errors(to, _TO):
        staging.mkdir(parents=True)
    try:
        require_free(staging, needed_bytes, "the model", f"free some, or give {_TO} on another disk")
        yield staging
        with disk_errors(to, _TO):
            for file in staging.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            staging.rename(to)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(to: Path) -> Path:
    return to.with_name(f".{to.name}.{uuid.uuid4().hex}.partial")


def weights_size(folder: Path, in_4bit: ModelBlock | None = None) -> int:
    """Bytes of the weights in `folder`; of those unpacked from 4 bits, in the dtype they then have."""
    if in_4bit is not None:
        return sum(math.prod(shape) for shape in stored_shapes(folder).values()) * in_4bit.itemsize
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _copy(source: Path, target: Path) -> None:
    if not os.access(source, os.R_OK):
        raise ModelError(f"{source}: cannot be read; make it readable")
    with disk_errors(target, _TO):
        shutil.copyfile(source, target)


def required_base(base: str | None, source: Path) -> Path:
    """The folder `base`. Raises ModelError when it is none of a base model."""
    if base is None:
        raise ModelError(f"{source}: an adapter cannot be merged without its base model; give the base model's folder")
    if not (Path(base) / MODEL_CONFIG).is_file():
        raise ModelError(f"{base}: no {MODEL_CONFIG}, so not a base model's folder; give one in transformers format")
    return Path(base)


def copy_code(folder: str | Path, staging: Path) -> None:
    """What config.json and the tokenizer's config name as the model's own code."""
    for file in sorted(Path(folder).glob("*.py")):
        shutil.copyfile(file, staging / file.name)


def _companions(source: Path, base: str | None) -> list[Path]:
    """Files of one tokenizer, and a generation config if there is one; what `source` has goes before `base`."""
    folders = [source, *([Path(base)] if base is not None else [])]
    for folder in folders:
        check_facts(folder)
    tokenizers = [folder for folder in folders if (folder / TOKENIZER_CONFIG).is_file()]
    if not tokenizers:
        places = " or ".join(str(folder) for folder in folders)
        raise ModelError(f"no {TOKENIZER_CONFIG} in {places}; give the base model's folder")
    tokenizer = [file for name in TOKENIZER_FILES if (file := tokenizers[0] / name).is_file()]
    generation = [file for folder in folders if (file := folder / GENERATION_CONFIG).is_file()]
    return [*tokenizer, *generation[:1]]


def _write_adapter(source: Path, base_model: str, staging: Path) -> None:
    """Copy the adapter, naming its base as the card does instead of by a path of the training machine."""
    config = read_facts(source / ADAPTER_CONFIG)
    config["base_model_name_or_path"] = base_model
    with disk_errors(staging, _TO):
        (staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _copy(adapter_file(source), staging / ADAPTER_WEIGHTS)
    compare(stored_shapes(source), stored_shapes(staging), staging)


def _write_full(source: Path, base: str | None, staging: Path, trust_remote_code: bool) -> None:
    """Copy the weights; a config that `source` lacks is the base's, and then the two must fit together."""
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{source}: neither an adapter ({ADAPTER_CONFIG}) nor a full model (*.safetensors)")
    indices = sorted(source.glob("*.safetensors.index.json"))
    for file in [*weights, *indices]:
        _copy(file, staging / file.name)
    compare(stored_shapes(source), stored_shapes(staging), staging)
    if len(weights) == 1 and not indices:
        (staging / weights[0].name).rename(staging / MODEL_WEIGHTS)
    if (source / MODEL_CONFIG).is_file():
        _copy(source / MODEL_CONFIG, staging / MODEL_CONFIG)
    else:
        _copy(required_base(base, source) / MODEL_CONFIG, staging / MODEL_CONFIG)
        load_back(staging, trust_remote_code)


def _write_merged(source: Path, base: Path, staging: Path, in_4bit: ModelBlock | None, trust_remote_code: bool) -> None:
    """Merge, save and load back; the two models are never in memory together."""
    adapter_file(source)
    if in_4bit is None:
        expected = _save_merged(source, base, staging, trust_remote_code)
        compare(expected, load_back(staging, trust_remote_code), staging)
    else:
        _save_unpacked(source, base, staging, in_4bit)
        load_back(staging, trust_remote_code)


def _save_unpacked(source: Path, base: Path, staging: Path, in_4bit: ModelBlock) -> None:
    model = load_policy(str(base), in_4bit.model_copy(update={"lora": None}), seed=0)
    adapted = with_adapter(model, source)
    weights = checkpoint_weights(adapted, lambda parameters: nullcontext())
    config = open_config(str(base), in_4bit.trust_remote_code)
    config.dtype = DTYPES[in_4bit.dtype]
    with tensor_errors(staging, _TO):
        save_file({name: tensor.cpu() for name, tensor in weights}, staging / MODEL_WEIGHTS, {"format": "pt"})
        config.save_pretrained(staging)


def _save_merged(source: Path, base: Path, staging: Path, trust_remote_code: bool) -> Shapes:
    dtype = dtype_of(open_config(str(base), trust_remote_code))
    opened = open_model(AutoModelForCausalLM, str(base), trust_remote_code, dtype=torch.float32)
    opened.require_fit(str(base))
    merged = with_adapter(opened.model, source).merge_and_unload(safe_merge=True).to(dtype)
    with tensor_errors(staging, _TO):
        merged.save_pretrained(staging)
    return shapes(merged.state_dict())


def with_adapter(model: nn.Module, source: Path) -> "PeftModel":
    """`model` under the adapter in `source`. Raises ModelError when the two do not fit."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - takes seconds, and few need it

    adapted = open_adapter(model, source)
    # PEFT only warns of names it cannot place, and would then merge an untrained adapter.
    compare(stored_shapes(source), shapes(get_peft_model_state_dict(adapted)), source)
    return adapted


def load_back(folder: Path, trust_remote_code: bool, kind: Any = AutoModelForCausalLM) -> Shapes:
    """Shapes of the tensors of the model in `folder`, as `kind` loads it. Raises ModelError when names do not fit."""
    opened = open_model(kind, str(folder), trust_remote_code)
    if opened.missing or opened.unexpected:
        faults = {"missing_keys": opened.missing, "unexpected_keys": opened.unexpected}
        raise ModelError(f"{folder}: the weights do not fit {MODEL_CONFIG}: {faults}; give the model's own base folder")
    return shapes(opened.model.state_dict())


def dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a model was saved in; float32 where its config names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def adapter_file(source: Path) -> Path:
    """The adapter's weights. Raises ModelError when they are not there as safetensors."""
    file = source / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ModelError(f"{source}: no {ADAPTER_WEIGHTS}; only safetensors are read, save the adapter in that format")
    return file


def shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def compare(expected: Shapes, found: Shapes, where: Path) -> None:
    """Raises ModelError when names or shapes differ."""
    if differing := sorted(name for name, _ in expected.items() ^ found.items()):
        raise ModelError(
            f"{where}: {len(differing)} of {len(expected)} tensors differ in name or shape from what they should be, "
            f"first {differing[0]}; nothing was exported"
        )

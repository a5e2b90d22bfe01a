"""Folders to policies, and the one place that lets transformers and PEFT make models of what others made."""

import difflib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import ModelError
from raylign.models.open import UNTRUSTED, opening, read_config, without_dropout
from raylign.models.resolve import stored_shapes

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Heads = tuple[str, ...] | None
"""Names of the weights of a head that a recipe makes."""
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Opened:
    """A model, and what its files and its config.json do not agree on.

    `missing` are weights of the model that no file has, `unexpected` those of files that the model has no place for.
    Weights that transformers declares tied or without meaning are in neither.
    """

    model: PreTrainedModel
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def require_fit(self, folder: str, heads: Heads = None) -> None:
        """Raises ModelError unless files and config.json fit.

        `heads` are the weights of a head that the recipe makes where it is missing, in place of any other the files
        have; None takes the head of the files as it is.
        """
        backbone = f"{self.model.base_model_prefix}."
        missing = [name for name in self.missing if not name.endswith(heads or ())]
        unexpected = [name for name in self.unexpected if heads is None or name.startswith(backbone)]
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} weights are not in the files, first {missing[0]}, and would start random; "
                "copy the model again, with the config.json that belongs to it"
            )
        if unexpected:
            raise ModelError(
                f"{folder}: config.json has no place for {len(unexpected)} weights of the files, first "
                f"{', '.join(unexpected[:_SHOWN])}; copy the model again, with the config.json that belongs to it"
            )


def open_model(kind: Any, folder: str | None, trust_remote_code: bool, *, where: str = "", **options: Any) -> Opened:
    """The model that `kind`, a class of transformers, makes of the safetensors in `folder`; `options` are its own.

    Without a folder there is a `state_dict` among them, and `where` names what it is of.

    Raises ModelError when it cannot be loaded, or weights have another shape.
    """
    where = folder or where
    with opening(f"{where}: the model cannot be loaded", UNTRUSTED, torch.OutOfMemoryError):
        loaded: tuple[PreTrainedModel, Mapping[str, Any]] = kind.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    model, info = loaded
    if info["mismatched_keys"]:
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
        raise ModelError(
            f"{where}: the model cannot be loaded: {len(names)} weights have another shape than config.json says, "
            f"first {names[0]}; copy the model again, with the config.json that belongs to it"
        )
    return Opened(model, *(tuple(sorted(info[name])) for name in ("missing_keys", "unexpected_keys")))


def empty_model(kind: Any, config: PreTrainedConfig, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """The model of `config` with weights of no meaning. Raises ModelError."""
    name = config.name_or_path
    with opening(f"{name}: no model can be made of its config.json", UNTRUSTED, torch.OutOfMemoryError):
        model: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code, **options)
    return model


def is_adapted(model: nn.Module) -> "TypeGuard[PeftModel]":
    """Whether `model` has an adapter. PEFT takes seconds to import, and is not needed for models without."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def open_adapter(model: nn.Module, folder: Path, **options: Any) -> "PeftModel":
    """`model` under the adapter of `folder`. Raises ModelError when the two do not fit."""
    from peft import PeftModel  # noqa: PLC0415 - takes seconds, and few need it

    with opening(f"{folder}: the adapter does not fit its base", "give the base it has", torch.OutOfMemoryError):
        adapted: PeftModel = PeftModel.from_pretrained(model, folder, **options)
    return adapted


def load_policy(folder: str, block: ModelBlock, seed: int) -> "PreTrainedModel | PeftModel":
    """The causal language model of `folder` in `block.dtype`, every dropout 0, with a fresh adapter if `block.lora`.

    `block.load_in_4bit` quantises every linear layer but the output head, on the GPU where there is one. Adapter
    weights have the compute dtype (fp32 masters are the optimizer's) and depend on `seed` alone; the adapter starts as
    the identity. Raises ModelError when the weights are not those of config.json, or no module is targeted.
    """
    config = without_dropout(read_config(folder, block.trust_remote_code))
    opened = load_whole(AutoModelForCausalLM, folder, block, config)
    opened.require_fit(folder)
    model = opened.model
    if block.lora is None:
        return model
    from peft import get_peft_model  # noqa: PLC0415 - takes seconds, and full fine-tuning does without

    adapter = adapter_config(model, block.lora, "CAUSAL_LM")
    with adapter_seed(seed):
        adapted: PeftModel = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    return adapted


def require_fit(folder: str, trust_remote_code: bool, kind: Any = AutoModelForCausalLM, heads: Heads = None) -> None:
    """Raises ModelError unless the tensors that the files name are those of config.json; no weights are read.

    `heads` is that of `Opened.require_fit`.
    """
    config = read_config(folder, trust_remote_code)
    if heads is not None:
        config.num_labels = 1
    with torch.device("meta"):
        shell = empty_model(kind, config, trust_remote_code)
        stored = {name: torch.empty(shape) for name, shape in stored_shapes(Path(folder)).items()}
    options = {
        "config": shell.config,
        "state_dict": stored,
        "device_map": {"": "meta"},
        "dtype": torch.float32,
        "ignore_mismatched_sizes": True,
    }
    open_model(type(shell), None, trust_remote_code, where=folder, **options).require_fit(folder, heads)


def load_whole(kind: Any, folder: str, block: ModelBlock, config: PreTrainedConfig) -> Opened:
    """The model that `kind`, one of transformers' Auto classes, makes, and what does not fit in its files.

    Raises ModelError when it cannot be loaded, or weights have another shape.
    """
    opened = open_model(
        kind,
        folder,
        block.trust_remote_code,
        config=config,
        dtype=DTYPES[block.dtype],
        quantization_config=_quantisation(block),
    )
    for module in opened.model.modules():
        # bitsandbytes would repack the weights of an evaluated model in place, for AVX-512, past dequantising.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return opened


def _quantisation(block: ModelBlock) -> BitsAndBytesConfig | None:
    """QLoRA's (Dettmers et al. 2023): computation is in `block.dtype`."""
    if not block.load_in_4bit:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.load_in_4bit needs bitsandbytes; pip install bitsandbytes==0.50.2")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=block.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=block.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=DTYPES[block.dtype],
    )


def adapter_config(model: PreTrainedModel, block: LoraBlock, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> "LoraConfig":
    """PEFT's settings of the adapter of `block`. Raises ModelError when no module of `model` has a targeted name."""
    if not isinstance(block.target_modules, str):
        _check_targets(model, block.target_modules)
    from peft import LoraConfig  # noqa: PLC0415 - takes seconds, and full fine-tuning does without

    return LoraConfig(
        task_type=task,
        r=block.r,
        lora_alpha=block.lora_alpha,
        target_modules=block.target_modules if isinstance(block.target_modules, str) else list(block.target_modules),
        lora_dropout=0.0,
        bias="none",
    )


@contextmanager
def adapter_seed(seed: int) -> Iterator[None]:
    """PEFT's draws depend on `seed` alone, and nobody else's on PEFT's."""
    # Devices are left out of the fork: PEFT draws an adapter on the CPU, wherever the model is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """PEFT is content when one of the names matches; a misspelt second one would silently stay frozen."""
    head = model.get_output_embeddings()
    tied = {name for name, module in model.named_modules() if module is head and model.config.tie_word_embeddings}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            close = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"linear layers: {', '.join(known)}"
            raise ModelError(f"model.lora.target_modules: no layer is named {target!r}; {hint}")
        if any(f".{name}".endswith(f".{target}") for name in tied):
            raise ModelError(
                f"model.lora.target_modules: {target!r} shares its weight with the input embedding, so an "
                "adapter on it cannot be merged or served; leave it out"
            )

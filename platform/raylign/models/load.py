"""Folders to tokenizers and policies, where generation stops, and how long a sequence a model reads.

Some rotary scalings take their frequencies from the longest sequence of a batch, so that what a sequence gets depends
on its neighbours; vLLM takes them from its limit instead. Up to a length that the config names, all of them agree.
"""

import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import ConfigError, ModelError
from raylign.models.open import Heads, Opened, empty_model, open_config, open_model, open_tokenizer, read_chat_template
from raylign.models.resolve import read_facts, stored_shapes

_CONFIGS = ("generation_config.json", "config.json")
"""The second counts where there is no first."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PLAIN = (
    "generators and trainer start from the plain ones; give the 16-bit model, with model.load_in_4bit=true for a base "
    "in 4 bits"
)


def context_limit(folder: str, trust_remote_code: bool = False) -> int:
    """Longest sequence, in tokens, that the model of `folder` reads. Raises ModelError if it names no positions."""
    limit = longest_sequence(read_config(folder, trust_remote_code))
    if limit is None:
        raise ModelError(f"{folder}: config.json has no max_position_embeddings; add it")
    return limit


def require_context(option: str, asked: int, folder: str, block: ModelBlock) -> None:
    """Raises ConfigError when `option`, the longest sequence of a run, is more than the model of `folder` reads."""
    limit = context_limit(folder, block.trust_remote_code)
    if asked > limit:
        config = read_config(folder, block.trust_remote_code)
        raise ConfigError(f"{option}={asked} exceeds the {limit} {limit_of(config)} of {folder}; lower it")


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Positions in tokens, and no more than get the rotary frequencies of short ones; None where none are named."""
    positions = _positions(config.get_text_config())
    known = [limit for limit in (positions, switch_length(config)) if limit is not None]
    return min(known, default=None)


def limit_of(config: PreTrainedConfig) -> str:
    """What the tokens of `longest_sequence` are, for people."""
    switch = switch_length(config)
    if switch is None or switch == _positions(config.get_text_config()):
        return "positions"
    return "tokens up to which rotary frequencies stay the same (longer sequences change those of a whole batch)"


def switch_length(config: PreTrainedConfig) -> int | None:
    """Tokens past which transformers takes other rotary frequencies for a whole batch; None where it never does."""
    text = config.get_text_config()
    positions, original = _positions(text), getattr(text, "original_max_position_embeddings", None)
    found = []
    for kind, rope in _ropes(text):
        if "dynamic" in kind:
            found.append(positions)
        elif kind in ("longrope", "su"):
            found.append(original or rope.get("original_max_position_embeddings") or positions)
    return min((int(limit) for limit in found if limit is not None), default=None)


def _positions(text: PreTrainedConfig) -> int | None:
    found: int | None = getattr(text, "max_position_embeddings", None)
    return found


def _ropes(text: PreTrainedConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Type and settings of each rotary embedding; some models have one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(text, name, None)
        if isinstance(settings, Mapping):
            for rope in (settings, *(part for part in settings.values() if isinstance(part, Mapping))):
                yield str(rope.get("rope_type") or rope.get("type") or ""), rope


def end_ids(tokenizer: PreTrainedTokenizerBase, folders: Iterable[Path]) -> frozenset[int]:
    """Ids that may end an answer: the tokenizer's EOS, and those that the model's files in `folders` name.

    Some models end a turn with a token that is not the tokenizer's EOS; Gemma's <end_of_turn> is one. Raises ModelError
    when a file cannot be read.
    """
    files = [[file for name in _CONFIGS if (file := folder / name).is_file()] for folder in folders]
    named = [end for found in files for file in found[:1] for end in _named(file)]
    return frozenset([tokenizer.eos_token_id, *named])


def _named(file: Path) -> list[int]:
    found = read_facts(file).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(end) is int for end in ends):
        raise ModelError(f"{file}: eos_token_id={found} is neither an id nor a list of ids; correct it")
    return ends


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def load_tokenizer(
    folder: str, trust_remote_code: bool = False, chat_template: Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`, with a pad token (EOS when it has none of its own) and a chat template.

    The file `chat_template` takes the place of the model's own template. Raises ModelError when one of them cannot be
    read or used, or when there is no EOS token or no template.
    """
    tokenizer = open_tokenizer(folder, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer names no EOS token; set eos_token in tokenizer_config.json")
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{folder}: the tokenizer has no chat template; use an instruction-tuned model, "
            "or name the file of the template it was trained with in model.chat_template"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def embedding_rows(folder: str, trust_remote_code: bool = False) -> int:
    """Token ids that the model of `folder` can read, padding of its embedding included."""
    return int(read_config(folder, trust_remote_code).get_text_config().vocab_size)


def read_config(folder: str, trust_remote_code: bool, plain: str = PLAIN) -> PreTrainedConfig:
    """Raises ModelError when it cannot be read, or is of quantised weights: `plain` says what to take instead."""
    config = open_config(folder, trust_remote_code)
    if found := getattr(config, "quantization_config", None):
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ModelError(f"{folder}: its weights are quantised already ({method}), and {plain}")
    return config


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Log-ratios need one and the same function for policy and sampler, so that dropout stays 0 in train mode too."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)
    return config


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

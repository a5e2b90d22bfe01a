"""Models with random weights, for shapes that no downloaded model is needed for."""

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM


def save_random_llama(folder: Path, *, width: int, layers: int, vocabulary: int, positions: int = 8192) -> str:
    """A Llama of `width` with heads of 64, three times as wide inside, in bf16; embeddings are tied."""
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return _save(LlamaForCausalLM, config, folder)


def save_random_qwen3(folder: Path) -> str:
    """The shape of Qwen3-1.7B in bf16."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    return _save(Qwen3ForCausalLM, config, folder)


def _save(architecture: type[PreTrainedModel], config: LlamaConfig | Qwen3Config, folder: Path) -> str:
    torch.manual_seed(0)
    model = architecture(config)
    nn.Module.bfloat16(model)
    model.save_pretrained(folder)
    return str(folder)

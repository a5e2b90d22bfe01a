"""Causal language models of two layers with random weights, large enough that every logit differs."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from raylign.records import Completions
from raylign.training.logprobs import CompletionLogps, CompletionScores
from raylign.training.sequences import Layout, token_batch

VOCABULARY = 50
WINDOW = 4
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA3 = Gemma3TextConfig(
    **SMALL, **IDS, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
)
PACKABLE: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, **IDS, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, **IDS),
    "qwen3": Qwen3Config(**SMALL, **IDS, head_dim=8),
    "gemma3": GEMMA3,
    "mistral": MistralConfig(**SMALL, **IDS, sliding_window=WINDOW),
}
"""All have two heads per key; two have windows of 4 tokens."""
GEMMA3_WITH_VISION = Gemma3Config(
    text_config=GEMMA3,
    vision_config=SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    ),
    mm_tokens_per_image=4,
    image_token_index=49,
)
"""Its language model is inside, and so are the options of that."""


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def tiny(tied: bool = False) -> PreTrainedModel:
    return build(LlamaConfig(**SMALL, **IDS, tie_word_embeddings=tied))


def plain(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    """log p(completion[t] | what stands before), from this model's own logits of this one unpadded row, in fp64.

    `model` must not be inside a `CompletionLogps`, which takes its output head.
    """
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    table = logits.log_softmax(-1)
    return [float(table[len(prompt) + t - 1, token]) for t, token in enumerate(completion)]


def plain_sums(model: nn.Module, groups: Sequence[Completions]) -> list[float]:
    return [sum(plain(model, group.prompt, completion)) for group in groups for completion in group.completions]


def scores(
    model: nn.Module, groups: Sequence[Completions], layout: Layout = "padded", pad_id: int = 0
) -> CompletionScores:
    """Of a copy of `model`, which keeps its own head."""
    found: CompletionScores = CompletionLogps(deepcopy(model))(token_batch(groups, layout, pad_id))
    return found

"""Which architectures of transformers train packed, padded or not at all, found out on a tiny random model of each.

`python -m tests.unit.architectures` writes deploy/architectures.md; a test holds the page and the findings equal.
"""

import logging
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from raylign.errors import ModelError
from raylign.models.open import without_dropout
from raylign.training.layout_check import supported_layout
from raylign.training.logprobs import CompletionLogps
from raylign.training.rewards import CompletionRewards
from tests.unit.tiny_models import IDS, SMALL, VOCABULARY

PAGE = Path(__file__).parents[2] / "deploy" / "architectures.md"
WINDOW = 64
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, "n_embd": 32}
_MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
_MAMBA: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
_TWOKINDS = ["sliding_attention", "full_attention"]
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "BLOOM": ("Bloom", _GPT | {"hidden_size": 32}),
    "Cohere (Command R)": ("Cohere", SMALL),
    "Cohere 2 (Command R7B)": ("Cohere2", SMALL | {"sliding_window": WINDOW, "layer_types": _TWOKINDS}),
    "DeepSeek V3": ("DeepseekV3", SMALL | _LATENT | _MOE | {"num_key_value_heads": 4}),
    "Falcon": ("Falcon", {**_MAMBA, "num_attention_heads": 4}),
    "Falcon with ALiBi": ("Falcon", {**_MAMBA, "num_attention_heads": 4, "alibi": True}),
    "Gemma": ("Gemma", SMALL | {"head_dim": 8}),
    "Gemma 2": (
        "Gemma2",
        SMALL | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": _TWOKINDS, "attn_logit_softcapping": 2.0},
    ),
    "Gemma 3": ("Gemma3Text", SMALL | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": _TWOKINDS}),
    "GLM 4": ("Glm4", SMALL | {"head_dim": 8}),
    "GPT-2": ("GPT2", _GPT),
    "GPT-J": ("GPTJ", _GPT | {"rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeo",
        {**_MAMBA, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    ),
    "GPT-NeoX (Pythia)": ("GPTNeoX", SMALL),
    "GPT-OSS": (
        "GptOss",
        SMALL
        | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
        | {"layer_types": _TWOKINDS},
    ),
    "Granite": ("Granite", SMALL | {"logits_scaling": 4.0}),
    "Granite, logits not scaled": ("Granite", SMALL | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "Jamba": (
        "Jamba",
        SMALL
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "LFM2": ("Lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}),
    "Llama": ("Llama", SMALL),
    "Llama 4": (
        "Llama4Text",
        SMALL
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": WINDOW}
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
    "Mamba": ("Mamba", _MAMBA | {"state_size": 8}),
    "Mamba 2": ("Mamba2", _MAMBA | {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1}),
    "Mistral": ("Mistral", SMALL | {"sliding_window": WINDOW}),
    "Mixtral": ("Mixtral", SMALL | {"num_local_experts": 4, "sliding_window": WINDOW}),
    "MPT": ("Mpt", {"vocab_size": VOCABULARY, "n_layers": 2, "n_heads": 4, "d_model": 32}),
    "Nemotron": ("Nemotron", SMALL),
    "OLMo": ("Olmo", SMALL),
    "OLMo 2": ("Olmo2", SMALL),
    "OLMo 3": ("Olmo3", SMALL | {"sliding_window": WINDOW, "layer_types": _TWOKINDS}),
    "OPT": ("OPT", {**_MAMBA, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Phi": ("Phi", SMALL),
    "Phi-3": ("Phi3", SMALL | {"sliding_window": WINDOW}),
    "Phi-3 with longrope": (
        "Phi3",
        SMALL | {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64, "max_position_embeddings": 256},
    ),
    "Phi-3.5 MoE": ("Phimoe", SMALL | {"num_local_experts": 4, "sliding_window": 512, "max_position_embeddings": 512}),
    "Phi-3.5 MoE with a narrow window": ("Phimoe", SMALL | {"num_local_experts": 4, "sliding_window": WINDOW}),
    "Qwen 2": ("Qwen2", SMALL | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "Qwen 2 MoE": (
        "Qwen2Moe",
        SMALL
        | _MOE
        | {"num_experts": 4, "shared_expert_intermediate_size": 16, "sliding_window": WINDOW}
        | {"use_sliding_window": True, "layer_types": _TWOKINDS},
    ),
    "Qwen 2 MoE without a window": (
        "Qwen2Moe",
        SMALL | _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen 3": ("Qwen3", SMALL | {"head_dim": 8}),
    "Qwen 3 MoE": ("Qwen3Moe", SMALL | _MOE | {"num_experts": 4, "head_dim": 8}),
    "RecurrentGemma": (
        "RecurrentGemma",
        SMALL | {"head_dim": 8, "lru_width": 32, "attention_window_size": WINDOW, "num_hidden_layers": 3},
    ),
    "RWKV": ("Rwkv", {**_MAMBA, "attention_hidden_size": 32, "intermediate_size": 48, "context_length": 128}),
    "SmolLM 3": ("SmolLM3", SMALL | {"num_hidden_layers": 4}),
    "StableLM": ("StableLm", SMALL),
    "Starcoder 2": ("Starcoder2", SMALL | {"sliding_window": WINDOW}),
}
"""The architecture of each, and the options of a tiny one."""
KINDS: dict[str, tuple[Any, Callable[[PreTrainedModel], Any]]] = {
    "policy": (AutoModelForCausalLM, CompletionLogps),
    "reward model": (AutoModelForSequenceClassification, CompletionRewards),
}


_HEAD = """# Architectures

How sequences of each architecture of transformers are laid out in training. Written by
`python -m tests.unit.architectures` from a tiny random model of each; a test holds page and findings equal.

- **packed**: no padding, each prompt once for all its completions (`trainer.packing: shared`).
- **padded**: one row per completion. The attention or the state of the model knows nothing of packed rows; the trainer
  warns and goes on so. With **(eager)**, attention is transformers' eager one, whose memory grows with the square of
  the length: PyTorch's own knows no soft-capping, sinks or biases.
- **refused**: the run ends at its start. An option named there rescales logits, which raylign does not apply.

The same check runs on your model, with its weights, when the trainer starts: in float32, in rows longer than every
attention window (windows are narrowed for it), each layout must give what transformers' eager forward gives for a
sequence alone, to 0.001 nats. A model that no layout reproduces is refused. Scorers that run a model check theirs too.

Rotary embeddings that change with length (`longrope`, `dynamic`) take their frequencies from the longest sequence of a
batch in transformers, and from `max_model_len` in vLLM. Runs and scorers therefore read such models up to the length at
which they change, `original_max_position_embeddings`, and refuse a longer `data.max_length`,
`generators.max_model_len` or `scoring.max_length`.

| architecture | policy | reward model |
|---|---|---|"""


def config_of(name: str) -> PreTrainedConfig:
    kind, options = CAUSAL[name]
    config: PreTrainedConfig = getattr(transformers, f"{kind}Config")(**deepcopy(options), **IDS)
    return without_dropout(config)


def module_of(config: PreTrainedConfig, kind: str) -> Any:
    """A random model wrapped as the trainer wraps it. Raises ModelError, or ValueError where transformers has none."""
    torch.manual_seed(0)
    make, wrap = KINDS[kind]
    if kind == "reward model":
        config.num_labels = 1
    model = make.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return wrap(model)


def verdict(name: str, kind: str) -> str:
    """How the trainer lays out sequences of this architecture, or that it refuses."""
    try:
        module = module_of(config_of(name), kind)
        layout = supported_layout([module], "shared", torch.device("cpu"))
    except ModelError as error:
        option = re.search(r"sets (\w+)=", str(error))
        return f"refused: {option[1]}" if option else "refused"
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return "no such head in transformers"
    eager = " (eager)" if layout == "padded" and module.padded_attention == "eager" else ""
    return ("packed" if layout == "shared" else layout) + eager


def row(name: str) -> str:
    """The line of the page."""
    return f"| {name} | {' | '.join(verdict(name, kind) for kind in KINDS)} |"


def page(rows: Sequence[str]) -> str:
    return "\n".join((_HEAD, *rows, ""))


def main() -> None:
    logging.getLogger("raylign").setLevel(logging.ERROR)
    PAGE.write_text(page([row(name) for name in CAUSAL]), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What every group of checks gets, and the models and pairs that they share."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raylign.records import Candidate, Preference, Prompt
from tests.benchmarks.harness.models import save_random_qwen3
from tests.gpu.rows import Sheet

PAD = 2
GIB = 2**30
WINDOW = 24
_SPREAD = 0.1
"""Standard deviation of random weights: at transformers' 0.02 attention would hardly move the log-probs."""


@dataclass(frozen=True, slots=True)
class Stage:
    """`tiny` makes every check small enough for a CPU; `folder` is for files that groups share."""

    device: torch.device
    tiny: bool
    folder: Path
    sheet: Sheet

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def random_model(kind: str, *, vocabulary: int, width: int = 128, layers: int = 2) -> PreTrainedModel:
    """fp32, in eager attention: `qwen3` (grouped keys, wide heads), `llama`, or `mistral` (grouped, a window)."""
    head = 32
    heads = width // head
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 4096,
        "initializer_range": _SPREAD,
        "pad_token_id": PAD,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=heads, tie_word_embeddings=True, **common))
    grouped: dict[str, Any] = {"num_key_value_heads": heads // 2, **common}
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **grouped))
    return Qwen3ForCausalLM(Qwen3Config(head_dim=2 * head, tie_word_embeddings=True, **grouped))


def tiny_folder(stage: Stage) -> str:
    """A small Qwen3 with a tokenizer of whole words, as a folder of transformers."""
    folder = stage.folder / "tiny"
    if not folder.exists():
        model = random_model("qwen3", vocabulary=512, width=64)
        model.config._attn_implementation = "sdpa"
        model.save_pretrained(folder)
        _save_tokenizer(folder)
    return str(folder)


def large_folder(stage: Stage) -> str:
    """Qwen3-1.7B's shape in bf16 with random weights; the small one where checks are tiny."""
    if stage.tiny:
        return tiny_folder(stage)
    folder = stage.folder / "qwen3-1.7b"
    if not folder.exists():
        with stage.device:
            save_random_qwen3(folder)
        _save_tokenizer(folder)
        free()
    return str(folder)


def _save_tokenizer(folder: Path) -> None:
    """TRL asks for one, and reads no text with it."""
    words = {"<unk>": 0, "<eos>": 1, "<pad>": PAD}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)


def random_ids(generator: torch.Generator, length: int, vocabulary: int) -> list[int]:
    """Not below 8: what is there means something to models."""
    return torch.randint(8, vocabulary, (length,), generator=generator).tolist()


def preference(index: int, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Preference:
    """Completions of `prompt`, best first."""
    name = f"p{index}"
    candidates = tuple(
        Candidate(name, number, tuple(ids), (0.0,) * len(ids), "", "stop", 0, 0)
        for number, ids in enumerate(completions)
    )
    scores = tuple(float(-number) for number in range(len(completions)))
    return Preference(Prompt(name, (), tuple(prompt)), candidates, scores, (1.0,) * len(completions))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

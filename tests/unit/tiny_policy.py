"""A Llama of 1,128 weights with a tokenizer and a chat template, and a recipe for it."""

from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["say", "good", "bad", "film", "one", "two", "three", "</s>", "<unk>"]
PARAMETERS = 1128
LORA_PARAMETERS = 928
"""Rank 4 on 2 layers of linear layers whose inputs and outputs add up to 116."""


def save_policy(folder: Path) -> Path:
    """Embeddings 16 x 8 (tied), two layers of 496, a norm of 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def save_recipe(folder: Path) -> Path:
    """A recipe in `folder` with its model, ten prompts of 1 to 5 tokens and a scorer of its own."""
    save_policy(folder / "policy")
    prompts = [" ".join(words) for count in range(1, 6) for words in (["good"] * count, ["bad"] * count)]
    rows = "".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts)
    (folder / "prompts.jsonl").write_text(rows)
    recipe = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "model": {"path": str(folder / "policy"), "lora": {"r": 4, "lora_alpha": 8}},
        "prompts": {"source": str(folder / "prompts.jsonl"), "held_out": 3},
        "sampling": {"num_generations": 4, "max_new_tokens": 10},
        "scoring": {"function": "user_scores:length"},
        "trainer": {"per_device_train_batch_size": 2, "num_train_epochs": 2},
        "generators": {"max_model_len": 32},
        "placement": {"device": "cpu", "generator_cpus": 1, "trainer_cpus": 1},
        "schedule": {"rounds": 2, "prompts_per_round": 5},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "tiny.yaml"

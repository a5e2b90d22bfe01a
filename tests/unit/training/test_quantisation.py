"""QLoRA: a frozen base in 4 bits under an adapter, and what of it leaves the trainer."""

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import ModelError
from raylign.models.load import load_policy
from raylign.records import Completions
from raylign.training.layout_check import compare
from raylign.training.logprobs import CompletionLogps
from raylign.training.weights import checkpoint_shapes, checkpoint_weights
from tests.unit.tiny_models import IDS, VOCABULARY, build, plain_sums, scores

GROUPS = [Completions((3, 4, 5), ((6, 7), (8, 9, 10)))]
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    **IDS,
)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, **IDS)


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    build(config).save_pretrained(folder)
    return folder


def qlora(folder: Path, **options: Any) -> PeftModel:
    """In 4 bits, with an adapter that changes the model."""
    block = ModelBlock(load_in_4bit=True, lora=LoraBlock(r=4, lora_alpha=8), **{"dtype": "float32", **options})
    policy = load_policy(str(folder), block, seed=0)
    assert isinstance(policy, PeftModel)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    return policy


@pytest.mark.parametrize("options", [{}, {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": False}])
def test_linear_layers_have_4_bits_and_only_the_adapter_is_trained(options: dict[str, Any], tmp_path: Path) -> None:
    policy = qlora(saved(LLAMA, tmp_path), **options)
    base = {name: parameter for name, parameter in policy.named_parameters() if ".lora_" not in name}
    packed = {name for name, parameter in base.items() if parameter.dtype == torch.uint8}
    assert packed == {name for name in base if name.endswith("proj.base_layer.weight")} and len(packed) == 14
    assert all(p.requires_grad == (".lora_" in name) for name, p in policy.named_parameters())


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda config: config.model_type)
def test_a_plain_model_of_the_published_weights_is_the_policy(config: PreTrainedConfig, tmp_path: Path) -> None:
    """Unpacked and merged; the generators' model needs no bitsandbytes."""
    policy = qlora(saved(config, tmp_path))
    weights = dict(checkpoint_weights(policy, lambda parameters: nullcontext()))
    told = {name: (kind, shape) for name, kind, shape in checkpoint_shapes(policy, lambda p: tuple(p.shape))}
    assert told == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    before = plain_sums(plain, GROUPS)
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}
    after = plain_sums(plain, GROUPS)
    assert after == pytest.approx(scores(policy, GROUPS).logps.tolist(), rel=1e-4)
    assert after != pytest.approx(before, abs=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_policy_can_be_packed(dtype: str, tmp_path: Path) -> None:
    """Compared in float32, and what layers in 4 bits compute in is afterwards what it was."""
    policy = qlora(saved(LLAMA, tmp_path), dtype=dtype)
    computes = [layer.compute_dtype for layer in policy.modules() if hasattr(layer, "compute_dtype")]
    verdict = compare(CompletionLogps(policy), "shared", torch.device("cpu"))
    assert verdict.exact and verdict.gap < 1e-4
    assert [layer.compute_dtype for layer in policy.modules() if hasattr(layer, "compute_dtype")] == computes
    assert set(computes) == {getattr(torch, dtype)}


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    config = json.loads((saved(LLAMA, tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"quantised already \(gptq\).*give the 16-bit model"):
        load_policy(str(tmp_path), ModelBlock(), seed=0)


def test_without_bitsandbytes_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(LLAMA, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="model.load_in_4bit needs bitsandbytes; pip install bitsandbytes=="):
        load_policy(str(tmp_path), ModelBlock(load_in_4bit=True, lora=LoraBlock()), seed=0)


def test_an_adapter_on_4_bits_does_not_fit_the_checkpoint() -> None:
    assert ModelBlock(lora=LoraBlock()).adapter_fits_checkpoint
    assert not ModelBlock(lora=LoraBlock(), load_in_4bit=True).adapter_fits_checkpoint
    assert not ModelBlock().adapter_fits_checkpoint

"""Export of an adapter that was trained on a base in 4 bits."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from raylign.config import parse_config
from raylign.config.blocks import ModelBlock
from raylign.export.card import card_text
from raylign.export.policy import export_model
from raylign.models.load import load_policy
from raylign.records import RoundReport
from raylign.run.directory import RunDirectory, create_run
from raylign.training.weights import checkpoint_weights
from recipes.commands.export import export_run
from tests.unit.export.test_export import FACTS, save_base

BLOCK = ModelBlock.model_validate({"load_in_4bit": True, "lora": {"r": 4, "lora_alpha": 8}})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", torch.bfloat16)


def trained(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Save an adapter on the base in 4 bits; returns what the run would push to its generators."""
    policy = load_policy(str(base), BLOCK, seed=0)
    assert isinstance(policy, PeftModel)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    policy.save_pretrained(str(adapter))
    return dict(checkpoint_weights(policy, lambda parameters: nullcontext()))


def test_the_merged_model_is_what_the_run_pushed(base: Path, tmp_path: Path) -> None:
    pushed = trained(base, tmp_path / "adapter")
    to = export_model(tmp_path / "adapter", str(base), tmp_path / "out", merge=True, card=FACTS, in_4bit=BLOCK)
    found = load_file(to / "model.safetensors")
    assert found.keys() == pushed.keys()
    assert all(torch.equal(found[name], pushed[name]) for name in pushed)
    config = AutoConfig.from_pretrained(to)
    assert config.dtype == torch.bfloat16 and not hasattr(config, "quantization_config")
    on_16_bits = export_model(tmp_path / "adapter", str(base), tmp_path / "other", merge=True, card=FACTS)
    other = load_file(on_16_bits / "model.safetensors")
    assert any(not torch.equal(found[name], other[name]) for name in found)


def test_the_card_of_an_adapter_says_how_to_load_its_base() -> None:
    text = card_text(FACTS, is_adapter=True, in_4bit=BLOCK)
    assert "base model in 4 bits (bitsandbytes, nf4, double quantisation)" in text
    assert 'bnb_4bit_quant_type="nf4"' in text and "bnb_4bit_compute_dtype=torch.bfloat16" in text
    assert "- qlora" in text


def test_the_card_of_a_merged_model_says_what_it_was_merged_into() -> None:
    text = card_text(FACTS, is_adapter=False, in_4bit=BLOCK)
    assert "merged here into the weights that\nthose 4 bits unpack to" in text
    assert "BitsAndBytesConfig" not in text
    assert "4 bits" not in card_text(FACTS, is_adapter=True)


def run_of(base: Path, folder: Path) -> RunDirectory:
    model = BLOCK.model_dump() | {"path": str(base)}
    config = parse_config({"run": {"name": "tiny", "dir": str(folder)}, "model": model})
    directory = create_run(config.run, config)
    with directory.checkpoint_store(None).new(1, (), True, 0) as checkpoint:
        trained(base, checkpoint)
    directory.write_report(RoundReport(1, 1, {}, (), {}, FACTS.evaluation, {}))
    return directory


def test_an_adapter_is_not_to_be_served_on_the_16_bit_base(base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path).path
    adapter = export_run(run, tmp_path / "adapter", merge=False, version=None)
    assert adapter.use.startswith(f"raylign export {run} --to {tmp_path}/adapter-merged --merge  # first: vLLM would")
    assert "in 4 bits" in (adapter.folder / "README.md").read_text()
    merged = export_run(run, tmp_path / "merged", merge=True, version=None)
    assert merged.use == f"vllm serve {tmp_path}/merged"

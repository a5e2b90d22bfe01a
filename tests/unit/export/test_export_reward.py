"""Export of reward models to what transformers reads, on a model of a few thousand weights."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raylign.config.blocks import ModelBlock
from raylign.errors import ModelError
from raylign.export.card import RewardModelFacts
from raylign.export.reward_model import export_reward_model
from raylign.models.reward_model import load_reward_model
from raylign.records import Completions
from raylign.training.rewards import CompletionRewards
from raylign.training.sequences import token_batch
from raylign.training.weights import adapter_weights, checkpoint_weights
from tests.unit.models.test_models import save_tokenizer
from tests.unit.tiny_models import tiny
from tests.unit.training.test_weights import whole

EOS, PAD = 1, 2
CARD = RewardModelFacts(
    "tiny", "someone/tiny", "someone/pairs", "`bradley_terry`", {"accuracy": 0.75}, {"torch": "2.13"}
)
GROUP = Completions((5, 6, 7), ((8, 9, 10, EOS), (4, EOS)))
LORA = {"r": 4, "lora_alpha": 8}
TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


def save_base(folder: Path, dtype: torch.dtype = torch.float32, **special: str) -> str:
    model = tiny()
    nn.Module.to(model, dtype)
    model.config.eos_token_id = model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    save_tokenizer(folder, eos_token="</s>", chat_template=TEMPLATE, **special)
    return str(folder)


def trained(base: str, source: Path, **options: Any) -> tuple[nn.Module, list[float]]:
    """Save a reward model as the trainer does; returns it with its rewards of `GROUP`."""
    block = ModelBlock.model_validate({"dtype": "float32", **options})
    model = load_reward_model(base, block, 0, whole)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("score.weight"):
                nn.init.normal_(parameter, std=0.3)
    source.mkdir()
    if isinstance(model, PeftModel):
        save_file(dict(adapter_weights(model, whole)), source / "adapter_model.safetensors", {"format": "pt"})
        model.peft_config["default"].save_pretrained(str(source))
    else:
        save_file(dict(checkpoint_weights(model, whole)), source / "model.safetensors", {"format": "pt"})
    return model, CompletionRewards(model)(token_batch([GROUP], "shared", 0)).tolist()


def rewards_of(folder: Path) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [[*GROUP.prompt, *completion] for completion in GROUP.completions]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        found: list[float] = AutoModelForSequenceClassification.from_pretrained(folder)(**batch).logits[:, 0].tolist()
    return found


@pytest.mark.parametrize("options", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_rewards_of_a_padded_batch_are_those_of_training(tmp_path: Path, options: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base")
    _, expected = trained(base, tmp_path / "source", **options)
    to = export_reward_model(tmp_path / "source", base, tmp_path / "out", CARD)
    assert rewards_of(to) == pytest.approx(expected, abs=1e-5)
    # EOS was the pad token: transformers would have read the reward one token early. Ids 3 to 49 are real tokens here.
    config = json.loads((to / "config.json").read_text())
    assert config["pad_token_id"] == AutoTokenizer.from_pretrained(to).pad_token_id != EOS
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    text = (to / "README.md").read_text()
    assert "pipeline_tag: text-classification" in text and "| accuracy | 0.7500 |" in text and "- torch 2" in text
    assert (to / "chat_template.jinja").read_text() == TEMPLATE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "source"]


def test_a_pad_token_that_ends_nothing_is_kept(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", pad_token="<pad>")
    _, expected = trained(base, tmp_path / "source")
    to = export_reward_model(tmp_path / "source", base, tmp_path / "out", CARD)
    assert AutoTokenizer.from_pretrained(to).pad_token_id == PAD and rewards_of(to) == pytest.approx(expected, abs=1e-5)


def test_a_pad_token_that_generation_stops_at_is_not(tmp_path: Path) -> None:
    """And the embedding grows by the one that takes its place, where it has no row for it."""
    base = save_base(tmp_path / "base", pad_token="<pad>")
    (tmp_path / "base/generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, PAD]}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"t{number}" for number in range(47)])
    tokenizer.save_pretrained(base)
    _, expected = trained(base, tmp_path / "source", lora=LORA)
    to = export_reward_model(tmp_path / "source", base, tmp_path / "out", CARD)
    assert AutoTokenizer.from_pretrained(to).pad_token_id == 50 and rewards_of(to) == pytest.approx(expected, abs=1e-5)
    weight = load_file(to / "model.safetensors")["model.embed_tokens.weight"]
    assert weight.shape == (51, 32) and not weight[50].any()


def test_an_exported_model_is_exported_again_as_it_is(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    _, expected = trained(base, tmp_path / "source")
    first = export_reward_model(tmp_path / "source", base, tmp_path / "first", CARD)
    second = export_reward_model(first, base, tmp_path / "second", CARD)
    assert rewards_of(second) == pytest.approx(expected, abs=1e-5)
    assert load_file(first / "model.safetensors").keys() == load_file(second / "model.safetensors").keys()


def test_an_adapter_on_4_bits_is_merged_into_what_they_unpack_to(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.bfloat16)
    options = {"dtype": "bfloat16", "load_in_4bit": True, "lora": LORA}
    model, _ = trained(base, tmp_path / "source", **options)
    block = ModelBlock.model_validate(options)
    to = export_reward_model(tmp_path / "source", base, tmp_path / "out", CARD, in_4bit=block)
    found, expected = load_file(to / "model.safetensors"), dict(checkpoint_weights(model, lambda _: nullcontext()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(ModelError, match="neither an adapter .* nor weights of a reward model"):
        export_reward_model(source, base, tmp_path / "out", CARD)
    tiny().save_pretrained(source)
    with pytest.raises(ModelError, match="do not fit config.json: {'missing_keys': .'score.weight'"):
        export_reward_model(source, base, tmp_path / "out", CARD)
    (source / "config.json").unlink()
    save_file({"score.weight": torch.zeros(1, 32)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="20 of 21 tensors differ in name or shape"):
        export_reward_model(source, base, tmp_path / "out", CARD)
    (source / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        export_reward_model(source, base, tmp_path / "out", CARD)
    (source / "model.safetensors").rename(source / "adapter_model.bin")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="only safetensors are read"):
        export_reward_model(source, base, tmp_path / "out", CARD)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ModelError, match="already there"):
        export_reward_model(source, base, tmp_path / "out", CARD)


def test_a_template_of_ones_own_comes_along(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    trained(base, tmp_path / "source")
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}hi{% endif %}")
    to = export_reward_model(tmp_path / "source", base, tmp_path / "out", CARD, chat_template=mine)
    assert AutoTokenizer.from_pretrained(to).chat_template == mine.read_text()

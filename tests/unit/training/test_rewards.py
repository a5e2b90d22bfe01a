"""Rewards of packed, shared and padded batches are those of transformers' own classifier on each row alone."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import ModelError
from raylign.models.reward_model import load_reward_model
from raylign.records import Completions
from raylign.training.layout_check import supported_layout
from raylign.training.rewards import CompletionRewards, score_head
from raylign.training.sequences import Layout, token_batch
from raylign.training.weights import adapter_weights, checkpoint_weights
from tests.unit.tiny_models import IDS, PACKABLE, SMALL, tiny
from tests.unit.training.test_weights import whole

GROUPS = [Completions((5, 6, 7), ((8, 9, 2), (), (4, 2))), Completions((3,), ((2, 11, 12, 13),))]
LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")


def classifier(name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    config = deepcopy(PACKABLE[name])
    config.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def plain(model: PreTrainedModel, groups: list[Completions]) -> list[float]:
    """transformers' own reward of every row alone, read at its last token."""
    found = []
    for group in groups:
        for completion in group.completions:
            with torch.no_grad():
                found.append(model(input_ids=torch.tensor([[*group.prompt, *completion]])).logits.item())
    return found


@pytest.mark.parametrize("name", PACKABLE)
def test_every_layout_gives_the_rewards_of_transformers(name: str) -> None:
    model = classifier(name)
    expected = torch.tensor(plain(model, GROUPS))
    module = CompletionRewards(deepcopy(model))
    for layout in LAYOUTS:
        torch.testing.assert_close(module(token_batch(GROUPS, layout, 0)), expected, atol=2e-5, rtol=0)
    assert len(set(expected.tolist())) == 4 and expected.std() > 0.1


def test_a_reward_by_hand() -> None:
    """The score's weight times the hidden state at the last token."""
    model = classifier()
    prompt, completion = (5, 6, 7), (8, 9, 2)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0, -1]
    expected = sum(w * float(h) for w, h in zip(score_head(model).weight[0].tolist(), hidden, strict=True))
    (found,) = CompletionRewards(model)(token_batch([Completions(prompt, (completion,))], "shared", 0)).tolist()
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pad_token_may_be_the_eos(layout: Layout) -> None:
    """transformers would take the reward of the token before."""
    model = classifier()
    module = CompletionRewards(deepcopy(model))
    expected = plain(model, [Completions((5, 6), ((7, 2), (9, 9, 9, 2)))])
    model.config.pad_token_id = 2
    found = module(token_batch([Completions((5, 6), ((7, 2), (9, 9, 9, 2)))], layout, 2)).tolist()
    assert found == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([[5, 6, 7, 2]])).logits.item()
    assert abs(theirs - expected[0]) > 1e-3


def test_gradients_are_the_same_in_every_layout() -> None:
    found = []
    for layout in LAYOUTS:
        module = CompletionRewards(classifier())
        (module(token_batch(GROUPS, layout, 0)) * torch.tensor([1.0, -2.0, 3.0, -1.0])).sum().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    for grads in found[1:]:
        for left, right in zip(found[0], grads, strict=True):
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PACKABLE)
def test_the_usual_architectures_can_be_packed(name: str) -> None:
    assert supported_layout([CompletionRewards(classifier(name))], "shared", torch.device("cpu")) == "shared"


def test_rewards_are_fp32_whatever_the_model() -> None:
    module = CompletionRewards(classifier().bfloat16())
    assert module(token_batch(GROUPS, "shared", 0)).dtype == torch.float32


def save(folder: Path) -> str:
    tiny().save_pretrained(folder)
    return str(folder)


def block(folder: str, lora: bool) -> ModelBlock:
    return ModelBlock(path=folder, dtype="float32", lora=LoraBlock(r=2, lora_alpha=4) if lora else None)


@pytest.mark.parametrize("lora", [False, True])
def test_a_fresh_head_depends_on_the_seed_alone(tmp_path: Path, lora: bool) -> None:
    folder = save(tmp_path)
    heads: list[nn.Parameter] = []
    for seed in (3, 3, 4):
        torch.rand(len(heads) + 1)
        model = load_reward_model(folder, block(folder, lora), seed, whole)
        heads.append(dict(model.named_parameters())[("base_model.model." if lora else "") + "score.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert all(head.requires_grad and head.shape == (1, 32) for head in heads)
    # 32 draws of a standard deviation of 1 / sqrt(33).
    assert 0.5 < heads[0].std().item() * 33**0.5 < 1.5


def test_the_backbone_is_that_of_the_language_model(tmp_path: Path) -> None:
    folder = save(tmp_path)
    weights = dict(load_reward_model(folder, block(folder, False), 0, whole).named_parameters())
    for name, parameter in tiny().named_parameters():
        assert name == "lm_head.weight" or torch.equal(weights[name], parameter)


def test_an_adapters_head_is_trained_and_saved_as_peft_saves_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "base")
    model = load_reward_model(folder, block(folder, True), 0, whole)
    assert isinstance(model, PeftModel)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name or name.endswith("score.weight") for name in trained)
    assert not any(".lora_" in name and "score" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(dict(adapter_weights(model, whole)), adapter / "adapter_model.safetensors", {"format": "pt"})
    model.peft_config["default"].save_pretrained(str(adapter))
    plain_base = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)
    again = PeftModel.from_pretrained(plain_base, str(adapter)).merge_and_unload()
    ours = CompletionRewards(model)(token_batch(GROUPS, "shared", 0)).tolist()
    assert ours == pytest.approx(plain(again, GROUPS), abs=1e-5)
    merged = dict(checkpoint_weights(model, whole))
    assert merged.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(merged[name], tensor)


def test_a_reward_models_own_head_is_kept(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    found = load_reward_model(str(tmp_path), block(str(tmp_path), False), 7, whole)
    assert isinstance(found, PreTrainedModel)
    assert torch.equal(score_head(found).weight, score_head(model).weight)


def test_models_without_one_linear_score_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL, **IDS)
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="size mismatch|mismatch"):
        load_reward_model(str(tmp_path), block(str(tmp_path), False), 0, whole)
    with pytest.raises(ModelError, match="not a linear layer with one output; use a model whose sequence classifier"):
        CompletionRewards(tiny())


def test_other_missing_weights_are_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path)
    tensors = {name: p.detach().clone() for name, p in tiny().named_parameters() if name != "model.norm.weight"}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in the files, first model\.norm\.weight"):
        load_reward_model(folder, block(folder, False), 0, whole)

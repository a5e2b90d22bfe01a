"""Weights under their checkpoint names: merged as PEFT merges, named as transformers names them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raylign.training.weights import adapter_weights, checkpoint_shapes, checkpoint_weights

TARGETS = ("all-linear", ("q_proj", "down_proj"))


def whole(parameters: Sequence[nn.Parameter]) -> nullcontext[None]:
    return nullcontext()


def shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.shape)


def tiny(tied: bool, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    if dtype == torch.bfloat16:
        model.bfloat16()
    return model


def adapted(model: LlamaForCausalLM, targets: str | tuple[str, ...] = "all-linear") -> PeftModel:
    """With an adapter of rank 4, scaled by 12 / 4, that changes the model."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=12,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
    )
    policy: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    return policy


def merged(policy: PeftModel) -> PreTrainedModel:
    """The base model with PEFT's own merge."""
    model: PreTrainedModel = policy.merge_and_unload()
    return model


def file_of(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """What transformers writes for this model."""
    model.save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
def test_merged_weights_are_those_peft_merges_and_transformers_saves(
    tied: bool, targets: str | tuple[str, ...], tmp_path: Path
) -> None:
    policy = adapted(tiny(tied), targets)
    ours = dict(checkpoint_weights(policy, whole))
    theirs = file_of(merged(policy), tmp_path)
    assert ours.keys() == theirs.keys()
    assert ("lm_head.weight" in ours) is not tied
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_adapter_gives_its_own_weights(tied: bool, tmp_path: Path) -> None:
    model = tiny(tied)
    ours = dict(checkpoint_weights(model, whole))
    theirs = file_of(model, tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_loaded_from_the_merged_weights_is_the_policy(tmp_path: Path) -> None:
    policy = adapted(tiny(tied=True))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        expected = policy(ids).logits
        tiny(tied=True).config.save_pretrained(tmp_path)
        save_file(dict(checkpoint_weights(policy, whole)), tmp_path / "model.safetensors", {"format": "pt"})
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
        with policy.disable_adapter():
            assert (policy(ids).logits - expected).abs().max() > 0.01


def test_an_update_is_added_in_fp32_before_the_cast() -> None:
    policy = adapted(tiny(tied=True, dtype=torch.bfloat16))
    layer = policy.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    weight = layer.get_parameter("base_layer.weight").float()
    b, a = (layer.get_parameter(f"lora_{part}.default.weight").float() for part in "BA")
    update = dict(checkpoint_weights(policy, whole))["model.layers.1.mlp.down_proj.weight"]
    assert update.dtype == torch.bfloat16
    assert torch.equal(update, (weight + 3.0 * (b @ a)).bfloat16())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_shapes_announce_the_weights_in_their_order(tied: bool, lora: bool) -> None:
    model: nn.Module = tiny(tied, torch.bfloat16)
    if lora:
        model = adapted(tiny(tied, torch.bfloat16))
    sent = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in checkpoint_weights(model, whole)]
    assert list(checkpoint_shapes(model, shape)) == sent


def test_shapes_are_asked_for_and_nothing_is_gathered() -> None:
    found = list(checkpoint_shapes(tiny(tied=True), lambda parameter: (7, parameter.dim())))
    assert {shape for _, _, shape in found} == {(7, 1), (7, 2)}


def test_tensors_are_copies() -> None:
    policy = adapted(tiny(tied=True))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    for _, tensor in (*checkpoint_weights(policy, whole), *adapter_weights(policy, whole)):
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def test_every_parameter_is_gathered_once_and_three_at_most_are_whole_at_a_time() -> None:
    policy = adapted(tiny(tied=True))
    gathered: list[int] = []
    open_now: list[int] = []

    @contextmanager
    def gather(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        assert not open_now
        open_now.extend(map(id, parameters))
        gathered.extend(map(id, parameters))
        yield
        open_now.clear()

    for _ in checkpoint_weights(policy, gather):
        assert len(open_now) <= 3
    assert len(gathered) == len(set(gathered))
    assert set(gathered) == {id(parameter) for parameter in policy.parameters()}


@pytest.mark.parametrize("targets", TARGETS)
def test_the_adapter_is_what_peft_saves(targets: str | tuple[str, ...], tmp_path: Path) -> None:
    policy = adapted(tiny(tied=True), targets)
    policy.save_pretrained(str(tmp_path))
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    ours = dict(adapter_weights(policy, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_peft_loads_the_adapter(tmp_path: Path) -> None:
    policy = adapted(tiny(tied=True))
    save_file(dict(adapter_weights(policy, whole)), tmp_path / "adapter_model.safetensors", {"format": "pt"})
    policy.peft_config["default"].save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny(tied=True), str(tmp_path))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, policy(ids).logits, rtol=1e-6, atol=1e-6)

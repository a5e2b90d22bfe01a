"""Fused LoRA layers against PEFT's own: outputs and gradients, and PEFT's wherever they are not the same."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from raylign.training.kernels.adapted_linear import use_fused_adapters


class Two(nn.Module):
    """Two linear layers, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 10), nn.Linear(10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.two(self.one(x).tanh())
        return output


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(r=2, lora_alpha=5, target_modules=["one", "two"], **options))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter)
    return model.to(dtype)


def fused_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module) and hasattr(module, "lora_A")]


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output = model(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad(output.square().sum(), [x, *trained])]


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_outputs_and_gradients_are_those_of_peft(shape: tuple[int, ...]) -> None:
    model, x = adapted(), torch.randn(shape, dtype=torch.float64)
    expected = outputs_and_gradients(model, x)
    use_fused_adapters(model)
    assert len(fused_layers(model)) == 2
    torch.testing.assert_close(outputs_and_gradients(model, x), expected)


def test_a_trained_base_gets_its_gradients() -> None:
    model, x = adapted().requires_grad_(True), torch.randn(4, 6, dtype=torch.float64)
    expected = outputs_and_gradients(model, x)
    use_fused_adapters(model)
    assert len(expected) == 1 + 1 + 3 + 4
    torch.testing.assert_close(outputs_and_gradients(model, x), expected)


def test_without_the_adapter_it_is_the_base_bit_by_bit() -> None:
    model, x = adapted(torch.bfloat16), torch.randn(4, 6).bfloat16()
    torch.manual_seed(0)
    base = Two().bfloat16()
    use_fused_adapters(model)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


def test_an_adapter_that_starts_at_zero_changes_no_bit() -> None:
    torch.manual_seed(0)
    base = Two().bfloat16()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["one", "two"])).to(torch.bfloat16)
    use_fused_adapters(model)
    x = torch.randn(4, 6).bfloat16()
    assert len(fused_layers(model)) == 2 and torch.equal(model(x), base(x))


# With a warning of peft's own class, the process that hands out tests would import peft to tell of it.
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_variants_stay_with_peft(options: dict[str, Any]) -> None:
    model = adapted(**options)
    use_fused_adapters(model)
    assert fused_layers(model) == []


def test_two_dtypes_stay_with_peft() -> None:
    model = adapted(torch.float32)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    x = torch.randn(4, 6).bfloat16()
    expected = model(x)
    use_fused_adapters(model)
    assert torch.equal(model(x), expected)

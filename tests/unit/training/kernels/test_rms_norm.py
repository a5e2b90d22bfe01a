"""The lean RMSNorm against transformers' own: the same outputs, the same gradients, and only where it is the same."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from raylign.training.kernels import rms_norm
from raylign.training.kernels.rms_norm import use_lean_norms
from tests.unit.tiny_models import PACKABLE, build


def norm(dtype: torch.dtype) -> LlamaRMSNorm:
    module = LlamaRMSNorm(24, eps=1e-3).to(dtype)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def by_hand(x: Tensor, module: LlamaRMSNorm) -> Tensor:
    return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_outputs_are_equal_bit_by_bit_and_gradients_those_of_the_formula(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rms_norm, "_BLOCK", block)
    module, x = norm(dtype), leaf(2, 5, 24, dtype=dtype)
    expected = module(x)
    use_lean_norms(module)
    found = module(x)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradients = torch.autograd.grad(found, (x, module.weight), grad)
    wide, exact = copy.deepcopy(norm(dtype)).double(), x.detach().double().requires_grad_()
    plain = torch.autograd.grad(by_hand(exact, wide), (exact, wide.weight), grad.double())
    limit = 0.02 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(gradients, plain, strict=True):
        assert one.dtype == dtype and (one.double() - other).norm() < limit * other.norm()


def test_a_frozen_weight_and_a_row_that_is_not_contiguous() -> None:
    module = norm(torch.float32).requires_grad_(False)
    x = leaf(5, 2, 24, dtype=torch.float32)
    expected = torch.autograd.grad(module(x.transpose(0, 1)).square().sum(), x)
    use_lean_norms(module)
    torch.testing.assert_close(torch.autograd.grad(module(x.transpose(0, 1)).square().sum(), x), expected)
    assert module.weight.grad is None


@pytest.mark.parametrize(("name", "lean"), [("llama", True), ("qwen3", True), ("mistral", True), ("gemma3", False)])
def test_only_norms_that_compute_the_same_are_replaced(name: str, lean: bool) -> None:
    model = build(PACKABLE[name])
    use_lean_norms(model)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms and all(("forward" in vars(module)) is lean for module in norms)

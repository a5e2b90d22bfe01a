"""RMSNorm on CPUs, a few rows at a time and computed again in the backward pass.

transformers' own keeps two fp32 and one narrow copy of its input per layer, a fifth of a small model's activations.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm

_BLOCK = 1 << 18
"""Elements of a block, which the caches hold."""


def use_lean_norms(model: nn.Module) -> None:
    """Replace the forward of all norms that are coded as Llama's (Mistral, Qwen and others have the same)."""
    for module in model.modules():
        if _is_llama_norm(module):
            module.forward = MethodType(_forward, module)


def _is_llama_norm(module: nn.Module) -> bool:
    return _code(type(module)) == _code(LlamaRMSNorm)


def _code(kind: type[nn.Module]) -> tuple[object, ...]:
    code = getattr(kind.forward, "__code__", None)
    return (kind,) if code is None else (code.co_code, code.co_names, code.co_consts)


def _forward(module: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.device.type != "cpu":
        elsewhere: Tensor = type(module).forward(module, hidden_states)
        return elsewhere
    output: Tensor = _RmsNorm.apply(hidden_states, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return output


class _RmsNorm(torch.autograd.Function):
    """weight * narrow(x / rms(x)) over the last dimension, in fp32 inside; Zhang and Sennrich (2019), equation 4."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        output = given.new_empty(given.shape, dtype=torch.promote_types(given.dtype, weight.dtype))
        for x, y in _blocks(given.contiguous(), output):
            normal, _ = _normal(x, epsilon)
            torch.mul(weight, normal.to(x.dtype), out=y)
        ctx.save_for_backward(given, weight)
        ctx.epsilon = epsilon
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        given, weight = ctx.saved_tensors
        to_weight = ctx.needs_input_grad[1]
        grad_given = given.new_empty(given.shape)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for x, dy, dx in _blocks(given.contiguous(), grad.contiguous(), grad_given):
            normal, inverse = _normal(x, ctx.epsilon)
            if to_weight:
                grad_weight += (dy * normal.to(x.dtype)).sum(0, dtype=torch.float32)
            of_normal = (dy * weight).float()
            along = (of_normal * normal).mean(-1, keepdim=True)
            dx.copy_(of_normal.addcmul_(normal, along, value=-1).mul_(inverse))
        return grad_given, grad_weight.to(weight.dtype) if to_weight else None, None


def _normal(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x), in fp32."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return wide * inverse, inverse


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of all tensors, which are contiguous and have one shape."""
    parts = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
    rows, width = parts[0].shape
    size = max(1, _BLOCK // width)
    for start in range(0, rows, size):
        yield tuple(part[start : start + size] for part in parts)

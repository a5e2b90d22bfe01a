"""LoRA layers in matrix products alone: no passes over outputs to scale an adapter's share and to add it."""

import sys
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

_ADAPTER = "default"


def use_fused_adapters(model: nn.Module) -> None:
    """Replace the forward of all plain LoRA layers: no dropout, bias or variant, and a base that is not quantised."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.lora.layer import Linear  # noqa: PLC0415 - takes seconds, and only adapters need it

    plain: type[nn.Module] = Linear
    for module in model.modules():
        if type(module) is plain and _is_plain(module):
            module.forward = MethodType(_forward, module)


def _is_plain(module: Any) -> bool:
    return (
        type(module.base_layer) is nn.Linear
        and module.active_adapters == [_ADAPTER]
        and isinstance(module.lora_dropout[_ADAPTER], nn.Identity)
        and not module.lora_variant
        and not module.lora_bias[_ADAPTER]
        and not module.fan_in_fan_out
    )


def _forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, down, up = module.base_layer, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
    # ZeRO-3 gathers a weight where its module is called, and one dtype is all that a matrix product takes.
    sharded, mixed = hasattr(base.weight, "ds_id"), not x.dtype == base.weight.dtype == down.dtype
    if args or kwargs or module.disable_adapters or module.merged or sharded or mixed:
        plain: Tensor = type(module).forward(module, x, *args, **kwargs)
        return plain
    scaling = module.scaling[_ADAPTER]
    output: Tensor = _AdaptedLinear.apply(x, base.weight, base.bias, down, up, scaling)  # type: ignore[no-untyped-call]
    return output


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T; Hu et al. (2021), equation 3."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = (rows @ down.T).mul_(scaling)
        output = linear(rows, weight, bias).addmm_(inner, up.T)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scaling = scaling
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        to_x, to_weight, to_bias, to_down, to_up, _ = ctx.needs_input_grad
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        of_inner = (grads @ up).mul_(ctx.scaling)
        return (
            (grads @ weight).addmm_(of_inner, down).view(x.shape) if to_x else None,
            grads.T @ rows if to_weight else None,
            grads.sum(0) if to_bias else None,
            of_inner.T @ rows if to_down else None,
            grads.T @ inner if to_up else None,
            None,
        )

"""A policy's weights under their checkpoint names, LoRA merged, 4 bits unpacked, one parameter in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raylign.models.load import is_adapted

if TYPE_CHECKING:
    from peft import PeftModel

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Makes sharded parameters whole inside its context; every rank must enter it in the same order."""

ShapeOf = Callable[[nn.Parameter], tuple[int, ...]]
"""Whole shape of a parameter that may be sharded."""

_ADAPTER = "default"


def checkpoint_weights(model: nn.Module, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every base parameter in the model's dtype; a LoRA update is added in fp32 before the cast.

    Weights in 4 bits come as the forward pass unpacks them. Tied parameters come once, under the embedding's name.
    Tensors are copies: training may go on.
    """
    base = _base(model)
    for name, parameter in _base_parameters(base):
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner and leaf == "weight":
            tensor = _merged(base.get_submodule(owner), parameter, gather)
        else:
            with gather([parameter]):
                tensor = _plain(parameter).detach().clone()
        yield _checkpoint_name(name), tensor.T.contiguous() if _is_transposed(base, name) else tensor


def checkpoint_shapes(model: nn.Module, shape_of: ShapeOf) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of what `checkpoint_weights` yields, in its order, without gathering anything."""
    base = _base(model)
    for name, parameter in _base_parameters(base):
        state = getattr(parameter, "quant_state", None)
        dtype, shape = (parameter.dtype, shape_of(parameter)) if state is None else (state.dtype, tuple(state.shape))
        yield _checkpoint_name(name), dtype, shape[::-1] if _is_transposed(base, name) else shape


def _base(model: nn.Module) -> nn.Module:
    base: nn.Module = model.get_base_model() if is_adapted(model) else model
    return base


def _base_parameters(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All but the adapter's and the untrained head beside a trained one, which PEFT keeps when it loads an adapter."""
    others = (".lora_", ".original_module.")
    return ((name, p) for name, p in base.named_parameters() if not any(other in name for other in others))


def _checkpoint_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{_ADAPTER}.", ".")


def _plain(weight: nn.Parameter) -> Tensor:
    """The weight itself, or what bitsandbytes makes of its 4 bits."""
    if getattr(weight, "quant_state", None) is None:
        return weight
    from peft.utils.integrations import dequantize_bnb_weight  # noqa: PLC0415 - takes seconds, and few need it

    plain: Tensor = dequantize_bnb_weight(weight)
    return plain


def _is_transposed(base: nn.Module, name: str) -> bool:
    """GPT-2 keeps its weights as [in, out]; quantised, they are held as [out, in]."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and issubclass(getattr(base.get_submodule(owner), "source_cls", nn.Module), Conv1D)


def _merged(layer: Any, weight: nn.Parameter, gather: Gather) -> Tensor:
    lora_a = layer.lora_A.get_parameter(f"{_ADAPTER}.weight")
    lora_b = layer.lora_B.get_parameter(f"{_ADAPTER}.weight")
    with gather([weight, lora_a, lora_b]), torch.no_grad():
        # LoRA, Hu et al. 2021 (arXiv 2106.09685) eq. 3: W + (alpha / r) B A
        update: Tensor = lora_b.float() @ lora_a.float() * layer.scaling[_ADAPTER]
        plain = _plain(weight)
        return (plain.float() + (update.T if layer.fan_in_fan_out else update)).to(plain.dtype)


def adapter_weights(model: "PeftModel", gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every trained parameter, a reward model's head among them, under PEFT's file names."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gather([parameter]):
                yield name.replace(f".{_ADAPTER}.", "."), parameter.detach().clone()

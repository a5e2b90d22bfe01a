"""A policy's weights under their checkpoint names, LoRA merged, one parameter in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Makes sharded parameters whole inside its context; every rank must enter it in the same order."""

ShapeOf = Callable[[nn.Parameter], tuple[int, ...]]
"""Whole shape of a parameter that may be sharded."""

_ADAPTER = "default"


def checkpoint_weights(model: nn.Module, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every base parameter in the model's dtype; a LoRA update is added in fp32 before the cast.

    Tied parameters come once, under the embedding's name. Tensors are copies: training may go on.
    """
    base = _base(model)
    for name, parameter in _base_parameters(base):
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner and leaf == "weight":
            yield _checkpoint_name(name), _merged(base.get_submodule(owner), parameter, gather)
        else:
            with gather([parameter]):
                yield _checkpoint_name(name), parameter.detach().clone()


def checkpoint_shapes(model: nn.Module, shape_of: ShapeOf) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of what `checkpoint_weights` yields, in its order, without gathering anything."""
    for name, parameter in _base_parameters(_base(model)):
        yield _checkpoint_name(name), parameter.dtype, shape_of(parameter)


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _base_parameters(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in base.named_parameters() if ".lora_" not in name)


def _checkpoint_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _merged(layer: nn.Module, weight: nn.Parameter, gather: Gather) -> Tensor:
    assert isinstance(layer, LoraLayer)
    lora_a = layer.lora_A.get_parameter(f"{_ADAPTER}.weight")
    lora_b = layer.lora_B.get_parameter(f"{_ADAPTER}.weight")
    with gather([weight, lora_a, lora_b]), torch.no_grad():
        # LoRA, Hu et al. 2021 (arXiv 2106.09685) eq. 3: W + (alpha / r) B A
        update: Tensor = lora_b.float() @ lora_a.float() * layer.scaling[_ADAPTER]
        return (weight.float() + update).to(weight.dtype)


def adapter_weights(model: PeftModel, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every LoRA parameter under PEFT's file names."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with gather([parameter]):
                yield name.replace(f".{_ADAPTER}.", "."), parameter.detach().clone()

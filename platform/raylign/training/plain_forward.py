"""A model as transformers has it, for a while: its own layers, eager attention, float32, and narrow windows."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from raylign.models.open import longest_sequence

_HALF = (torch.bfloat16, torch.float16)
_WINDOWS = ("attention_chunk_size", "attention_window_size", "sliding_window", "sliding_window_size", "window_size")
"""What configs and layers call the tokens that a query sees."""


@contextmanager
def as_transformers(inner: PreTrainedModel) -> Iterator[None]:
    """`inner` with its own forwards in place of ours, eager attention and nothing random.

    A sequence classifier reads rewards at the last token, whatever it is.
    """
    ours = [module for module in inner.modules() if _is_ours(vars(module).get("forward"))]
    forwards = [vars(module).pop("forward") for module in ours]
    training = [module for module in inner.modules() if module.training]
    configs = configs_of(inner)
    attentions = [config._attn_implementation for config in configs]
    pads = [getattr(config, "pad_token_id", None) for config in configs]
    for module in training:
        module.training = False
    for config in configs:
        config._attn_implementation = "eager"
        config.pad_token_id = None
    try:
        yield
    finally:
        for module, forward in zip(ours, forwards, strict=True):
            vars(module)["forward"] = forward
        for module in training:
            module.training = True
        for config, attention, pad in zip(configs, attentions, pads, strict=True):
            config._attn_implementation, config.pad_token_id = attention, pad


def _is_ours(forward: object) -> bool:
    function = getattr(forward, "__func__", forward)
    return getattr(function, "__module__", "").startswith("raylign.")


def configs_of(inner: PreTrainedModel) -> list[PreTrainedConfig]:
    """Of the model and of all parts in it, each once."""
    found = [
        inner.config,
        inner.config.get_text_config(),
        *(getattr(module, "config", None) for module in inner.modules()),
    ]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


@contextmanager
def narrow_windows(inner: PreTrainedModel, width: int) -> Iterator[None]:
    """No attention window or chunk of `inner` is wider than `width` tokens; masks and layers read the same numbers.

    Windows that its longest sequence fits into change nothing, and stay.
    """
    longest = longest_sequence(inner.config) or math.inf
    with ExitStack() as stack:
        for holder in [*configs_of(inner), *inner.modules()]:
            for name, value in _windows(vars(holder)).items():
                if width < value < longest:
                    stack.callback(setattr, holder, name, value)
                    setattr(holder, name, width)
        yield


def _windows(values: Mapping[str, object]) -> dict[str, int]:
    return {name: value for name in _WINDOWS if isinstance(value := values.get(name), int)}


@contextmanager
def in_float32(inner: PreTrainedModel) -> Iterator[None]:
    """What `inner` computes is computed in float32; its weights stay what and where they are."""
    changes = {"compute_dtype": torch.float32, "cast_input_dtype_enabled": False}
    with ExitStack() as stack:
        for module in inner.modules():
            # Layers in 4 bits and adapters would round their input to the dtype of their weights.
            for name, value in changes.items():
                if (old := vars(module).get(name)) is not None:
                    stack.callback(setattr, module, name, old)
                    setattr(module, name, value)
        stack.enter_context(_Widened())
        yield


class _Widened(TorchFunctionMode):
    """Embeddings come out in float32, and what is narrower is widened where it meets them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is nn.functional.embedding:
            return _wide(func(*args, **options))
        if _narrows(func, args):
            args = [_wide_dtype(part) for part in args]
            options = {name: _wide_dtype(part) for name, part in options.items()}
        elif _mixes([*args, *options.values()]) and not func.__name__.endswith("_"):
            args, options = [_wide(part) for part in args], {name: _wide(part) for name, part in options.items()}
        return func(*args, **options)


def _narrows(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    return func is Tensor.to and isinstance(args[0], Tensor) and args[0].dtype == torch.float32


def _wide_dtype(part: Any) -> Any:
    return torch.float32 if isinstance(part, torch.dtype) and part in _HALF else part


def _mixes(parts: Iterable[Any]) -> bool:
    kinds = {part.dtype for part in _flat(parts) if isinstance(part, Tensor)}
    return torch.float32 in kinds and not kinds.isdisjoint(_HALF)


def _flat(parts: Iterable[Any]) -> Iterator[Any]:
    for part in parts:
        yield from part if isinstance(part, list | tuple) else (part,)


def _wide(part: Any) -> Any:
    if isinstance(part, list | tuple) and any(isinstance(inner, Tensor) for inner in part):
        return [_wide(inner) for inner in part]
    return part.float() if isinstance(part, Tensor) and part.dtype in _HALF else part

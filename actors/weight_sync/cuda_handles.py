"""CUDA's handles of a tensor in plain values, so that nothing that is sent to an engine has to be unpickled.

PyTorch describes a tensor that another process may open as the arguments of `rebuild_cuda_tensor`: numbers, bytes, and
four things that are no values: the tensor's class, its storage's, its dtype and its size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.storage import TypedStorage

_CLASSES: Mapping[str, type] = {"Tensor": torch.Tensor, "Parameter": nn.Parameter, "TypedStorage": TypedStorage}
_DTYPES: Mapping[str, torch.dtype] = {str(dtype): dtype for dtype in (torch.uint8, torch.bfloat16, torch.float16)}
_TENSOR, _STORAGE, _DTYPE = 0, 4, 5
"""Places of those among the arguments."""
_SIZES = (1, 2)
"""Of size and stride."""


def to_plain(handle: Sequence[Any]) -> list[Any]:
    """The arguments of `rebuild_cuda_tensor` as numbers, strings, bytes and lists."""
    plain = list(handle)
    for place in (_TENSOR, _STORAGE):
        plain[place] = plain[place].__name__
    plain[_DTYPE] = str(plain[_DTYPE])
    for place in _SIZES:
        plain[place] = list(plain[place])
    return plain


def from_plain(plain: Sequence[Any]) -> tuple[Any, ...]:
    """What `to_plain` was given. Raises KeyError for a class or dtype that weights never have."""
    handle = list(plain)
    for place in (_TENSOR, _STORAGE):
        handle[place] = _CLASSES[handle[place]]
    handle[_DTYPE] = _DTYPES[handle[_DTYPE]]
    handle[1], handle[2] = torch.Size(handle[1]), tuple(handle[2])
    return tuple(handle)

"""Products of bf16 matrices through fp32, for processors without bf16 instructions: the same sums, but faster.

PyTorch's own products there convert element by element. A product of two bf16 numbers is exact in fp32, sums are fp32
in both, and the result is rounded once.
"""

from typing import Any

import torch
from torch import Tensor

_KEPT: list[Any] = []


def widen_products() -> bool:
    """Replace `mm` and `bmm` of bf16 tensors in this process, unless the processor multiplies bf16 itself (False)."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if not _KEPT:
        library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        library.impl("mm", mm, "CPU")
        library.impl("bmm", bmm, "CPU")
        _KEPT.append(library)
    return True


def mm(left: Tensor, right: Tensor) -> Tensor:
    out = left.new_empty(left.shape[0], right.shape[1], dtype=_wide(left))
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out).to(left.dtype)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    out = left.new_empty(*left.shape[:2], right.shape[2], dtype=_wide(left))
    return torch.bmm(left.to(out.dtype), right.to(out.dtype), out=out).to(left.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype is torch.bfloat16 else tensor.dtype

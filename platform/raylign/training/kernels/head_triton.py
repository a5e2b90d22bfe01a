"""The head's tiles on GPUs, one pass over each: what `head` has in eager PyTorch as two Triton kernels.

Their arithmetic is tested in Triton's interpreter, and that they compile; only tests/gpu runs them on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Columns that a program holds at a time."""
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def fold_kernel(
    logits: tl.tensor,
    own: tl.tensor,
    highest: tl.tensor,
    label: tl.tensor,
    total: tl.tensor,
    expected: tl.tensor,
    squares: tl.tensor,
    plain: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row of `logits` [R, C]; the others are [R], all but `own` read and written."""
    row = tl.program_id(0)
    top, sum_z = tl.load(highest + row), tl.load(plain + row)
    sum_p, sum_pz, sum_pp = tl.load(total + row), tl.load(expected + row), tl.load(squares + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(logits + row * columns + column, mask=inside, other=float("-inf")).to(tl.float32)
        sum_z += tl.sum(tl.where(inside, z, 0.0), 0)
        new = tl.maximum(top, tl.max(z, 0))
        drop = top - new
        factor = tl.exp(drop)
        shifted = z - new
        p = tl.exp(shifted)
        sum_pz = factor * (sum_pz + drop * sum_p) + tl.sum(tl.where(inside, shifted * p, 0.0), 0)
        sum_p = factor * sum_p + tl.sum(p, 0)
        sum_pp = factor * factor * sum_pp + tl.sum(p * p, 0)
        top = new
    tl.store(highest + row, top)
    tl.store(plain + row, sum_z)
    tl.store(total + row, sum_p)
    tl.store(expected + row, sum_pz)
    tl.store(squares + row, sum_pp)
    mine = tl.load(own + row)
    if (mine >= 0) & (mine < columns):
        tl.store(label + row, tl.load(logits + row * columns + mine).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(
    logits: tl.tensor,
    own: tl.tensor,
    log_z: tl.tensor,
    of_logps: tl.tensor,
    of_entropies: tl.tensor,
    entropies: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row and block of `logits` [R, C], which it overwrites by gradients; the others are [R]."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = logits + row * columns + column
    log_p = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32) - tl.load(log_z + row)
    of_logp = tl.load(of_logps + row)
    spread = tl.load(of_entropies + row) * (log_p + tl.load(entropies + row))
    gradient = tl.exp(log_p) * (-spread - of_logp) + tl.where(column == tl.load(own + row), of_logp, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def fold(logits: Tensor, own: Tensor, sums: tuple[Tensor, ...]) -> None:
    """Count the tile `logits` [R, C] of any float dtype in `sums`, fp32 [R] each, in the order of `LogitSums`.

    `own` [R] int64 are the labels' columns, outside of 0..C-1 where another tile has them.
    """
    rows, columns = logits.shape
    fold_kernel[(rows,)](logits, own, *sums, columns, BLOCK=_BLOCK, num_warps=_WARPS)


def logit_gradient(logits: Tensor, own: Tensor, log_z: Tensor, of_logps: Tensor, slopes: Tensor | None) -> Tensor:
    """The gradient of the tile `logits` [R, C], in its place and dtype; `slopes` [2, R] as for `head`'s, None is 0."""
    rows, columns = logits.shape
    of_entropies, entropies = torch.zeros_like(log_z).expand(2, -1) if slopes is None else slopes
    grid = (rows, triton.cdiv(columns, _BLOCK))
    # Autograd may hand over one value that is seen as many.
    per_row = (log_z, of_logps.contiguous(), of_entropies, entropies)
    gradient_kernel[grid](logits, own, *per_row, columns, BLOCK=_BLOCK, num_warps=_WARPS)
    return logits

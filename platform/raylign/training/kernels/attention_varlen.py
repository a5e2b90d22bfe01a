"""Attention over a packed row on GPUs: one variable-length call of FlashAttention a layer, forward and backward.

Its causal mask is aligned to the bottom right: the last query of a piece sees all of its keys. So a completion asks
with its own tokens, of keys that are its prompt's and its own.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import is_flash_attention_available
from torch.nn.attention.varlen import varlen_attn

from raylign.training.kernels.attention_blocked import pieces_of
from raylign.training.sequences import Segment, on_device

_PARAMETERS = signature(varlen_attn).parameters
_HAS_MASKS = {"scale", "window_size"} <= _PARAMETERS.keys()
"""Older ones know neither a scale nor a window."""
_HAS_GROUPS = "enable_gqa" in _PARAMETERS
_DTYPES = (torch.bfloat16, torch.float16)
_HEAD = 256
"""Most elements of a head."""
_HEAD_STEP = 8
"""A head has a multiple of as many elements."""
_WIDE_HEAD = 192
"""Above, FlashAttention 2 has no backward pass where a block has little shared memory."""
_OLDEST = (8, 0)
"""Compute capability."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Where the keys of all pieces come from, and back: positions and places are int64 [*].

    `keys` [S] are the row's positions, piece by piece, a prompt once for each completion. `own` [T] are the places in
    `keys` of each position as part of its own piece; `copies` are the other places, all of prompts, and `prompts` the
    positions that they have.
    """

    keys: Tensor
    own: Tensor
    copies: Tensor
    prompts: Tensor


@dataclass(frozen=True, slots=True)
class VarlenIndex:
    """P pieces of a packed row: their queries are the whole row, in order.

    `queries` and `keys` [P + 1] int32 are where pieces begin among queries and keys, `longest_query` and `longest_key`
    the most that a piece has. `gather` is None where the keys are the row itself, in order.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    gather: Gather | None


@functools.lru_cache(maxsize=8)
def varlen_index(segments: tuple[Segment, ...], device: torch.device) -> VarlenIndex:
    """Of a row of `segments`; every layer asks for the same, and when activations are computed again."""
    positions: list[int] = []
    own: list[int] = []
    copies: list[int] = []
    queries: list[int] = []
    keys: list[int] = []
    for piece in pieces_of(segments):
        prompt = range(piece.prompt.start, piece.prompt.stop)
        mine = range(piece.own.start, piece.own.stop)
        copies += range(len(positions), len(positions) + len(prompt))
        own += range(len(positions) + len(prompt), len(positions) + len(prompt) + len(mine))
        positions += [*prompt, *mine]
        queries.append(len(mine))
        keys.append(len(prompt) + len(mine))

    def moved(values: Sequence[int], dtype: torch.dtype) -> Tensor:
        return on_device(torch.tensor(values, dtype=dtype), device)

    parts = (positions, own, copies, [positions[place] for place in copies])
    return VarlenIndex(
        moved(list(accumulate(queries, initial=0)), torch.int32),
        moved(list(accumulate(keys, initial=0)), torch.int32),
        max(queries),
        max(keys),
        Gather(*(moved(part, torch.int64) for part in parts)) if copies else None,
    )


def has_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether the installed PyTorch and this GPU have a kernel for such heads: queries [1, H, T, D], values too."""
    head = query.shape[-1]
    if not _HAS_MASKS or query.device.type != "cuda" or query.dtype not in _DTYPES:
        return False
    if head != value.shape[-1] or head > _HEAD or head % _HEAD_STEP or not is_flash_attention_available():
        return False
    capability = torch.cuda.get_device_capability(query.device)
    little = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    return capability >= _OLDEST and (head <= _WIDE_HEAD or not little)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention [1, T, H, D] of a packed row; query is [1, H, T, D], key and value are [1, H_kv, T, D].

    For what `has_varlen` says yes to.
    """
    index = varlen_index(tuple(segments), query.device)
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    if index.gather is not None:
        key, value = gathered(key, index.gather), gathered(value, index.gather)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _HAS_GROUPS:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    options: dict[str, Any] = {"enable_gqa": True} if groups > 1 and _HAS_GROUPS else {}
    # A window of W tokens reaches W - 1 back from the query itself.
    found = varlen_attn(
        query,
        key,
        value,
        index.queries,
        index.keys,
        index.longest_query,
        index.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    assert isinstance(found, Tensor)
    return found[None]


def gathered(row: Tensor, gather: Gather) -> Tensor:
    """[S, H, D] of the row's [T, H, D]."""
    taken: Tensor = _Gathered.apply(row, gather)  # type: ignore[no-untyped-call]
    return taken


class _Gathered(torch.autograd.Function):
    """Its backward pass adds a prompt's gradients up in fp32: in bfloat16 those of many completions would be lost."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return row.index_select(0, gather.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gather: Gather = ctx.gather
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.index_select(0, gather.own).to(wide)
        total.index_add_(0, gather.prompts, grad.index_select(0, gather.copies).to(wide))
        return total.to(grad.dtype), None

"""Attention over a packed row: every completion sees its prompt and itself, and nothing else."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from raylign.training.sequences import Segment

PACKED = "raylign_packed"
"""Name under which transformers finds `packed_attention`; it makes no mask for names it does not know."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [1, T, H, D] of a packed row; query is [1, H, T, D], key and value are [1, H_kv, T, D].

    A token sees the tokens before it in its prompt and its completion, none of its siblings' (a mask over the whole
    row would cost T squared), and of those the last `sliding_window` where the layer has one.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts: list[Tensor] = []
    for segment in segments:
        parts += _segment_attention(query, key, value, segment, scaling, sliding_window)
    return torch.cat(parts, 2).transpose(1, 2), None


def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segment: Segment, scaling: float | None, window: int | None
) -> list[Tensor]:
    prompt_end = segment.start + segment.prompt
    end = prompt_end + (segment.completions[0] if segment.completions else 0)
    first = slice(segment.start, end)
    parts = [_causal(query[:, :, first], key[:, :, first], value[:, :, first], scaling, window)]
    prompt = slice(segment.start, prompt_end)
    for length in segment.completions[1:]:
        own = slice(end, end + length)
        keys = torch.cat([key[:, :, prompt], key[:, :, own]], 2)
        values = torch.cat([value[:, :, prompt], value[:, :, own]], 2)
        parts.append(_causal(query[:, :, own], keys, values, scaling, window))
        end += length
    return parts


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Queries are the last positions of the keys."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or keys <= window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = _causal_mask(queries, keys, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


@functools.lru_cache(maxsize=256)
def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool, True where a query may look; the same for all layers."""
    ahead = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
    return (ahead >= 0) & (ahead < (window or keys))


AttentionInterface.register(PACKED, packed_attention)

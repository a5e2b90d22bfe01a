"""What a packed row is made of for attention: pieces that each look at one run of keys."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from raylign.training.sequences import Segment


class Piece(NamedTuple):
    """Tokens `own` of a row look at themselves and at `prompt`, which is empty where it is part of `own`."""

    prompt: slice
    own: slice


def pieces_of(segments: Sequence[Segment]) -> Iterator[Piece]:
    """Each prompt with its first completion, then the other completions one by one."""
    for segment in segments:
        first, *others = segment.completions or (0,)
        end = segment.start + segment.prompt
        yield Piece(slice(segment.start, segment.start), slice(segment.start, end + first))
        own = end + first
        for length in others:
            if length:
                yield Piece(slice(segment.start, end), slice(own, own + length))
            own += length


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """[1, H, Q, D] of queries that are the last of the positions of the keys; key and value have H or H_kv heads."""
    queries, keys = query.shape[2], key.shape[2]
    plain = queries == keys and (window is None or keys <= window)
    mask = None if plain else visible(queries, keys, window, query.device)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=plain, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


@functools.lru_cache(maxsize=32)
def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[Q, K] bool, True where a query may look; the same for all layers."""
    ahead = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
    return (ahead >= 0) & (ahead < (window or keys))

"""Attention over a packed row by PyTorch's own kernels, forward and backward; fast on GPUs."""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from raylign.training.sequences import Segment


def joined_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention [1, T, H, D] of a packed row; query is [1, H, T, D], key and value are [1, H_kv, T, D]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # One split each: slices would each cost a gradient of the whole row.
    queries, keys, values = (torch.split(part, _piece_lengths(segments), 2) for part in (query, key, value))
    pieces = zip(queries, keys, values, strict=True)
    outputs: list[Tensor] = []
    for segment in segments:
        own = list(itertools.islice(pieces, max(1, len(segment.completions))))
        outputs += _segment_attention(own, segment.prompt, scaling, window)
    return torch.cat(outputs, 2).transpose(1, 2)


def _piece_lengths(segments: Sequence[Segment]) -> list[int]:
    """Each prompt with its first completion, then the other completions one by one."""
    lengths = []
    for segment in segments:
        first, *others = segment.completions or (0,)
        lengths += [segment.prompt + first, *others]
    return lengths


def _segment_attention(
    pieces: Sequence[tuple[Tensor, Tensor, Tensor]], prompt: int, scaling: float | None, window: int | None
) -> list[Tensor]:
    first_query, first_key, first_value = pieces[0]
    outputs = [causal_attention(first_query, first_key, first_value, scaling, window)]
    prompt_key, prompt_value = first_key[:, :, :prompt], first_value[:, :, :prompt]
    for query, own_key, own_value in pieces[1:]:
        key, value = torch.cat([prompt_key, own_key], 2), torch.cat([prompt_value, own_value], 2)
        outputs.append(causal_attention(query, key, value, scaling, window))
    return outputs


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

"""Attention over a packed row by PyTorch's own kernels, forward and backward; fast on GPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from raylign.training.kernels.attention_pieces import causal_attention, pieces_of
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
    pieces = list(pieces_of(segments))
    lengths = [piece.own.stop - piece.own.start for piece in pieces]
    # One split each: slices would each cost a gradient of the whole row.
    parts = zip(pieces, *(torch.split(part, lengths, 2) for part in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    first_keys, first_values = key, value
    for piece, queries, keys, values in parts:
        prompt = piece.prompt.stop - piece.prompt.start
        if prompt:
            keys = torch.cat([first_keys[:, :, :prompt], keys], 2)
            values = torch.cat([first_values[:, :, :prompt], values], 2)
        else:
            first_keys, first_values = keys, values
        outputs.append(causal_attention(queries, keys, values, scaling, window))
    return torch.cat(outputs, 2).transpose(1, 2)

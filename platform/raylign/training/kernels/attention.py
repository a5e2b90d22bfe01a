"""Attention over a packed row: which kernel takes it, and PyTorch's own piece by piece, which take everything."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from raylign.training.kernels.attention_blocked import blocked_attention, causal_attention, pieces_of
from raylign.training.kernels.attention_varlen import has_varlen, varlen_attention
from raylign.training.sequences import Segment

Attention = Callable[[Tensor, Tensor, Tensor, Sequence[Segment], float | None, int | None], Tensor]
"""From query, key, value, segments, scaling and window; see `joined_attention`."""


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


def attention_for(query: Tensor, value: Tensor) -> Attention:
    """The kernel for such queries [1, H, T, D] and values where they are."""
    if query.device.type == "cpu":
        return blocked_attention
    return varlen_attention if has_varlen(query, value) else joined_attention


PACKED = "raylign_packed"
"""Name under which transformers finds `packed_attention`; it makes no mask for names it does not know."""

_IDLE = (
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
)
"""Options of a whole model that reach its attention and say nothing to it."""


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
    dropout: float = 0.0,
    is_causal: bool = True,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention [1, T, H, D] of a packed row; query is [1, H, T, D], key and value are [1, H_kv, T, D].

    A token sees the tokens before it in its prompt and its completion, none of its siblings' (a mask over the whole
    row would cost T squared), and of those the last `sliding_window` where the layer has one. Raises TypeError for
    whatever else an architecture asks of its attention: soft-capping, sinks, biases.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IDLE)
    if unknown or dropout or not is_causal or attention_mask is not None:
        asked = {"dropout": dropout, "is_causal": is_causal, "attention_mask": attention_mask is not None}
        raise TypeError(f"packed rows know no attention with {', '.join(unknown) or asked}")
    attention = attention_for(query, value)
    return attention(query, key, value, segments, scaling, sliding_window), None


AttentionInterface.register(PACKED, packed_attention)

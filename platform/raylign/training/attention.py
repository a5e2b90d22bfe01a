"""Attention over a packed row: every completion sees its prompt and itself, and nothing else."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from raylign.training.attention_blocked import blocked_attention
from raylign.training.attention_joined import joined_attention
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
    attention = blocked_attention if query.device.type == "cpu" else joined_attention
    return attention(query, key, value, segments, scaling, sliding_window), None


AttentionInterface.register(PACKED, packed_attention)

"""Attention over a packed row: every completion sees its prompt and itself, and nothing else."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from raylign.training.sequences import Segment

PACKED = "raylign_packed"
"""Name under which transformers finds `packed_attention`; it makes no mask for names it does not know."""

_WEIGHTS_BYTES = 256 << 20


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
    # One split each: slices would each cost a gradient of the whole row.
    queries, keys, values = (torch.split(part, _piece_lengths(segments), 2) for part in (query, key, value))
    pieces = zip(queries, keys, values, strict=True)
    outputs: list[Tensor] = []
    for segment in segments:
        own = list(itertools.islice(pieces, max(1, len(segment.completions))))
        outputs += _segment_attention(own, segment.prompt, scaling, sliding_window)
    return torch.cat(outputs, 2).transpose(1, 2), None


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
    outputs = [_causal(first_query, first_key, first_value, scaling, window)]
    prompt_key, prompt_value = first_key[:, :, :prompt], first_value[:, :, :prompt]
    for query, own_key, own_value in pieces[1:]:
        key, value = torch.cat([prompt_key, own_key], 2), torch.cat([prompt_value, own_value], 2)
        outputs.append(_causal(query, key, value, scaling, window))
    return outputs


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Queries are the last positions of the keys."""
    queries, keys = query.shape[2], key.shape[2]
    plain = queries == keys and (window is None or keys <= window)
    mask = None if plain else _causal_mask(queries, keys, window, query.device)
    narrow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    if narrow and query.shape[1] * queries * keys * query.element_size() <= _WEIGHTS_BYTES:
        added = _added_mask(queries, keys, window)
        attended: Tensor = _MatmulBackward.apply(query, key, value, mask, added, scaling)  # type: ignore[no-untyped-call]
        return attended
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=plain, scale=scaling)


class _MatmulBackward(torch.autograd.Function):
    """PyTorch's attention with a backward pass of whole matrix products.

    On CPUs its own bfloat16 backward takes three to six times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        added: Tensor,
        scaling: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, added)
        ctx.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        *inputs, added = ctx.saved_tensors
        query, key, value = (part[0] for part in inputs)
        shape = (query.shape[0], *added.shape)
        scores = torch.baddbmm(added.expand(shape), query, key.transpose(1, 2), alpha=ctx.scaling)
        weights = scores.softmax(-1)
        grad_weights = torch.bmm(grad[0], value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query = torch.bmm(grad_scores, key).mul_(ctx.scaling)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query).mul_(ctx.scaling)
        grad_value = torch.bmm(weights.transpose(1, 2), grad[0])
        return grad_query[None], grad_key[None], grad_value[None], None, None, None


@functools.lru_cache(maxsize=32)
def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool, True where a query may look; the same for all layers."""
    ahead = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
    return (ahead >= 0) & (ahead < (window or keys))


@functools.lru_cache(maxsize=32)
def _added_mask(queries: int, keys: int, window: int | None) -> Tensor:
    """The same mask as bfloat16 to add to scores: 0 or -inf."""
    hidden = ~_causal_mask(queries, keys, window, torch.device("cpu"))
    return torch.zeros(queries, keys, dtype=torch.bfloat16).masked_fill_(hidden, float("-inf"))


AttentionInterface.register(PACKED, packed_attention)

"""Attention over a packed row on CPUs: PyTorch's forward pass, and a backward pass of whole matrix products.

In bfloat16 PyTorch's own backward takes three to six times as long on CPUs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from raylign.training.kernels.attention_pieces import Batch, batches_of
from raylign.training.sequences import Segment


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention [1, T, H, D] of a packed row; query is [1, H, T, D], key and value are [1, H_kv, T, D].

    Values may be of another size than keys.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    batches = batches_of(tuple(segments), window, query.dtype)
    output: Tensor = _BlockedAttention.apply(query, key, value, batches, scale)  # type: ignore[no-untyped-call]
    return output


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, batches: Sequence[Batch], scale: float) -> Tensor:
        rows = tuple(_by_position(part) for part in (query, key, value))
        output = query.new_empty(*rows[0].shape[:2], value.shape[-1])
        for batch in batches:
            blocks = batch.mask.shape[0]
            indices = (batch.queries, batch.keys, batch.keys)
            taken = (row.index_select(0, index) for row, index in zip(rows, indices, strict=True))
            queries, keys, values = (part.view(blocks, -1, *part.shape[1:]).transpose(1, 2) for part in taken)
            found = scaled_dot_product_attention(
                queries, keys, values, attn_mask=batch.mask, scale=scale, enable_gqa=True
            )
            _put(found.transpose(1, 2).flatten(0, 1), batch, output)
        ctx.save_for_backward(*rows)
        ctx.batches, ctx.scale = batches, scale
        return output[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        wide = torch.promote_types(key.dtype, torch.float32)
        of_key, of_value = (torch.zeros(part.shape, dtype=wide) for part in (key, value))
        for batch in ctx.batches:
            blocks, _, queries, keys = batch.mask.shape
            taken = (
                query.index_select(0, batch.queries),
                key.index_select(0, batch.keys),
                value.index_select(0, batch.keys),
                _without_padding(grad[0], batch),
            )
            by_head = tuple(_by_head(part, blocks, key.shape[1]) for part in taken)
            found = _batch_backward(by_head, batch.mask, ctx.scale)
            _put(_by_token(found[0], blocks, queries), batch, of_query)
            of_key.index_add_(0, batch.keys, _by_token(found[1], blocks, keys).to(wide))
            of_value.index_add_(0, batch.keys, _by_token(found[2], blocks, keys).to(wide))
        rows = (of_query.mul_(ctx.scale), of_key.mul_(ctx.scale).to(key.dtype), of_value.to(value.dtype))
        query, key, value = (row.transpose(0, 1)[None] for row in rows)
        return query, key, value, None, None


def _by_position(part: Tensor) -> Tensor:
    """[T, H, D] of [1, H, T, D]."""
    return part[0].transpose(0, 1)


def _put(found: Tensor, batch: Batch, output: Tensor) -> None:
    """Results [B * Q, H, D] to their positions in the row; those of padding are left out."""
    output.index_copy_(0, batch.own, found.index_select(0, batch.slots))


def _without_padding(grad: Tensor, batch: Batch) -> Tensor:
    """[B * Q, H, D] of the row's [T, H, D], zero for padding: it adds nothing to any gradient."""
    taken = grad.new_zeros(len(batch.queries), *grad.shape[1:])
    return taken.index_copy_(0, batch.slots, grad.index_select(0, batch.own))


def _by_head(rows: Tensor, blocks: int, key_heads: int) -> Tensor:
    """[B * H_kv, G * Q, D] of [B * Q, H, D]: the queries that share a key stand together."""
    split = rows.view(blocks, -1, key_heads, rows.shape[1] // key_heads, rows.shape[2])
    return split.permute(0, 2, 3, 1, 4).reshape(blocks * key_heads, -1, rows.shape[2])


def _by_token(parts: Tensor, blocks: int, length: int) -> Tensor:
    """The inverse of `_by_head`: [B * length, H, D]."""
    split = parts.view(blocks, -1, parts.shape[1] // length, length, parts.shape[2])
    return split.permute(0, 3, 1, 2, 4).reshape(blocks * length, -1, parts.shape[2])


def _batch_backward(by_head: tuple[Tensor, ...], mask: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries and keys, both over `scale`, and of values.

    `by_head` has queries [B * H_kv, G * Q, D], keys and values [B * H_kv, K, D] and gradients [B * H_kv, G * Q, D].
    """
    query, key, value, grad = by_head
    scores = torch.bmm(query, key.transpose(1, 2)).view(len(mask), -1, *mask.shape[2:])
    weights = torch.add(mask, scores, alpha=scale, out=scores).view(len(query), -1, mask.shape[3]).softmax(-1)
    of_weights = torch.bmm(grad, value.transpose(1, 2))
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    return (
        torch.bmm(of_scores, key),
        torch.bmm(of_scores.transpose(1, 2), query),
        torch.bmm(weights.transpose(1, 2), grad),
    )

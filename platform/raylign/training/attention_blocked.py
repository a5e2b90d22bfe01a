"""Attention over a packed row on CPUs: PyTorch's forward pass, and a backward pass of whole matrix products.

In bfloat16 PyTorch's own backward takes three to six times as long on CPUs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raylign.training.attention_pieces import Piece, causal_attention, pieces_of, visible
from raylign.training.sequences import Segment

_BLOCK = 256
"""Queries whose attention weights exist at a time in the backward pass."""


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention [1, T, H, D] of a packed row; query is [1, H, T, D], key and value are [1, H_kv, T, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = _BlockedAttention.apply(query, key, value, segments, scale, window)  # type: ignore[no-untyped-call]
    return output


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[Segment],
        scale: float,
        window: int | None,
    ) -> Tensor:
        output = query.new_empty(query.transpose(1, 2).shape)
        for piece in pieces_of(segments):
            keys, values = _seen(key, piece), _seen(value, piece)
            queries = query[:, :, piece.own]
            output[:, piece.own] = causal_attention(queries, keys, values, scale, window).transpose(1, 2)
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value = ctx.saved_tensors
        grad_query = grad.new_empty(grad.shape)
        heads = (query[0], grad[0].transpose(0, 1), grad_query[0].transpose(0, 1))
        # [H_kv, H / H_kv, T, D]: the queries that share a key stand together.
        queries, grads, of_queries = (part.view(key.shape[1], -1, *part.shape[1:]) for part in heads)
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for piece in pieces_of(ctx.segments):
            keys, values = _seen(key, piece)[0].contiguous(), _seen(value, piece)[0].contiguous()
            of_keys, of_values = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
            for block, seen in _blocks(piece, ctx.window):
                of_queries[:, :, block] = _block_backward(
                    queries[:, :, block],
                    (keys[:, seen], values[:, seen]),
                    grads[:, :, block],
                    (of_keys[:, seen], of_values[:, seen]),
                    ctx.scale,
                    ctx.window,
                )
            _add(grad_key[0], piece, of_keys.mul_(ctx.scale))
            _add(grad_value[0], piece, of_values)
        return grad_query.transpose(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _seen(row: Tensor, piece: Piece) -> Tensor:
    """The keys or values [1, H_kv, K, D] that a piece looks at."""
    own = row[:, :, piece.own]
    return own if piece.prompt.start == piece.prompt.stop else torch.cat([row[:, :, piece.prompt], own], 2)


def _add(row: Tensor, piece: Piece, gradient: Tensor) -> None:
    prompt = piece.prompt.stop - piece.prompt.start
    row[:, piece.prompt] += gradient[:, :prompt]
    row[:, piece.own] += gradient[:, prompt:]


def _blocks(piece: Piece, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries of the row, and those of the piece's keys that they can see."""
    before = piece.prompt.stop - piece.prompt.start - piece.own.start
    for start in range(piece.own.start, piece.own.stop, _BLOCK):
        end = min(start + _BLOCK, piece.own.stop)
        first = 0 if window is None else max(0, before + start + 1 - window)
        yield slice(start, end), slice(first, before + end)


def _block_backward(
    query: Tensor,
    seen: tuple[Tensor, Tensor],
    grad: Tensor,
    sums: tuple[Tensor, Tensor],
    scale: float,
    window: int | None,
) -> Tensor:
    """The gradient of `query` [H_kv, G, Q, D]; those of the keys (over `scale`) and values seen are added to `sums`."""
    key, value = seen
    queries, grads = query.flatten(1, 2), grad.flatten(1, 2)
    scores = torch.bmm(queries, key.transpose(1, 2))
    mask = _added_mask(query.shape[1], query.shape[2], key.shape[1], window, key.dtype)
    weights = torch.add(mask, scores, alpha=scale, out=scores).softmax(-1)
    of_weights = torch.bmm(grads, value.transpose(1, 2))
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    sums[0].add_(torch.bmm(of_scores.transpose(1, 2), queries))
    sums[1].add_(torch.bmm(weights.transpose(1, 2), grads))
    return torch.bmm(of_scores, key).mul_(scale).view(query.shape)


@functools.lru_cache(maxsize=32)
def _added_mask(groups: int, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[G * Q, K] to add to scores: 0 or -inf."""
    hidden = ~visible(queries, keys, window, torch.device("cpu"))
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_(hidden, float("-inf")).repeat(groups, 1)

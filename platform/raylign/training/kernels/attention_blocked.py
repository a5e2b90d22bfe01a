"""Attention over a packed row on CPUs: PyTorch's forward pass, and a backward pass of whole matrix products.

In bfloat16 PyTorch's own backward takes three to six times as long on CPUs.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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


_BLOCK = 128
"""Most queries of a block; a longer piece is cut."""
_AREA = 1 << 17
"""Most attention weights a head that a batch of several blocks has; more would leave the caches."""
_LANES = 32
"""Keys of a batch are a multiple of this; softmax takes twice as long where its rows are not."""
_WASTE = 1.5
"""Most of them over those that the blocks have without padding."""


class QueryBlock(NamedTuple):
    """Up to `_BLOCK` queries, and the keys of the row that they see: the last ones are the queries' own."""

    queries: range
    keys: tuple[range, range]

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.queries), sum(map(len, self.keys))


@dataclass(frozen=True, slots=True)
class Batch:
    """B blocks, padded to Q queries and K keys.

    `queries` [B * Q] and `keys` [B * K] are positions in the row; padding repeats a block's first. `slots` [N] are the
    queries that are not padding, `own` [N] their positions. `mask` [B, 1, Q, K] is added to scores: 0, or -inf for what
    a query may not see.
    """

    queries: Tensor
    keys: Tensor
    slots: Tensor
    own: Tensor
    mask: Tensor


@functools.lru_cache(maxsize=8)
def batches_of(segments: tuple[Segment, ...], window: int | None, dtype: torch.dtype) -> tuple[Batch, ...]:
    """All blocks of a row of `segments`; every layer of one window asks for the same."""
    blocks = [block for piece in pieces_of(segments) for block in _blocks(piece, window)]
    return tuple(_batch(group, window, dtype) for group in _alike(blocks))


def _blocks(piece: Piece, window: int | None) -> Iterator[QueryBlock]:
    own = range(piece.own.start, piece.own.stop)
    prompt = range(piece.prompt.start, piece.prompt.stop)
    for start in range(0, len(own), _BLOCK):
        queries = own[start : start + _BLOCK]
        hidden = 0 if window is None else max(0, len(prompt) + start + 1 - window)
        before = max(0, hidden - len(prompt))
        yield QueryBlock(queries, (prompt[hidden:], own[before : start + len(queries)]))


@dataclass(slots=True)
class _Group:
    """Blocks that share a batch, the longest queries and keys among them, and the weights that they have alone."""

    blocks: list[QueryBlock] = field(default_factory=list)
    queries: int = 0
    keys: int = 0
    area: int = 0

    def takes(self, block: QueryBlock) -> bool:
        queries, keys = block.sizes
        padded = (len(self.blocks) + 1) * max(self.queries, queries) * max(self.keys, keys)
        return padded <= min(_AREA, _WASTE * (self.area + queries * keys))

    def add(self, block: QueryBlock) -> None:
        queries, keys = block.sizes
        self.blocks.append(block)
        self.queries, self.keys = max(self.queries, queries), max(self.keys, keys)
        self.area += queries * keys


def _alike(blocks: Iterable[QueryBlock]) -> Iterator[list[QueryBlock]]:
    """First fit, longest first."""
    groups: list[_Group] = []
    for block in sorted(blocks, key=lambda block: block.sizes, reverse=True):
        group = next((group for group in groups if group.takes(block)), None)
        if group is None:
            groups.append(group := _Group())
        group.add(block)
    return (group.blocks for group in groups)


def _batch(blocks: list[QueryBlock], window: int | None, dtype: torch.dtype) -> Batch:
    width = max(block.sizes[0] for block in blocks)
    height = -(-max(block.sizes[1] for block in blocks) // _LANES) * _LANES
    mask = torch.zeros(len(blocks), 1, width, height, dtype=dtype)
    queries: list[int] = []
    keys: list[int] = []
    slots: list[int] = []
    own: list[int] = []
    for number, block in enumerate(blocks):
        of_queries, of_keys = block.sizes
        slots += range(number * width, number * width + of_queries)
        own += block.queries
        queries += _padded(block.queries, width)
        keys += _padded([*block.keys[0], *block.keys[1]], height)
        hidden = ~visible(of_queries, of_keys, window, mask.device)
        mask[number, 0, :of_queries, :of_keys].masked_fill_(hidden, float("-inf"))
        mask[number, 0, :, of_keys:] = float("-inf")
    return Batch(torch.tensor(queries), torch.tensor(keys), torch.tensor(slots), torch.tensor(own), mask)


def _padded(positions: Sequence[int], length: int) -> list[int]:
    return [*positions, *[positions[0]] * (length - len(positions))]


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

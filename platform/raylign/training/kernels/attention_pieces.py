"""What a packed row is made of for attention, and how pieces join into batches of alike blocks."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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

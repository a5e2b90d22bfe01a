"""Preferences into optimizer steps: which rank runs which of them together."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from raylign.chunks import chunks


@dataclass(frozen=True, slots=True)
class BatchShape:
    """`batch` preferences a step over `ranks`; a micro-batch has at most `micro_batch` of them and `max_tokens` tokens.

    A single preference longer than `max_tokens` is a micro-batch of its own.
    """

    ranks: int
    batch: int
    micro_batch: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Indices into the round's preferences; weight 1 is a real one, 0 a filler that keeps ranks equal."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: `micro_batches[rank][k]` is what `rank` runs as its k-th micro-batch."""

    count: int
    micro_batches: tuple[tuple[MicroBatch, ...], ...]

    def indices(self) -> tuple[int, ...]:
        """The preferences that count in the step, over all ranks, in order."""
        micro_batches = (micro for mine in self.micro_batches for micro in mine)
        pairs = (pair for micro in micro_batches for pair in zip(micro.indices, micro.weights, strict=True))
        return tuple(sorted(index for index, weight in pairs if weight))


def plan_steps(costs: Sequence[int], shape: BatchShape, *, epochs: int, seed: int) -> list[Step]:
    """Shuffled steps over preferences of `costs` tokens, each epoch in a new order.

    Every rank gets the same number of micro-batches of each step, so collectives line up. Which preferences a step has
    depends on `shape.batch` and the seed alone, so 1x8 and 8x1 train on the same steps.
    """
    steps = []
    for epoch in range(epochs):
        order = list(range(len(costs)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [_step(indices, costs, shape) for indices in chunks(order, shape.batch)]
    return steps


def _step(indices: Sequence[int], costs: Sequence[int], shape: BatchShape) -> Step:
    lanes = [_micro_batches(share, costs, shape) for share in _deal(indices, costs, shape.ranks)]
    longest = max(map(len, lanes))
    filler = MicroBatch((min(indices, key=lambda index: costs[index]),), (0.0,))
    return Step(len(indices), tuple((*lane, *[filler] * (longest - len(lane))) for lane in lanes))


def _deal(indices: Sequence[int], costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Longest first, always to the rank with the fewest tokens: ranks end together."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(indices, key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


def _micro_batches(indices: Sequence[int], costs: Sequence[int], shape: BatchShape) -> list[MicroBatch]:
    """First fit; `indices` come longest first."""
    bins: list[list[int]] = []
    for index in indices:
        fitting = (
            one
            for one in bins
            if len(one) < shape.micro_batch and sum(costs[i] for i in one) + costs[index] <= shape.max_tokens
        )
        found = next(fitting, None)
        if found is None:
            bins.append([index])
        else:
            found.append(index)
    return [MicroBatch(tuple(one), (1.0,) * len(one)) for one in bins]

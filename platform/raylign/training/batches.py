"""Preferences into optimizer steps: which rank runs which of them together. Forward passes without gradients."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from raylign.chunks import chunks
from raylign.config.blocks import TrainerBlock
from raylign.records import Completions, Preference, TokenLogps
from raylign.training.logprobs import CompletionScores
from raylign.training.preferences import kl_completions, kl_reference_logps
from raylign.training.sequences import Layout, on_device, token_batch


@dataclass(frozen=True, slots=True)
class BatchShape:
    """`batch` preferences a step over `ranks`; a micro-batch has at most `micro_batch` of them and `max_tokens` tokens.

    A single preference longer than `max_tokens` is a micro-batch of its own, which runs in several passes.
    """

    ranks: int
    batch: int
    micro_batch: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Indices into the round's preferences; weight 1 is a real one, 0 a filler that keeps ranks equal.

    Every rank runs its k-th micro-batch in as many `passes` as the others do theirs.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    passes: int = 1


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


def plan_steps(
    costs: Sequence[int], shape: BatchShape, *, epochs: int, seed: int, passes: Sequence[int] | None = None
) -> list[Step]:
    """Shuffled steps over preferences of `costs` tokens, each epoch in a new order.

    `passes` is how many forward passes each preference takes by itself, one where it is None. Every rank gets the same
    number of micro-batches and passes of each step, so collectives line up. Which preferences a step has depends on
    `shape.batch` and the seed alone, so 1x8 and 8x1 train on the same steps.
    """
    alone = [1] * len(costs) if passes is None else passes
    steps = []
    for epoch in range(epochs):
        order = list(range(len(costs)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [_step(indices, costs, alone, shape) for indices in chunks(order, shape.batch)]
    return steps


def _step(indices: Sequence[int], costs: Sequence[int], passes: Sequence[int], shape: BatchShape) -> Step:
    lanes = [_micro_batches(share, costs, shape) for share in _deal(indices, costs, shape.ranks)]
    longest = max(map(len, lanes))
    filler = MicroBatch((min(indices, key=lambda index: costs[index]),), (0.0,))
    filled = [[*lane, *[filler] * (longest - len(lane))] for lane in lanes]
    most = [
        max(passes[index] for micro in of_ranks for index in micro.indices) for of_ranks in zip(*filled, strict=True)
    ]
    lined_up = (zip(lane, most, strict=True) for lane in filled)
    return Step(len(indices), tuple(tuple(replace(micro, passes=count) for micro, count in lane) for lane in lined_up))


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


@dataclass(frozen=True, slots=True)
class Passes:
    """How this rank lays sequences out. A `module` maps a `TokenBatch` to `CompletionScores`."""

    layout: Layout
    pad_id: int
    device: torch.device

    def logps(
        self, module: nn.Module, rows: Sequence[Completions], rank: int, block: TrainerBlock
    ) -> list[list[float]]:
        """Summed log-probs of the completions of the share of `rank`, `rows[rank::world]`.

        Every rank runs as many rows, a micro-batch at a time with fillers, so that ZeRO-3 gathers line up.
        """
        mine, scores = self._of_share(module, rows, rank, block)
        found = iter([logp for one in scores for logp in one.logps.tolist()])
        return [[next(found) for _ in row.completions] for row in mine]

    def logprobs(self, module: nn.Module, rows: Sequence[Completions], rank: int, block: TrainerBlock) -> TokenLogps:
        """The same of every token."""
        mine, scores = self._of_share(module, rows, rank, block)
        found = iter([logp for one in scores for logp in one.tokens.logps.tolist()])
        return [[list(islice(found, len(own))) for own in row.completions] for row in mine]

    def _of_share(
        self, module: nn.Module, rows: Sequence[Completions], rank: int, block: TrainerBlock
    ) -> tuple[Sequence[Completions], list[CompletionScores]]:
        """The rows of `rank`, and what is said of them and the fillers."""
        mine, count = rows[rank :: block.ranks], math.ceil(len(rows) / block.ranks)
        filled = [*mine, *[mine[-1] if mine else Completions((0,), ((0,),))] * (count - len(mine))]
        return mine, [self._scored(module, group) for group in chunks(filled, block.per_device_train_batch_size)]

    def kl_logps(self, module: nn.Module, preferences: Sequence[Preference]) -> Tensor:
        """[G] summed log-probs of the KL samples of `preferences`."""
        return self._scored(module, [kl_completions(preference) for preference in preferences]).logps

    def kl_totals(
        self, module: nn.Module, preferences: Sequence[Preference], micro_batches: Iterable[MicroBatch]
    ) -> Tensor:
        """[2] fp64: the sum of log pi - log pi_ref over the KL samples of the micro-batches, and how many they are.

        `module` is the policy. Fillers count nothing.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in micro_batches:
            mine = [preferences[index] for index in micro.indices]
            weights = on_device(torch.tensor(micro.weights, dtype=torch.float64), self.device)
            reference = on_device(kl_reference_logps(mine), self.device)
            logratios = (self.kl_logps(module, mine) - reference).double()
            totals += torch.stack([(logratios * weights).sum(), weights.sum()])
        return totals

    def _scored(self, module: nn.Module, rows: Sequence[Completions]) -> CompletionScores:
        with torch.no_grad():
            scores: CompletionScores = module(token_batch(rows, self.layout, self.pad_id).to(self.device))
        return scores

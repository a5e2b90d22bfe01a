"""Preferences into optimizer steps and padded tensors."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raylign.records import Preference


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


def plan_steps(count: int, *, ranks: int, micro_batch: int, accumulation: int, epochs: int, seed: int) -> list[Step]:
    """Shuffled steps over `count` preferences, each epoch in a new order.

    Every rank gets the same number of micro-batches of each step, so collectives line up; the content of a step
    depends only on ranks * micro_batch * accumulation, so 1x8 and 8x1 train on the same steps.
    """
    batch = ranks * micro_batch * accumulation
    steps = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [_step(order[start : start + batch], ranks, accumulation) for start in range(0, count, batch)]
    return steps


def _step(indices: Sequence[int], ranks: int, accumulation: int) -> Step:
    lanes = ranks * accumulation
    dealt = [tuple(indices[lane::lanes]) for lane in range(lanes)]
    micro = [MicroBatch(lane, (1.0,) * len(lane)) if lane else MicroBatch((indices[0],), (0.0,)) for lane in dealt]
    return Step(len(indices), tuple(tuple(micro[rank::ranks]) for rank in range(ranks)))


class Sequences(NamedTuple):
    """S padded prompt+completion rows. Made by `pad_sequences`, read by `CompletionLogps`.

    `input_ids` [S, T] int64; `attention_mask` [S, T] is 1 on real tokens; `targets` [S, T] is True where
    input_ids[s, t] is a completion token (its log-probability is predicted at t - 1). Rows are right-padded.
    A named tuple, because ZeRO-3 looks for tensors in those.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device))


TokenPair = tuple[Sequence[int], Sequence[int]]


def pad_sequences(pairs: Sequence[TokenPair], pad_id: int) -> Sequences:
    """(prompt ids, completion ids) rows into right-padded tensors; token ids are taken as they are."""
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    input_ids = torch.full((len(pairs), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.zeros((len(pairs), width), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        targets[row, len(prompt) : end] = True
    return Sequences(input_ids, attention_mask, targets)


def pair_rows(preferences: Sequence[Preference]) -> list[TokenPair]:
    """All chosen rows, then all rejected rows, of preferences that are pairs."""
    chosen: list[TokenPair] = [(p.prompt.token_ids, p.candidates[0].token_ids) for p in preferences]
    rejected: list[TokenPair] = [(p.prompt.token_ids, p.candidates[-1].token_ids) for p in preferences]
    return chosen + rejected

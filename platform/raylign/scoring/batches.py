"""What a scorer is asked in one call, and how long that may take."""

import math
from collections.abc import Sequence

from raylign.chunks import chunks
from raylign.config.scoring import (
    CompositionBlock,
    FunctionScoringBlock,
    HttpScoringBlock,
    JudgeScoringBlock,
    LeafBlock,
    ModelScoringBlock,
    ScoringBlock,
    VerifierScoringBlock,
    leaves,
)
from raylign.scoring.base import ScoringItem, groups
from raylign.scoring.http_client import JITTER_S, LONGEST_WAIT_S, RemoteBlock
from raylign.scoring.judge_check import QUESTIONS
from raylign.scoring.verifier import GRACE_S

FORWARDS = 8
"""Forward passes in one call of a model: completions of like length meet in one of them."""


def batches(items: Sequence[ScoringItem], block: ScoringBlock) -> list[Sequence[ScoringItem]]:
    """`items` in order, at most `batch_size` at a time, the largest one of a composition.

    Items of one prompt that are compared stay together, even where they are more.
    """
    limit = max(_at_once(leaf) for leaf in leaves(block))
    return _whole_groups(items, limit) if block.compares else [*chunks(items, limit)]


def _at_once(block: LeafBlock) -> int:
    """Items in one call of a scorer that keep it busy."""
    match block:
        case HttpScoringBlock():
            return block.batch_size * block.concurrency
        case ModelScoringBlock():
            return block.batch_size * FORWARDS
        case _:
            return block.batch_size


def _whole_groups(items: Sequence[ScoringItem], limit: int) -> list[Sequence[ScoringItem]]:
    found: list[list[ScoringItem]] = []
    for group in groups(items):
        if found and len(found[-1]) + len(group) <= limit:
            found[-1].extend(group)
        else:
            found.append(group)
    return [*found]


def longest_s(batch: Sequence[ScoringItem], block: ScoringBlock) -> float:
    """Seconds within which any scorer that works answers, be it with nothing but failures."""
    match block:
        case FunctionScoringBlock():
            return 2 * block.timeout_s * len(batch)
        case VerifierScoringBlock():
            return 2 * (block.timeout_s + GRACE_S) * len(batch)
        case ModelScoringBlock():
            return block.timeout_s * len(batch)
        case JudgeScoringBlock():
            asked = questions(batch) + (2 * len(QUESTIONS) + 1 if block.canaries else 1)
            return _asking_s(asked, block)
        case HttpScoringBlock():
            return _asking_s(math.ceil(len(batch) / block.batch_size) + len(batch), block)
        case CompositionBlock():
            return sum(longest_s(batch, member) for member in block.members.values())


def _asking_s(requests: int, block: RemoteBlock) -> float:
    """So many requests, every one of which fails until it is given up."""
    waits = block.timeout_s + LONGEST_WAIT_S + JITTER_S
    return math.ceil(requests / block.concurrency) * (block.timeout_s + block.retries * (block.timeout_s + waits))


def questions(batch: Sequence[ScoringItem]) -> int:
    """Questions about a batch at most, without retries: one for a single item, both orders of every pair of more."""
    return sum(max(1, len(group) * (len(group) - 1)) for group in groups(batch))

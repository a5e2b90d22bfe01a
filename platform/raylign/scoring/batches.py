"""What a scorer is asked in one call, and how long that may take."""

import math
from collections.abc import Sequence

from raylign.config.scoring import FunctionScoringBlock, JudgeScoringBlock, ScoringBlock
from raylign.scoring.base import ScoringItem
from raylign.scoring.judge import groups
from raylign.scoring.judge_check import CANARIES
from raylign.scoring.judge_client import JITTER_S, LONGEST_WAIT_S


def batches(items: Sequence[ScoringItem], block: ScoringBlock) -> list[Sequence[ScoringItem]]:
    """`items` in order, at most `batch_size` at a time.

    A judge compares the items of one prompt, which therefore stay together, even where they are more.
    """
    match block:
        case FunctionScoringBlock():
            return [items[start : start + block.batch_size] for start in range(0, len(items), block.batch_size)]
        case JudgeScoringBlock():
            return _whole_groups(items, block.batch_size)


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
        case JudgeScoringBlock():
            asked = questions(batch) + (2 * len(CANARIES) + 1 if block.canaries else 1)
            waits = block.timeout_s + LONGEST_WAIT_S + JITTER_S
            return math.ceil(asked / block.concurrency) * (block.timeout_s + block.retries * (block.timeout_s + waits))


def questions(batch: Sequence[ScoringItem]) -> int:
    """Questions about a batch at most, without retries: one for a single item, both orders of every pair of more."""
    return sum(max(1, len(group) * (len(group) - 1)) for group in groups(batch))

"""What a scorer is asked in one call, and how long that may take."""

from collections.abc import Sequence

from raylign.chunks import chunks
from raylign.config.scoring import CompositionBlock, ScoringBlock, leaves
from raylign.scoring.base import ScoringItem, groups
from raylign.scoring.kind import kind_of


def batches(items: Sequence[ScoringItem], block: ScoringBlock) -> list[Sequence[ScoringItem]]:
    """`items` in order, at most `batch_size` at a time, the largest one of a composition.

    Items of one prompt that are compared stay together, even where they are more.
    """
    limit = max(leaf.items_per_call for leaf in leaves(block))
    return _whole_groups(items, limit) if block.compares else [*chunks(items, limit)]


def _whole_groups(items: Sequence[ScoringItem], limit: int) -> list[Sequence[ScoringItem]]:
    found: list[list[ScoringItem]] = []
    for group in groups(items):
        if found and len(found[-1]) + len(group) <= limit:
            found[-1].extend(group)
        else:
            found.append(group)
    return [*found]


def longest_s(batch: Sequence[ScoringItem], block: ScoringBlock) -> float:
    """Seconds within which any scorer that works answers, even if with failures alone."""
    if isinstance(block, CompositionBlock):
        return sum(longest_s(batch, member) for member in block.members.values())
    return kind_of(block).longest_s(block, batch)

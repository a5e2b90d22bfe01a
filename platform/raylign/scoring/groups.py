"""Items of one prompt that stand together, for scorers that compare them."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from raylign.scoring.base import ScoringItem

Group = list[ScoringItem]


def groups(items: Sequence[ScoringItem]) -> list[Group]:
    """Items of one prompt that stand together."""
    return [list(group) for _, group in groupby(items, key=lambda item: item.prompt.id)]


def apart(kept: Iterable[Group]) -> list[list[Group]]:
    """Groups in as few runs as keep each a group of its own, where others between them were taken out."""
    runs: list[list[Group]] = []
    for group in kept:
        if runs and runs[-1][-1][0].prompt.id != group[0].prompt.id:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs

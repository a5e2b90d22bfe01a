"""What every scorer takes and gives."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from raylign.errors import ScorerError
from raylign.records import Prompt, Score

RETURNED_NONE = "scorer returned None"
REASON_LENGTH = 300
REASONS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ScoringItem:
    """One completion to judge. Made by the scoring stage, read by scorers. `completion` is the candidate's text."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True, slots=True)
class Compute:
    """What scorers that run a model compute on: the GPU that Ray gave the actor, else this many threads."""

    threads: int = 1
    on_gpu: bool = False


class ItemScorer(Protocol):
    """Judges completions."""

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in the items' order. What cannot be judged has value None and a reason.

        Nothing is asked any more once more than `allowed` items are unscored; None takes the scorer's own limit.
        """
        ...


def most_unscored(total: int, limit: float) -> int:
    """How many of `total` items may be unscored when a share of `limit` (0..1) may."""
    return sum(count / total <= limit for count in range(1, total + 1))


def skipped(limit: float) -> Score:
    """The score of an item that nobody is asked about any more."""
    return Score(None, reason=f"skipped: more than {limit:.0%} of items already unscored")


def check_unscored(scores: Sequence[Score], limit: float) -> None:
    """Raise ScorerError when more than `limit` (0..1) of `scores` is unscored; names the most frequent reasons."""
    reasons = Counter(score.reason for score in scores if score.value is None)
    unscored = reasons.total()
    if not scores or unscored / len(scores) <= limit:
        return
    shown = "".join(f"\n  {count} x {reason}" for reason, count in reasons.most_common(REASONS_SHOWN))
    raise ScorerError(
        f"{unscored} of {len(scores)} completions ({unscored / len(scores):.0%}) are unscored; "
        f"scoring.max_unscored={limit:g} allows {limit:.0%}. Most frequent reasons:{shown}\n"
        "Fix what they name (a scoring function's traceback is on stderr), or raise scoring.timeout_s or "
        "scoring.max_unscored."
    )


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

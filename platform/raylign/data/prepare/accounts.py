"""What became of every row and every pair."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from raylign.data.prepare.filters import Unfit
from raylign.data.prepare.ratings import Unpaired

RowFate: TypeAlias = Literal["bad", Unpaired, "paired"]
PairFate: TypeAlias = Literal[Unfit, "exact_duplicate", "near_duplicate", "other_language", "not_drawn", "kept"]
MEANINGS: Mapping[RowFate | PairFate, str] = {
    "bad": "cannot be used; listed in quarantine.jsonl",
    "single_answer": "one answer alone, nothing to compare it with",
    "unrated": "answers without order, scores or ratings that all have",
    "small_gap": "weighted ratings differ by less than ratings.min_gap, or against the source's order",
    "tie": "equal scores",
    "paired": "gave pairs",
    "same_answer": "chosen and rejected say the same",
    "short": "an answer below filters.min_chars",
    "long": "prompt and answer above filters.max_chars",
    "template": "an answer holds one of filters.templates",
    "exact_duplicate": "the same as an earlier pair",
    "near_duplicate": "prompt and chosen answer are nearly those of an earlier row",
    "other_language": "in a language without a share in the mix",
    "not_drawn": "not needed for the shares and the size of the mix",
    "kept": "written",
}
ROW_FATES: tuple[RowFate, ...] = ("bad", "single_answer", "unrated", "small_gap", "tie", "paired")
PAIR_FATES: tuple[PairFate, ...] = (
    "same_answer",
    "short",
    "long",
    "template",
    "exact_duplicate",
    "near_duplicate",
    "other_language",
    "not_drawn",
    "kept",
)
"""Every row and every pair has exactly one fate: the first of these that holds."""


@dataclass(slots=True)
class Account:
    """Fates of the rows and the pairs of one source."""

    name: str
    where: str
    format: str
    rows: Counter[RowFate] = field(default_factory=Counter)
    pairs: Counter[PairFate] = field(default_factory=Counter)


def total_fates(accounts: Sequence[Account]) -> tuple[dict[RowFate, int], dict[PairFate, int]]:
    """Rows and pairs of all sources by fate, in the order in which fates are looked for."""
    rows = {fate: sum(account.rows[fate] for account in accounts) for fate in ROW_FATES}
    pairs = {fate: sum(account.pairs[fate] for account in accounts) for fate in PAIR_FATES}
    return rows, pairs

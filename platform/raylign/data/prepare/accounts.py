"""What makes a pair unfit by itself, the language it is in, and what became of every row and every pair."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from py3langid.langid import classify

from raylign.config.prepare import FiltersBlock
from raylign.data.prepare.ratings import Unpaired

Unfit = Literal["same_answer", "short", "long", "template"]


@dataclass(frozen=True, slots=True)
class PairText:
    """What a pair says, as text."""

    prompt: str
    chosen: str
    rejected: str


class Filters:
    """The filters of a config, their expressions compiled once."""

    def __init__(self, block: FiltersBlock) -> None:
        self._min, self._max = block.min_chars, block.max_chars
        self._templates = [re.compile(template, re.IGNORECASE) for template in block.templates]

    def problem(self, text: PairText) -> Unfit | None:
        """The first reason to drop the pair, None for a fit one."""
        answers = (text.chosen, text.rejected)
        shortest, longest = sorted(len(answer.strip()) for answer in answers)
        if text.chosen.strip() == text.rejected.strip():
            return "same_answer"
        if shortest < self._min:
            return "short"
        if self._max is not None and len(text.prompt) + longest > self._max:
            return "long"
        if any(template.search(answer) for template in self._templates for answer in answers):
            return "template"
        return None


LOOKED_AT = 300
"""Characters of the prompt's end and of the answer's start, each."""
LETTERS = re.compile(r"[^\W\d_]")
KANA = re.compile(r"[\u3040-\u30ff]")
HANGUL = re.compile(r"[\uac00-\ud7af]")
HAN = re.compile(r"[\u3400-\u9fff]")
WORDS = re.compile(r"[a-z']+")
ENGLISH = frozenset(
    {"the", "and", "that", "what", "how", "with", "this", "you", "your", "which", "are", "from", "have", "would"}
    | {"should", "its", "their", "these", "when", "where"}
)
"""Frequent words of English that are rare in other languages of its script."""
CHINESE = frozenset({"cmn", "gan", "hak", "lzh", "nan", "wuu", "yue"})
"""Codes that `zh` stands for: a few characters among code do not tell them apart."""
SCRIPT_SHARE = 0.2
KANA_SHARE = 0.05
ENGLISH_SHARE = 0.08
ENGLISH_WORDS = 3


def language_of(text: PairText) -> str:
    """ISO 639 code of what a pair says; `zxx` for what is no language."""
    sample = f"{text.prompt[-LOOKED_AT:]}\n{text.chosen[:LOOKED_AT]}"
    letters = len(LETTERS.findall(sample))
    if not letters:
        return "zxx"
    if not sample.isascii() and (script := _script(sample, letters)):
        return script
    words = WORDS.findall(sample.lower())
    known = sum(word in ENGLISH for word in words)
    if known >= ENGLISH_WORDS and known >= ENGLISH_SHARE * len(words):
        return "en"
    code: str = classify(sample)[0]
    return "zh" if code in CHINESE else code


def _script(sample: str, letters: int) -> str | None:
    """Kana first: Japanese has Han characters too."""
    if len(KANA.findall(sample)) >= KANA_SHARE * letters:
        return "ja"
    if len(HANGUL.findall(sample)) >= SCRIPT_SHARE * letters:
        return "ko"
    if len(HAN.findall(sample)) >= SCRIPT_SHARE * letters:
        return "zh"
    return None


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

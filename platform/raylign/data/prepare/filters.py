"""What makes a pair unfit by itself, and the language it is in."""

import re
from dataclasses import dataclass
from typing import Literal

from py3langid.langid import classify

from raylign.config.prepare import FiltersBlock

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

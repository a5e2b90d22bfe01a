"""What makes a pair unfit by itself, whatever the other pairs are."""

import re
from dataclasses import dataclass
from typing import Literal

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

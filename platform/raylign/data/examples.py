"""What every format of judged text becomes. Text only: `raylign.data.tokens` applies the chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raylign.records import Message

SCORES, STRENGTHS, ORDER = "scores", "strengths", "order alone"
"""What the scores of a row are where nothing says it better: the source's own, a margin, places from the worst, 0."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: usually one assistant message, several where tools were called on the way.

    `score` is the source's own verdict (higher is better), None where it gives an order alone. `ratings` are its
    verdicts by attribute, such as `helpfulness`, in the source's own units.
    """

    messages: tuple[Message, ...]
    score: float | None = None
    ratings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation and its answers. Made by `raylign.data.formats`, read by `prepare` and `tokens`.

    `prompt` ends with the message that is answered. `ranked`: `completions` go from best to worst (two are a pair, one
    is a demonstration); else they come in the source's order and `ratings` tell them apart. `number` is the line from
    1 or the row from 0 in the source, as its unit says. `meta` has JSON scalars of the row that are worth keeping.
    `scale` says what the scores are, in words; numbers on different scales do not compare.
    """

    number: int
    prompt: tuple[Message, ...]
    completions: tuple[Completion, ...]
    ranked: bool
    tools: tuple[Mapping[str, Any], ...] = ()
    language: str | None = None
    """ISO 639-1 code, where the source or the config names it."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    scale: str = SCORES

"""What every format of judged text becomes, and which of its completions a recipe trains on. Text only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raylign.config.offline import Rows
from raylign.prompts.tables import Fault
from raylign.records import Message, Preference

SCORES, STRENGTHS, ORDER = "scores", "strengths", "order alone"
"""What the scores of a row are where nothing says it better: the source's own, a margin, places from the worst, 0."""

_PREPARE = "run `raylign data prepare` on the source first: it makes pairs of rated answers"
SCALE = "score_scale"
"""The label of a row, and the column of a prepared file, that says what its scores are."""


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


def answers(example: Example, rows: Rows) -> tuple[Completion, ...] | Fault:
    """The best completion (demonstrations), the best and the worst (pairs), or all of them in order (rankings).

    Answers that the source does not rank are ordered by their scores; a Fault says what cannot be ordered.
    """
    ordered = _ordered(example)
    if isinstance(ordered, Fault) or rows == "demonstrations":
        return ordered if isinstance(ordered, Fault) else ordered[:1]
    if len(ordered) < 2:
        return Fault(example.number, "one answer alone", shown(example), "give a better and a worse answer")
    return (ordered[0], ordered[-1]) if rows == "pairs" else ordered


def scores_of(completions: tuple[Completion, ...]) -> tuple[float, ...]:
    """The source's scores where all are there and fall from best to worst; else the places, K-1 for the best."""
    scores = [completion.score for completion in completions]
    known = [score for score in scores if score is not None]
    places = tuple(float(place) for place in range(len(completions) - 1, -1, -1))
    if len(known) < len(scores) or sorted(known, reverse=True) != known or known[0] == known[-1]:
        return places
    return tuple(known)


def scale_of(row: Preference) -> str:
    """What the scores of a row are, in words."""
    meta = row.prompt.meta
    return str(meta.get(SCALE, SCORES if "margin" in meta else ORDER))


def labels_of(example: Example, completions: tuple[Completion, ...]) -> dict[str, Any]:
    """What the row says of itself: its language, `margin` (the best score less the worst), and what its scores are."""
    labels = dict(example.meta)
    if example.language:
        labels["language"] = example.language
    best, worst = completions[0].score, completions[-1].score
    are_scores = False
    if len(completions) > 1 and best is not None and worst is not None:
        labels["margin"] = best - worst
        scores = scores_of(completions)
        are_scores = (scores[0], scores[-1]) == (best, worst)
    scale = example.scale if are_scores else ORDER
    if scale != (SCORES if "margin" in labels else ORDER):
        labels[SCALE] = scale
    return labels


def tied(completions: tuple[Completion, ...]) -> bool:
    """Whether the source scores the best and the worst alike."""
    first, last = completions[0].score, completions[-1].score
    return len(completions) > 1 and first is not None and first == last


def _ordered(example: Example) -> tuple[Completion, ...] | Fault:
    if example.ranked or len(example.completions) == 1:
        return example.completions
    scored = [(completion.score, completion) for completion in example.completions if completion.score is not None]
    if len(scored) < len(example.completions):
        return Fault(example.number, "answers with ratings, but in no order", shown(example), _PREPARE)
    return tuple(completion for _, completion in sorted(scored, key=lambda pair: -pair[0]))


def shown(example: Example) -> str:
    """What a report says of a bad row."""
    return str(example.prompt[-1]["content"])

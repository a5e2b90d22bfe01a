"""Which completions of an example a recipe trains on, best first."""

from typing import Any

from raylign.config.offline import Rows
from raylign.data.examples import ORDER, SCORES, Completion, Example
from raylign.prompts.tables import Fault
from raylign.records import Preference

_PREPARE = "run `raylign data prepare` on the source first: it makes pairs of rated answers"
SCALE = "score_scale"
"""The label of a row, and the column of a prepared file, that says what its scores are."""


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

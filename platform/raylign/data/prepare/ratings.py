"""From the answers of an Example to pairs: ratings on 0..1, weighted, best against worst."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

from raylign.config.prepare import RatingsBlock
from raylign.data.examples import ORDER, Completion, Example
from raylign.errors import DataError
from raylign.records import Message

Unpaired = Literal["single_answer", "unrated", "small_gap", "tie"]
Scales = Mapping[str, tuple[float, float]]
ROUNDING = 1e-9
RATINGS = "ratings in 0..1"
"""Scores of answers rated by attribute, which compare between sources."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer to one prompt. Made by `Rater`.

    Both scores are weighted ratings in 0..1, or the source's own in its units, or None where it has an order alone;
    `scale` says which.
    """

    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    score_chosen: float | None
    score_rejected: float | None
    scale: str

    @property
    def gap(self) -> float | None:
        """How much better the chosen answer scores."""
        if self.score_chosen is None or self.score_rejected is None:
            return None
        return self.score_chosen - self.score_rejected


@dataclass(frozen=True, slots=True)
class _Scored:
    """Answers that can be compared, the better first unless `scores` tie; pairs need `min_gap` and more than 0."""

    completions: tuple[Completion, ...]
    scores: tuple[float | None, ...]
    scale: str
    min_gap: float
    too_close: Unpaired


class Rater:
    """Makes pairs of the Examples of one source, whose ratings have `scales`: lowest and highest value of each."""

    def __init__(self, block: RatingsBlock, scales: Scales) -> None:
        self._block, self._scales = block, scales
        weights: dict[str, float] = block.weights.model_dump()
        names: dict[str, str | None] = dict.fromkeys(weights) | block.names.model_dump()
        self._attributes = {
            name: attribute or name for name, attribute in names.items() if attribute or name in weights
        }
        self._weights = {name: weights[attribute] for name, attribute in self._attributes.items()}

    def pairs(self, example: Example) -> tuple[Pair, ...] | Unpaired:
        """The pairs of one Example, at least one, or why it has none.

        Ratings by attribute come first, then the source's scores, then its order alone. The order of a ranking stands:
        where its ratings say the opposite of it, there is no pair. Raises DataError for ratings without a scale.
        """
        if len(example.completions) == 1:
            return "single_answer"
        scored = self._scored(example)
        if scored is None:
            return "unrated"
        count = len(scored.completions)
        places = [(0, count - 1)] if self._block.pairs == "best_worst" else combinations(range(count), 2)
        pairs = (_pair(scored, better, worse) for better, worse in places)
        return tuple(pair for pair in pairs if _far_enough(pair, scored.min_gap)) or scored.too_close

    def scores(self, completions: Sequence[Completion]) -> tuple[float, ...] | None:
        """The weighted score in 0..1 of each answer, or None where they share no attribute that counts.

        Only attributes that all of them have are used, so that scores compare like with like. Attributes that stand
        for one are averaged; the weights of those that are missing are shared out over the others.
        """
        shared = set.intersection(*(set(self._counting(completion)) for completion in completions))
        return tuple(self._score(completion, sorted(shared)) for completion in completions) if shared else None

    def _scored(self, example: Example) -> _Scored | None:
        rated = tuple(completion for completion in example.completions if self._counting(completion))
        if len(rated) > 1 and (ratings := self.scores(rated)) is not None:
            return _ordered(rated, ratings, example.ranked, RATINGS, self._block.min_gap, "small_gap")
        scores = tuple(completion.score for completion in example.completions)
        known = [score for score in scores if score is not None]
        if len(known) == len(scores):
            return _ordered(example.completions, known, example.ranked, example.scale, 0.0, "tie")
        return _Scored(example.completions, (None,) * len(scores), ORDER, 0.0, "tie") if example.ranked else None

    def _counting(self, completion: Completion) -> list[str]:
        """The source's names of those ratings that count."""
        return [name for name in completion.ratings if self._weights.get(name, 0.0) > 0]

    def _score(self, completion: Completion, names: Sequence[str]) -> float:
        parts: dict[str, list[float]] = {}
        weights: dict[str, float] = {}
        for name in names:
            attribute = self._attributes[name]
            weights[attribute] = self._weights[name]
            parts.setdefault(attribute, []).append(self._on_unit_scale(name, completion.ratings[name]))
        return sum(weights[name] * fmean(values) for name, values in parts.items()) / sum(weights.values())

    def _on_unit_scale(self, name: str, rating: float) -> float:
        if name not in self._scales:
            raise DataError(f"ratings of {name!r} have no known scale; set the source's format to one that rates it")
        low, high = self._scales[name]
        return (rating - low) / (high - low)


def _ordered(
    completions: tuple[Completion, ...],
    scores: Sequence[float],
    ranked: bool,
    scale: str,
    min_gap: float,
    too_close: Unpaired,
) -> _Scored:
    places = range(len(scores))
    order = places if ranked else sorted(places, key=lambda place: -scores[place])
    return _Scored(tuple(completions[i] for i in order), tuple(scores[i] for i in order), scale, min_gap, too_close)


def _pair(scored: _Scored, better: int, worse: int) -> Pair:
    chosen, rejected = scored.completions[better], scored.completions[worse]
    return Pair(chosen.messages, rejected.messages, scored.scores[better], scored.scores[worse], scored.scale)


def _far_enough(pair: Pair, min_gap: float) -> bool:
    return pair.gap is None or (pair.gap > 0 and pair.gap >= min_gap - ROUNDING)

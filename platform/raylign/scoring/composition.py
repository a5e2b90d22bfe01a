"""Scorers made of scorers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import fmean, pstdev

from raylign.config.scoring import (
    MEAN,
    STD,
    CalibratedScoringBlock,
    Composition,
    EnsembleBlock,
    GateScoringBlock,
    HumanScoringBlock,
    MeanStdScoringBlock,
    MinScoringBlock,
    WeightedScoringBlock,
)
from raylign.errors import ScorerError
from raylign.evaluation.judge_calibration import CalibratedJudge
from raylign.records import Score
from raylign.scoring.base import ItemScorer, ScoringItem, apart, groups, most_unscored, skipped


class EnsembleScorer(ABC):
    """Asks every member about every item. An item that one of them leaves unscored is unscored, with its reason.

    `parts` has the members' values by name, and their own parts as `name/part`; `part_reasons` their reasons.
    """

    def __init__(self, block: EnsembleBlock, scorers: Mapping[str, ItemScorer]) -> None:
        self._limit, self._scorers, self._place = block.max_unscored, scorers, block.place

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. A member is not asked once others left more than `allowed` unscored."""
        most = most_unscored(len(items), self._limit) if allowed is None else allowed
        by_member: dict[str, list[Score]] = {}
        lost = [False] * len(items)
        for name, scorer in self._scorers.items():
            if sum(lost) > most:
                by_member[name] = [skipped(self._limit)] * len(items)
                break
            with named(f"{self._place}{name}"):
                by_member[name] = scorer.score(items, most)
            lost = [gone or score.value is None for gone, score in zip(lost, by_member[name], strict=True)]
        columns = zip(*by_member.values(), strict=True)
        return [self._join(dict(zip(by_member, column, strict=True))) for column in columns]

    def _join(self, scores: Mapping[str, Score]) -> Score:
        for name, score in scores.items():
            if score.value is None:
                return _score_of(scores, None, f"{name}: {score.reason}")
        values = {name: score.value for name, score in scores.items() if score.value is not None}
        value, own = self.value_of(values)
        if not math.isfinite(value):
            return _score_of(scores, None, f"the members' values come to {value}")
        return _score_of(scores, value, more=own)

    @abstractmethod
    def value_of(self, values: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
        """The value of the whole from the members' values, and parts of its own."""


class WeightedScorer(EnsembleScorer):
    """The weighted sum."""

    def __init__(self, block: WeightedScoringBlock, scorers: Mapping[str, ItemScorer]) -> None:
        super().__init__(block, scorers)
        self._weights = block.weights

    def value_of(self, values: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
        return sum(self._weights[name] * value for name, value in values.items()), {}


class MinScorer(EnsembleScorer):
    """The worst value (Coste et al. 2024, arXiv 2310.02743, worst-case optimisation)."""

    def __init__(self, block: MinScoringBlock, scorers: Mapping[str, ItemScorer]) -> None:
        super().__init__(block, scorers)

    def value_of(self, values: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
        return min(values.values()), {}


class MeanStdScorer(EnsembleScorer):
    """The mean plus `std_coefficient` population standard deviations; both are kept in `parts`."""

    def __init__(self, block: MeanStdScoringBlock, scorers: Mapping[str, ItemScorer]) -> None:
        super().__init__(block, scorers)
        self._coefficient = block.std_coefficient

    def value_of(self, values: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
        mean, std = fmean(values.values()), pstdev(values.values())
        return mean + self._coefficient * std, {MEAN: mean, STD: std}


class GateScorer:
    """One scorer's value where another one's is at least a threshold, a constant elsewhere; `score` is not asked there.

    An item that the gate leaves unscored is unscored.
    """

    def __init__(self, block: GateScoringBlock, scorers: Mapping[str, ItemScorer]) -> None:
        self._block, self._gate, self._score = block, scorers["gate"], scorers["score"]

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops asking once more than `allowed` are unscored."""
        most = most_unscored(len(items), self._block.max_unscored) if allowed is None else allowed
        with named("gate"):
            gates = self._gate.score(items, most)
        left = most - sum(gate.value is None for gate in gates)
        behind = iter(self._behind(items, gates, left))
        return [self._join(gate, behind) for gate in gates]

    def _behind(self, items: Sequence[ScoringItem], gates: Sequence[Score], allowed: int) -> list[Score]:
        """Scores of the items that have passed, which keep to their own groups."""
        passed = iter([self._is_open(gate) for gate in gates])
        kept = [[item for item in group if next(passed)] for group in groups(items)]
        found: list[Score] = []
        for run in apart(group for group in kept if group):
            asked = [item for group in run for item in group]
            if allowed < 0:
                found += [skipped(self._block.max_unscored)] * len(asked)
                continue
            with named("score"):
                scores = self._score.score(asked, allowed)
            allowed -= sum(score.value is None for score in scores)
            found += scores
        return found

    def _join(self, gate: Score, behind: Iterator[Score]) -> Score:
        if gate.value is None:
            return _score_of({"gate": gate}, None, f"gate: {gate.reason}")
        if not self._is_open(gate):
            return _score_of({"gate": gate}, self._block.otherwise)
        score = next(behind)
        reason = f"score: {score.reason}" if score.value is None else ""
        return _score_of({"gate": gate, "score": score}, score.value, reason)

    def _is_open(self, gate: Score) -> bool:
        return gate.value is not None and gate.value >= self._block.threshold


PEOPLE = "raylign.people"
"""Key of a prompt's `meta`: share of wins by completion, of every one that people compared (`raylign.review`)."""


class HumanScorer:
    """A completion's share of wins where people were asked about its prompt, else the value of `held_out`."""

    def __init__(self, block: HumanScoringBlock, scorers: Mapping[str, ItemScorer]) -> None:
        self._limit, self._held_out = block.max_unscored, scorers["held_out"]

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. What nobody compared is unscored."""
        most = most_unscored(len(items), self._limit) if allowed is None else allowed
        alone = [item for item in items if PEOPLE not in item.prompt.meta]
        found: list[Score] = []
        if alone:
            with named("held_out"):
                found = self._held_out.score(alone, most)
        by_scorer = iter(found)
        return [_shared(item) if PEOPLE in item.prompt.meta else next(by_scorer) for item in items]


def _shared(item: ScoringItem) -> Score:
    share = item.prompt.meta[PEOPLE].get(item.completion)
    return Score(None, reason="people compared it with no other answer") if share is None else Score(share)


class CalibratedScorer:
    """What a scorer's differences mean to people: the mean of P(better) over the other candidates of the prompt.

    A copy is as good: 1/2. An item alone gets the scorer's own value. Where the scorer leaves all others unscored there
    is nothing to be better than, and the item is unscored too.
    """

    def __init__(self, block: CalibratedScoringBlock, scorers: Mapping[str, ItemScorer]) -> None:
        self._limit, self._scorer = block.max_unscored, scorers["scorer"]
        self._judge = CalibratedJudge(block.slope, block.band)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order; `parts` has the scorer's value as `scorer`."""
        most = most_unscored(len(items), self._limit) if allowed is None else allowed
        with named("scorer"):
            found = iter(self._scorer.score(items, most))
        return [score for group in groups(items) for score in self._beside([next(found) for _ in group])]

    def _beside(self, group: Sequence[Score]) -> list[Score]:
        """Candidates of one prompt, from the scorer's scores of them."""
        if len(group) == 1:
            score = group[0]
            return [_score_of({"scorer": score}, score.value, f"scorer: {score.reason}" if score.value is None else "")]
        return [
            self._against(score, [other.value for at, other in enumerate(group) if at != place])
            for place, score in enumerate(group)
        ]

    def _against(self, score: Score, others: Sequence[float | None]) -> Score:
        if score.value is None:
            return _score_of({"scorer": score}, None, f"scorer: {score.reason}")
        shares = [self._judge.share(score.value - other) for other in others if other is not None]
        if not shares:
            return _score_of({"scorer": score}, None, "scorer: no other candidate of its prompt has a value")
        return _score_of({"scorer": score}, fmean(shares))


def composed(block: Composition, scorers: Mapping[str, ItemScorer]) -> ItemScorer:
    """The scorer of a composition, from the scorers of its members."""
    match block:
        case WeightedScoringBlock():
            return WeightedScorer(block, scorers)
        case MinScoringBlock():
            return MinScorer(block, scorers)
        case MeanStdScoringBlock():
            return MeanStdScorer(block, scorers)
        case GateScoringBlock():
            return GateScorer(block, scorers)
        case HumanScoringBlock():
            return HumanScorer(block, scorers)
        case CalibratedScoringBlock():
            return CalibratedScorer(block, scorers)


def _score_of(
    scores: Mapping[str, Score], value: float | None, reason: str = "", *, more: Mapping[str, float] | None = None
) -> Score:
    """The score of a whole, with what its members say by their names."""
    reasons: dict[str, str] = {}
    for name, score in scores.items():
        if score.value is not None and score.reason:
            reasons[name] = score.reason
        reasons |= {f"{name}/{part}": told for part, told in score.part_reasons.items()}
    return Score(value, {**parts_of(scores), **(more or {})}, reason, reasons)


def parts_of(scores: Mapping[str, Score]) -> dict[str, float]:
    """Values by name, and the parts below them."""
    found: dict[str, float] = {}
    for name, score in scores.items():
        if score.value is not None:
            found[name] = score.value
        found |= {f"{name}/{part}": value for part, value in score.parts.items()}
    return found


class MemberError(ScorerError):
    """A ScorerError of a member, whose place in the config is below `block`."""

    def __init__(self, place: str, cause: str, block: str) -> None:
        super().__init__(place, cause, block)
        self.place, self.cause, self.block = place, cause, block

    def __str__(self) -> str:
        return f"{self.block}.{self.place}: {self.cause}"


@contextmanager
def named(place: str, block: str = "scoring") -> Iterator[None]:
    """Name the member that a ScorerError comes from. Raises MemberError."""
    try:
        yield
    except MemberError as error:
        raise MemberError(f"{place}.{error.place}", error.cause, block) from error
    except ScorerError as error:
        raise MemberError(place, str(error), block) from error


def of_gold() -> AbstractContextManager[None]:
    """Name the gold scorer where a ScorerError comes from it."""
    return named("gold", "evaluation")

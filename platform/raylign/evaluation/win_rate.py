"""How often one set of answers beats another on the same prompts: by scores, or by a judge that compares them.

A tie is half a win. Several completions of a prompt are compared each with each, and their mean is the prompt's share;
the rate is the mean over prompts, and its interval is one over prompts: what they have in common is no new evidence.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypedDict

import numpy as np

from raylign.errors import ScorerError
from raylign.evaluation.intervals import Values, share_interval
from raylign.evaluation.length_control import length_controlled
from raylign.records import Candidate, Prompt, Score

Opponent = Literal["initial", "previous_round"]
UNNAMED = "-"


@dataclass(frozen=True, slots=True)
class Pair:
    """An answer and an opponent's to the same prompt. Made by `scored_pairs` and `judged_pairs`.

    `share` is what the answer takes of the win: 1, 1/2 for a tie, 0. `longer` is how many characters it is longer.
    """

    prompt_id: str
    share: float
    longer: int


@dataclass(frozen=True, slots=True)
class WinRate:
    """Made by `win_rate`, read by reports. `low`/`high` bound `rate`, `controlled_low`/`controlled_high` `controlled`.

    `rate`, `wins`, `ties` and `losses` are shares, means over `prompts`; `missing` prompts had no pair to compare.
    `controlled` is the rate at equal lengths (`raylign.evaluation.length_control`).
    """

    rate: float
    low: float
    high: float
    wins: float
    ties: float
    losses: float
    controlled: float
    controlled_low: float
    controlled_high: float
    prompts: int
    missing: int = 0


def scored_pairs(
    own: Sequence[Candidate], own_scores: Sequence[Score], other: Sequence[Candidate], other_scores: Sequence[Score]
) -> list[Pair]:
    """Each answer against each opponent's of its prompt: the higher score wins, equal scores tie.

    Scores run parallel to candidates, and come from the same scorer. What is unscored is compared with nothing.
    """
    opponents: dict[str, list[tuple[Candidate, float]]] = {}
    for candidate, score in zip(other, other_scores, strict=True):
        if score.value is not None:
            opponents.setdefault(candidate.prompt_id, []).append((candidate, score.value))
    return [
        Pair(candidate.prompt_id, _share(score.value, value), len(candidate.text) - len(opponent.text))
        for candidate, score in zip(own, own_scores, strict=True)
        if score.value is not None
        for opponent, value in opponents.get(candidate.prompt_id, ())
    ]


def _share(own: float, other: float) -> float:
    return 0.5 if own == other else float(own > other)


def to_compare(
    prompts: Sequence[Prompt], own: Sequence[Candidate], other: Sequence[Candidate]
) -> tuple[list[Prompt], list[Candidate]]:
    """What a scorer that compares candidates is asked: each pair as the two candidates of a prompt of its own.

    It then sees the two alone, a judge in both orders, and `judged_pairs` reads its scores.
    """
    asked: list[Prompt] = []
    shown: list[Candidate] = []
    for prompt in prompts:
        answers = [[c for c in candidates if c.prompt_id == prompt.id] for candidates in (own, other)]
        for mine in answers[0]:
            for theirs in answers[1]:
                pair = replace(prompt, id=f"{prompt.id}/{mine.index}/{theirs.index}")
                asked.append(pair)
                shown += [replace(mine, prompt_id=pair.id, index=0), replace(theirs, prompt_id=pair.id, index=1)]
    return asked, shown


def judged_pairs(shown: Sequence[Candidate], scores: Sequence[Score]) -> list[Pair]:
    """The pairs of `to_compare` by the scores that they were given beside each other; unscored ones are left out."""
    pairs = []
    for place in range(0, len(shown), 2):
        mine, theirs = shown[place : place + 2]
        first, second = scores[place].value, scores[place + 1].value
        if first is not None and second is not None:
            prompt_id = mine.prompt_id.rsplit("/", 2)[0]
            pairs.append(Pair(prompt_id, _share(first, second), len(mine.text) - len(theirs.text)))
    return pairs


def win_rate(
    pairs: Sequence[Pair], confidence: float, *, asked: int = 0, difficulty: Mapping[str, float] | None = None
) -> WinRate:
    """Sum up pairs, of `asked` prompts (0: of those that have a pair).

    `difficulty` by prompt is for the length-controlled rate, see there. Raises ScorerError when there is no pair.
    """
    by_prompt = _by_prompt(pairs)
    if not by_prompt:
        raise ScorerError(
            f"no pair of answers to compare on {asked} prompts: on each of them one side has no answer or no score; "
            "see why they are unscored, or give an opponent that answers the same prompts"
        )
    outcomes = [[pair.share for pair in own] for own in by_prompt.values()]
    shares = means(outcomes)
    low, high = share_interval(shares, confidence)
    controlled = length_controlled(
        outcomes,
        [[float(pair.longer) for pair in own] for own in by_prompt.values()],
        confidence,
        None if difficulty is None else [difficulty.get(name, 0.0) for name in by_prompt],
    )
    wins, losses = (means([[float(share == end) for share in own] for own in outcomes]).mean() for end in (1.0, 0.0))
    return WinRate(
        rate=float(shares.mean()),
        low=float(low),
        high=float(high),
        wins=float(wins),
        ties=float(1.0 - wins - losses),
        losses=float(losses),
        controlled=controlled.rate,
        controlled_low=controlled.low,
        controlled_high=controlled.high,
        prompts=len(by_prompt),
        missing=max(0, asked - len(by_prompt)),
    )


class VersionRates(TypedDict, total=False):
    """The fields of an `Evaluation` that `against_versions` gives."""

    win_rate: float
    win_rate_low: float
    win_rate_high: float
    win_rate_length_controlled: float
    win_rate_length_controlled_low: float
    win_rate_length_controlled_high: float
    win_rate_previous: float
    win_rate_previous_low: float
    win_rate_previous_high: float


def rates_over(won: WinRate) -> VersionRates:
    """As an `Evaluation` tells of an opponent."""
    return {
        "win_rate": won.rate,
        "win_rate_low": won.low,
        "win_rate_high": won.high,
        "win_rate_length_controlled": won.controlled,
        "win_rate_length_controlled_low": won.controlled_low,
        "win_rate_length_controlled_high": won.controlled_high,
    }


def against_versions(
    own: Sequence[Candidate],
    own_scores: Sequence[Score],
    versions: Mapping[Opponent, tuple[Sequence[Candidate], Sequence[Score]] | None],
    confidence: float,
) -> VersionRates:
    """How a version does against earlier ones on the held-out prompts.

    Opponents without samples, or without a pair that is scored on both sides, have none.
    """
    found: VersionRates = {}
    for name, known in versions.items():
        if not (known and (pairs := scored_pairs(own, own_scores, *known))):
            continue
        won = win_rate(pairs, confidence)
        if name == "initial":
            found |= rates_over(won)
        else:
            found |= {
                "win_rate_previous": won.rate,
                "win_rate_previous_low": won.low,
                "win_rate_previous_high": won.high,
            }
    return found


def by_category(
    pairs: Sequence[Pair],
    prompts: Sequence[Prompt],
    field: str,
    confidence: float,
    difficulty: Mapping[str, float] | None = None,
) -> dict[str, WinRate]:
    """The rate of each value of `field` in the prompts' `meta`, the most frequent first.

    Prompts without it are of the category "-". Categories without any pair are left out.
    """
    category = {prompt.id: str(prompt.meta.get(field) or UNNAMED) for prompt in prompts}
    asked = Counter(category.values())
    parts = {name: [pair for pair in pairs if category[pair.prompt_id] == name] for name, _ in asked.most_common()}
    return {
        name: win_rate(own, confidence, asked=asked[name], difficulty=difficulty) for name, own in parts.items() if own
    }


def means(outcomes: Sequence[Sequence[float]]) -> Values:
    """[prompts] mean of each prompt's pairs."""
    return np.array([np.mean(own) for own in outcomes], dtype=np.float64)


def _by_prompt(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    ordered = sorted(pairs, key=lambda pair: pair.prompt_id)
    return {name: list(own) for name, own in groupby(ordered, key=lambda pair: pair.prompt_id)}

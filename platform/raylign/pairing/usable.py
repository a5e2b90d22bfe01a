"""The candidates of each prompt with their scores, and which of them can be paired."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

from raylign.config.pairing import PairingBlock, RankingPairingBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score


@dataclass(frozen=True, slots=True)
class Group:
    """The candidates of one prompt in sampled order, `scores` parallel to them."""

    prompt: Prompt
    candidates: tuple[Candidate, ...]
    scores: tuple[Score, ...]

    @property
    def samplers(self) -> tuple[int, int]:
        """The policy versions that sampled for the reference and for the policy: the oldest and the newest."""
        versions = [candidate.policy_version for candidate in self.candidates]
        return min(versions), max(versions)


def group_by_prompt(
    prompts: Sequence[Prompt], candidates: Sequence[Candidate], scores: Sequence[Score]
) -> tuple[Group, ...]:
    """One group per prompt, in the order of `prompts`.

    `candidates` is prompt-major and `scores` is parallel to it. Raises ValueError when the lengths differ, a candidate
    belongs to no prompt, the candidates of a prompt are not adjacent, or a score is not finite.
    """
    if len(candidates) != len(scores):
        raise ValueError(f"{len(scores)} scores for {len(candidates)} candidates; give one score per candidate")
    groups: dict[str, list[tuple[Candidate, Score]]] = {}
    for prompt_id, members in groupby(zip(candidates, scores, strict=True), key=lambda pair: pair[0].prompt_id):
        if prompt_id in groups:
            raise ValueError(f"candidates of prompt {prompt_id!r} are not adjacent; order candidates by prompt")
        groups[prompt_id] = list(members)
    if unknown := groups.keys() - {prompt.id for prompt in prompts}:
        raise ValueError(f"{len(unknown)} candidate groups without a prompt, among them {min(unknown)!r}")
    if infinite := [score.value for score in scores if score.value is not None and not math.isfinite(score.value)]:
        raise ValueError(f"{len(infinite)} scores are not finite, first {infinite[0]}; an unscored item has value None")
    return tuple(
        Group(prompt, tuple(c for c, _ in groups.get(prompt.id, ())), tuple(s for _, s in groups.get(prompt.id, ())))
        for prompt in prompts
    )


Dropped = Literal[
    "unscored_groups",
    "truncated_groups",
    "identical",
    "near_duplicates",
    "one_sided",
    "one_sampler",
    "ties",
    "below_margin",
    "above_margin",
    "truncated_chosen",
    "penalised",
]
"""Why a prompt gives no preference, in the order in which that is looked at."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate that can be paired.

    `score` is the scorer's own, which thresholds read; `value` is that less the length penalty, which is compared;
    `std` is an ensemble's, 0 where nothing reads it.
    """

    candidate: Candidate
    score: float
    value: float
    std: float

    @property
    def truncated(self) -> bool:
        return self.candidate.finish_reason == "length"


def usable(group: Group, block: PairingBlock) -> list[Scored] | Dropped:
    """At least two candidates, with different tokens unless copies stay, by index; or why there are not two.

    Raises ScorerError when `block` needs an ensemble's std that a score does not have.
    """
    ordered = sorted(zip(group.candidates, group.scores, strict=True), key=lambda pair: pair[0].index)
    found = [made for candidate, score in ordered for made in _scored(candidate, score, block)]
    if len(found) < 2:
        return "unscored_groups"
    if block.truncated != "keep":
        found = _without_truncated(found, block)
        if len(found) < 2:
            return "truncated_groups" if block.truncated == "drop" else "truncated_chosen"
    if not block.keeps_copies:
        found = list({one.candidate.token_ids: one for one in reversed(found)}.values())[::-1]
    if len(found) < 2:
        return "identical"
    if block.near_duplicates is not None:
        found = _unlike(found, block.near_duplicates)
        if len(found) < 2:
            return "near_duplicates"
    return found


def _scored(candidate: Candidate, score: Score, block: PairingBlock) -> list[Scored]:
    if score.value is None:
        return []
    value = score.value - block.length_penalty * len(candidate.token_ids)
    return [Scored(candidate, score.value, value, _std(candidate, score, block) if block.needs_std else 0.0)]


def _std(candidate: Candidate, score: Score, block: PairingBlock) -> float:
    if "std" not in score.parts:
        raise ScorerError(
            f"pairing.optimism={block.optimism:g} and pairing.weights={block.weights} need an ensemble's std, which "
            f"the score of candidate {candidate.index} of prompt {candidate.prompt_id} does not have; score with "
            "scoring.type=mean_std, or set optimism=0 and weights=none"
        )
    std = score.parts["std"]
    if not 0 <= std < math.inf:
        raise ScorerError(
            f"the score of candidate {candidate.index} of prompt {candidate.prompt_id} has std={std}; a scorer must "
            "give a finite one, not below 0"
        )
    return std


def _without_truncated(found: Sequence[Scored], block: PairingBlock) -> list[Scored]:
    """With `reject_only` those stay that one which ended by itself can beat, or in a ranking all that did."""
    ended = [one.value for one in found if not one.truncated]
    if block.truncated == "drop" or not ended:
        return [one for one in found if not one.truncated]
    bar = min(ended) if isinstance(block, RankingPairingBlock) else max(ended)
    return [one for one in found if not one.truncated or one.value < bar]


def _unlike(found: Sequence[Scored], limit: float) -> list[Scored]:
    """Those that overlap with no earlier kept one by `limit` or more."""
    kept: list[tuple[Scored, frozenset[tuple[int, ...]]]] = []
    for one in found:
        own = _shingles(one.candidate.token_ids)
        if all(_jaccard(own, other) < limit for _, other in kept):
            kept.append((one, own))
    return [one for one, _ in kept]


def _shingles(token_ids: Sequence[int]) -> frozenset[tuple[int, ...]]:
    """Token bigrams; of a single token itself."""
    return frozenset(pairwise(token_ids)) or frozenset([tuple(token_ids)])


def _jaccard(first: frozenset[tuple[int, ...]], second: frozenset[tuple[int, ...]]) -> float:
    return len(first & second) / len(first | second)

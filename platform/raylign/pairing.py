"""From scored candidates to preferences."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from raylign.config.blocks import BestWorstPairingBlock
from raylign.errors import NoPreferencesError
from raylign.records import Candidate, Preference, Prompt, Score

Dropped = Literal["unscored_groups", "identical", "ties", "below_margin"]

_REASONS: Mapping[Dropped, tuple[str, str]] = {
    "unscored_groups": ("had fewer than two scored candidates", "look at the scorer's reasons for unscored candidates"),
    "identical": ("had candidates with identical tokens", "raise sampling.temperature or sampling.num_generations"),
    "ties": (
        "had equal scores for best and worst",
        "use a scorer with finer values, or raise sampling.temperature or sampling.num_generations",
    ),
    "below_margin": ("had a score gap below pairing.min_margin", "lower pairing.min_margin"),
}


@dataclass(frozen=True, slots=True)
class Group:
    """The candidates of one prompt in sampled order, `scores` parallel to them."""

    prompt: Prompt
    candidates: tuple[Candidate, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class PairingResult:
    """The preferences of a round. Made by `build_preferences`, read by the trainer and the round report.

    `counts`: `prompts`, `candidates`, `unscored` and `truncated` (candidates), `unscored_groups`, `identical`, `ties`
    and `below_margin` (prompts dropped, each under the first reason that holds), `preferences`.
    """

    preferences: tuple[Preference, ...]
    counts: Mapping[str, int]


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


def build_preferences(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    scores: Sequence[Score],
    block: BestWorstPairingBlock,
) -> PairingResult:
    """Pair the best with the worst candidate of each prompt, with weights of 1.

    `candidates` is prompt-major and `scores` is parallel to it (ValueError otherwise). Unscored candidates are left
    out, candidates with identical tokens count once with the score of the first, and equal scores go to the lowest
    index. A prompt gives no pair when best and worst tie or are closer than `min_margin`.
    """
    outcomes = [_best_and_worst(group, block.min_margin) for group in group_by_prompt(prompts, candidates, scores)]
    preferences = tuple(outcome for outcome in outcomes if isinstance(outcome, Preference))
    dropped = Counter(outcome for outcome in outcomes if not isinstance(outcome, Preference))
    counts = {
        "prompts": len(prompts),
        "candidates": len(candidates),
        "unscored": sum(score.value is None for score in scores),
        "truncated": sum(candidate.finish_reason == "length" for candidate in candidates),
        "preferences": len(preferences),
    } | {str(reason): dropped[reason] for reason in _REASONS}
    return PairingResult(preferences, counts)


def without_pair(prompts: Sequence[Prompt], result: PairingResult) -> list[Prompt]:
    """The prompts that gave nothing to train on, in order."""
    paired = {preference.prompt.id for preference in result.preferences}
    return [prompt for prompt in prompts if prompt.id not in paired]


def require_preferences(result: PairingResult, round_index: int) -> None:
    """Raise NoPreferencesError, with the reasons and their cures, when a round gave nothing to train on."""
    if result.preferences:
        return
    counts = result.counts
    present = [(counts[reason], *texts) for reason, texts in _REASONS.items() if counts[reason]]
    lines = "".join(f"\n  {count} {fact}: {cure}" for count, fact, cure in present)
    raise NoPreferencesError(
        f"round {round_index} gave no pair from {counts['candidates']} candidates ({counts['unscored']} unscored, "
        f"{counts['truncated']} truncated) of {counts['prompts']} prompts; at least 1 is needed. Of the prompts{lines}"
    )


def _best_and_worst(group: Group, min_margin: float) -> Preference | Dropped:
    pairs = zip(group.candidates, group.scores, strict=True)
    scored = [(candidate, score.value) for candidate, score in pairs if score.value is not None]
    if len(scored) < 2:
        return "unscored_groups"
    scored.sort(key=lambda pair: pair[0].index)
    distinct: dict[tuple[int, ...], tuple[Candidate, float]] = {}
    for candidate, value in scored:
        distinct.setdefault(candidate.token_ids, (candidate, value))
    if len(distinct) < 2:
        return "identical"
    best, high = max(distinct.values(), key=lambda pair: pair[1])  # the first of equals, so the lowest index
    worst, low = min(distinct.values(), key=lambda pair: pair[1])
    if high == low:
        return "ties"
    if high - low < min_margin:
        return "below_margin"
    return Preference(group.prompt, (best, worst), scores=(high, low), weights=(1.0, 1.0))

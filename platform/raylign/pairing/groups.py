"""The candidates of each prompt, with their scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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

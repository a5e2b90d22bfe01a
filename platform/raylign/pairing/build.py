"""From scored candidates to preferences."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from raylign.config.pairing import CorrectWrongPairingBlock, PairingBlock, PolicyReferencePairingBlock
from raylign.errors import NoPreferencesError
from raylign.pairing.strategies import select
from raylign.pairing.usable import Dropped, Group, Scored, group_by_prompt, usable
from raylign.records import Candidate, Preference, Prompt, Score

_FINER = "use a scorer with finer values, or raise sampling.temperature or sampling.num_generations"
_REASONS: Mapping[Dropped, tuple[str, str]] = {
    "unscored_groups": ("had fewer than two scored candidates", "look at the scorer's reasons for unscored candidates"),
    "truncated_groups": (
        "had fewer than two candidates that ended by themselves",
        "raise sampling.max_new_tokens, or set pairing.truncated=keep",
    ),
    "identical": ("had candidates with identical tokens", "raise sampling.temperature or sampling.num_generations"),
    "near_duplicates": (
        "had candidates that are nearly the same",
        "raise pairing.near_duplicates, sampling.temperature or sampling.num_generations",
    ),
    "one_sided": (
        "had only correct or only wrong candidates",
        "take prompts of middling difficulty, or raise sampling.num_generations or sampling.max_resamples",
    ),
    "one_sampler": (
        "had no candidate of the reference, or none of the policy, that could be compared",
        "raise sampling.reference_generations, sampling.num_generations or sampling.temperature",
    ),
    "ties": ("had equal scores for what was compared", _FINER),
    "below_margin": ("had a score gap below pairing.min_margin", "lower pairing.min_margin"),
    "above_margin": ("had a score gap above pairing.max_margin", "raise pairing.max_margin"),
    "truncated_chosen": (
        "had a better candidate that was truncated",
        "raise sampling.max_new_tokens, or set pairing.truncated=keep",
    ),
    "penalised": (
        "had correct candidates that pairing.length_penalty puts below the wrong ones",
        "lower pairing.length_penalty",
    ),
}
assert set(_REASONS) == set(get_args(Dropped))


@dataclass(frozen=True, slots=True)
class PairingResult:
    """The preferences of a round. Made by `build_preferences`, read by the trainer and the round report.

    `counts`: `prompts`, `candidates`, `unscored` and `truncated` (candidates), `preferences`, and for each reason in
    `raylign.pairing.usable.Dropped` the prompts dropped for it, each under the first reason that holds. `dropped` has
    that reason by prompt id.
    """

    preferences: tuple[Preference, ...]
    counts: Mapping[str, int]
    dropped: Mapping[str, Dropped]


def build_preferences(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    scores: Sequence[Score],
    block: PairingBlock,
    seed: int,
) -> PairingResult:
    """Compare the candidates of each prompt as `block` says.

    `candidates` is prompt-major and `scores` is parallel to it (ValueError otherwise). Equal scores go to the lowest
    index. A Preference has the scores that were compared: those of the scorer less the length penalty. What is drawn at
    random depends on `seed` and the prompt's id. Raises ScorerError when `block` needs an ensemble's std and a score
    has none.
    """
    outcomes = {group.prompt.id: _outcome(group, block, seed) for group in group_by_prompt(prompts, candidates, scores)}
    made = [pair for outcome in outcomes.values() if isinstance(outcome, list) for pair in outcome]
    dropped = {prompt_id: outcome for prompt_id, outcome in outcomes.items() if not isinstance(outcome, list)}
    tally = Counter(dropped.values())
    preferences = _weighted(made, block)
    counts = {
        "prompts": len(prompts),
        "candidates": len(candidates),
        "unscored": sum(score.value is None for score in scores),
        "truncated": sum(candidate.finish_reason == "length" for candidate in candidates),
        "preferences": len(preferences),
    } | {str(reason): tally[reason] for reason in _REASONS}
    return PairingResult(preferences, counts, dropped)


def without_pair(prompts: Sequence[Prompt], result: PairingResult) -> list[Prompt]:
    """The prompts that gave nothing to train on, in order."""
    return [prompt for prompt in prompts if prompt.id in result.dropped]


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


@dataclass(frozen=True, slots=True)
class _Compared:
    """Candidates of a prompt, best first."""

    prompt: Prompt
    ordered: tuple[Scored, ...]


def _outcome(group: Group, block: PairingBlock, seed: int) -> list[_Compared] | Dropped:
    found = usable(group, block)
    if not isinstance(found, list):
        return found
    own_seed = f"{seed}/{group.prompt.id}"
    selected = select(
        found, block, lambda one, other: not _fault(_ordered((one, other), block), block), group.samplers, own_seed
    )
    if not selected:
        return _nothing_selected(block)
    ordered = [_ordered(members, block) for members in selected]
    faults = [_fault(members, block) for members in ordered]
    kept = [_Compared(group.prompt, members) for members, fault in zip(ordered, faults, strict=True) if fault is None]
    return kept or next(reason for reason in _REASONS if reason in faults)


def _ordered(members: Sequence[Scored], block: PairingBlock) -> tuple[Scored, ...]:
    """By value, so that optimism decides what is compared and not which one is better; what is correct is better."""
    if isinstance(block, CorrectWrongPairingBlock):
        return tuple(members)
    return tuple(sorted(members, key=lambda one: -one.value))


def _nothing_selected(block: PairingBlock) -> Dropped:
    match block:
        case CorrectWrongPairingBlock():
            return "one_sided"
        case PolicyReferencePairingBlock():
            return "one_sampler"
        case _:
            return "ties"


def _fault(members: Sequence[Scored], block: PairingBlock) -> Dropped | None:
    gap = members[0].value - members[-1].value
    if gap <= 0 and members[0].score > members[-1].score and isinstance(block, CorrectWrongPairingBlock):
        return "penalised"
    if gap == 0:
        return "ties"
    if gap < block.min_margin:
        return "below_margin"
    if block.max_margin is not None and gap > block.max_margin:
        return "above_margin"
    return "truncated_chosen" if block.truncated == "reject_only" and members[0].truncated else None


def _weighted(made: Sequence[_Compared], block: PairingBlock) -> tuple[Preference, ...]:
    raw = [_weight(one.ordered, block) for one in made]
    mean = math.fsum(raw) / len(raw) if raw else 1.0
    return tuple(_preference(one, weight / mean) for one, weight in zip(made, raw, strict=True))


def _weight(members: Sequence[Scored], block: PairingBlock) -> float:
    match block.weights:
        case "none":
            return 1.0
        case "margin":
            return members[0].value - members[-1].value
        case "uncertainty":
            return 1 / (1 + members[0].std ** 2 + members[-1].std ** 2)


def _preference(one: _Compared, weight: float) -> Preference:
    members = one.ordered
    return Preference(
        one.prompt,
        tuple(member.candidate for member in members),
        scores=tuple(member.value for member in members),
        weights=(weight,) * len(members),
    )

"""More candidates for prompts that gave no pair."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType

from raylign.records import Candidate, Prompt, Score

Place = tuple[str, int]
"""A candidate by its prompt's id and its index."""
NOTHING_KNOWN: Mapping[Place, Score] = MappingProxyType({})


def attempt_seed(run_seed: int, attempt: int) -> int:
    """The seed that takes the run's place in attempt `attempt` (0 is the first) at sampling a round."""
    return run_seed + attempt * 1_000_003


def joined(prompts: Sequence[Prompt], first: Iterable[Candidate], more: Iterable[Candidate]) -> list[Candidate]:
    """The candidates of `prompts` in both, prompt-major; a prompt's later ones are numbered on."""
    found: dict[str, list[Candidate]] = {prompt.id: [] for prompt in prompts}
    for candidate in (*first, *more):
        if (group := found.get(candidate.prompt_id)) is not None:
            group.append(replace(candidate, index=len(group)))
    return [candidate for prompt in prompts for candidate in found[prompt.id]]


def scores_by_place(candidates: Sequence[Candidate], scores: Sequence[Score]) -> dict[Place, Score]:
    """What is known of candidates."""
    return {place(candidate): score for candidate, score in zip(candidates, scores, strict=True)}


def place(candidate: Candidate) -> Place:
    return candidate.prompt_id, candidate.index


def filled_in(candidates: Iterable[Candidate], known: Mapping[Place, Score], found: Iterable[Score]) -> list[Score]:
    """One score per candidate: the known one, and for the others those `found`, in order."""
    rest = iter(found)
    return [known[place(one)] if place(one) in known else next(rest) for one in candidates]


def regrouped(
    old: tuple[Sequence[Candidate], Sequence[Score]], new: tuple[Sequence[Candidate], Sequence[Score]]
) -> tuple[list[Candidate], list[Score]]:
    """Whole groups of `new` in the places of their prompts in `old`."""
    fresh = _by_prompt(*new)
    pairs = [pair for prompt_id, group in _by_prompt(*old).items() for pair in fresh.get(prompt_id, group)]
    return [candidate for candidate, _ in pairs], [score for _, score in pairs]


def _by_prompt(candidates: Sequence[Candidate], scores: Sequence[Score]) -> dict[str, list[tuple[Candidate, Score]]]:
    pairs = zip(candidates, scores, strict=True)
    return {prompt_id: [*group] for prompt_id, group in groupby(pairs, key=lambda pair: pair[0].prompt_id)}

"""Which prompts teach nothing any more, and which are drawn instead: a function of the finished rounds' files.

And more candidates for prompts that gave no pair.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import Literal

from raylign.config.blocks import CurriculumBlock
from raylign.errors import PromptError
from raylign.records import Candidate, Prompt, Score
from raylign.run.directory import RunDirectory
from raylign.run.rounds import candidate_files
from raylign.run.tables import read_outcomes

Verdict = Literal["right", "wrong", "open"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a drawn prompt: the scores of all its candidates, None for one that nobody could score."""

    prompt_id: str
    scores: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompts of a round, and how many are left out because they are always right or always wrong."""

    prompts: tuple[Prompt, ...]
    right: int
    wrong: int


class History:
    """The outcomes of a run's rounds, read from their files once."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._rounds: list[list[Outcome]] = []

    def before(self, index: int) -> list[list[Outcome]]:
        """Of every round before `index`, in order."""
        for earlier in range(len(self._rounds) + 1, index):
            self._rounds.append(_outcomes(self._directory, earlier))
        return self._rounds[: index - 1]


def _outcomes(directory: RunDirectory, index: int) -> list[Outcome]:
    scores: dict[str, list[float | None]] = {}
    for path in candidate_files(directory.round(index)):
        groups: dict[str, list[float | None]] = {}
        for prompt_id, score in read_outcomes(path):
            groups.setdefault(prompt_id, []).append(score)
        scores |= groups
    return [Outcome(prompt_id, tuple(values)) for prompt_id, values in scores.items()]


def draw_open(
    prompts: Sequence[Prompt], history: Sequence[Iterable[Outcome]], count: int, block: CurriculumBlock, seed: int
) -> Drawn:
    """At most `count` prompts that are neither always right nor always wrong by `history`, the round's predecessors.

    Those drawn least often come first, in an order that `seed` and the number of rounds decide. Raises PromptError
    when no prompt is left.
    """
    verdicts = settled(history, block)
    left = [prompt for prompt in prompts if verdicts.get(prompt.id, "open") == "open"]
    tally = Counter(verdicts[prompt.id] for prompt in prompts if prompt.id in verdicts)
    if not left:
        raise PromptError(
            f"round {len(history) + 1}: schedule.curriculum leaves none of {len(prompts)} prompts ({tally['right']} "
            f"always right, {tally['wrong']} always wrong); what they can teach is learnt: add prompts, or raise "
            "schedule.curriculum.patience"
        )
    drawn = Counter(outcome.prompt_id for outcomes in history for outcome in outcomes)
    generator = random.Random(f"{seed}/curriculum/{len(history)}")
    order = sorted(left, key=lambda prompt: (drawn[prompt.id], generator.random()))
    return Drawn(tuple(order[:count]), tally["right"], tally["wrong"])


def settled(history: Iterable[Iterable[Outcome]], block: CurriculumBlock) -> Mapping[str, Verdict]:
    """Prompt ids whose last `patience` outcomes are all right, or all wrong; a missing score settles nothing."""
    streaks: dict[str, tuple[Verdict, int]] = {}
    for outcome in (outcome for outcomes in history for outcome in outcomes):
        verdict = _verdict(outcome.scores, block)
        before, length = streaks.get(outcome.prompt_id, (verdict, 0))
        streaks[outcome.prompt_id] = (verdict, length + 1 if before == verdict else 1)
    return {
        prompt_id: verdict
        for prompt_id, (verdict, length) in streaks.items()
        if verdict != "open" and length >= block.patience
    }


def _verdict(scores: Sequence[float | None], block: CurriculumBlock) -> Verdict:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return "open"
    if block.right_from is not None and min(known) >= block.right_from:
        return "right"
    if block.wrong_to is not None and max(known) <= block.wrong_to:
        return "wrong"
    return "open"


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

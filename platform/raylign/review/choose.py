"""Which pairs of a run people are asked about."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import pstdev
from typing import Literal

from raylign.config.scoring import (
    CompositionBlock,
    HumanScoringBlock,
    ScoringBlock,
    WeightedScoringBlock,
    asks_people,
)
from raylign.errors import RaylignError
from raylign.records import Message, Score
from raylign.review.record import Pair, pair_of, readable
from raylign.run.directory import RunDirectory
from raylign.run.rounds import candidate_files
from raylign.run.tables import read_candidates, read_messages

By = Literal["random", "uncertainty", "disagreement"]
WHOLE = "score"
"""Name of the score that pairs are built of; those of the members of a composition have the members' names."""


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer of a round to a prompt, with what scorers say of it by name; higher is better throughout."""

    round: int
    prompt_id: str
    messages: Sequence[Message]
    text: str
    values: Mapping[str, float]


def directions(block: ScoringBlock) -> dict[str, float]:
    """The scorers that a score is made of by their names in `parts`, and 1, or -1 where less is better.

    People are no scorers here.
    """
    if isinstance(block, HumanScoringBlock) or not isinstance(block, CompositionBlock):
        return {}
    found: dict[str, float] = {}
    for name, member in block.members.items():
        if isinstance(member, HumanScoringBlock):
            continue
        sign = -1.0 if isinstance(block, WeightedScoringBlock) and block.weights[name] < 0 else 1.0
        found[name] = sign
        found |= {f"{name}/{part}": sign * own for part, own in directions(member).items()}
    return found


def scored_answers(directory: RunDirectory, block: ScoringBlock) -> list[Scored]:
    """Every answer that rounds of the run have scored, prompt by prompt. Raises RecordError for a damaged table."""
    signs = directions(block)
    people = asks_people(block)
    found: list[Scored] = []
    for folder in sorted((directory.path / "rounds").glob("[0-9]*")):
        index = int(folder.name) if folder.name.isdigit() else 0
        by_prompt: dict[str, list[Scored]] = {}
        for path in candidate_files(folder) if index else ():
            messages = read_messages(path)
            group: dict[str, list[Scored]] = {}
            for candidate, score in zip(*read_candidates(path), strict=True):
                values = _values(score, signs, people)
                own = Scored(index, candidate.prompt_id, messages[candidate.prompt_id], candidate.text, values)
                group.setdefault(candidate.prompt_id, []).append(own)
            by_prompt |= group
        found += [answer for group_of_prompt in by_prompt.values() for answer in group_of_prompt]
    return found


def _values(score: Score, signs: Mapping[str, float], people: bool) -> dict[str, float]:
    """The whole score counts as a scorer's unless people have a part in it."""
    found = {name: sign * score.parts[name] for name, sign in signs.items() if name in score.parts}
    return found if people or score.value is None else {WHOLE: score.value, **found}


def choose(answers: Sequence[Scored], by: By, block: ScoringBlock, identity: str, seed: int) -> Iterator[Pair]:
    """Pairs of different answers to one prompt, those that tell most first, one of each prompt before a second.

    `uncertainty`: the smallest difference of scores. `disagreement`: the scorers of a composition that contradict each
    other most clearly; pairs about which they agree are left out. `random`: drawn with `seed`.

    Raises RaylignError when the run has no such pair.
    """
    keyed = list(_keyed(answers, by, block, seed))
    if not keyed:
        raise RaylignError((_NOTHING_BESIDE_PEOPLE if asks_people(block) else _NOTHING)[by])
    keyed.sort(key=lambda entry: entry[0])
    seen: dict[tuple[int, str], int] = {}
    ranked = []
    for place, (_, first, second) in enumerate(keyed):
        prompt = (first.round, first.prompt_id)
        seen[prompt] = seen.get(prompt, 0) + 1
        ranked.append((seen[prompt], place, first, second))
    for _, _, first, second in sorted(ranked, key=lambda entry: entry[:2]):
        about = (first.prompt_id, first.messages)
        yield pair_of(identity, first.round, about, (first.text, second.text), by=by, seed=seed)


_NOTHING: Mapping[By, str] = {
    "random": "no round of this run has two different scored answers to one prompt; finish a round first",
    "uncertainty": "no round of this run has two different scored answers to one prompt; finish a round first, or take "
    "--by random",
    "disagreement": "no two scorers of this run contradict each other about a pair: take --by uncertainty, or a run "
    "whose scoring.type is a composition of two scorers at least",
}

_NOTHING_BESIDE_PEOPLE: Mapping[By, str] = {
    **_NOTHING,
    "uncertainty": "the scores of this run are what people said, which leaves nobody to be uncertain; take --by random",
    "disagreement": "no two scorers of this run, people aside, contradict each other about a pair; take --by random",
}


def _keyed(answers: Sequence[Scored], by: By, block: ScoringBlock, seed: int) -> Iterator[tuple[float, Scored, Scored]]:
    """Every pair with what it is sorted by, smallest first."""
    chance = random.Random(seed)
    spread = spreads(answers, directions(block)) if by == "disagreement" else {}
    for first, second in pairs_of(answers):
        match by:
            case "random":
                yield chance.random(), first, second
            case "uncertainty":
                if (margin := difference(first, second, WHOLE)) is not None:
                    yield abs(margin), first, second
            case "disagreement":
                if (strength := disagreement(first, second, spread)) > 0:
                    yield -strength, first, second


def pairs_of(answers: Iterable[Scored]) -> Iterator[tuple[Scored, Scored]]:
    """Two answers to one prompt of one round whose texts differ."""
    groups: dict[tuple[int, str], list[Scored]] = {}
    for answer in answers:
        groups.setdefault((answer.round, answer.prompt_id), []).append(answer)
    for group in groups.values():
        distinct = {readable(answer.text): answer for answer in reversed(group)}
        yield from combinations(reversed(distinct.values()), 2)


def difference(first: Scored, second: Scored, name: str) -> float | None:
    """What scorer `name` gives the first more than the second; None where it scored not both."""
    if name not in first.values or name not in second.values:
        return None
    return first.values[name] - second.values[name]


def spreads(answers: Sequence[Scored], names: Iterable[str]) -> dict[str, float]:
    """The standard deviation of each scorer's values, of those that differ: what brings their scales together."""
    values = {name: [answer.values[name] for answer in answers if name in answer.values] for name in names}
    found = {name: pstdev(own) for name, own in values.items() if own}
    return {name: spread for name, spread in found.items() if spread > 0}


def disagreement(first: Scored, second: Scored, spread: Mapping[str, float]) -> float:
    """How sure the less sure one of two opposed scorers is, in standard deviations of its own values; 0 if none are."""
    found = {name: difference(first, second, name) for name in spread}
    scaled = [value / spread[name] for name, value in found.items() if value is not None]
    return max(0.0, min(max(scaled), -min(scaled))) if scaled else 0.0

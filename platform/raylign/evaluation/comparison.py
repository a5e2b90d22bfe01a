"""A policy against its opponents on one set of prompts: what the recipe `evaluate` reports."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raylign.evaluation.length_control import difficulties
from raylign.evaluation.win_rate import Pair, WinRate, by_category, win_rate
from raylign.records import Evaluation, Prompt

OF_A_RUN = re.compile(r"version (\d+) of (.+)", re.DOTALL)
"""How a side that is the policy of a run is told: its version and the run directory."""


@dataclass(frozen=True, slots=True)
class Opponent:
    """`against` says who it is. `categories` are those of the prompts, empty where they were not asked for."""

    against: str
    overall: WinRate
    categories: Mapping[str, WinRate]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`report.json` of the recipe `evaluate`. `evaluation` is of the policy alone; intervals are of `confidence`."""

    policy: str
    scorer: str
    prompts: int
    confidence: float
    evaluation: Evaluation
    opponents: Mapping[str, Opponent]


def compare(
    pairs: Mapping[str, Sequence[Pair]],
    told: Mapping[str, str],
    prompts: Sequence[Prompt],
    category: str | None,
    confidence: float,
) -> dict[str, Opponent]:
    """Each opponent's pairs summed up. `told` says who opponents are.

    Where there are several, the length-controlled rate over one of them knows from the others which prompts the policy
    does well on. Raises ScorerError for an opponent without any pair.
    """
    found = {}
    for name, own in pairs.items():
        known = _difficulty([other for key, other in pairs.items() if key != name], prompts)
        overall = win_rate(own, confidence, asked=len(prompts), difficulty=known)
        parts = {} if category is None else by_category(own, prompts, category, confidence, known)
        found[name] = Opponent(told[name], overall, parts)
    return found


def _difficulty(others: Sequence[Sequence[Pair]], prompts: Sequence[Prompt]) -> dict[str, float] | None:
    """gamma of each prompt by the pairs with the other opponents, several of a prompt as their mean."""
    if not any(others):
        return None
    place = {prompt.id: index for index, prompt in enumerate(prompts)}
    outcomes, longer = (np.full((len(others), len(prompts)), np.nan) for _ in range(2))
    for row, pairs in enumerate(others):
        for prompt_id in dict.fromkeys(pair.prompt_id for pair in pairs):
            own = [pair for pair in pairs if pair.prompt_id == prompt_id]
            outcomes[row, place[prompt_id]] = np.mean([pair.share for pair in own])
            longer[row, place[prompt_id]] = np.mean([pair.longer for pair in own])
    told = difficulties(outcomes.tolist(), longer.tolist(), range(len(others)), len(prompts))
    return {prompt.id: float(value) for prompt, value in zip(prompts, told, strict=True)}

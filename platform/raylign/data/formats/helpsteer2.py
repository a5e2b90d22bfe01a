"""NVIDIA's HelpSteer2: rated answers, two adjacent rows to a prompt; and its pairs with a preference strength."""

import re
from collections.abc import Mapping
from typing import Any

from raylign.data.examples import STRENGTHS, Completion
from raylign.data.formats.parts import (
    BadRow,
    Cells,
    Parts,
    answer_of,
    checked_text,
    pair,
    prompt_of,
    rating,
    required,
    text,
    used,
)
from raylign.records import Message

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
COLUMNS = (("prompt", "response", "helpfulness"), ("prompt", "response_1", "response_2", "preference_strength"))
SCALES: Mapping[str, tuple[float, float]] = dict.fromkeys(ATTRIBUTES, (0.0, 4.0))
STRENGTH_RANGE = (-3.0, 3.0)
TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n?")
MARKER = "<extra_id_"


def parse(row: Cells) -> Parts:
    """One row: a rated answer, or two answers and the strength from -3 (the first is better) to 3. Raises BadRow."""
    prompt = _prompt(text(row, "prompt"))
    if "preference_strength" in row:
        return _preference(row, prompt)
    answer = answer_of("response", text(row, "response"))
    ratings = {name: rating(name, row[name], SCALES[name]) for name in ATTRIBUTES if row.get(name) is not None}
    if not ratings:
        raise BadRow("no ratings", dict(row), f"rate at least one of {', '.join(ATTRIBUTES)}")
    columns = used(row, ("prompt", "response", *ATTRIBUTES))
    return Parts(prompt, (Completion(answer, ratings=ratings),), False, columns, joins=True)


def _preference(row: Cells, prompt: tuple[Message, ...]) -> Parts:
    """The strength is the gap between the scores; at 0 neither is better."""
    first, second = (answer_of(name, text(row, name)) for name in ("response_1", "response_2"))
    strength = rating("preference_strength", required(row, "preference_strength"), STRENGTH_RANGE)
    columns = used(row, ("prompt", "response_1", "response_2", "preference_strength"))
    if strength == 0:
        return Parts(prompt, (Completion(first, 0.0), Completion(second, 0.0)), False, columns)
    chosen, rejected = (first, second) if strength < 0 else (second, first)
    return Parts(prompt, pair(chosen, rejected, (abs(strength), 0.0)), True, columns, scale=STRENGTHS)


def _prompt(value: str) -> tuple[Message, ...]:
    """The first turn is the user's; each later one begins with a marker that names its speaker."""
    first, *rest = TURN.split(value)
    turns: list[dict[str, Any]] = [{"role": "user", "content": first}]
    turns += [{"role": role.lower(), "content": said} for role, said in zip(rest[::2], rest[1::2], strict=True)]
    for turn in turns:
        checked_text("a turn of the prompt", turn["content"])
        if MARKER in turn["content"]:
            cure = "write <extra_id_1>User or <extra_id_1>Assistant before each turn"
            raise BadRow("the prompt has an unknown turn marker", value, cure)
    return prompt_of(turns)

"""Rows of prompt sets as their authors publish them, in the columns that raylign reads.

AlpacaEval (`alpaca_eval.json`: instruction, output, generator, dataset), Arena-Hard (`question.jsonl`; v2: uid,
category, subcategory, prompt; v0.1: question_id, cluster, turns) and IFEval (`input_data.jsonl`: key, prompt,
instruction_id_list, kwargs); and models' answers to the first two (`model_outputs.json`, rows as above;
`model_answer/*.jsonl`, v2: uid, messages; v0.1: question_id, choices).
"""

import json
from collections.abc import Mapping
from typing import Any

from raylign.config.scoring.blocks import IFEVAL

_ALPACA_EVAL = frozenset({"instruction", "output", "generator"})
_IFEVAL = frozenset({"instruction_id_list", "kwargs"})
_ARENA_V2, _ARENA_V1 = frozenset({"uid", "ans_id", "messages"}), frozenset({"question_id", "answer_id", "choices"})
QUESTION_IDS = ("uid", "question_id")
"""Columns by which Arena-Hard's answers name the question: v0.1 does not repeat it."""
OUTPUT = "output"
"""The column of AlpacaEval's answers, which those of Arena-Hard get too."""


def as_published(cells: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """The cells of a row, with its prompt in `column` where it is known where the prompt is; any other row as it is.

    Other columns keep their names. Keyword arguments of IFEval's instructions that are null are left out: some copies
    of the set have every key in every row.
    """
    if column not in cells and cells.keys() >= _ALPACA_EVAL:
        return {column: cells["instruction"], **_without(cells, "instruction")}
    if column not in cells and (question := _first_turn(cells.get("turns"))) is not None:
        return {column: question, **_without(cells, "turns")}
    if cells.keys() >= _ARENA_V2 and (both := _question_and_answer(cells["messages"])):
        return {**_without(cells, "messages"), column: both[0], OUTPUT: both[1]}
    if cells.keys() >= _ARENA_V1 and (answer := _first_choice(cells["choices"])) is not None:
        return {**_without(cells, "choices"), OUTPUT: answer}
    if cells.keys() >= _IFEVAL and IFEVAL not in cells:
        return {**cells, IFEVAL: _instructions(cells["instruction_id_list"], cells["kwargs"])}
    return cells


def _without(cells: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {name: cell for name, cell in cells.items() if name != column}


def _question_and_answer(messages: object) -> tuple[object, object] | None:
    """Of Arena-Hard v2: the user's message, and the assistant's, whose content is `{"answer": ...}`."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    said = [message for message in messages if message.get("role") != "system"]
    if [message.get("role") for message in said] != ["user", "assistant"]:
        return None
    content = said[1].get("content")
    return said[0].get("content"), content.get("answer") if isinstance(content, dict) else content


def _first_choice(choices: object) -> object:
    """Of Arena-Hard v0.1: one choice of one turn. More of them are no single answer."""
    if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict):
        return _first_turn(choices[0].get("turns"))
    return None


def _first_turn(turns: object) -> object:
    """What Arena-Hard v0.1 asks: one turn. More of them are no single prompt."""
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict):
        return turns[0].get("content")
    return None


def _instructions(names: object, arguments: object) -> str | None:
    """None where there is not a mapping for each name; the verifier then has nothing to check the row by."""
    if not (isinstance(names, list) and isinstance(arguments, list) and len(names) == len(arguments)):
        return None
    if not all(isinstance(given, dict) for given in arguments):
        return None
    told = [
        [name, {key: value for key, value in given.items() if value is not None}]
        for name, given in zip(names, arguments, strict=True)
    ]
    return json.dumps(told)

"""Rows of prompt sets as their authors publish them, in the columns that raylign reads.

AlpacaEval (`alpaca_eval.json`: instruction, output, generator, dataset), Arena-Hard (`question.jsonl`; v2: uid,
category, subcategory, prompt; v0.1: question_id, cluster, turns) and IFEval (`input_data.jsonl`: key, prompt,
instruction_id_list, kwargs).
"""

import json
from collections.abc import Mapping
from typing import Any

from raylign.config.scoring.blocks import IFEVAL

_ALPACA_EVAL = frozenset({"instruction", "output", "generator"})
_IFEVAL = frozenset({"instruction_id_list", "kwargs"})


def as_published(cells: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """The cells of a row, with its prompt in `column` where it is known where the prompt is; any other row as it is.

    Other columns keep their names. Keyword arguments of IFEval's instructions that are null are left out: some copies
    of the set have every key in every row.
    """
    if column not in cells and cells.keys() >= _ALPACA_EVAL:
        return {column: cells["instruction"], **{name: cell for name, cell in cells.items() if name != "instruction"}}
    if column not in cells and (question := _first_turn(cells.get("turns"))) is not None:
        return {column: question, **{name: cell for name, cell in cells.items() if name != "turns"}}
    if cells.keys() >= _IFEVAL and IFEVAL not in cells:
        return {**cells, IFEVAL: _instructions(cells["instruction_id_list"], cells["kwargs"])}
    return cells


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

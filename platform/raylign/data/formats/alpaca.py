"""LLaMA-Factory's Alpaca format: `instruction` and `input`, with `chosen` and `rejected` or `output`."""

from typing import Any

from raylign.data.examples import Completion
from raylign.data.formats.parts import (
    BadRow,
    Cells,
    Parts,
    answer_of,
    check_text_only,
    filled,
    pair,
    prompt_of,
    required,
    text,
    tools_of,
    used,
)

COLUMNS = (("instruction", "chosen", "rejected"), ("instruction", "output"))
USED = ("instruction", "input", "history", "system", "tools", "chosen", "rejected", "output")


def parse(row: Cells) -> Parts:
    """One row; `input` follows the instruction on a line of its own, `history` goes before it. Raises BadRow.

    `output` is a demonstration, or a list of answers with the best first.
    """
    check_text_only(row)
    prompt = prompt_of([*_history(row.get("history")), {"role": "user", "content": _request(row)}], row.get("system"))
    columns, tools = used(row, USED), tools_of(row.get("tools"))
    if row.get("chosen") is not None or row.get("rejected") is not None:
        chosen, rejected = (answer_of(name, text(row, name)) for name in ("chosen", "rejected"))
        return Parts(prompt, pair(chosen, rejected), True, columns, tools)
    output = required(row, "output")
    if isinstance(output, str):
        return Parts(prompt, (Completion(answer_of("output", output)),), True, columns, tools)
    if not isinstance(output, list) or len(output) < 2 or not all(isinstance(answer, str) for answer in output):
        raise BadRow("output is neither a string nor a list of answers", output, "give a string or [chosen, rejected]")
    answers = [answer_of(f"output {index}", answer) for index, answer in enumerate(output)]
    if len(answers) == 2:
        return Parts(prompt, pair(answers[0], answers[1]), True, columns, tools)
    return Parts(prompt, tuple(Completion(answer) for answer in answers), True, columns, tools)


def _request(row: Cells) -> str:
    if not filled(row.get("input")):
        return text(row, "instruction")
    # LLaMA-Factory lets either of the two be empty.
    if row.get("instruction") == "":
        return text(row, "input")
    return f"{text(row, 'instruction')}\n{text(row, 'input')}"


def _history(value: object) -> list[dict[str, Any]]:
    if not filled(value):
        return []
    if not isinstance(value, list):
        raise BadRow("history is no list", value, "give a list of [request, answer]")
    messages = []
    for turn in value:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("a turn of history is no pair", turn, "give a list of [request, answer]")
        messages.append({"role": "user", "content": turn[0]})
        messages.append({"role": "assistant", "content": turn[1]})
    return messages

"""LLaMA-Factory's ShareGPT format: `conversations` of {from, value}, and `chosen` and `rejected` messages."""

from collections.abc import Mapping
from typing import Any

from raylign.data.examples import Completion
from raylign.data.formats.parts import (
    BadRow,
    Cells,
    Parts,
    answer_of,
    check_text_only,
    pair,
    prompt_of,
    required,
    split_demonstration,
    system_of,
    tools_of,
    turns_of,
    used,
)
from raylign.prompts.conversations import conversation
from raylign.reading.json_text import parse_json
from raylign.records import Message

COLUMNS = (
    ("conversations", "chosen", "rejected"),
    ("messages", "chosen", "rejected"),
    ("conversations",),
    ("messages",),
)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
CALL = "function_call"


def parse(row: Cells) -> Parts:
    """One row; `system` and `tools` are optional, and without chosen and rejected it is a demonstration.

    A function call becomes an assistant message with `tool_calls`. Raises BadRow.
    """
    check_text_only(row)
    column = "conversations" if row.get("conversations") is not None else "messages"
    given = required(row, column)
    if not isinstance(given, list):
        raise BadRow(f"{column} is a {type(given).__name__} instead of a list", given, "give a list of messages")
    messages = [_message(f"message {index}", message) for index, message in enumerate(given)]
    tools = tools_of(row.get("tools"))
    columns = used(row, (column, "system", "tools", "chosen", "rejected"))
    if row.get("chosen") is None and row.get("rejected") is None:
        before, answer = split_demonstration(column, turns_of(column, messages))
        prompt = conversation(list(before), system_of(row.get("system")))
        return Parts(prompt, (Completion(answer),), True, columns, tools)
    prompt = prompt_of(messages, row.get("system"))
    chosen, rejected = (_answer(name, required(row, name)) for name in ("chosen", "rejected"))
    return Parts(prompt, pair(chosen, rejected), True, columns, tools)


def _answer(name: str, given: object) -> tuple[Message, ...]:
    return answer_of(name, _message(name, given) if isinstance(given, dict) else given)


def _message(name: str, given: object) -> Mapping[str, Any]:
    """{role, content} of {from, value}; a message that has role and content already keeps its other keys."""
    if not isinstance(given, dict):
        raise BadRow(f"{name} is a {type(given).__name__}", given, "a message is an object with from and value")
    keys = ("from", "value") if given.get("from") is not None else ("role", "content")
    role, content = (given.get(key) for key in keys)
    if role == CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls(name, content)}
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join((*ROLES, CALL))
        raise BadRow(f"{name} has unknown role {role!r}", given, f"roles are {known}")
    kept = {key: part for key, part in given.items() if key not in keys} if keys[0] == "role" else {}
    return {"role": ROLES[role], "content": content, **kept}


def _calls(name: str, content: object) -> list[Mapping[str, Any]]:
    """Tool calls of the JSON text of one call or a list of calls."""
    try:
        calls = parse_json(content) if isinstance(content, str) else content
    except ValueError as error:
        raise BadRow(
            f"{name}: the function call is not JSON ({error})", content, 'give {"name": ..., "arguments": ...}'
        ) from error
    functions = [calls] if isinstance(calls, dict) else calls
    if not isinstance(functions, list) or not functions:
        raise BadRow(f"{name}: no function call", content, 'give {"name": ..., "arguments": ...}')
    return [{"type": "function", "function": function} for function in functions]

"""One cell of the prompt column: is it a conversation, and which messages is it?"""

from collections.abc import Mapping
from typing import Any

from raylign.reading import plain_problem
from raylign.reading.values import unicode_problem
from raylign.records import Message

ROLES = ("system", "user", "assistant", "tool")


def conversation_problem(value: object) -> tuple[str, str]:
    """(problem, cure) of a cell that should be a string or a list of chat messages; two empty strings if it is fine."""
    if isinstance(value, str):
        return text_problem("the prompt", value)
    problem, cure = messages_problem(value)
    if problem or not isinstance(value, list):
        return problem, cure
    last = value[-1]["role"]
    if last not in ("user", "tool"):
        return f"the last message is from {last}", "end with the user message that is to be answered"
    return "", ""


def messages_problem(value: object) -> tuple[str, str]:
    """(problem, cure) of what should be chat messages, whoever speaks last; two empty strings if it is fine."""
    if not isinstance(value, list):
        return f"{type(value).__name__} instead of a string or a list of messages", "give a string or a list"
    if not value:
        return "a conversation without messages", "give at least one user message"
    for index, message in enumerate(value):
        problem, cure = _message_problem(index, message)
        if not problem:
            # Other keys reach the chat template and the scorer too.
            problem, cure = plain_problem(f"message {index}", message)
        if problem:
            return problem, cure
    return "", ""


def conversation(value: str | list[Mapping[str, Any]], system: str | None) -> tuple[Message, ...]:
    """Messages of a cell without problems; `system` goes first unless the cell has a system message of its own.

    Keys whose value is None are left out: Arrow adds them where messages have different keys.
    """
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    messages = tuple({key: part for key, part in turn.items() if part is not None} for turn in turns)
    if system is None or any(message["role"] == "system" for message in messages):
        return messages
    return ({"role": "system", "content": system}, *messages)


def text_problem(name: str, text: str) -> tuple[str, str]:
    """(problem, cure) of a text that must say something in valid Unicode; two empty strings if it does."""
    if not text.strip():
        return f"{name} is empty", "write the text or remove the row"
    return unicode_problem(name, text)


def _message_problem(index: int, message: object) -> tuple[str, str]:
    if not isinstance(message, dict):
        return f"message {index} is a {type(message).__name__}", "a message is an object with role and content"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role is None:
        return f"message {index} has no role", "a message is an object with role and content"
    if calls:
        problem, cure = _calls_problem(index, role, calls)
        if problem or not content:
            return problem, cure
    if content is None:
        return f"message {index} has no content", "a message is an object with role and content"
    if role not in ROLES:
        return f"message {index} has unknown role {role!r}", f"roles are {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"content of message {index} is a {type(content).__name__}", "content is text; give a string"
    return text_problem(f"content of message {index}", content)


def _calls_problem(index: int, role: object, calls: object) -> tuple[str, str]:
    """An assistant that calls tools need not say anything."""
    if role != "assistant":
        return f"message {index} from {role} has tool_calls", "only the assistant calls tools"
    if not isinstance(calls, list) or not all(isinstance(call, dict) and _called(call) for call in calls):
        return f"tool_calls of message {index} name no function", 'give [{"function": {"name": ..., "arguments": ...}}]'
    return plain_problem(f"tool_calls of message {index}", calls)


def _called(call: Mapping[str, Any]) -> bool:
    function = call.get("function", call)
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])

"""What messages say, as text to filter and compare."""

import json
from collections.abc import Sequence
from typing import Any

from raylign.records import Message


def text_of(messages: Sequence[Message]) -> str:
    """What was said and called in `messages`, without the system's part."""
    return "\n".join(part for message in messages if message["role"] != "system" for part in _parts(message))


def called(call: Any) -> tuple[str, str]:
    """(name, arguments as JSON text) of a tool call, with or without the wrapper `function`."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if arguments is None:
        return function["name"], "{}"
    return function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _parts(message: Message) -> list[str]:
    content = message.get("content")
    calls = [" ".join(called(call)) for call in message.get("tool_calls") or ()]
    return [content, *calls] if content else calls

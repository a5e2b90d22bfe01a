"""One cell of the prompt column: is it a conversation, which messages is it, and do they hold control tokens?

To a tokenizer, `<|im_end|>` that a user wrote ends the user's turn.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylign.config.blocks import ControlTokens as Mode
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


log = logging.getLogger(__name__)

_WARNING = (
    "%s: %d rows, the first with %s %d, have control tokens in their text, such as %s: the model reads them as if the "
    "chat template had written them. %s=break_up makes them text"
)


class ControlTokens:
    """Reads messages and remembers what control tokens their text has.

    Control tokens are the tokenizer's special ones, and those added ones that its chat template writes. `found` has the
    first one of each row that has any, by the row's number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: Mode) -> None:
        template = str(tokenizer.chat_template or "")
        added = tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special or token.content in template}
        names |= set(tokenizer.all_special_tokens)
        # A word, a space or a single letter is what anybody writes.
        steering = sorted((name for name in names if len(name) > 1 and not _is_plain(name)), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, steering))) if steering else None
        self._breaks_up = mode == "break_up"
        self.found: dict[int, str] = {}

    def prompt(self, number: int, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages of row `number`, where so configured with a space inside each control token."""
        if not self.look(number, messages) or not self._breaks_up:
            return tuple(messages)
        return tuple(_mapped(message, self._inert) for message in messages)

    def look(self, number: int, messages: Sequence[Message]) -> bool:
        """Whether the text of the messages has a control token."""
        if self._pattern is None:
            return False
        matches = (self._pattern.search(text) for message in messages for text in _texts(message))
        first = next((match[0] for match in matches if match), None)
        if first is not None:
            self.found.setdefault(number, first)
        return first is not None

    def warn(self, where: str, unit: str, option: str) -> None:
        """Say how many rows have control tokens that stay as they are."""
        if self.found and not self._breaks_up:
            number, token = next(iter(self.found.items()))
            log.warning(_WARNING, where, len(self.found), unit, number, token, option)

    def _inert(self, text: str) -> str:
        # A space may make a token of what stands around it; each pass adds one, so that this ends.
        while self._pattern is not None and self._pattern.search(text):
            text = self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text


def _is_plain(name: str) -> bool:
    return not name.strip() or name.isalnum()


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _texts(part)]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change` made to every text but names of keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value

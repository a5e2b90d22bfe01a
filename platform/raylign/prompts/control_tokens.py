"""Control tokens in the text of messages: to a tokenizer, `<|im_end|>` that a user wrote ends the user's turn."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylign.config.blocks import ControlTokens as Mode
from raylign.records import Message

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

"""JSON with one meaning: no key twice, no number beyond 64 bits, no endless nesting."""

import json
from typing import Any

from raylign.reading.values import DEEPEST, SHORTER, Refused, integer_problem

_DIGITS = 20
"""Of the largest integer of 64 bits."""
ANY_INTEGER = 100
"""Digits of the integers in files of models, whose tokenizers give 10^30 as the length that they take."""
_QUOTED = 200


class StrictDecoder:
    """Decodes one value after the other; an integer may have 64 bits, or `digits` digits where that is more."""

    def __init__(self, digits: int = _DIGITS) -> None:
        self._digits = digits
        self._flaws: list[Refused] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def decode(self, text: str, at: int = 0) -> tuple[Any, int]:
        """The value that begins at `at`, or in its place a Refused that says what is wrong with it; and its end.

        Raises JSONDecodeError where there is no JSON, RecursionError past Python's own limit.
        """
        self._flaws.clear()
        value, end = self._json.raw_decode(text, at)
        is_deep = text.count("[", at, end) + text.count("{", at, end) > DEEPEST and _depth(value) > DEEPEST
        flaws = [*self._flaws, *([_too_deep()] if is_deep else [])]
        if not flaws:
            return value, end
        return Refused(flaws[0].problem, flaws[0].cure, text[at : min(end, at + _QUOTED)]), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._flaws.append(Refused(f"the key {twice!r} is there twice", "leave one of them"))
        return found

    def _integer(self, text: str) -> int:
        if len(text) > self._digits + 1:
            self._flaws.append(Refused(f"an integer of {len(text.lstrip('-')):,} digits", SHORTER))
            return 0
        value = int(text)
        problem, cure = integer_problem(value) if self._digits == _DIGITS else ("", "")
        if problem:
            self._flaws.append(Refused(problem, cure))
        return value


def parse_json(text: str, digits: int = _DIGITS) -> Any:
    """The value that is the whole text. Raises ValueError; a Refused says what to do."""
    stripped = text.strip(" \t\r\n")
    try:
        value, end = StrictDecoder(digits).decode(stripped)
    except RecursionError as error:
        raise _too_deep() from error
    if isinstance(value, Refused):
        raise value
    if end < len(stripped):
        raise json.JSONDecodeError("Extra data", stripped, end)
    return value


def _too_deep() -> Refused:
    return Refused(f"nested more than {DEEPEST} levels deep", "give it flatter")


def _depth(value: Any) -> int:
    """Levels of lists and objects, counted no further than one past the limit."""
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            break
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth

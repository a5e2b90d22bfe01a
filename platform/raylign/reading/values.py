"""Plain values: what JSON can hold, of a depth and a size that every later stage can take."""

import math
from collections.abc import Iterator

DEEPEST = 64
"""Lists and objects inside one another; Python's own readers and writers recurse."""
SMALLEST, LARGEST = -(1 << 63), (1 << 64) - 1
"""Integers that fit 64 bits, with a sign or without: Arrow, databases and tensors hold no others."""
SHORTER = "give a smaller one, or put it in quotes as text"
_SHOWN = 200


class Refused(ValueError):
    """What no reader takes: the problem, the cure and, where it helps, the value or text at fault."""

    def __init__(self, problem: str, cure: str, value: object = None) -> None:
        super().__init__(f"{problem}; {cure}")
        self.problem, self.cure, self.value = problem, cure, value


def shown(value: object) -> str:
    """`repr` for a message: of any value, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or a value of a thousand levels.
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def plain_problem(name: str, value: object) -> tuple[str, str]:
    """(problem, cure) of a value that is not plain, named by its place; two empty strings if it is.

    Plain are null, booleans, integers of 64 bits, finite numbers, valid Unicode, and lists and objects of these.
    """
    level = [(name, value)]
    for _ in range(DEEPEST + 1):
        following: list[tuple[str, object]] = []
        for place, part in level:
            problem, cure = _leaf_problem(place, part)
            if problem:
                return problem, cure
            following += _parts(place, part)
        if not following:
            return "", ""
        level = following
    return f"{name} is nested more than {DEEPEST} levels deep", "give it flatter"


def unicode_problem(name: str, text: str) -> tuple[str, str]:
    """(problem, cure) of a text that is no valid Unicode; two empty strings if it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{name} has half a surrogate pair at character {error.start}", "save the text as valid Unicode"
    return "", ""


def integer_problem(value: int) -> tuple[str, str]:
    """(problem, cure) of an integer beyond 64 bits; two empty strings if it fits."""
    if SMALLEST <= value <= LARGEST:
        return "", ""
    return "an integer beyond 64 bits", SHORTER


def _leaf_problem(place: str, part: object) -> tuple[str, str]:
    match part:
        case None | bool() | list():
            return "", ""
        case dict():
            return _keys_problem(place, part)
        case str():
            return unicode_problem(place, part)
        case int():
            problem, cure = integer_problem(part)
            return (f"{place} is {problem}", cure) if problem else ("", "")
        case float():
            return ("", "") if math.isfinite(part) else (f"{place} is {part}", "give a finite number")
    return f"{place} is a {type(part).__name__}, which JSON does not have", "give text, a number or a boolean"


def _keys_problem(place: str, part: dict[object, object]) -> tuple[str, str]:
    for key in part:
        if not isinstance(key, str):
            return f"{place} has the key {shown(key)}, which is no text", "put the key in quotes"
        problem, cure = unicode_problem(f"a key of {place}", key)
        if problem:
            return problem, cure
    return "", ""


def _parts(place: str, part: object) -> Iterator[tuple[str, object]]:
    if isinstance(part, dict):
        yield from ((f"{place}.{key}", value) for key, value in part.items())
    elif isinstance(part, list):
        yield from ((f"{place}[{index}]", value) for index, value in enumerate(part))

"""JSON with one meaning: no key twice, no number beyond 64 bits, no endless nesting.

An array of rows, or an object of splits that are such arrays, is read value by value.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from raylign.reading.files import LONGEST_ROW
from raylign.reading.values import DEEPEST, SHORTER, Refused, integer_problem, shown

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


CHUNK = 1 << 18
"""Bytes read at a time; a longer value doubles it."""
SLACK = 16
"""Characters before the end of what is read where an error may only mean that more is to come."""
BEGINNINGS = tuple(word[:size] for word in ("true", "false", "null", "NaN", "-Infinity") for size in range(len(word)))
BLANK = re.compile(r"\s*")
NO_ROWS = "neither a list of rows nor an object of splits"
WRAP = "wrap the rows in [...]"


def array_values(file: IO[bytes], split: str) -> Iterator[Any]:
    """The values of the array, or of the array of `split`, one by one; memory holds the largest value.

    A value with a flaw, such as a key that is there twice, is a Refused that says so. Raises EOFError when the file
    ends too early, ValueError where it is no JSON, Refused when there is no such array.
    """
    text = _Text(file)
    if text.peek() == "[":
        yield from _only_array(text)
        return
    names: list[str] = []
    for name, values in _splits(text):
        names.append(name)
        if name == split:
            yield from values
    if split not in names:
        raise NoSplit(names)


def all_arrays(file: IO[bytes]) -> dict[str, list[Any]] | list[Any]:
    """All values of the array, or of each split by its name. Flaws and errors are those of `array_values`."""
    text = _Text(file)
    if text.peek() == "[":
        return list(_only_array(text))
    return {name: list(values) for name, values in _splits(text)}


def has_splits(file: IO[bytes]) -> bool:
    """Whether the file has an object where a list of rows would begin."""
    return _Text(file).peek() == "{"


class NoSplit(Refused):
    """The file has splits of other names, which are `names`."""

    def __init__(self, names: list[str]) -> None:
        super().__init__("no such split", "name one that is there")
        self.names = names


def _splits(text: "_Text") -> Iterator[tuple[str, Iterator[Any]]]:
    """Name and values of each split; values that are not taken are passed over."""
    if not text.peek():
        raise Refused("the file is empty", "give a list of rows")
    if text.peek() != "{":
        raise Refused(NO_ROWS, WRAP)
    text.take("{")
    names: set[str] = set()
    while text.peek() != "}":
        if names:
            text.take(",")
        name = text.value()
        text.take(":")
        if not isinstance(name, str) or text.peek() != "[":
            raise Refused(NO_ROWS, WRAP)
        if name in names:
            raise Refused(f"the split {shown(name)} is there twice", "leave one of them, or join them")
        names.add(name)
        values = _array(text)
        yield name, values
        for _ in values:
            pass
    text.take("}")
    _end(text)


def _only_array(text: "_Text") -> Iterator[Any]:
    yield from _array(text)
    _end(text)


def _end(text: "_Text") -> None:
    if text.peek():
        raise ValueError(f"text after the array at character {text.position}")


def _array(text: "_Text") -> Iterator[Any]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.peek() == "]":
            text.take("]")
            return
        text.take(",")


class _Text:
    """A window over the text of a file that moves on value by value."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = StrictDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self._before = 0
        self._text = ""
        self._at = 0
        self._ended = False
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    @property
    def position(self) -> int:
        """Characters before the place that is read next."""
        return self._before + self._at

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def take(self, mark: str) -> None:
        """Step over a mark that must come next."""
        found = self.peek()
        if not found:
            raise EOFError
        if found != mark:
            raise ValueError(f"{found!r} instead of {mark!r} at character {self.position}")
        self._at += 1

    def value(self) -> Any:
        """The next value, whole, or the Refused that it is."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended and self._is_torn(error):
                    raise EOFError from error
                if self._ended or not self._may_go_on(error):
                    raise ValueError(f"{error.msg} at character {self._before + error.pos}") from error
            except RecursionError as error:
                raise ValueError(f"nested too deeply at character {self.position}") from error
            else:
                if self._ended or end < len(self._text) - SLACK:
                    self._at = end
                    return value
            self._more()

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - SLACK

    def _is_torn(self, error: json.JSONDecodeError) -> bool:
        """Whether the text just stops. A string that is never closed, half a word or half an escape count as that."""
        rest = self._text[error.pos :].strip()
        in_escape = error.msg.startswith("Invalid \\") and len(rest) <= len("\\u1234")
        return error.msg.startswith("Unterminated string") or in_escape or rest in (*BEGINNINGS, ",")

    def _more(self) -> None:
        waiting = len(self._text) - self._at
        if waiting > LONGEST_ROW:
            raise Refused(
                f"the value at character {self.position:,} is longer than {LONGEST_ROW >> 20} MiB", "give shorter rows"
            )
        data = self._file.read(max(CHUNK, waiting))
        pending = len(self._utf8.getstate()[0])
        try:
            read = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                raise EOFError from error
            raise ValueError(f"not UTF-8 at byte {self._bytes - pending + error.start}; save it as UTF-8") from error
        self._bytes += len(data)
        self._before += self._at
        self._text = self._text[self._at :] + read
        self._at = 0
        self._ended = not data

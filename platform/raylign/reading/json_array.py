"""A JSON array of rows, or an object of splits that are such arrays, read value by value."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from raylign.reading.files import LONGEST_ROW
from raylign.reading.json_text import StrictDecoder
from raylign.reading.values import Refused, shown

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

"""A JSON array of rows, or an object of splits that are such arrays, read value by value."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from raylign.errors import DataError
from raylign.prompts.tables import closest

CHUNK = 1 << 18
"""Bytes read at a time; a longer value doubles it."""
SLACK = 16
"""Characters before the end of what is read where an error may only mean that more is to come."""
DECODER = json.JSONDecoder()
BEGINNINGS = tuple(word[:size] for word in ("true", "false", "null", "NaN", "-Infinity") for size in range(len(word)))


def array_values(file: BinaryIO, where: str, split: str) -> Iterator[Any]:
    """The values of the array, or of the array of `split`, one by one; memory holds the largest value.

    Raises EOFError when the file ends too early, ValueError where it is no JSON, DataError when there is no such array.
    """
    text = _Text(file)
    match text.peek():
        case "[":
            yield from _array(text)
            if text.peek():
                raise ValueError(f"text after the array at character {text.position}")
        case "{":
            yield from _split(text, where, split)
        case "":
            raise DataError(f"{where}: the file is empty; give a list of rows")
        case _:
            raise DataError(f"{where}: neither a list of rows nor an object of splits; wrap the rows in [...]")


def has_splits(file: BinaryIO) -> bool:
    """Whether the file has an object where a list of rows would begin."""
    return _Text(file).peek() == "{"


def _split(text: "_Text", where: str, split: str) -> Iterator[Any]:
    """What follows the split is not read."""
    text.take("{")
    names: list[str] = []
    while text.peek() != "}":
        if names:
            text.take(",")
        name = text.value()
        text.take(":")
        if text.peek() != "[":
            raise DataError(f"{where}: neither a list of rows nor an object of splits; wrap the rows in [...]")
        if name == split:
            yield from _array(text)
            return
        names.append(str(name))
        for _ in _array(text):
            pass
    raise DataError(f"{where}: no split {split!r}; {closest(split, names)}; correct split")


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

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
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
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
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
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
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

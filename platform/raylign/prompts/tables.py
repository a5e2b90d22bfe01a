"""Rows as a source gave them, and what is wrong with them."""

import codecs
import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raylign.errors import PromptError
from raylign.reading import Refused
from raylign.reading.json_text import StrictDecoder
from raylign.report.text import one_line

Unit = Literal["line", "row"]
_LONGEST_TEXT = 400


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `cells` by column. `number` is the line from 1 or the row from 0, as the table's `unit` says."""

    number: int
    cells: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row cannot be used, the value at fault, and what to do about it.

    Problem and cure become one line of bounded length each: what they quote of the row may be of any length.
    """

    number: int
    problem: str
    value: object
    cure: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "problem", one_line(self.problem, _LONGEST_TEXT))
        object.__setattr__(self, "cure", one_line(self.cure, _LONGEST_TEXT))


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one split. Made by `sources`, read by `load`. `faults` are rows that could not even be read."""

    where: str
    unit: Unit
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...] = ()

    def require(self, column: str) -> None:
        """Raise PromptError when there are no rows or none has `column`."""
        if not self.rows and not self.faults:
            raise PromptError(f"{self.where}: no rows; give a source with at least two prompts")
        if self.rows and column not in self.columns:
            raise PromptError(f"{self.where}: no column {column!r}; {closest(column, self.columns)} (prompts.column)")


def closest(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?`, or every known name when none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def json_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Any] | Fault]:
    """(line from 1, value) of each line of JSON, or why it is none; blank lines are passed over."""
    decoder = StrictDecoder()
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(codecs.BOM_UTF8).strip()
        if not text:
            continue
        try:
            yield flawless(number, _whole(decoder, text.decode()))
        except UnicodeDecodeError as error:
            shown = text.decode(errors="backslashreplace")
            yield Fault(number, f"not UTF-8 at byte {error.start}", shown, "save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            yield Fault(number, f"not a JSON row ({error})", text.decode(), "one JSON object per line")


def flawless(number: int, value: Any) -> tuple[int, Any] | Fault:
    """Row `number` and its value as it was read, or the fault that a strict reader found in it."""
    if isinstance(value, Refused):
        return Fault(number, value.problem, value.value, value.cure)
    return number, value


def _whole(decoder: StrictDecoder, text: str) -> Any:
    value, end = decoder.decode(text)
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def is_json_scalar(value: object) -> bool:
    """Whether JSON can hold the value as it is, without nesting."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)

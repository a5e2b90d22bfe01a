"""Rows as a source gave them, what is wrong with them, and the report that names each."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raylign.errors import PromptError

SHOWN_FAULTS = 10
SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `cells` by column. `number` is the line from 1 or the row from 0, as the table's `unit` says."""

    number: int
    cells: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row cannot be used, the value at fault, and what to do about it."""

    number: int
    problem: str
    value: object
    cure: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one split. Made by `sources`, read by `load`. `faults` are rows that could not even be read."""

    where: str
    unit: Literal["line", "row"]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...] = ()

    def head(self, count: int) -> "Table":
        """The first `count` rows; faults stay."""
        return Table(self.where, self.unit, self.columns, self.rows[:count], self.faults)

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


def refuse(table: Table, faults: Iterable[Fault]) -> None:
    """Raise one PromptError that lists the faults in order of rows, at most ten, with their cures. Nothing if none."""
    ordered = sorted(faults, key=lambda fault: fault.number)
    if not ordered:
        return
    total = len(table.rows) + len(table.faults)
    first = "1" if table.unit == "line" else "0"
    lines = [f"{table.where}: {len(ordered)} of {total} rows cannot be used ({table.unit}s counted from {first})"]
    for fault in ordered[:SHOWN_FAULTS]:
        lines.append(f"  {table.unit} {fault.number}: {fault.problem}: {_shortened(fault.value)}")
    if len(ordered) > SHOWN_FAULTS:
        lines.append(f"  and {len(ordered) - SHOWN_FAULTS} more")
    cures = dict.fromkeys(fault.cure for fault in ordered)
    raise PromptError("\n".join([*lines, f"cure: {'; '.join(cures)}"]))


def _shortened(value: object) -> str:
    """repr() also writes out terminal controls, so that a row cannot forge lines of the report."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."

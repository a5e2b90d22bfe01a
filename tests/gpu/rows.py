"""What was measured beside what is required: rows that are written as they come, and the table of them at the end."""

import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["at least", "at most"]
Verdict = Literal["PASS", "FAIL", "SKIP", "INFO"]
_TOLD = 160
"""Characters of an error that a row has."""


@dataclass(frozen=True, slots=True)
class Row:
    """One check of `group`. Made by a Sheet, read by the table and the JSON file.

    `value` is what was measured, None where nothing was or it is no finite number, and `required` its limit in words.
    """

    group: str
    what: str
    verdict: Verdict
    value: float | None = None
    unit: str = ""
    required: str = ""
    note: str = ""


class Sheet:
    """The rows of one group of checks, appended to a file: a process that dies has told what it knew."""

    def __init__(self, path: Path, group: str, seconds: float) -> None:
        """`seconds` are left for the group from now on."""
        self._path, self._group, self._deadline = path, group, time.monotonic() + seconds

    def require(self, what: str, value: float, kind: Kind, limit: float, unit: str = "", note: str = "") -> bool:
        """Whether `value` is on the right side of `limit`; NaN is on none."""
        holds = value >= limit if kind == "at least" else value <= limit
        self._write(Row(self._group, what, "PASS" if holds else "FAIL", value, unit, f"{kind} {limit:.4g}", note))
        return holds

    def inform(self, what: str, value: float | None = None, unit: str = "", note: str = "") -> None:
        self._write(Row(self._group, what, "INFO", value, unit, "", note))

    def skip(self, what: str, why: str) -> None:
        self._write(Row(self._group, what, "SKIP", note=why))

    def fail(self, what: str, why: str) -> None:
        self._write(Row(self._group, what, "FAIL", note=why))

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """A check that raises has failed, whatever it raised, and the next one is still made."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            told = " ".join(str(error).split())[:_TOLD]
            self.fail(what, f"{type(error).__name__}: {told}")

    def left(self) -> float:
        """Seconds."""
        return self._deadline - time.monotonic()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether `what`, which takes about as long, still fits; else its row says that it was left out."""
        if self.left() >= seconds:
            return True
        self.skip(what, f"{max(0.0, self.left()):.0f} s were left, it takes about {seconds:.0f} s")
        return False

    def _write(self, row: Row) -> None:
        finite = row.value is None or math.isfinite(row.value)
        told = row if finite else replace(row, value=None, note=f"{row.value}")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(told)) + "\n")
        print(_line(told), flush=True)


def read_rows(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _line(row: Row) -> str:
    value = "-" if row.value is None else f"{row.value:.4g}{' ' if row.unit else ''}{row.unit}"
    return f"{row.verdict}  {row.group}: {row.what} | {value} | {row.required or '-'} | {row.note}"


def table(rows: Sequence[Row]) -> str:
    """Of plain text: what was checked, the verdict, the value, what is required, a note."""
    cells = [["group", "check", "", "measured", "required", "note"]]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}".strip()
        cells.append([row.group, row.what, row.verdict, value, row.required or "-", row.note])
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    lines = ["  ".join([*map(str.ljust, line, widths), line[5]]).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * (sum(widths) + 10), *lines[1:]])

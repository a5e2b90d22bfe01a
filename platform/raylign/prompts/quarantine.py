"""Rows that cannot be used: how many may be left out, the report that names them, and the file that holds them all."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raylign.config.blocks import RunBlock
from raylign.errors import DiskError, PromptError, RaylignError
from raylign.prompts.tables import Fault, Unit
from raylign.run.files import publish_text

QUARANTINE_NAME = "quarantine.jsonl"
SHOWN_FAULTS = 10
SHOWN_NUMBERS = 5
SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class InvalidRows:
    """Bad rows of one split, in order, and how many rows were looked at. Made by `load`.

    `where` names the source and its split; `unit` says what the faults' numbers count: lines from 1 or rows from 0.
    `more` counts bad rows after `faults` that are not held in memory.
    """

    where: str
    unit: Unit
    faults: tuple[Fault, ...]
    total: int
    more: int = 0

    @property
    def count(self) -> int:
        """All bad rows."""
        return len(self.faults) + self.more

    @property
    def share(self) -> float:
        """Bad rows among those looked at, 0 to 1."""
        return self.count / self.total if self.total else 0.0


def refused_path(block: RunBlock) -> Path:
    """Where the bad rows go when the run is refused and so gets no directory: beside where it would stand."""
    return (block.dir / f"{block.name}.{QUARANTINE_NAME}").absolute()


def refuse(
    splits: Sequence[InvalidRows],
    limit: float,
    refused_to: Path | None,
    *,
    option: str = "prompts.max_invalid",
    error: type[RaylignError] = PromptError,
) -> None:
    """Raise one `error` when more than `limit` (0 to 1), which `option` sets, of a split's rows is bad.

    It lists the first ten bad rows of such a split, and names the file with all of them, unless `refused_to` is None.
    """
    lines = refusal(splits, limit, option)
    if not lines:
        return
    if refused_to is not None:
        try:
            write_quarantine(refused_to, splits)
            lines.append(f"every bad row is in {refused_to}")
        except DiskError as problem:
            lines.append(f"no list of all bad rows: {problem}")
    raise error("\n".join(lines))


def refusal(splits: Sequence[InvalidRows], limit: float, option: str) -> list[str]:
    """What `refuse` says of the splits with more than `limit` bad rows, without naming a file; empty without any."""
    over = [split for split in splits if split.share > limit]
    if not over:
        return []
    lines = [line for split in over for line in _report(split)]
    cures = dict.fromkeys(fault.cure for split in over for fault in split.faults)
    lines.append(f"cure: {'; '.join(cures)}")
    needed = max(math.ceil(split.share * 1000) / 1000 for split in over)
    if needed < 1:
        lines.append(f"or leave them out: {option}={needed:g} (now {limit:g})")
    return lines


def left_out(splits: Sequence[InvalidRows]) -> str:
    """`12 of 4,000 rows left out (lines 3, 17, ...)` for each split with bad rows; empty without any."""
    return "; ".join(
        f"{split.where}: {split.count:,} of {split.total:,} rows left out ({_numbers(split)})"
        for split in splits
        if split.faults
    )


def set_aside(splits: Sequence[InvalidRows], run_directory: Path) -> str:
    """Write the rows that a run goes without into its directory; the line that says so, empty without any."""
    note = left_out(splits)
    if not note:
        return ""
    path = run_directory / QUARANTINE_NAME
    write_quarantine(path, splits)
    return f"{note}: see {path}"


def write_quarantine(path: Path, splits: Sequence[InvalidRows]) -> None:
    """One JSON object for each bad row: where, unit, number, problem, cure, value. The file appears whole or not."""
    lines = [quarantine_line(split.where, split.unit, fault) for split in splits for fault in split.faults]
    publish_text(path, "".join(lines))


def quarantine_line(where: str, unit: Unit, fault: Fault) -> str:
    """The line of one bad row in the file."""
    row = {
        "where": where,
        "unit": unit,
        "number": fault.number,
        "problem": fault.problem,
        "cure": fault.cure,
        "value": _as_json(fault.value),
    }
    return f"{json.dumps(row)}\n"


def _report(split: InvalidRows) -> list[str]:
    first = "1" if split.unit == "line" else "0"
    count = split.count
    lines = [f"{split.where}: {count} of {split.total} rows cannot be used ({split.unit}s counted from {first})"]
    for fault in split.faults[:SHOWN_FAULTS]:
        lines.append(f"  {split.unit} {fault.number}: {fault.problem}: {_shortened(fault.value)}")
    if count > SHOWN_FAULTS:
        lines.append(f"  and {count - SHOWN_FAULTS} more")
    return lines


def _numbers(split: InvalidRows) -> str:
    shown = ", ".join(str(fault.number) for fault in split.faults[:SHOWN_NUMBERS])
    more = ", ..." if split.count > SHOWN_NUMBERS else ""
    return f"{split.unit}{'s' if split.count > 1 else ''} {shown}{more}"


def _as_json(value: object) -> object:
    """The value, or its repr where JSON has none (dates, bytes, NaN)."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)
    return value


def _shortened(value: object) -> str:
    """repr() also writes out terminal controls, so that a row cannot forge lines of the report."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."

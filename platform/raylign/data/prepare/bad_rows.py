"""Rows that cannot be used, written to quarantine.jsonl as they come; few of them stay in memory."""

from pathlib import Path
from typing import Self

from raylign.data.load import ExampleStream
from raylign.errors import DataError
from raylign.prompts.quarantine import InvalidRows, quarantine_line, refusal
from raylign.prompts.tables import Fault

HELD = 100
"""Bad rows of a source that are kept for the message when there are too many."""


class BadRows:
    """Takes the faults of all sources, one source after another. Use as a context, then `settle`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("w", encoding="utf-8")
        self._sources: list[InvalidRows] = []
        self._held: list[Fault] = []
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, source: ExampleStream, fault: Fault) -> None:
        self._stream.write(quarantine_line(source.where, source.unit, fault))
        self._count += 1
        if len(self._held) < HELD:
            self._held.append(fault)

    def finish_source(self, source: ExampleStream, total: int) -> None:
        """Close the account of a source of `total` rows."""
        more = self._count - len(self._held)
        self._sources.append(InvalidRows(source.where, source.unit, tuple(self._held), total, more))
        self._held, self._count = [], 0

    def settle(self, limit: float, refused_to: Path) -> None:
        """Without bad rows no file stays.

        Raises one DataError when more than `limit` (0 to 1) of a source's rows is bad; all are then in `refused_to`.
        """
        if lines := refusal(self._sources, limit, "max_invalid"):
            self._path.replace(refused_to)
            raise DataError("\n".join([*lines, f"every bad row is in {refused_to}"]))
        if not any(source.count for source in self._sources):
            self._path.unlink()

"""The append-only journal of a run: `events.jsonl`, one JSON object per line."""

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from raylign.errors import RaylignError, RecordError
from raylign.report.text import escape_control
from raylign.run.files import disk_errors, first_problem, unreadable

JOURNAL_NAME = "events.jsonl"
T = TypeVar("T")
_SHOWN, _NEWLINE = 60, b"\n"
_LATEST = 10**12
"""Times and sequences stay below, so that whatever is computed with them fits its type."""
_ENVELOPE = frozenset({"time", "sequence", "event", "non_finite"})


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the journal. Made by `Journal`, read by feeds and pages.

    `time` is in epoch seconds; `sequence` counts from 1 without gaps. Numbers that were not finite are None in
    `payload`, and `payload["non_finite"]` lists their dotted names.
    """

    time: float
    sequence: int
    name: str
    payload: Mapping[str, Any]
    path: Path
    """Of the journal."""
    offset: int
    """Of the line's first byte."""

    @property
    def round(self) -> int | None:
        """The round it is of; None where it names none."""
        index = self.payload.get("round")
        return index if type(index) is int else None

    def get(self, name: str, kind: TypeAdapter[T]) -> T:
        """`payload[name]` as `kind`. Raises RecordError when it is not there or of another type."""
        if name not in self.payload:
            raise self.wrong(f"has no {name!r}")
        try:
            return kind.validate_python(self.payload[name], strict=True)
        except ValidationError as error:
            raise self.wrong(f"has a wrong {name!r}: {first_problem(error)}") from error
        except OverflowError as error:
            raise self.wrong(f"has a number in {name!r} that is too large") from error

    def wrong(self, problem: str) -> RecordError:
        """That this line is not one that a run writes."""
        name = escape_control(self.name[:_SHOWN])
        return _damaged(self.path, self.offset, f"event {self.sequence} ({name}) of {JOURNAL_NAME} {problem}")


class Journal:
    """Appends events durably. Reopening cuts off a line torn by a crash and continues the sequence."""

    def __init__(self, path: Path) -> None:
        """Raises RecordError when a line before the last is not an event, DiskError when nothing can be written."""
        self.path = path
        self._lock = threading.Lock()
        self._end = (0, 0)
        """Sequence and end of the last event. One assignment, which a signal comes before or after."""
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        self._settle()
        with disk_errors(path):
            _sync_directory(path.parent)

    def append(self, name: str, payload: Mapping[str, Any]) -> Event:
        """Write one event; it is on disk when this returns. Raises DiskError; TypeError for values JSON cannot hold."""
        if taken := _ENVELOPE & payload.keys():
            raise ValueError(f"event {name!r}: payload key(s) {sorted(taken)} are the journal's own; rename them")
        non_finite: list[str] = []
        body = {key: _finite(value, key, non_finite) for key, value in payload.items()}
        if non_finite:
            body["non_finite"] = non_finite
        with self._lock:
            self._settle()
            sequence, offset = self._end
            event = Event(time.time(), sequence + 1, name, body, self.path, offset)
            record = {"time": event.time, "sequence": event.sequence, "event": name, **body}
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
            self._write(line, offset)
            self._end = (event.sequence, offset + len(line))
        return event

    def _settle(self) -> None:
        """Count what is behind the last known event, and cut off a torn line.

        That is all of a journal that was just opened; later what an append left that a signal cut off. Its event may
        be whole, and a feed may have read it: the next one must not have its sequence.
        """
        descriptor = self._file.fileno()
        sequence, end = self._end
        if os.fstat(descriptor).st_size <= end:
            return
        for event, after in read_from(self.path, end):
            sequence, end = event.sequence, after
        with disk_errors(self.path):
            os.ftruncate(descriptor, end)
        self._end = (sequence, end)

    def _write(self, line: bytes, size: int) -> None:
        """All of the line behind the `size` bytes that are there, or nothing: a torn one would hide what follows it."""
        with disk_errors(self.path):
            try:
                _write_all(self._file.fileno(), line)
                os.fsync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), size)
                raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def read_events(path: Path, after: int = 0) -> Iterator[Event]:
    """Events with a sequence above `after`, in order. A torn last line is left out."""
    return (event for event, _ in read_from(path) if event.sequence > after)


def read_from(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Whole events from byte `offset` on, each with the offset of the next.

    Raises RaylignError when there is no journal, RecordError when it cannot be opened or a line that others follow is
    not an event.
    """
    if not path.is_file():
        raise RaylignError(f"{path}: no journal there; give the directory of a run that has started")
    try:
        opened = path.open("rb")
    except OSError as error:
        raise unreadable(path, error.strerror or str(error), "make it readable") from error
    with opened as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                event = _parse(line, path, offset)
            except (ValueError, RecursionError) as error:
                if not file.read(1):
                    return
                raise _damaged(
                    path, offset, f"byte {offset} does not start an event ({escape_control(str(error))})"
                ) from error
            offset += len(line)
            yield event, offset


def _damaged(path: Path, offset: int, problem: str) -> RecordError:
    try:
        with path.open("rb") as file:
            before = file.read(offset)
        place = f"line {before.count(_NEWLINE) + 1}: "
    except OSError:
        place = ""
    error = RecordError(f"{path}: {place}{problem}")
    error.cure = f"restore {JOURNAL_NAME} from a copy"
    return error


def _parse(line: bytes, path: Path, offset: int) -> Event:
    raw = json.loads(line)
    if not isinstance(raw, dict) or not {"time", "sequence", "event"} <= raw.keys():
        raise ValueError("time, sequence or event is missing")
    when, sequence, name = raw.pop("time"), raw.pop("sequence"), raw.pop("event")
    if type(when) not in (int, float) or not abs(when) < _LATEST:
        raise ValueError(f"time is {str(when)[:60]}, not epoch seconds")
    if type(sequence) is not int or not 0 < sequence < _LATEST or type(name) is not str:
        raise ValueError("sequence is no number, or event no name")
    return Event(when, sequence, name, raw, path, offset)


def _finite(value: Any, name: str, non_finite: list[str]) -> Any:
    """`value` with NaN and infinities replaced by None; their names are added to `non_finite`."""
    if isinstance(value, float) and not math.isfinite(value):
        non_finite.append(name)
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{name}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{name}.{index}", non_finite) for index, item in enumerate(value)]
    return value


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

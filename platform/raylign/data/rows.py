"""Rows of a source of judged text: files, folders, saved data sets and the hub, each read as a stream of Examples."""

import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pyarrow as pa

from raylign.config.data import Format, SourceBlock
from raylign.data.examples import Example
from raylign.data.formats import examples, resolve_format
from raylign.errors import DataError
from raylign.prompts.sources import hub_split, hub_splits, local_part
from raylign.prompts.tables import Fault, Row, Unit, closest, flawless, json_lines
from raylign.reading import Refused
from raylign.reading.arrow import open_parquet, parquet_rows, require_plain_columns
from raylign.reading.files import open_plain, plain_lines, require_plain_files
from raylign.reading.json_text import NoSplit, array_values, has_splits

JSON_LINES = (".jsonl", ".jsonl.gz")
JSON_ARRAY = (".json", ".json.gz")
PARQUET = (".parquet",)
T = TypeVar("T")
SUFFIXES = (*JSON_LINES, *JSON_ARRAY, *PARQUET)
SAVED = ("state.json", "dataset_dict.json")
"""Files of a folder that datasets' save_to_disk made."""
SPLIT_FILE = re.compile(r"(train|test|validation|valid|val|dev|eval|held_out)\b[^/]*")
BATCH = 256
HUB_CURE = (
    "take a data set in Parquet or JSON (code that ships with data is never run), correct the name or the subset, log "
    "in with `hf auth login` if it is gated, or check the network and HF_HUB_OFFLINE"
)


@dataclass(frozen=True, slots=True)
class RowStream:
    """Rows of a source in their order, read anew by each loop over it, and in bounded memory.

    `unit`: rows are numbered by their line from 1, or from 0 on. `total` is how many there are, None where only
    reading them all would tell. Loops raise DataError where the source cannot be read on.
    """

    where: str
    unit: Unit
    total: int | None
    start: Callable[[], Iterator[Row | Fault]]
    cure: str = "fetch or write it again"

    def __iter__(self) -> Iterator[Row | Fault]:
        count = 0
        try:
            for row in self.start():
                yield row
                count += 1
        except EOFError as error:
            raise DataError(
                f"{self.where}: it ends inside row {count}; whole rows before it: {count}; {self.cure}"
            ) from error
        except Refused as error:
            raise DataError(f"{self.where}: {error}") from error
        except unreadable() as error:
            raise DataError(
                f"{self.where}: row {count} cannot be read ({error}); whole rows before it: {count}; {self.cure}"
            ) from error


def unreadable() -> tuple[type[Exception], ...]:
    """Errors of sources that cannot be read; those of `datasets` once that is loaded, before which it raises none."""
    datasets_errors = sys.modules.get("datasets.exceptions")
    own = () if datasets_errors is None else (datasets_errors.DatasetsError,)
    return (EOFError, OSError, ValueError, RuntimeError, zlib.error, pa.ArrowException, httpx.HTTPError, *own)


def open_rows(block: SourceBlock) -> RowStream:
    """The rows of `block.source`. Raises DataError when it is missing, in no known format or without `block.split`."""
    name = block.source
    path = Path(name).expanduser()
    if not (path.name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or os.path.exists(path)):
        return _hub_rows(name, block)
    if problem := local_part(block):
        raise DataError(f"{name}: {problem}")
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file or folder (from {Path.cwd()}); correct source")
    if path.is_dir():
        return _folder_rows(path, block.split)
    return _file_rows(path, block.split)


def _file_rows(path: Path, split: str) -> RowStream:
    where, name = str(path), path.name
    if name.endswith(JSON_LINES):
        return RowStream(where, "line", None, lambda: _json_lines(path))
    if name.endswith(JSON_ARRAY):
        if _readable(where, lambda: _has_splits(path)):
            where = f"{where} split {split}"
        return RowStream(where, "row", None, lambda: _json_array(path, where, split))
    if name.endswith(PARQUET):
        return RowStream(where, "row", _readable(where, lambda: _count(path)), lambda: _parquet(path))
    raise DataError(f"{path}: not a {', '.join(SUFFIXES)} file; convert it to one of these")


def _readable(where: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except Refused as error:
        raise DataError(f"{where}: {error}") from error
    except unreadable() as error:
        raise DataError(f"{where}: cannot be read ({error}); check that it is whole") from error


def _json_lines(path: Path) -> Iterator[Row | Fault]:
    with open_plain(path) as file:
        for parsed in json_lines(plain_lines(file)):
            yield parsed if isinstance(parsed, Fault) else _row(*parsed)


def _has_splits(path: Path) -> bool:
    with open_plain(path) as file:
        return has_splits(file)


def _json_array(path: Path, where: str, split: str) -> Iterator[Row | Fault]:
    try:
        with open_plain(path) as file:
            for parsed in (flawless(*numbered) for numbered in enumerate(array_values(file, split))):
                yield parsed if isinstance(parsed, Fault) else _row(*parsed)
    except NoSplit as error:
        raise DataError(f"{where}: no split {split!r}; {closest(split, error.names)}; correct split") from error


def _row(number: int, value: object) -> Row | Fault:
    if isinstance(value, dict):
        return Row(number, value)
    return Fault(number, f"{type(value).__name__} instead of an object", value, "give one JSON object per row")


def _count(path: Path) -> int:
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def _parquet(path: Path) -> Iterator[Row]:
    for number, cells in enumerate(parquet_rows(path)):
        yield Row(number, _without_nulls(cells))


def _arrow_rows(batches: Iterable[pa.Table]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        if not number:
            require_plain_columns(batch.schema)
        for cells in batch.to_pylist():
            yield Row(number, _without_nulls(cells))
            number += 1


def _without_nulls(value: Any) -> Any:
    """Arrow fills objects with the keys of other rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _folder_rows(path: Path, split: str) -> RowStream:
    if any((path / name).exists() for name in SAVED):
        return _saved_rows(path, split)
    files = _split_files(path, split)
    streams = [_file_rows(file, split) for file in files]
    totals = [stream.total for stream in streams]
    total = None if None in totals else sum(total or 0 for total in totals)
    return RowStream(f"{path} ({len(files)} files)", "row", total, lambda: _joined(streams))


def _joined(streams: Iterable[RowStream]) -> Iterator[Row | Fault]:
    """Rows of all files, numbered through."""
    number = 0
    for stream in streams:
        for row in stream:
            if isinstance(row, Fault):
                yield replace(row, number=number, problem=f"{stream.where} {stream.unit} {row.number}: {row.problem}")
            else:
                yield replace(row, number=number)
            number += 1


def _split_files(path: Path, split: str) -> list[Path]:
    """Files of the folder by name: those named after the split if any file is named after one, else all."""
    files = sorted(file for file in path.iterdir() if file.name.endswith((*JSON_LINES, *PARQUET)))
    if not files:
        raise DataError(
            f"{path}: neither a folder made by datasets' save_to_disk nor one with {', '.join(JSON_LINES + PARQUET)} "
            "files; give one of these or a file"
        )
    if len({file.name.endswith(PARQUET) for file in files}) > 1:
        raise DataError(f"{path}: holds both Parquet and JSON files; leave one kind in it, or give a file")
    named = [file for file in files if re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name)]
    if named:
        return named
    splits = sorted({match[1] for file in files if (match := SPLIT_FILE.match(file.name))})
    if splits:
        raise DataError(f"{path}: no file of split {split!r}; {closest(split, splits)}; correct split")
    return files


def _saved_rows(path: Path, split: str) -> RowStream:
    saved = _readable(str(path), lambda: _saved(path))
    where = str(path)
    if isinstance(saved, Mapping):
        if split not in saved:
            raise DataError(f"{path}: no split {split!r}; {closest(split, list(saved))}; correct split")
        saved, where = saved[split], f"{path} split {split}"
    table = saved.with_format("arrow")
    return RowStream(where, "row", len(saved), lambda: _arrow_rows(table.iter(batch_size=BATCH)))


def _saved(path: Path) -> Any:
    import datasets  # noqa: PLC0415 - takes a second, and files do without

    require_plain_files(path)
    return datasets.load_from_disk(str(path))


def _hub_rows(name: str, block: SourceBlock) -> RowStream:
    """Streamed from the hub: nothing is stored here, and a slice such as train[:100] is not known to streams."""
    split = block.split
    if "[" in split:
        raise DataError(f"{name}: split {split!r} is a slice; name the whole split and use limit")
    try:
        splits = hub_splits(name, block)
        if split not in splits:
            raise DataError(f"{name}: no split {split!r}; {closest(split, splits)}; correct split")
        stream = hub_split(name, block, split, streaming=True)
    except unreadable() as error:
        raise DataError(
            f"{name}: neither a file or folder here nor a hub data set that can be read ({error}): {HUB_CURE}"
        ) from error
    known = stream.info.splits
    total = known[split].num_examples or None if known is not None and split in known else None
    table = stream.with_format("arrow")
    return RowStream(f"{name} split {split}", "row", total, lambda: _arrow_rows(table.iter(batch_size=BATCH)), HUB_CURE)


LOOKED_AT = 64
"""Rows from the start that tell the format."""
GIVEN_UP_AFTER = 1000
"""Rows from the start among which one must be readable."""


@dataclass(frozen=True, slots=True)
class ExampleStream:
    """What a source holds, in its order: an Example or a Fault. Made by `read_examples`.

    Each loop reads the source anew, row by row, in memory that does not grow with it; it raises DataError where the
    source cannot be read on. `where` names the source and its split. `unit` says what numbers count: lines from 1 or
    rows from 0, in a folder over all its files in the order of their names. `total` is the number of rows (Examples
    and Faults may be fewer where rows are joined), None where only reading them all would tell.
    """

    where: str
    unit: Unit
    format: Format
    total: int | None
    rows: RowStream
    language: str | None

    def __iter__(self) -> Iterator[Example | Fault]:
        return examples(self.rows, self.format, self.language)


def read_examples(block: SourceBlock) -> ExampleStream:
    """Open a source and find out its format from its first rows.

    Raises DataError when the source is missing, empty, unreadable or without `block.split`, or when its rows do not
    have the columns of `block.format` or, for `auto`, of exactly one format.
    """
    rows = open_rows(block)
    kind = resolve_format(block.format, rows.where, [row.cells for row in _first_rows(rows)], block.language)
    return ExampleStream(rows.where, rows.unit, kind, rows.total, rows, block.language)


def _first_rows(stream: RowStream) -> list[Row]:
    good: list[Row] = []
    bad: list[Fault] = []
    for row in stream:
        if isinstance(row, Row):
            good.append(row)
        else:
            bad.append(row)
        if len(good) == LOOKED_AT or len(good) + len(bad) == GIVEN_UP_AFTER:
            break
    if not good and not bad:
        raise DataError(f"{stream.where}: no rows; give a source that has some")
    if not good:
        first = bad[0]
        raise DataError(
            f"{stream.where}: none of {len(bad)} rows can be read; {stream.unit} {first.number}: {first.problem}; "
            f"{first.cure}"
        )
    return good

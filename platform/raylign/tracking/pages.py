"""Tables of a run as HTML for people. Everything in a page is escaped: it holds untrusted model output."""

import html
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.run.reading import unreadable

TABLE_SUFFIXES = frozenset({".parquet", ".jsonl"})
_MAX_ROWS = 200
_MAX_CELL = 4000
_LONG_NUMBERS = 8
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:1em}table{border-collapse:collapse}"
    "th,td{border:1px solid #bbb;padding:.4em;text-align:left;vertical-align:top}"
    "td{white-space:pre-wrap;overflow-wrap:anywhere;min-width:4em;max-width:40em}"
)


def table_page(path: Path) -> str:
    """The first rows of a .parquet or .jsonl table as one page without scripts; long lists of numbers are left out.

    Raises RecordError when the file is no such table.
    """
    try:
        rows, total = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise unreadable(path, str(error).partition("\n")[0], "restore it from a copy") from error
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(_cell(row.get(column)) for column in columns)}</tr>" for row in rows)
    title = html.escape(path.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1><p>{len(rows)} of {total} rows</p>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></body></html>\n"
    )


def row_count(path: Path) -> int:
    """Rows of a .parquet or .jsonl table."""
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _read_parquet(path: Path) -> tuple[list[dict[str, Any]], int]:
    with pq.ParquetFile(path) as file:
        rows = [row for batch in islice(file.iter_batches(_MAX_ROWS), 1) for row in batch.to_pylist()]
        return [_readable(row) for row in rows], int(file.metadata.num_rows)


def _read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, _MAX_ROWS)]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no row")
    return [_readable(row) for row in rows], row_count(path)


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _prune(value) for key, value in row.items() if not _is_long_numbers(value)}


def _prune(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _readable(value)
    if isinstance(value, list):
        return [_prune(item) for item in value if not _is_long_numbers(item)]
    return value


def _is_long_numbers(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > _LONG_NUMBERS
        and all(isinstance(item, int | float) for item in value)
    )


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1, default=str)
    shown = text if len(text) <= _MAX_CELL else f"{text[:_MAX_CELL]} [{len(text) - _MAX_CELL} more characters]"
    return f"<td>{html.escape(shown)}</td>"

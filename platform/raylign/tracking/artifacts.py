"""Files of a run directory as MLflow artifacts, data sets and pages.

Everything in a page is escaped: it holds untrusted model output.
"""

import html
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from raylign.errors import RecordError
from raylign.reading.files import read_text
from raylign.reading.yaml_text import parse_yaml
from raylign.report.text import one_line
from raylign.run.files import inside, unreadable
from raylign.tracking.facts import redacted
from raylign.tracking.mlflow_store import MlflowStore

TABLE_SUFFIXES = frozenset({".parquet", ".jsonl"})
_MAX_ROWS = 200
_MAX_CELL = 4000
_LONG_NUMBERS = 8
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:1em}table{border-collapse:collapse}"
    "th,td{border:1px solid #bbb;padding:.4em;text-align:left;vertical-align:top}"
    "td{white-space:pre-wrap;overflow-wrap:anywhere;min-width:4em;max-width:40em}"
)

UPLOAD_LIMIT_MIB = 256
_MAX_DIGEST = 36
_SHOWN = 200
_CURE = "restore it from a copy"
logger = logging.getLogger(__name__)


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


def dataset_input(
    name: str, digest: str, source_type: str, source: Mapping[str, Any], profile: Mapping[str, int]
) -> DatasetInput:
    """A data set as MLflow shows it: for training, unless all of its rows are held out.

    The digest is cut to MLflow's 36 characters, whole in a tag.
    """
    context = "evaluation" if profile.get("train") == 0 else "training"
    dataset = Dataset(
        name, digest[:_MAX_DIGEST], source_type, json.dumps(dict(source)), None, json.dumps(dict(profile))
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context), InputTag("raylign.digest", digest)])


def upload(store: MlflowStore, run_id: str, run_dir: Path, name: str, kind: str) -> bool:
    """Send the file `name` of the run, and a page of it if it is a table. False when the file is gone or damaged."""
    path, relative = inside(run_dir, name), PurePosixPath(name)
    if not path.is_file():
        logger.warning("%s is gone; MLflow goes without it", path)
        return False
    try:
        if kind == "config":
            store.log_text(run_id, _config_text(path), name)
            return True
        if path.suffix in TABLE_SUFFIXES:
            # A lone surrogate in model output has no UTF-8 form.
            page = table_page(path).encode("utf-8", "replace").decode()
            store.log_text(run_id, page, str(relative.with_suffix(".html")))
    except RecordError as error:
        logger.warning("%s; MLflow goes without it", error)
        return False
    if path.stat().st_size > UPLOAD_LIMIT_MIB << 20:
        logger.info("%s is above %d MiB; MLflow gets its page only", path, UPLOAD_LIMIT_MIB)
        return True
    folder = str(relative.parent)
    store.log_file(run_id, path, None if folder == "." else folder)
    return True


def preferences_input(run_dir: Path, name: str, index: int, sha256: str) -> DatasetInput:
    """The preferences of round `index` as its training data."""
    path = inside(run_dir, name)
    profile = {"num_rows": row_count(path)} if path.suffix in TABLE_SUFFIXES else {}
    return dataset_input(f"preferences-round-{index}", sha256, "local", {"uri": str(path)}, profile)


def _config_text(path: Path) -> str:
    """A recipe without secrets. Raises RecordError."""
    try:
        tree = parse_yaml(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise unreadable(path, one_line(str(error), _SHOWN), _CURE) from error
    if not isinstance(tree, dict):
        raise unreadable(path, "it is no mapping", _CURE)
    return yaml.safe_dump(redacted(tree), sort_keys=False)

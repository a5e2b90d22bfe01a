"""Small Parquet files that become very much: refused before memory is taken; other tables keep their values."""

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config.data import SourceBlock
from raylign.data.rows import read_examples
from raylign.errors import DataError
from raylign.reading.arrow import parquet_rows
from tests.faults import record

ROWS, LONG = 4000, "z" * (1 << 20)


def in_every_row() -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * ROWS), [LONG])


def bomb(kind: str) -> pa.Table:
    match kind:
        case "one text in every row":
            return pa.table({"prompt": in_every_row()})
        case "one text in every message":
            return pa.table({"prompt": pa.ListArray.from_arrays(pa.array(range(ROWS + 1), pa.int32()), in_every_row())})
        case "one text in every key":
            items = pa.array([None] * ROWS, pa.string())
            return pa.table(
                {"prompt": pa.MapArray.from_arrays(pa.array(range(ROWS + 1), pa.int32()), in_every_row(), items)}
            )
        case "a row of many numbers":
            return pa.table(
                {"prompt": pa.ListArray.from_arrays([0, 20_000_000], pa.array(range(1)).take([0] * 20_000_000))}
            )
        case "many empty rows":
            return pa.table({"prompt": pa.nulls(2_000_000, pa.string())})
        case _:
            return pa.table({"prompt": ["z" * (160 << 20)]})


@pytest.mark.fault
@pytest.mark.parametrize(
    "kind",
    [
        "one text in every row",
        "one text in every message",
        "one text in every key",
        "a row of many numbers",
        "many empty rows",
        "one long text, packed",
    ],
)
def test_a_table_that_becomes_very_much_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(bomb(kind), path, compression="zstd")
    assert path.stat().st_size < 256 << 10
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"d\.parquet: .*(become more than .*; look at|longer than 16 MiB)"):
        list(read_examples(SourceBlock(source=str(path))))
    assert pa.total_allocated_bytes() - before < 64 << 20
    record("a Parquet bomb, more than 128 MiB in less than 256 KiB", kind, lost="nothing: refused")


TABLES: dict[str, Any] = {
    "maps": pa.array([[("a", "b")], []], pa.map_(pa.string(), pa.string())),
    "large": pa.array([["a"], None], pa.large_list(pa.large_string())),
    "fixed": pa.array([["a", "b"]], pa.list_(pa.string(), 2)),
    "binary": pa.array([b"ab", None], pa.binary(2)),
    "views": pa.array(["ab", None], pa.string_view()),
    "dictionary": pa.array(["ab", None, "ab"]).dictionary_encode(),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}", None])),
    "decimal": pa.array([decimal.Decimal("1.2")]),
    "time": pa.array([datetime.datetime(2020, 1, 1)]),
    "nested": pa.array([[{"a": {"b": ["x", None]}}], None, []]),
    "empty": pa.array([], pa.string()),
    "nulls": pa.nulls(3),
}


@pytest.mark.parametrize("column", TABLES.values(), ids=TABLES)
def test_values_of_every_type_are_those_of_the_table(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
    assert list(parquet_rows(tmp_path / "a.parquet")) == [{"a": value} for value in column.to_pylist()]


def test_rows_that_repeat_a_little_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{number % 7}" * 900}]} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(parquet_rows(tmp_path / "a.parquet")) == rows

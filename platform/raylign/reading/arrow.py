"""Arrow tables and Parquet files whose rows have one meaning and a size that fits."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylign.reading.files import LONGEST_ROW, open_plain
from raylign.reading.values import DEEPEST, Refused, shown

_BATCH = 256
_RATIO, _FREE = 200, 128 << 20
"""The rows may have this many times the bytes of the file, and this many bytes in any case."""
_VIEWS = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
"""What arrow cannot unpack texts to, and the type with the same values."""
_PER_ROW, _PER_VALUE = 256, 8
"""Bytes that a row and a value take in memory, whatever is in them."""


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file. Raises as `open_parquet`, and Refused where little becomes very much.

    A text that a file has once may stand in every row. So texts are unpacked once it is known how long they are.
    """
    with open_parquet(path) as plain:
        columns, metadata = plain.schema, plain.metadata
        schema = pa.schema([field.with_type(_VIEWS.get(field.type, field.type)) for field in plain.schema_arrow])
    _require_few_values(path, metadata)
    total = 0
    leaves = [columns.column(index).path for index in range(len(columns))]
    with pq.ParquetFile(path, pre_buffer=False, read_dictionary=leaves) as file:
        for batch in file.iter_batches(batch_size=_BATCH):
            total += _PER_ROW * batch.num_rows + sum(map(_unpacked, batch.columns))
            _require_few_bytes(path, total)
            yield from batch.cast(schema).to_pylist()


def _require_few_values(path: Path, facts: pq.FileMetaData) -> None:
    groups = [facts.row_group(index) for index in range(facts.num_row_groups)]
    values = [group.column(index).num_values for group in groups for index in range(group.num_columns)]
    _require_few_bytes(path, _PER_VALUE * sum(values) + _PER_ROW * facts.num_rows)
    _require_few_bytes(path, sum(group.total_byte_size for group in groups))


def _require_few_bytes(path: Path, unpacked: int) -> None:
    if unpacked > _FREE + _RATIO * (size := path.stat().st_size):
        raise Refused(
            f"its {size:,} bytes become more than {unpacked:,} in memory",
            "look at what is in it, and give rows with fewer repetitions",
        )


def _unpacked(array: pa.Array) -> int:
    """Bytes of the values, with texts written out wherever they stand."""
    match array:
        case pa.DictionaryArray():
            if not pa.types.is_string(array.type.value_type) and not pa.types.is_binary(array.type.value_type):
                return int(array.nbytes)
            lengths = pc.binary_length(array.dictionary).cast(pa.int64())
            return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
        case pa.MapArray():
            return _unpacked(array.keys) + _unpacked(array.items)
        case pa.ListArray() | pa.LargeListArray() | pa.FixedSizeListArray():
            return _unpacked(array.flatten())
        case pa.StructArray():
            return sum(map(_unpacked, array.flatten()))
        case _:
            return int(array.nbytes)


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file of others, for its facts; `parquet_rows` reads its rows.

    Raises OSError, pyarrow's errors where it is no Parquet, and Refused for columns that have no one meaning and for
    rows that would become very large.
    """
    open_plain(path).close()
    # Buffered ahead, every row group would stay in memory until the end.
    file = pq.ParquetFile(path, pre_buffer=False)
    try:
        require_plain_columns(file.schema_arrow)
        _require_small_rows(file.metadata)
    except BaseException:
        file.close()
        raise
    return file


def require_plain_columns(schema: pa.Schema) -> None:
    """Raises Refused when two columns, or two fields of one, have the same name, or when one is nested too deep."""
    _require_own_names("column", schema.names)
    for field in schema:
        for depth, kind in _nested(field.type, 1):
            if depth > DEEPEST:
                raise Refused(
                    f"column {shown(field.name)} is nested more than {DEEPEST} levels deep", "give it flatter"
                )
            if isinstance(kind, pa.StructType):
                names = [kind.field(index).name for index in range(kind.num_fields)]
                _require_own_names(f"field of column {shown(field.name)}", names)


def _require_own_names(what: str, names: list[str]) -> None:
    name, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        raise Refused(f"the {what} {shown(name)} is there {count} times", "leave one of them")


def _nested(kind: pa.DataType, depth: int) -> Iterator[tuple[int, pa.DataType]]:
    """The type and those inside it, with their level; no further than one level past the limit."""
    yield depth, kind
    if depth <= DEEPEST:
        for index in range(kind.num_fields):
            yield from _nested(kind.field(index).type, depth + 1)


def _require_small_rows(facts: pq.FileMetaData) -> None:
    """A packed row may become absurdly large; a file tells the size of its groups unpacked."""
    for index in range(facts.num_row_groups):
        group = facts.row_group(index)
        if group.total_byte_size > LONGEST_ROW * max(1, group.num_rows):
            raise Refused(
                f"rows of group {index} are longer than {LONGEST_ROW >> 20} MiB on average", "give shorter rows"
            )

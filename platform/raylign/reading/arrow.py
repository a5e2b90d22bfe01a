"""Arrow tables and Parquet files whose rows have one meaning and a size that fits."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.reading.files import LONGEST_ROW, open_plain
from raylign.reading.values import DEEPEST, Refused, shown


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file, which its rows are read from as they are asked for.

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

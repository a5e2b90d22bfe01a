"""From `source` of a recipe to Examples, as a stream."""

from collections.abc import Iterator
from dataclasses import dataclass

from raylign.config.data import Format, SourceBlock
from raylign.data.examples import Example
from raylign.data.formats import examples, resolve_format
from raylign.data.rows import RowStream, open_rows
from raylign.errors import DataError
from raylign.prompts.tables import Fault, Row, Unit

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

"""What messages say, as text to filter and compare."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raylign.records import Message


def text_of(messages: Sequence[Message]) -> str:
    """What was said and called in `messages`, without the system's part."""
    return "\n".join(part for message in messages if message["role"] != "system" for part in _parts(message))


def called(call: Any) -> tuple[str, str]:
    """(name, arguments as JSON text) of a tool call, with or without the wrapper `function`."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if arguments is None:
        return function["name"], "{}"
    return function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _parts(message: Message) -> list[str]:
    content = message.get("content")
    calls = [" ".join(called(call)) for call in message.get("tool_calls") or ()]
    return [content, *calls] if content else calls


ROW_GROUP = 4096
EXTRAS = ("name", "tool_call_id", "reasoning_content")
"""Keys of a message that hold text, beside role and content."""
KEYS = frozenset({"role", "content", "tool_calls", *EXTRAS})
CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
MESSAGE = pa.struct([*((name, pa.string()) for name in ("role", "content", *EXTRAS)), ("tool_calls", pa.list_(CALL))])
MESSAGES = ("prompt", "chosen", "rejected")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.list_(MESSAGE)) for name in MESSAGES),
        ("score_chosen", pa.float64()),
        ("score_rejected", pa.float64()),
        ("score_scale", pa.string()),
        ("language", pa.string()),
        ("source", pa.string()),
        ("tools", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class PairRow:
    """One row of the file."""

    id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    score_chosen: float | None
    score_rejected: float | None
    score_scale: str
    language: str
    source: str
    tools: tuple[Any, ...]


def unknown_key(messages: Sequence[Message]) -> str | None:
    """A key of a message that the file has no place for, None where it has one for all."""
    for message in messages:
        for key, value in message.items():
            if key not in KEYS or (key in EXTRAS and not isinstance(value, str)):
                return key
    return None


def used_keys(messages: Sequence[Message]) -> frozenset[str]:
    """The keys that some message has."""
    return frozenset().union(*messages)


def record_batch(rows: Sequence[PairRow]) -> pa.RecordBatch:
    """The rows with every key that a message may have."""
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        *(_messages([getattr(row, name) for row in rows]) for name in MESSAGES),
        pa.array([row.score_chosen for row in rows], pa.float64()),
        pa.array([row.score_rejected for row in rows], pa.float64()),
        pa.array([row.score_scale for row in rows], pa.string()),
        pa.array([row.language for row in rows], pa.string()),
        pa.array([row.source for row in rows], pa.string()),
        pa.array([json.dumps(row.tools, ensure_ascii=False) if row.tools else None for row in rows], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def copy_rows(source: Path, target: Path, kept: NDArray[np.bool_], keys: frozenset[str]) -> Iterator[int]:
    """Copy the rows `kept` from one file to another, messages with `keys` alone; yields rows read, as it goes.

    The file depends on its rows alone: they are grouped by ROW_GROUP however the source was written.
    """
    schema = _narrow_schema(keys)
    # Buffered ahead, every row group would stay in memory until the end.
    with (
        pq.ParquetFile(source, pre_buffer=False) as file,
        pq.ParquetWriter(target, schema, compression="zstd") as writer,
    ):
        waiting: list[pa.RecordBatch] = []
        start = 0
        for batch in file.iter_batches(batch_size=ROW_GROUP, use_threads=False):
            mask = pa.array(kept[start : start + len(batch)])
            waiting = _written(writer, [*waiting, _narrow(batch.filter(mask), schema)], ROW_GROUP)
            start += len(batch)
            yield len(batch)
        _written(writer, waiting, 1)


def _written(writer: pq.ParquetWriter, waiting: list[pa.RecordBatch], at_least: int) -> list[pa.RecordBatch]:
    """Write whole row groups of what waits, while there are `at_least` as many rows; what is left goes on waiting."""
    table = pa.Table.from_batches(waiting, schema=writer.schema)
    start = 0
    while len(table) - start >= at_least:
        writer.write_table(table.slice(start, ROW_GROUP), row_group_size=ROW_GROUP)
        start += ROW_GROUP
    rest: list[pa.RecordBatch] = table.slice(start).combine_chunks().to_batches()
    return rest


def _messages(conversations: Sequence[Sequence[Message]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, conversations)], dtype=np.int32)
    flat = [message for messages in conversations for message in messages]
    texts = [pa.array([message.get(name) for message in flat], pa.string()) for name in ("role", "content", *EXTRAS)]
    calls = pa.array([_calls(message.get("tool_calls")) for message in flat], pa.list_(CALL))
    parts = pa.StructArray.from_arrays([*texts, calls], fields=list(MESSAGE))
    return pa.ListArray.from_arrays(pa.array(offsets), parts)


def _calls(calls: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    if not calls:
        return None
    made = []
    for call in calls:
        name, arguments = called(call)
        number = call.get("id")
        function = {"name": name, "arguments": arguments}
        made.append({"id": None if number is None else str(number), "type": "function", "function": function})
    return made


def _narrow_schema(keys: frozenset[str]) -> pa.Schema:
    fields = [field for field in MESSAGE if field.name in keys]
    return pa.schema([pa.field(f.name, pa.list_(pa.struct(fields))) if f.name in MESSAGES else f for f in SCHEMA])


def _narrow(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = dict(zip(schema.names, batch.columns, strict=True))
    for name in MESSAGES:
        columns[name] = _narrow_messages(columns[name], schema.field(name).type)
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


def _narrow_messages(messages: pa.ListArray, kind: pa.ListType) -> pa.ListArray:
    # flatten() and lengths, not offsets and values: a slice shares its whole parent's values.
    lengths = messages.value_lengths().to_numpy(zero_copy_only=False)
    flat = messages.flatten()
    offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
    fields = list(kind.value_type)
    return pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays([flat.field(field.name) for field in fields], fields=fields)
    )

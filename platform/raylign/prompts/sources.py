"""Data sets of the hub, by subset, folder and split."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from raylign.config.blocks import PartBlock, PromptsBlock
from raylign.errors import PromptError
from raylign.prompts.published import as_published
from raylign.prompts.tables import Fault, Row, Table, Unit, closest, flawless, json_lines
from raylign.reading import Refused
from raylign.reading.arrow import open_parquet, parquet_rows, require_plain_columns
from raylign.reading.files import open_plain, plain_lines, require_plain_files
from raylign.reading.json_text import all_arrays

if TYPE_CHECKING:
    from datasets import Dataset


def hub_splits(name: str, block: PartBlock) -> list[str]:
    """Splits of the hub data set `name`. Raises what `datasets` raises."""
    import datasets  # noqa: PLC0415 - takes a second, and files do without

    return list(datasets.get_dataset_split_names(name, block.subset, data_dir=block.data_dir))


def hub_split(name: str, block: PartBlock, split: str, *, streaming: bool = False) -> Any:
    """One split: a `datasets.Dataset`, an `IterableDataset` for `streaming`. Raises what `datasets` raises."""
    import datasets  # noqa: PLC0415 - takes a second, and files do without

    return datasets.load_dataset(name, block.subset, data_dir=block.data_dir, split=split, streaming=streaming)


def local_part(block: PartBlock) -> str:
    """What the config asks of a file or folder that only hub data sets have, with the cure; else empty."""
    asked = [f"{key}={value}" for key, value in (("subset", block.subset), ("data_dir", block.data_dir)) if value]
    return (
        f"{' and '.join(asked)}: for hub data sets, but the source is a file or folder here; remove it" if asked else ""
    )


PREFIX = "embedded:"
EMBEDDED = {"review-topics": "review_topics.json"}
HELD_OUT_SPLITS = ("held_out", "test", "validation")
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class PromptSource:
    """What was read: rows to train on, and the source's own held-out split if it has one."""

    train: Table
    held_out: Table | None


def read_source(block: PromptsBlock) -> PromptSource:
    """Read `block.source`. Raises PromptError when it is missing or in no known format."""
    name = block.source
    path = Path(name).expanduser()
    is_embedded = name.startswith(PREFIX)
    if not (is_embedded or path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or os.path.exists(path)):
        return _read_hub(block)
    if problem := local_part(block):
        raise PromptError(f"{name}: {problem}")
    return _read_embedded(block) if is_embedded else _read_path(path, block)


def _read_embedded(block: PromptsBlock) -> PromptSource:
    name = block.source.removeprefix(PREFIX)
    if name not in EMBEDDED:
        raise PromptError(f"no embedded prompts {name!r}; {closest(name, list(EMBEDDED))}")
    with resources.files("raylign.prompts").joinpath(EMBEDDED[name]).open("rb") as file:
        return _json_source(block.source, file, block)


def _read_path(path: Path, block: PromptsBlock) -> PromptSource:
    if not os.path.exists(path):
        raise PromptError(f"{path}: no such file or folder (from {Path.cwd()}); correct prompts.source")
    try:
        if path.is_dir():
            return _read_saved(path, block)
        if path.suffix == ".jsonl":
            return PromptSource(_read_jsonl(path, block), None)
        if path.suffix == ".json":
            with open_plain(path) as file:
                return _json_source(str(path), file, block)
        if path.suffix == ".parquet":
            return PromptSource(_parquet_table(path), None)
    except Refused as error:
        raise PromptError(f"{path}: {error}") from error
    except EOFError as error:
        raise PromptError(f"{path}: cannot be read (it ends too early); write it again") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise PromptError(f"{path}: cannot be read ({error}); check that it is a whole {path.suffix} file") from error
    raise PromptError(f"{path}: not a {', '.join(SUFFIXES)} file; convert it to one of these")


def _read_jsonl(path: Path, block: PromptsBlock) -> Table:
    with open_plain(path) as file:
        parsed = list(json_lines(plain_lines(file)))
    return _table(str(path), "line", parsed, block.column, "not a JSON row ({})", "one JSON object per line")


def _json_source(where: str, file: IO[bytes], block: PromptsBlock) -> PromptSource:
    """A list of rows, or an object of splits that are lists of rows; a row is an object or the prompt itself."""
    content = all_arrays(file)
    if isinstance(content, list):
        return PromptSource(_json_table(where, content, block), None)
    train, held_out = _pick_splits(where, list(content), block.split)
    return PromptSource(
        _json_table(f"{where} split {train}", content[train], block),
        None if held_out is None else _json_table(f"{where} split {held_out}", content[held_out], block),
    )


def _json_table(where: str, content: list[object], block: PromptsBlock) -> Table:
    parsed = [flawless(number, value) for number, value in enumerate(content)]
    return _table(where, "row", parsed, block.column, "{}", "one JSON object per row")


def _table(
    where: str, unit: Unit, parsed: list[tuple[int, Any] | Fault], column: str, problem: str, cure: str
) -> Table:
    """`problem` and `cure` say what is wrong with a value that is no row."""
    rows: list[Row] = []
    faults: list[Fault] = []
    for one in parsed:
        if isinstance(one, Fault):
            faults.append(one)
            continue
        number, value = one
        try:
            rows.append(Row(number, _cells(value, column)))
        except ValueError as error:
            faults.append(Fault(number, problem.format(error), value, cure))
    return Table(where, unit, _columns(rows), tuple(rows), tuple(faults))


def _cells(value: object, column: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        return {column: value}
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of an object")
    return as_published(value, column)


def _columns(rows: list[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row.cells))


def _parquet_table(path: Path) -> Table:
    with open_parquet(path) as file:
        columns = tuple(file.schema_arrow.names)
    rows = tuple(Row(number, cells) for number, cells in enumerate(parquet_rows(path)))
    return Table(str(path), "row", columns, rows)


def _read_saved(path: Path, block: PromptsBlock) -> PromptSource:
    import datasets  # noqa: PLC0415 - takes a second, and files do without

    require_plain_files(path)
    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise PromptError(
            f"{path}: not a folder made by datasets' save_to_disk; give that, or one {', '.join(SUFFIXES)} file"
        ) from error
    if isinstance(saved, datasets.Dataset):
        return PromptSource(_dataset_table(str(path), saved, block.column), None)
    train, held_out = _pick_splits(str(path), list(saved), block.split)
    return PromptSource(
        _dataset_table(f"{path} split {train}", saved[train], block.column),
        None if held_out is None else _dataset_table(f"{path} split {held_out}", saved[held_out], block.column),
    )


def _read_hub(block: PromptsBlock) -> PromptSource:
    """`split` may be a slice such as `train[:1000]`; only the splits that are used are read."""
    from datasets.exceptions import DatasetsError  # noqa: PLC0415 - takes a second, and files do without

    name = block.source
    try:
        _, held_out = _pick_splits(name, hub_splits(name, block), block.split.partition("[")[0])
        wanted = [block.split] if held_out is None else [block.split, held_out]
        loaded = [hub_split(name, block, split) for split in wanted]
    except RuntimeError as error:
        raise PromptError(
            f"{name}: its data set cannot be read ({error}); code that ships with data is never run: take a data set "
            "in Parquet or JSON, or save its rows yourself with save_to_disk"
        ) from error
    except (OSError, ValueError, DatasetsError) as error:
        raise PromptError(
            f"{name}: neither a file or folder here nor a hub data set that can be read ({error}); correct "
            "prompts.source or prompts.subset, log in with `hf auth login` if it is gated, or check the network "
            "and HF_HUB_OFFLINE"
        ) from error
    tables = [
        _dataset_table(f"{name} split {split}", part, block.column) for split, part in zip(wanted, loaded, strict=True)
    ]
    return PromptSource(tables[0], None if held_out is None else tables[1])


def _dataset_table(where: str, dataset: "Dataset", column: str) -> Table:
    """Columns other than `column` and plain values (images, audio, nested) are never decoded."""
    from datasets import Value  # noqa: PLC0415 - takes a second, and files do without

    require_plain_columns(dataset.data.schema)
    columns = tuple(dataset.column_names)
    plain = [name for name, feature in dataset.features.items() if isinstance(feature, Value)]
    kept = [name for name in columns if name == column or name in plain]
    rows = tuple(Row(number, cells) for number, cells in enumerate(dataset.select_columns(kept).to_list()))
    return Table(where, "row", columns, rows)


def _pick_splits(where: str, splits: list[str], wanted: str) -> tuple[str, str | None]:
    """The split to train on and the first of the source's own held-out splits, if it has one."""
    if wanted not in splits:
        raise PromptError(f"{where}: no split {wanted!r}; {closest(wanted, splits)} (prompts.split)")
    return wanted, next((name for name in HELD_OUT_SPLITS if name in splits and name != wanted), None)

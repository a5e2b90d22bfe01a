"""Sources of judged text: every kind of file and folder, what is wrong with broken ones, and bounded memory."""

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config.data import SourceBlock
from raylign.data.examples import Example
from raylign.data.rows import ExampleStream, RowStream, _hub_rows, read_examples
from raylign.errors import DataError
from raylign.prompts.tables import Fault, Row
from raylign.reading import json_text


def row(index: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"question {index}"}, {"role": "assistant", "content": f"good {index}"}]
    return {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": f"bad {index}"}], "id": index}


ROWS = [row(index) for index in range(5)]
ROW = json.dumps(row(0))


def open_source(path: Path, **block: Any) -> ExampleStream:
    return read_examples(SourceBlock.model_validate({"source": str(path)} | block))


def hub(folder: Path, **block: Any) -> RowStream:
    """`datasets` reads a folder as it reads the hub, and no network is needed."""
    return _hub_rows(str(folder), SourceBlock.model_validate({"source": "some-org/some-data"} | block))


def good(stream: Iterable[Example | Fault]) -> list[Example]:
    found = list(stream)
    assert all(isinstance(item, Example) for item in found), found
    return [item for item in found if isinstance(item, Example)]


def refused(path: Path, **block: Any) -> str:
    """The message that opening the source, or reading it to its end, is refused with."""
    with pytest.raises(DataError) as caught:
        list(open_source(path, **block))
    return str(caught.value)


def write_all(folder: Path) -> dict[str, Path]:
    """The same rows in each kind of source."""
    lines = "".join(f"{json.dumps(item)}\n" for item in ROWS)
    paths = {name: folder / name for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "splits.json")}
    paths["a.jsonl"].write_text(f"\ufeff{lines}")
    paths["a.jsonl.gz"].write_bytes(gzip.compress(lines.encode()))
    paths["a.json"].write_text(f"\ufeff {json.dumps(ROWS, indent=1)}\n", encoding="utf-8")
    paths["a.json.gz"].write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    paths["splits.json"].write_text(json.dumps({"test": [{"x": [1]}], "train": ROWS, "more": []}))
    pq.write_table(pa.Table.from_pylist(ROWS), paths.setdefault("a.parquet", folder / "a.parquet"))
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(paths.setdefault("saved", folder / "saved")))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(paths.setdefault("dict", folder / "dict")))
    return paths


def test_every_kind_of_source_gives_the_same_examples(tmp_path: Path) -> None:
    for name, path in write_all(tmp_path).items():
        stream = open_source(path)
        found = good(stream)
        first = 1 if "jsonl" in name else 0
        assert stream.unit == ("line" if first else "row") and stream.format == "trl", name
        assert [example.number for example in found] == list(range(first, first + 5)), name
        assert [example.meta for example in found] == [{"id": index} for index in range(5)], name
        assert found[4].completions[1].messages == ({"role": "assistant", "content": "bad 4"},), name
        assert stream.total == (None if "json" in name else 5), name
        assert good(stream) == found, f"{name} is read anew by a second loop"


def test_where_names_the_source_and_its_split(tmp_path: Path) -> None:
    paths = write_all(tmp_path)
    assert open_source(paths["a.jsonl"]).where == str(paths["a.jsonl"])
    assert open_source(paths["splits.json"]).where == f"{paths['splits.json']} split train"
    assert open_source(paths["dict"]).where == f"{paths['dict']} split train"


def test_arrow_s_nulls_are_left_out(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}]
    other = [{"type": "function", "function": {"name": "f", "parameters": {"y": 1}}}]
    named = {"prompt": [prompt[0] | {"name": "ann"}], "completion": "b", "tools": other, "note": "n"}
    plain = {"prompt": prompt, "completion": "b", "tools": tools}
    pq.write_table(pa.Table.from_pylist([named, plain]), tmp_path / "a.parquet")
    second = good(open_source(tmp_path / "a.parquet"))[1]
    assert (second.prompt, second.tools, second.meta) == (tuple(prompt), tuple(tools), {})


def test_a_folder_of_files_is_numbered_through(tmp_path: Path) -> None:
    for name, part in (("b.jsonl", ROWS[2:]), ("a.jsonl", ROWS[:2])):
        (tmp_path / name).write_text("\n".join(json.dumps(item) for item in part) + "\nnot json")
    stream = open_source(tmp_path)
    assert stream.unit == "row" and stream.where == f"{tmp_path} (2 files)"
    found = list(stream)
    assert [item.number for item in found] == list(range(7))
    assert [item.number for item in found if isinstance(item, Fault)] == [2, 6]
    assert isinstance(found[6], Fault) and "b.jsonl line 4: not a JSON row" in found[6].problem


def test_a_folder_of_files_named_after_splits_gives_one_split(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    for name, rows in (("train-00000-of-00002", 2), ("train-00001-of-00002", 3), ("test-00000-of-00001", 1)):
        pq.write_table(table.slice(0, rows), tmp_path / f"{name}.parquet")
    assert (len(good(open_source(tmp_path))), open_source(tmp_path).total) == (5, 5)
    assert len(good(open_source(tmp_path, split="test"))) == 1
    assert "no file of split 'tets'; did you mean 'test'?" in refused(tmp_path, split="tets")


def test_a_hub_data_set_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "hub" / "train-00000-of-00001.parquet")
    stream = hub(tmp_path / "hub")
    assert [item.number for item in stream if isinstance(item, Row)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="no split 'tran'; did you mean 'train'"):
        hub(tmp_path / "hub", split="tran")
    with pytest.raises(DataError, match="is a slice; name the whole split and use limit"):
        hub(tmp_path / "hub", split="train[:2]")


def test_a_part_of_a_hub_data_set_is_named_by_its_subset_or_its_folder(tmp_path: Path) -> None:
    for folder, rows in (("helpful", 2), ("harmless", 3)):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.Table.from_pylist(ROWS[:rows]), tmp_path / folder / "train.parquet")
    assert len(list(hub(tmp_path, data_dir="harmless"))) == 3
    configs = [{"config_name": name, "data_dir": name} for name in ("helpful", "harmless")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert [len(list(hub(tmp_path, subset=name))) for name in ("helpful", "harmless")] == [2, 3]
    with pytest.raises(DataError, match=r"(?s)helpfull.*'helpful'.*correct the name or the subset"):
        hub(tmp_path, subset="helpfull")
    (tmp_path / "a.jsonl").write_text(ROW)
    assert "subset=helpful: for hub data sets, but the source is a file or folder here" in refused(
        tmp_path / "a.jsonl", subset="helpful"
    )


def test_code_that_ships_with_a_data_set_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "hub.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="code that ships with data is never run"):
        list(hub(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", "", "no rows; give a source that has some"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.jsonl", "{\n[1]\n", "none of 2 rows can be read; line 1: not a JSON row"),
        ("a.jsonl", '{"question": "a"}', "its format is none that is known: it has the columns question"),
        ("a.json", "", "the file is empty; give a list of rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", "7", "neither a list of rows nor an object of splits"),
        ("a.json", ROW[:-1] + ', "x": 1}', "no split 'train'; known: chosen, rejected|neither a list of rows nor"),
        ("a.json", '{"prompt": "a", "completion": "b"}', "neither a list of rows nor an object of splits"),
        ("a.json", f'{{"trian": [{ROW}]}}', "no split 'train'; did you mean 'trian'"),
        ("a.json", f"[{ROW}, {ROW}, {ROW[:30]}", "it ends inside row 2; whole rows before it: 2"),
        ("a.json", f"[{ROW}, {ROW}", "it ends inside row 2; whole rows before it: 2"),
        ("a.json", f"[{ROW},", "it ends inside row 1; whole rows before it: 1"),
        ("a.json", f'[{ROW}, {{"a": tru', "it ends inside row 1"),
        ("a.json", f'[{ROW}, {{"a": "\\u00', "it ends inside row 1"),
        ("a.json", f"[{ROW}, {ROW},]", "row 2 cannot be read .Expecting value at character"),
        ("a.json", f"[{ROW} {ROW}]", "row 1 cannot be read .'{' instead of ',' at character"),
        ("a.json", f"[{ROW}] [", "row 1 cannot be read .text after the array at character"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.parquet", "PAR1", "cannot be read .*check that it is whole"),
        ("a.csv", "a,b\n", r"not a \.jsonl, .* file; convert it to one of these"),
    ],
)
def test_broken_files_are_refused_with_the_place_and_a_cure(
    tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    (tmp_path / name).write_text(content)
    message = refused(tmp_path / name)
    assert message.startswith(str(tmp_path / name))
    with pytest.raises(DataError, match=complaint):
        list(open_source(tmp_path / name))


def test_a_syntax_error_is_found_without_reading_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "CHUNK", 64)
    (tmp_path / "a.json").write_text(f"[{ROW}, {{'chosen': 1}}, {', '.join([ROW] * 50)}]")
    problem = f"Expecting property name enclosed in double quotes at character {len(ROW) + 4}"
    with (tmp_path / "a.json").open("rb") as file:
        values = json_text.array_values(file, "train")
        assert next(values) == ROWS[0]
        with pytest.raises(ValueError, match=problem):
            next(values)
        assert file.tell() < 2 * len(ROW) + 128
    assert f"row 1 cannot be read ({problem}); whole rows before it: 1;" in refused(tmp_path / "a.json")


def test_values_are_whole_wherever_the_file_is_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": 'é😀天\\"\n', "completion": "b", "n": [1.5, -2e-7, True, None], "x": 12345.678},
        *ROWS,
        -1234567.25,
        True,
    ]
    (tmp_path / "a.json").write_text(json.dumps({"other": [1, [2]], "train": rows}, ensure_ascii=False))
    for chunk in range(1, 40):
        monkeypatch.setattr(json_text, "CHUNK", chunk)
        with (tmp_path / "a.json").open("rb") as file:
            assert list(json_text.array_values(file, "train")) == rows


def test_half_a_surrogate_pair_reaches_the_checks_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "a", "completion": "b\\ud83d"}, {"prompt": "a", "completion": "b"}]')
    bad, fine = open_source(tmp_path / "a.json")
    assert isinstance(bad, Fault) and bad.problem == "completion has half a surrogate pair at character 1"
    assert isinstance(fine, Example)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_text_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    content = f"[{ROW}, {ROW}]" if name == "a.json" else f"{ROW}\n{ROW}\n"
    broken = content.encode().replace(b"bad 0", b"bad \xff", 1)
    (tmp_path / name).write_bytes(broken)
    at = broken.index(b"\xff")
    if name == "a.json":
        assert f"not UTF-8 at byte {at}; save it as UTF-8" in refused(tmp_path / name)
    else:
        fault, fine = open_source(tmp_path / name)
        assert isinstance(fault, Fault) and fault.problem == f"not UTF-8 at byte {at}" and isinstance(fine, Example)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_torn_gzip_names_how_many_rows_are_whole(tmp_path: Path, name: str) -> None:
    lines = [json.dumps(row(index) | {"noise": str(hash(("noise", index)) ** 5)}) for index in range(2000)]
    text = f"[{', '.join(lines)}]" if name == "a.json.gz" else "\n".join(lines)
    whole = gzip.compress(text.encode())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    message = refused(tmp_path / name)
    count = int(message.split("it ends inside row ")[1].split(";")[0])
    assert 0 < count < 2000 and f"whole rows before it: {count};" in message
    (tmp_path / name).write_bytes(b"no gzip at all")
    assert "Not a gzipped file" in refused(tmp_path / name)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row(index) for index in range(500)]), path, compression="zstd")
    content = bytearray(path.read_bytes())
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refused(torn) and "check that it is whole" in refused(torn)
    content[4:400] = bytes(396)
    path.write_bytes(content)
    assert "row 0 cannot be read" in refused(path)


def test_missing_sources_and_splits_are_named(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "none.jsonl")
    paths = write_all(tmp_path)
    assert "no split 'tran'; did you mean 'train'?" in refused(paths["dict"], split="tran")
    (tmp_path / "empty").mkdir()
    assert "neither a folder made by datasets' save_to_disk" in refused(tmp_path / "empty")
    assert "holds both Parquet and JSON files" in refused(tmp_path)


def test_a_name_that_is_no_file_is_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing: neither a file or folder here nor a hub data set"):
        read_examples(SourceBlock(source="nobody/nothing"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, name: str) -> None:
    count, path = 20_000, tmp_path / name
    padded = [{"prompt": f"{index}", "completion": "b", "pad": f"{index} " * 100} for index in range(count)]
    if name == "a.jsonl":
        path.write_text("\n".join(map(json.dumps, padded)))
    elif name == "a.json":
        path.write_text(json.dumps(padded))
    else:
        pq.write_table(pa.Table.from_pylist(padded), path, row_group_size=1000)
    del padded
    stream = open_source(path)
    tracemalloc.start()
    read = sum(1 for _ in stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == count and peak < 4 << 20, f"{peak:,} bytes at most for {path.stat().st_size:,} on disk"

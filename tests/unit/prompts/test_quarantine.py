"""Bad rows: left out and listed up to a share of the rows, refused past it, and always on file."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from raylign.config.blocks import PromptsBlock, RunBlock
from raylign.errors import PromptError
from raylign.models import load_tokenizer
from raylign.prompts import PromptSet, load_prompts, refused_path, set_aside
from tests.faults import record
from tests.unit.tiny_policy import save_policy

LIMIT = 8
BAD: dict[str, bytes] = {
    "not a JSON row": b'{"prompt": "go',
    "nested too deep for JSON": b"[" * 100_000,
    "int instead of an object": b"7",
    "not UTF-8 at byte 12": b'{"prompt": "\xe9"}',
    "no 'prompt'": b'{"text": "good"}',
    "the prompt is empty": b'{"prompt": " "}',
    "float instead of a string": b'{"prompt": NaN}',
    "a conversation without messages": b'{"prompt": []}',
    "message 0 is a str": b'{"prompt": ["good"]}',
    "message 0 has no role": b'{"prompt": [{"content": "good"}]}',
    "unknown role 'human'": b'{"prompt": [{"role": "human", "content": "good"}]}',
    "content of message 0 is a list": b'{"prompt": [{"role": "user", "content": []}]}',
    "the last message is from assistant": b'{"prompt": [{"role": "assistant", "content": "good"}]}',
    "half a surrogate pair at character 5": b'{"prompt": "good \\ud800"}',
    "9 tokens, limit 8": b'{"prompt": "%s"}' % (b"good " * 9),
}
"""A row of each kind that cannot be used, by what is said about it."""
SAID = {"nested too deep for JSON": "not a JSON row (maximum recursion depth exceeded"}
GOOD = [b'{"prompt": "%s"}' % (b"good " * count) for count in range(1, LIMIT)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(save_policy(tmp_path_factory.mktemp("policy"))))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Good rows on odd lines, bad ones on even lines; more of the latter."""
    lines: list[bytes] = []
    for index, row in enumerate(BAD.values()):
        lines += [GOOD[index % len(GOOD)], row]
    (tmp_path / "prompts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path / "prompts.jsonl"


def load(tokenizer: PreTrainedTokenizerBase, source: Path, refused_to: Path | None = None, **block: Any) -> PromptSet:
    options = {"source": str(source), "held_out": 1} | block
    return load_prompts(PromptsBlock.model_validate(options), tokenizer, LIMIT, seed=0, refused_to=refused_to)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


@pytest.mark.fault
def test_up_to_the_limit_bad_rows_of_every_kind_are_left_out_and_listed(
    tokenizer: PreTrainedTokenizerBase, source: Path, tmp_path: Path
) -> None:
    prompts = load(tokenizer, source, max_invalid=0.5, refused_to=tmp_path / "refused.jsonl")
    assert len(prompts.train) + len(prompts.held_out) == len(GOOD)
    assert not (tmp_path / "refused.jsonl").exists()
    run = tmp_path / "run"
    note = set_aside(prompts.invalid, run)
    file = run / "quarantine.jsonl"
    assert note == f"{source}: 15 of 30 rows left out (lines 2, 4, 6, 8, 10, ...): see {file}"
    found = rows(file)
    assert [row["number"] for row in found] == [2 * number for number in range(1, len(BAD) + 1)]
    for row, kind in zip(found, BAD, strict=True):
        assert SAID.get(kind, kind) in row["problem"], row
        assert row.keys() == {"where", "unit", "number", "problem", "cure", "value"}
        assert (row["where"], row["unit"]) == (str(source), "line") and row["cure"]
    assert found[13]["value"] == "good \ud800"
    assert found[14]["value"] == "good " * 9
    assert "NaN" not in json.dumps(found)
    record("bad rows in the prompts", "a JSONL row of each of 15 kinds", lost="those rows, listed with line and cure")


@pytest.mark.fault
def test_past_the_limit_the_run_does_not_start_and_every_bad_row_is_on_file(
    tokenizer: PreTrainedTokenizerBase, source: Path, tmp_path: Path
) -> None:
    refused = tmp_path / "new/runs/tiny.quarantine.jsonl"
    with pytest.raises(PromptError) as caught:
        load(tokenizer, source, max_invalid=0.499, refused_to=refused)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{source}: 15 of 30 rows cannot be used (lines counted from 1)"
    assert sum(line.startswith("  line ") for line in lines) == 10 and "  and 5 more" in lines
    assert lines[-2] == "or leave them out: prompts.max_invalid=0.5 (now 0.499)"
    assert lines[-1] == f"every bad row is in {refused}"
    assert [row["number"] for row in rows(refused)] == list(range(2, 31, 2))
    assert [path.name for path in refused.parent.iterdir()] == [refused.name]
    record("too many bad rows", "more than prompts.max_invalid of a JSONL file", lost="nothing: refused before loading")


def test_a_quarantine_that_cannot_be_written_hides_no_error(
    tokenizer: PreTrainedTokenizerBase, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PromptError, match=r"(?s)15 of 30 rows.*no list of all bad rows: .*q\.jsonl cannot be"):
        load(tokenizer, source, refused_to=tmp_path / "file/q.jsonl")


def test_by_default_one_bad_row_is_too_many(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join([*GOOD, b"{", *GOOD]))
    with pytest.raises(PromptError, match=r"1 of 15 rows cannot be used(?s:.*)prompts\.max_invalid=0\.067 \(now 0\)"):
        load(tokenizer, path)
    assert load(tokenizer, path, max_invalid=0.067).invalid[0].faults[0].number == len(GOOD) + 1


def test_without_bad_rows_nothing_is_written(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(GOOD))
    assert set_aside(load(tokenizer, path, max_invalid=1).invalid, tmp_path / "run") == ""
    assert not (tmp_path / "run").exists()


def test_where_no_row_is_left_any_limit_is_too_low(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("{\n{\n")
    with pytest.raises(PromptError, match=r"none of 2 rows can be used; lower prompts\.max_invalid"):
        load(tokenizer, path, max_invalid=1)


def test_a_split_is_judged_by_itself_and_held_out_prompts_are_filled_up(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    splits = {"train": ["good one", "good two", "good three"], "test": ["bad", "", "bad one", " ", "bad two"]}
    path.write_text(json.dumps(splits))
    prompts = load(tokenizer, path, held_out=2, max_invalid=0.34)
    assert [prompt.id for prompt in prompts.held_out] == ["h000000", "h000002"]
    assert [(split.where, len(split.faults), split.total) for split in prompts.invalid] == [
        (f"{path} split train", 0, 3),
        (f"{path} split test", 1, 3),
    ]
    with pytest.raises(PromptError, match=f"^{path} split test: 1 of 3 rows"):
        load(tokenizer, path, held_out=2, max_invalid=0.3)


def test_values_without_a_form_in_json_are_written_out(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    pq.write_table(pa.table({"prompt": ["good", "bad", None], "day": [day] * 3}), tmp_path / "p.parquet")
    prompts = load(tokenizer, tmp_path / "p.parquet", max_invalid=0.5)
    set_aside(prompts.invalid, tmp_path)
    (row,) = rows(tmp_path / "quarantine.jsonl")
    assert (row["unit"], row["number"]) == ("row", 2)
    assert row["value"] == repr({"prompt": None, "day": day})


def test_a_refused_run_keeps_its_bad_rows_beside_where_it_would_stand(tmp_path: Path) -> None:
    block = RunBlock(dir=tmp_path, name="second")
    assert refused_path(block) == tmp_path / "second.quarantine.jsonl"

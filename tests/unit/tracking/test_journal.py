"""The journal on disk, and the pure parts of tracking: what is published, and how."""

import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config.blocks import TrackingBlock
from raylign.errors import ConfigError, RaylignError
from raylign.run.files import inside
from raylign.tracking.artifacts import row_count, table_page
from raylign.tracking.facts import publishable, redacted, run_facts
from raylign.tracking.journal import Journal, read_events, read_from
from raylign.tracking.tracker import step_means
from raylign.tracking.uri import artifact_location, default_uri


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def write(path: Path, *names: str) -> None:
    with Journal(path) as journal:
        for name in names:
            journal.append(name, {"value": 1.5})


def test_one_json_object_per_line(path: Path) -> None:
    write(path, "a", "b")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(line) for line in lines] == [{"time", "sequence", "event", "value"}] * 2
    assert [(line["sequence"], line["event"], line["value"]) for line in lines] == [(1, "a", 1.5), (2, "b", 1.5)]
    assert lines[0]["time"] > 1.7e9


def test_reopening_continues_the_sequence(path: Path) -> None:
    write(path, "a", "b")
    write(path, "c")
    assert [(event.sequence, event.name) for event in read_events(path)] == [(1, "a"), (2, "b"), (3, "c")]
    assert [event.name for event in read_events(path, after=2)] == ["c"]


@pytest.mark.parametrize(("call", "written"), [("fsync", 1.0), ("write", 1.0), ("write", 0.5), ("write", 0.0)])
def test_a_signal_in_the_middle_of_an_append_gives_no_sequence_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, written: float
) -> None:
    """A feed that has read the first would take the second for known: the end of a stopped run, say."""
    write_bytes = os.write

    def interrupted(descriptor: int, content: bytes = b"") -> int:
        write_bytes(descriptor, content[: int(written * len(content))])
        raise KeyboardInterrupt

    with Journal(path) as journal:
        journal.append("a", {})
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"raylign.tracking.journal.os.{call}", interrupted)
            journal.append("step", {"step": 1})
        journal.append("campaign_finished", {})
    names = ["a", "step", "campaign_finished"] if written == 1 else ["a", "campaign_finished"]
    assert [(event.sequence, event.name) for event in read_events(path)] == [*enumerate(names, 1)]


@pytest.mark.parametrize("torn", [b'{"time": 1.0, "sequence": 3, "ev', b'{"time": 1.0\n', b"\x00\x00\x00\n", b"17\n"])
def test_a_torn_last_line_is_unread_and_then_cut_off(path: Path, torn: bytes) -> None:
    write(path, "a", "b")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [event.name for event in read_events(path)] == ["a", "b"]
    write(path, "c")
    assert path.read_bytes().startswith(whole)
    assert [(event.sequence, event.name) for event in read_events(path)] == [(1, "a"), (2, "b"), (3, "c")]


def test_a_broken_line_in_the_middle_is_refused_with_its_place(path: Path) -> None:
    write(path, "a")
    start = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"garbage\n" + path.read_bytes())
    with pytest.raises(RaylignError, match=f"byte {start} "):
        list(read_events(path))
    with pytest.raises(RaylignError, match=f"byte {start} "):
        Journal(path)


def test_following_by_offset_sees_only_what_is_new_and_whole(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("a", {})
        ((_, offset),) = list(read_from(path))
        assert offset == path.stat().st_size
        assert list(read_from(path, offset)) == []
        journal.append("b", {})
        assert [event.name for event, _ in read_from(path, offset)] == ["b"]


def test_numbers_that_are_not_finite_become_null_and_are_named(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("step", {"metrics": {"loss": math.nan, "lr": 0.5}, "gaps": [1.0, -math.inf]})
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["metrics"] == {"loss": None, "lr": 0.5}
    assert line["gaps"] == [1.0, None]
    assert line["non_finite"] == ["metrics.loss", "gaps.1"]


def test_line_breaks_and_lone_surrogates_stay_on_one_line(path: Path) -> None:
    text = "a\nb\u2028c\ud800"
    with Journal(path) as journal:
        journal.append("note", {"text": text})
    assert path.read_bytes().count(b"\n") == 1
    assert next(read_events(path)).payload["text"] == text


def test_the_envelope_cannot_be_overwritten(path: Path) -> None:
    with Journal(path) as journal, pytest.raises(ValueError, match="sequence"):
        journal.append("a", {"sequence": 9})


def test_no_journal_is_an_error_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(RaylignError, match="directory of a run"):
        list(read_events(tmp_path / "events.jsonl"))


def test_params_are_flat_and_secrets_withheld() -> None:
    tree = {
        "sampling": {"max_new_tokens": 64, "max_prompt_tokens": 960, "tokenizer": "t", "stop": ["a", "b"]},
        "hub": {"token": "hf_1", "api_key": "k", "apiKey": "k", "accessToken": "k", "Authorization": "Bearer x"},
        "db": {"password": None, "uri": "postgresql://me:pa@ss@host:5432/mlflow"},
        "secret": {"name": "inside"},
        "mixture": [{"source": "x", "key": 3}],
        "none": {},
    }
    assert publishable(tree) == {
        "sampling.max_new_tokens": "64",
        "sampling.max_prompt_tokens": "960",
        "sampling.tokenizer": "t",
        "sampling.stop": '["a", "b"]',
        "hub.token": "[redacted]",
        "hub.api_key": "[redacted]",
        "hub.apiKey": "[redacted]",
        "hub.accessToken": "[redacted]",
        "hub.Authorization": "[redacted]",
        "db.password": "null",
        "db.uri": "postgresql://host:5432/mlflow",
        "secret.name": "[redacted]",
        "mixture.0.source": "x",
        "mixture.0.key": "[redacted]",
        "none": "{}",
    }


def test_redaction_keeps_the_shape() -> None:
    tree = {"a": {"token": "t", "uri": "http://u:p@h/x"}, "b": [{"key": 1}], "secret": ["s"], "n": 2}
    assert redacted(tree) == {
        "a": {"token": "[redacted]", "uri": "http://h/x"},
        "b": [{"key": "[redacted]"}],
        "secret": ["[redacted]"],
        "n": 2,
    }


def test_default_uri_is_sqlite_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri(TrackingBlock(), Path("runs/demo")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (
        default_uri(TrackingBlock(uri="sqlite:///a.db?timeout=9"), tmp_path) == f"sqlite:///{tmp_path}/a.db?timeout=9"
    )
    assert default_uri(TrackingBlock(uri="http://mlflow:5000"), tmp_path) == "http://mlflow:5000"
    assert artifact_location(f"sqlite:///{tmp_path}/my runs/mlflow.db") == f"file://{tmp_path}/my%20runs/mlartifacts"
    assert artifact_location("http://mlflow:5000") is None


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "./mlruns", "sqlite://", "sqlite:///:memory:"])
def test_uris_that_keep_no_record_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sqlite:///"):
        default_uri(TrackingBlock(uri=uri), tmp_path)


def test_pages_escape_model_output_and_skip_long_number_lists(tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>&\"<img src=x onerror=y>"
    candidate = {"text": attack, "token_ids": list(range(9)), "scores": [1.0, 0.5]}
    table = pa.Table.from_pylist([{"<b>": attack, "candidates": [candidate], "logprobs": [0.123] * 9}])
    pq.write_table(table, tmp_path / "p.parquet")
    page = table_page(tmp_path / "p.parquet")
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 2
    assert "token_ids" not in page and "logprobs" not in page and "scores" in page
    assert "1 of 1 rows" in page


def test_pages_show_the_first_rows_and_count_them_all(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {index}", "long": "y" * 4100}) + "\n" for index in range(250)))
    page = table_page(path)
    assert "200 of 250 rows" in page and "row 199<" in page and "row 200<" not in page
    assert "[100 more characters]" in page and row_count(path) == 250


def test_step_means_leave_out_and_count_what_is_not_finite() -> None:
    steps = [{"loss": 0.5, "kl": math.nan}, {"loss": 1.0, "kl": math.inf}, {"loss": math.nan, "late": 4.0}]
    assert step_means(steps) == {"loss": 0.75, "late": 4.0, "non_finite": 3}
    assert step_means([{"loss": 2.0}]) == {"loss": 2.0}
    assert step_means([]) == {}


def test_facts_name_code_versions_and_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = run_facts()
    assert facts["version.mlflow"].startswith("3.")
    assert {"python", "platform", "cpu_count", "version.torch", "version.raylign"} <= facts.keys()
    monkeypatch.chdir(tmp_path)
    assert "git.sha" not in run_facts()
    monkeypatch.setenv("PATH", "")
    assert "git.sha" not in run_facts()


def test_artifact_paths_stay_inside_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "link").symlink_to(tmp_path)
    assert inside(run_dir, "rounds/0001/report.json") == run_dir / "rounds/0001/report.json"
    for path in ("../other", "/etc/passwd", "link/other"):
        with pytest.raises(RaylignError, match="outside the run directory"):
            inside(run_dir, path)

"""What a run has written is verified before it is read: what is damaged counts as not finished, and is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from raylign.config.scoring import RewardModelScoringBlock
from raylign.errors import ConfigError, ModelError, RecordError
from raylign.records import RoundReport
from raylign.run.checkpoints import Checkpoints, is_name
from raylign.run.directory import RunDirectory, continue_or_create, open_run
from raylign.run.files import finished_record, read_record
from raylign.run.sampled import parse_line
from raylign.run.tables import read_candidates, read_preferences
from raylign.sampling.curriculum import History
from raylign.scoring.reward_model import find_reward_model
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from recipes.commands.resume import resumed_config
from recipes.run import finished_before
from tests.fakes import Deadly
from tests.faults import record
from tests.unit.recipes.commands.test_cli import finished, raylign, recipe
from tests.unit.run.test_resume import config_in, happened, run_once, tables, what_it_came_to, whole

__all__ = ["finished", "recipe", "whole"]
Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def holding(text: str) -> Damage:
    return lambda path: path.write_text(text)


def changed(**fields: Any) -> Damage:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


NOT_REPORTS: dict[str, Damage] = {
    "cut": cut,
    "empty": empty,
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "another shape": holding("[1, 2]"),
    "nested without end": holding("[" * 100_000),
    "a number of 5,000 digits": holding('{"index": ' + "9" * 5000 + "}"),
    "steps of words": changed(steps=[{"loss": "low"}]),
    "no evaluation": changed(evaluation={}),
    "of another round": changed(index=7),
}


@pytest.mark.fault
@pytest.mark.parametrize("damage", NOT_REPORTS)
@pytest.mark.parametrize("index", [1, 2])
def test_a_damaged_report_is_made_again_from_its_round(
    index: int, damage: str, whole: tuple[Deadly, RunDirectory], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path)
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    report = directory.round(index) / "report.json"
    NOT_REPORTS[damage](report)
    assert [found.index for found in directory.reports()] == [3 - index] and finished_before(config) is None
    said = [line for line in caplog.messages if str(report) in line]
    assert len(said) == 1 and "counts as not finished" in said[0]
    again = run_once(config, tmp_path)
    assert not any(event.startswith(("sample", "score", "train", "step")) for event in again)
    assert what_it_came_to(directory) == what_it_came_to(whole[1])
    assert len(happened(directory, "round_finished")) == 2
    record(
        "a report damaged",
        damage,
        lost="nothing: said with its path, made again from the round's files and the journal",
    )


def test_names_that_are_no_rounds_are_passed_over(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    expected = what_it_came_to(directory)
    for name in ("7x", "7", "00003", "0003-partial", "7²"):
        shutil.copytree(directory.round(2), directory.path / "rounds" / name)
    assert what_it_came_to(directory) == expected and directory.rounds_finished() == 2
    names = {"0001": True, "12345": True, "0003-partial": True, "7": False, "00003": False, "00012345": False}
    assert {name: is_name(name) for name in names} == names


@pytest.mark.fault
def test_a_file_in_the_place_of_a_checkpoint_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_in(tmp_path)
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    (directory.path / "checkpoints/0009").write_text("in the way")
    assert directory.checkpoints() == [directory.checkpoint(1), directory.checkpoint(2)]
    run_once(config, tmp_path)
    assert "0009 is damaged (it is no folder)" in caplog.text
    assert (directory.path / "checkpoints/damaged-0009").read_text() == "in the way"
    (directory.path / "checkpoints/0003").write_text("in the way")
    with directory.checkpoint_store(None).new(3, (), True, 0) as folder:
        (folder / "weights").write_text("3")
    assert directory.whole_checkpoint(3).round == 3
    record("a file named as a checkpoint", "`checkpoints/0009`", lost="nothing: said, kept aside")


NOT_LEDGERS: dict[str, Damage] = {
    "empty": empty,
    "cut": cut,
    "a list": holding("[]"),
    "entries of another shape": holding('{"sample": 3}'),
    "seconds as text": holding('{"sample": {"seconds": "1", "files": {}}}'),
    "files without hashes": holding('{"sample": {"seconds": 1, "files": {"sampled.jsonl": 5}}}'),
}


@pytest.mark.fault
@pytest.mark.parametrize("damage", NOT_LEDGERS)
def test_stages_of_a_damaged_ledger_are_done_again(
    damage: str, whole: tuple[Deadly, RunDirectory], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path)
    second_training = [index for index, event in enumerate(whole[0]) if event.startswith("train ")][1]
    run_once(config, tmp_path, second_training)
    directory = continue_or_create(config)
    ledger = directory.round(2) / "stages.json"
    NOT_LEDGERS[damage](ledger)
    again = run_once(config, tmp_path)
    assert f"{ledger} cannot be read" in caplog.text
    assert "score 6" in again and not any(event.startswith("sample a") for event in again)
    assert what_it_came_to(directory) == what_it_came_to(whole[1]) and tables(directory.path) == tables(whole[1].path)
    record("a round's ledger damaged", damage, lost="nothing that was sampled")


LINE = {
    "prompt_id": "a",
    "index": 0,
    "token_ids": [1, 2],
    "logprobs": [-0.5, -0.25],
    "text": "half \ud83d",
    "finish_reason": "stop",
    "policy_version": 0,
    "seed": 1,
}


def line_of(*rows: object) -> bytes:
    return json.dumps(list(rows)).encode() + b"\n"


def test_a_line_of_samples_is_read_as_it_was_written() -> None:
    (found,) = parse_line(line_of(LINE))
    assert (found.prompt_id, found.token_ids, found.logprobs, found.text) == ("a", (1, 2), (-0.5, -0.25), "half \ud83d")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]\n",
        b"7\n",
        b'{"prompt_id": "a"}\n',
        line_of(LINE)[:-1],
        b"[" * 100_000 + b"\n",
        line_of(7),
        line_of({"prompt_id": "a"}),
        line_of(LINE | {"token_ids": 3}),
        line_of(LINE | {"token_ids": [1]}),
        line_of(LINE | {"token_ids": [1, 2**31]}),
        line_of(LINE | {"logprobs": [None, None]}),
        line_of(LINE | {"logprobs": [float("nan"), 0.0]}),
        line_of(LINE | {"finish_reason": "tired"}),
        line_of(LINE, LINE | {"prompt_id": "b"}),
    ],
)
def test_lines_that_are_none_are_left_out(line: bytes) -> None:
    assert parse_line(line) == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: empty(folder / "manifest.json"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {"a": 1}}'), "files.a: "),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: (folder / "extra.safetensors").write_text(""), "extra.safetensors was added"),
        (lambda folder: empty(folder / "progress.json"), "progress.json has 0 bytes"),
    ],
)
def test_a_checkpoint_with_a_damaged_manifest_is_set_aside(
    damage: Damage, problem: str, whole: tuple[Deadly, RunDirectory], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path)
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    damage(directory.checkpoint(2))
    with pytest.raises(RecordError, match="checkpoints/0002 is damaged") as error:
        directory.whole_checkpoint(2)
    assert error.value.cure.endswith("the newest whole one is 1")
    run_once(config, tmp_path)
    assert "0002 is damaged" in caplog.text and problem in caplog.text
    assert what_it_came_to(directory) == what_it_came_to(whole[1])
    record("a checkpoint's manifest damaged", problem, lost="nothing: said, kept aside, its round trained again")


def test_a_lost_baseline_is_not_measured_on_the_trained_policy(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    for name in ("report.json", "stages.json"):
        empty(directory.round(0) / name)
    with pytest.raises(RecordError, match=r"rounds/0000: the evaluation before round 1 is damaged") as error:
        run_once(config, tmp_path)
    assert "restore it" in error.value.cure
    with pytest.raises(RecordError, match=r"rounds/0000/report.json cannot be read"):
        directory.baseline()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "problem"),
    [(empty, "it is empty"), (cut, "it was cut or changed"), (lambda path: edit(path), "it was cut or changed")],
)
def test_a_damaged_config_is_no_set_of_defaults(
    damage: Damage, problem: str, finished: RunDirectory, tmp_path: Path
) -> None:
    config = finished.path / "config.yaml"
    damage(config)
    with pytest.raises(ConfigError, match=f"config.yaml is not what the run has written: {problem}") as error:
        resumed_config(finished.path, ())
    assert "restore it" in error.value.cure
    for arguments in (["export", finished.path, "--to", tmp_path / "out"], ["sync", finished.path]):
        result = raylign(*arguments)
        assert result.exit_code == 1 and problem in result.stderr and "cure: restore it" in result.stderr
    record("a run's config.yaml damaged", problem, lost="nothing: refused, instead of defaults in its place")


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("held_out: 3", "held_out: 2"))


def test_configs_of_earlier_versions_are_read(finished: RunDirectory) -> None:
    path = finished.path / "config.yaml"
    expected = finished.config()
    path.write_text(path.read_text().partition("\n")[2])
    assert open_run(finished.path).config() == expected


@pytest.mark.fault
@pytest.mark.parametrize("merge", [True, False])
def test_a_damaged_checkpoint_is_not_exported(merge: bool, finished: RunDirectory, tmp_path: Path) -> None:
    weights = finished.checkpoint(2) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2000:] = bytes(byte ^ 0xFF for byte in content[-2000:])
    weights.write_bytes(content)
    options = ["--merge"] if merge else []
    result = raylign("export", finished.path, "--to", tmp_path / "out", *options)
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert "checkpoints/0002 is damaged: adapter_model.safetensors is not what was written" in result.stderr
    assert "the newest whole one is 1" in result.stderr
    result = raylign("export", finished.path, "--to", tmp_path / "out", *options, "--version", 1)
    assert result.exit_code == 0, result.output
    record(
        "export of a damaged checkpoint",
        f"2,000 bytes flipped{', merged' if merge else ''}",
        lost="nothing: refused, naming the newest version that is whole",
    )


def test_a_scorer_takes_no_damaged_checkpoint(finished: RunDirectory) -> None:
    folder = finished.checkpoint(2)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"scoring.path: .*0002 is a damaged checkpoint of a run: adapter_config.json"):
        find_reward_model(RewardModelScoringBlock(path=str(folder)))


def table(path: Path, **columns: pa.Array) -> Path:
    """The table of round 1 of a small run with other `columns`."""
    found = pq.read_table(path)
    for name, values in columns.items():
        found = found.drop([name]) if values is None else found.set_column(found.column_names.index(name), name, values)
    pq.write_table(found, path)
    return path


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"token_ids": None}, "it has no column 'token_ids'"),
        ({"token_ids": ["x"]}, "column 'token_ids' is string instead of list"),
        ({"seed": [None]}, "column 'seed' is null instead of int64"),
        ({"text": pa.array([None], pa.string())}, "column 'text' has 6 empty values"),
        ({"token_ids": pa.array([[1, None]], pa.list_(pa.int32()))}, "column 'token_ids' has 6 empty values"),
        ({"score_parts": ["[1]"]}, r"row 0: score_parts is '\[1\]'"),
        ({"score_parts": ["{"]}, "row 0: Expecting property name"),
        ({"finish_reason": ["tired"]}, "row 0: finish_reason is 'tired'"),
    ],
)
def test_candidates_of_another_shape_are_refused(columns: dict[str, Any], problem: str, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run_once(config, tmp_path)
    path = continue_or_create(config).round(1) / "candidates.parquet"
    rows = pq.read_metadata(path).num_rows
    assert rows == 6 and len(read_candidates(path)[0]) == 6
    made = {
        name: None if value is None else pa.concat_arrays([pa.array(value) if isinstance(value, list) else value] * 6)
        for name, value in columns.items()
    }
    table(path, **made)
    with pytest.raises(RecordError, match=f"candidates.parquet cannot be read: {problem}") as error:
        read_candidates(path)
    assert "restore it" in error.value.cure


@pytest.mark.parametrize("damage", [cut, empty, lambda path: path.unlink(), holding("PAR1 and no more PAR1")])
def test_tables_that_are_none_are_refused(damage: Damage, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    for name in ("candidates.parquet", "preferences.parquet"):
        damage(directory.round(1) / name)
    with pytest.raises(RecordError, match=r"candidates.parquet cannot be read"):
        read_candidates(directory.round(1) / "candidates.parquet")
    with pytest.raises(RecordError, match=r"preferences.parquet cannot be read"):
        read_preferences(directory.round(1) / "preferences.parquet", [], [])
    if (directory.round(1) / "candidates.parquet").exists():
        with pytest.raises(RecordError, match=r"rounds/0001: candidates.parquet") as error:
            History(directory).before(2)
        assert "schedule.curriculum=null" in error.value.cure


def test_records_are_files_of_their_kind(tmp_path: Path) -> None:
    kind = TypeAdapter(RoundReport)
    (tmp_path / "folder").mkdir()
    for name, problem in (("folder", "it is no file"), ("nothing", "there is no such file")):
        with pytest.raises(RecordError, match=f"{name} cannot be read: {problem}"):
            read_record(tmp_path / name, kind)
    assert finished_record(tmp_path / "nothing", kind) is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"time": "noon", "sequence": 1, "event": "a"}',
        b'{"time": NaN, "sequence": 1, "event": "a"}',
        b'{"time": 1e300, "sequence": 1, "event": "a"}',
        b'{"time": 1, "sequence": "1", "event": "a"}',
        b'{"time": 1, "sequence": true, "event": "a"}',
        b'{"time": 1, "sequence": 1, "event": ["a"]}',
        b"[" * 100_000,
    ],
)
def test_a_journal_of_another_shape_is_refused_with_its_place(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    with Journal(path) as journal:
        journal.append("a", {})
    start = path.stat().st_size
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(RecordError, match=f"byte {start} does not start an event"):
        list(read_events(path))


def test_an_event_with_a_wrong_payload_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path / JOURNAL_NAME) as journal:
        event = journal.append("campaign_finished", {"status": 3})
    for name, problem in (
        ("status", "has a wrong 'status': Input should be a valid string"),
        ("when", "has no 'when'"),
    ):
        with pytest.raises(RecordError, match=rf"event 1 \(campaign_finished\) of events.jsonl {problem}") as error:
            event.get(name, TypeAdapter(str))
        assert "restore" in error.value.cure


def test_the_newest_whole_checkpoint_is_none_where_none_is(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="0001 is damaged: it is no folder") as error:
        Checkpoints(tmp_path, None).whole(1)
    assert error.value.cure.endswith("no other one is whole")

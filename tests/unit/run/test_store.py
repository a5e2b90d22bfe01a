"""What a run leaves on disk: Parquet that reads back, files that are whole or absent, the run directory."""

import json
import re
import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import OnlineDpoConfig, parse_config
from raylign.config.blocks import RunBlock
from raylign.errors import ConfigError, DiskError, RecordError
from raylign.records import Candidate, Evaluation, KlSample, Preference, Prompt, RoundReport, Score
from raylign.run.directory import RunDirectory, create_run, open_run, require_continuable
from raylign.run.files import publish_file, publish_folder, publish_text
from raylign.run.tables import read_candidates, read_preferences, write_candidates, write_preferences

PROMPT = Prompt("p000001", ({"role": "user", "content": "Say “hi”\n\ud83d"},), (5, 6, 7))
OTHER = Prompt("p000002", ({"role": "system", "content": "s"}, {"role": "user", "content": "?"}), (8,))
GOOD = Candidate("p000001", 0, (11, 12), (-0.5, -0.25), "fine 🙂", "stop", 3, 2_000_000_000)
CUT = Candidate("p000001", 1, (13,), (-1.5,), "half \ud83d", "length", 3, 2_000_000_001)
EMPTY = Candidate("p000002", 0, (), (), "", "stop", 3, 7)
EMPTY_OF_P = Candidate("p000001", 2, (), (), "", "stop", 3, 7)
SCORES = [Score(0.75, {"tone": 0.5, "length": 0.25}), Score(-1.0), Score(None, reason="late")]
EVALUATION = Evaluation(0.5, 0.25, 0.75, 1.5, 20.25, 0.875, 0.5, 4, 1)


def report(index: int) -> RoundReport:
    steps = ({"loss": 0.6931471805599453, "num_tokens": 31.0}, {"loss": 0.5, "num_tokens": 9.0})
    return RoundReport(
        index, index, {"preferences": 2, "ties": 1}, steps, {"logprob_gap_mean": 1e-3}, EVALUATION, {"train": 1.5}
    )


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_candidates_read_back_with_their_scores(tmp_path: Path) -> None:
    path = tmp_path / "rounds" / "0001" / "candidates.parquet"
    write_candidates(path, [PROMPT, OTHER], [GOOD, CUT, EMPTY], SCORES)
    first, second, third = pq.read_table(path).to_pylist()
    assert json.loads(first.pop("messages")) == [dict(message) for message in PROMPT.messages]
    assert json.loads(first.pop("score_parts")) == {"tone": 0.5, "length": 0.25}
    assert first == {
        "prompt_id": "p000001",
        "index": 0,
        "text": "fine 🙂",
        "score": 0.75,
        "score_reason": "",
        "finish_reason": "stop",
        "policy_version": 3,
        "seed": 2_000_000_000,
        "token_ids": [11, 12],
        "logprobs": [-0.5, -0.25],
        "part_reasons": None,
    }
    assert (second["index"], second["finish_reason"], second["score"]) == (1, "length", -1.0)
    assert (third["prompt_id"], third["score"], third["score_reason"]) == ("p000002", None, "late")
    assert (third["token_ids"], third["logprobs"], third["text"]) == ([], [], "")
    assert leftovers(path.parent) == ["candidates.parquet"]


def test_reasons_of_scores_and_parts_come_back_also_from_a_table_without_them(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    scores = [Score(0.5, {"tone": 0.5}, "A is “better”.\nB is not.", {"tone": "warm"}), *SCORES[1:]]
    write_candidates(path, [PROMPT, OTHER], [GOOD, CUT, EMPTY], scores)
    assert read_candidates(path)[1] == scores
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["part_reasons"]), path)
    assert read_candidates(path)[1] == [replace(scores[0], part_reasons={}), *scores[1:]]
    for wrong in ("[]", '{"a": 1}', "{", "[" * 100_000):
        pq.write_table(table.set_column(12, "part_reasons", pa.array([None, wrong, None])), path)
        with pytest.raises(RecordError, match=r"row 1: "):
            read_candidates(path)


def test_half_a_surrogate_pair_does_not_stop_a_round(tmp_path: Path) -> None:
    write_candidates(tmp_path / "c.parquet", [PROMPT], [CUT], [Score(1.0)])
    preference = Preference(PROMPT, (GOOD, CUT), (1.0, 0.0), (1.0, 1.0))
    write_preferences(tmp_path / "p.parquet", [preference])
    (row,) = pq.read_table(tmp_path / "c.parquet").to_pylist()
    assert row["text"] == "half ?" and row["token_ids"] == [13]
    assert json.loads(row["messages"])[0]["content"].endswith("\ud83d")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist()[0]["rejected"] == "half ?"


def test_half_a_surrogate_pair_in_a_reason_does_not_stop_a_round(tmp_path: Path) -> None:
    write_candidates(tmp_path / "c.parquet", [PROMPT], [CUT], [Score(None, reason="cannot read 'half \ud83d'")])


def test_preferences_read_back_best_first(tmp_path: Path) -> None:
    pair = Preference(PROMPT, (CUT, GOOD), (0.75, -1.0), (1.0, 0.5), (-3.25, -4.125))
    unfilled = Preference(OTHER, (EMPTY, GOOD), (2.0, 1.0), (1.0, 1.0))
    write_preferences(tmp_path / "preferences.parquet", [pair, unfilled])
    first, second = pq.read_table(tmp_path / "preferences.parquet").to_pylist()
    assert json.loads(first.pop("messages"))[0]["role"] == "user"
    assert first == {
        "prompt_id": "p000001",
        "chosen": "half ?",
        "rejected": "fine 🙂",
        "scores": [0.75, -1.0],
        "weights": [1.0, 0.5],
        "reference_logps": [-3.25, -4.125],
        "indices": [1, 0],
        "prompt_token_ids": [5, 6, 7],
        "token_ids": [[13], [11, 12]],
    } | dict.fromkeys(
        (
            "kl_prompt_token_ids",
            "kl_token_ids",
            "kl_sampler_logp",
            "kl_reference_logp",
            "reference_logprobs",
            "old_logprobs",
        )
    )
    assert (second["reference_logps"], second["token_ids"]) == ([], [[], [11, 12]])


def test_preferences_come_back_with_their_kl_samples(tmp_path: Path) -> None:
    """Also one without a token, and one whose prompt is another than the preference's."""
    pair = Preference(PROMPT, (CUT, GOOD), (0.75, -1.0), (1.0, 0.5), (-3.25, -4.125))
    samples = (KlSample((9, 9), (4, 2), -1.5, -2.25), KlSample(PROMPT.token_ids, (), 0.0, 0.0), None)
    written = tuple(replace(pair, kl_sample=sample) for sample in samples)
    write_preferences(tmp_path / "preferences.parquet", written)
    assert read_preferences(tmp_path / "preferences.parquet", [PROMPT], [CUT, GOOD]) == written


def test_log_probs_by_token_come_back_bit_by_bit(tmp_path: Path) -> None:
    """They are fp32 in the trainer; a completion may have no token."""
    third = struct.unpack("f", struct.pack("f", -1 / 3))[0]
    pair = Preference(PROMPT, (EMPTY_OF_P, GOOD), (0.75, -1.0), (1.0, 0.5), (-3.25, -4.125))
    written = (
        replace(pair, reference_logprobs=((), (third, -2.0)), old_logprobs=((), (-0.5, third))),
        replace(pair, old_logprobs=((), (-0.5, third))),
        pair,
    )
    write_preferences(tmp_path / "p.parquet", written)
    assert read_preferences(tmp_path / "p.parquet", [PROMPT], [EMPTY_OF_P, GOOD]) == written


def test_log_probs_of_other_tokens_are_refused(tmp_path: Path) -> None:
    short = Preference(PROMPT, (CUT, GOOD), (1.0, 0.0), (1.0, 1.0), (-3.0, -4.0), old_logprobs=((-1.0,), (-1.0,)))
    write_preferences(tmp_path / "p.parquet", [short])
    with pytest.raises(RecordError, match="row 0: old_logprobs has another number of values than the answers have tok"):
        read_preferences(tmp_path / "p.parquet", [PROMPT], [CUT, GOOD])


def test_no_rows_keep_the_columns(tmp_path: Path) -> None:
    write_candidates(tmp_path / "c.parquet", [], [], [])
    write_preferences(tmp_path / "p.parquet", [])
    assert pq.read_table(tmp_path / "c.parquet").num_rows == 0
    assert "reference_logps" in pq.read_table(tmp_path / "p.parquet").column_names


def test_scores_must_be_parallel_to_candidates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write_candidates(tmp_path / "c.parquet", [PROMPT], [GOOD, CUT], [Score(1.0)])
    assert leftovers(tmp_path) == []


def test_a_file_is_published_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"

    def write(temporary: Path) -> None:
        temporary.write_text("first")
        assert temporary.parent == path.parent and not path.exists()

    publish_file(path, write)
    assert path.read_text() == "first"
    publish_text(path, "zweite – Fassung")
    assert path.read_bytes() == "zweite – Fassung".encode()
    assert leftovers(path.parent) == ["report.json"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    publish_text(path, "whole")

    def write(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match="cannot be written: No space left on device; free some space, then run"):
        publish_file(path, write)
    with pytest.raises(UnicodeEncodeError):
        publish_text(path, "\ud83d")
    assert path.read_text() == "whole" and leftovers(tmp_path) == ["report.json"]


def test_a_folder_is_published_once(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / "staging" / "sub").mkdir(parents=True)
        (tmp_path / "staging" / "sub" / "file").write_text(text)
        if text == "first":
            publish_folder(tmp_path / "staging", tmp_path / "final")
    assert leftovers(tmp_path) == ["final", "staging"]
    with pytest.raises(OSError, match="not empty"):
        publish_folder(tmp_path / "staging", tmp_path / "final")
    assert (tmp_path / "final" / "sub" / "file").read_text() == "first"


def test_a_run_directory_is_created_once(tmp_path: Path) -> None:
    config = parse_config({"run": {"name": "one", "dir": str(tmp_path / "runs")}}, ["model.lora.r=4"])
    directory = create_run(config.run, config)
    assert directory.path == tmp_path / "runs" / "one"
    assert directory.config() == config == open_run(directory.path).config()
    with pytest.raises(ConfigError, match=r"runs/one exists already and is no run \(no config\.yaml\)"):
        (directory.path / "config.yaml").rename(directory.path / "other.yaml")
        create_run(config.run, config)
    (directory.path / "other.yaml").rename(directory.path / "config.yaml")
    assert directory.config() == config


def test_a_relative_run_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_run(RunBlock(dir=Path("runs")), OnlineDpoConfig()).path == tmp_path / "runs" / "online-dpo"
    assert open_run(Path("runs/online-dpo")).path == tmp_path / "runs" / "online-dpo"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory; set run.dir to a writable folder"):
        create_run(RunBlock(dir=tmp_path / "file"), OnlineDpoConfig())


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("file", "file/one cannot be written: Not a directory; set run.dir"),
        ("/proc/raylign/runs", "/proc/raylign/runs/one cannot be written: No such file or directory; set run.dir"),
        ("taken", "taken/one exists already and is no run"),
        ("new/runs", None),
    ],
)
def test_where_a_run_cannot_begin_is_told_and_nothing_is_left(folder: str, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken/one").mkdir(parents=True)
    (tmp_path / "taken/one/notes.txt").write_text("no run")
    before = {*tmp_path.rglob("*")}
    config = parse_config({"run": {"name": "one", "dir": str(tmp_path / folder)}})
    with pytest.raises(ConfigError, match=re.escape(message)) if message else nullcontext():
        require_continuable(config)
    assert {*tmp_path.rglob("*")} == before


def test_a_folder_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run directory: it has no config\.yaml"):
        open_run(tmp_path)


SEALED = ["manifest.json", "progress.json", "weights"]


def save(directory: RunDirectory, version: int, keep: int | None) -> None:
    with directory.checkpoint_store(keep).new(version, (), True, 0) as folder:
        (folder / "weights").write_text(str(version))


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4]), (None, [1, 2, 3, 4])])
def test_the_newest_checkpoints_are_kept(keep: int | None, left: list[int], tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for version in range(1, 5):
        save(directory, version, keep)
    assert directory.checkpoints() == [directory.checkpoint(version) for version in left]
    assert [(path / "weights").read_text() for path in directory.checkpoints()] == [str(v) for v in left]
    assert leftovers(tmp_path / "checkpoints") == [f"{version:04d}" for version in left]


def test_the_newest_checkpoint_is_kept_past_four_digits(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for version in (9998, 9999, 10000):
        save(directory, version, keep=2)
    assert directory.checkpoints() == [directory.checkpoint(9999), directory.checkpoint(10000)]


def test_what_a_killed_save_left_behind_is_replaced(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    save(directory, 1, keep=1)
    with pytest.raises(RuntimeError, match="killed"), directory.checkpoint_store(1).new(2, (), True, 0) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")
    assert directory.checkpoints() == [directory.checkpoint(1)]
    with directory.checkpoint_store(1).new(2, (), True, 0) as folder:
        assert list(folder.iterdir()) == [] and directory.checkpoint(1).exists()
        (folder / "weights").write_text("2")
    assert directory.checkpoints() == [directory.checkpoint(2)]
    assert leftovers(tmp_path / "checkpoints") == ["0002"] and leftovers(directory.checkpoint(2)) == SEALED


def test_reports_read_back_equal_and_in_order(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.reports() == [] and directory.checkpoints() == []
    directory.write_baseline(EVALUATION)
    for index in (2, 1, 11):
        directory.write_report(report(index))
    directory.round(12).mkdir()
    assert directory.reports() == [report(1), report(2), report(11)]
    baseline = json.loads((directory.round(0) / "report.json").read_text())
    assert Evaluation(**baseline["evaluation"]) == EVALUATION


def test_a_report_without_the_metrics_of_scoring_is_read(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_report(replace(report(1), scoring={"judge/items": 8.0}))
    assert directory.reports()[0].scoring == {"judge/items": 8.0}
    path = directory.round(1) / "report.json"
    raw = json.loads(path.read_text())
    del raw["scoring"]
    path.write_text(json.dumps(raw))
    assert directory.reports() == [report(1)] and report(1).scoring == {}


def test_paths_of_a_run() -> None:
    directory = RunDirectory(Path("/runs/x"))
    assert directory.round(3) == Path("/runs/x/rounds/0003")
    assert directory.checkpoint(12) == Path("/runs/x/checkpoints/0012")

"""People in the loop against a real MLflow server: from the queue to a trained round, and back to a report."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner, Result

from raylign.config import OnlineDpoConfig
from raylign.errors import RaylignError, Waiting
from raylign.records import Evaluation
from raylign.review.record import ReviewRecord
from raylign.review.run_review import RunReview
from raylign.run.directory import RunDirectory, run_path
from raylign.run.tables import read_candidates
from recipes.commands.cli import app
from recipes.commands.failures import WAITING
from tests.integration.played_reviews import EXPERIMENT, Reviewer, config, fewer_good, play
from tests.mlflow_servers import free_port, mlflow_server

QUEUE = "asks: pairs"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server"), free_port()) as uri:
        yield uri


def review(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["review", *arguments])


def statuses(uri: str) -> list[str]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return [run.info.status for run in client.search_runs([experiment.experiment_id])]


def test_a_round_trains_on_what_people_said(server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asks = config(tmp_path, server)
    run = run_path(asks.run)
    with pytest.raises(Waiting, match=r"6 of 6 questions .*/review-queue\?selectedQueueId=rq-") as waiting:
        play(asks, tmp_path)
    assert server in str(waiting.value)
    assert statuses(server) == ["SCHEDULED", "SCHEDULED"]
    ann = Reviewer(server, QUEUE)
    items = ann.items()
    with pytest.raises(Waiting, match="6 of 6"):
        play(asks, tmp_path)
    assert sorted(ann.items()) == sorted(items) and len(items) == 6
    shown = ann.store.get_trace_info(items[0])
    assert re.fullmatch(r"Write [ab]\. !\\\[[ab]\]\(http://x\.invalid/y\)", shown.request_preview or "")
    assert re.fullmatch(r"\*\*Answer A\*\*\n\n> .*\n\n---\n\n\*\*Answer B\*\*\n\n> .*", shown.response_preview or "")

    ann.answer(items[:5], fewer_good, "fewer words")
    ann.answer(items[5:], lambda a, b: "C")
    with caplog.at_level(logging.WARNING), pytest.raises(Waiting, match="1 of 6"):
        play(asks, tmp_path)
    assert "1 answer(s) are none of A, B and tie" in caplog.text
    ann.answer(items[5:], fewer_good)
    events = play(asks, tmp_path)
    assert not [event for event in events if event in ("sample a", "sample b")]  # of an earlier start
    rows = pq.read_table(run / "rounds/0001/preferences.parquet").to_pylist()
    assert {(row["chosen"].count("good"), row["rejected"].count("good")) for row in rows} == {(0, 2)}
    assert [row["scores"] for row in rows] == [[1.0, 0.0]] * 2
    assert statuses(server) == ["FINISHED", "FINISHED"]

    pulled = review("pull", str(run))
    assert pulled.exit_code == 0, pulled.output
    report = json.loads((run / "review/report.json").read_text())
    assert (report["pairs"], report["answered"], report["answers"], report["reviewers"]) == (6, 6, 6, 1)
    assert report["chosen"] == {"scoring": 6} and report["scorers"] == {}
    said = ReviewRecord(run).said()
    assert {answer.why for answer in said.answers} == {"fewer words", ""}


def test_a_deleted_queue_is_made_again_and_takes_no_answer(server: str, tmp_path: Path) -> None:
    asks = config(tmp_path, server, "loses")
    with pytest.raises(Waiting):
        play(asks, tmp_path)
    bob = Reviewer(server, "loses: pairs", "bob")
    items = bob.items()
    bob.answer(items[:2], fewer_good)
    bob.decline(items[2])
    with pytest.raises(Waiting, match="3 of 6"):
        play(asks, tmp_path)
    bob.store.delete_review_queue(bob.queue.queue_id)
    bob.store.delete_traces(bob.experiment, trace_ids=[items[0], items[3]])
    with pytest.raises(Waiting, match="3 of 6"):
        play(asks, tmp_path)
    again = Reviewer(server, "loses: pairs", "bob")
    assert sorted(again.items()) == sorted(items[3:]) and again.queue.queue_id != bob.queue.queue_id, "what is open"
    record = ReviewRecord(run_path(asks.run))
    assert len(record.said().answers) == 2
    again.answer(items[3:], fewer_good)
    play(asks, tmp_path)


WEIGHED = """scoring={type: weighted, weights: {people: 1.0, words: 2.0}, scorers: {
    people: {type: human}, words: {type: function, function: some:words}}}"""


def test_people_are_weighed_with_a_function(server: str, tmp_path: Path) -> None:
    """Who likes fewer words is outvoted by twice the number of words."""
    asks = config(tmp_path, server, "weighs", WEIGHED)
    with pytest.raises(Waiting, match="6 of 6"):
        play(asks, tmp_path)
    ann = Reviewer(server, "weighs: pairs")
    ann.answer(ann.items(), fewer_good)
    play(asks, tmp_path)
    run = run_path(asks.run)
    _, scores = read_candidates(run / "rounds/0001/candidates.parquet")
    found = sorted((score.parts["people"], score.parts["words"], score.value) for score in scores)
    assert found == [(0.0, 2.0, 4.0)] * 2 + [(0.5, 1.0, 2.5)] * 2 + [(1.0, 0.0, 1.0)] * 2
    rows = pq.read_table(run / "rounds/0001/preferences.parquet").to_pylist()
    assert {(row["chosen"].count("good"), row["rejected"].count("good")) for row in rows} == {(2, 0)}
    (report,) = RunDirectory(run).reports()
    assert isinstance(report.evaluation, Evaluation) and report.evaluation.win_rate == 1.0, "by `held_out`"
    pulled = review("pull", str(run))
    assert pulled.exit_code == 0, pulled.output
    (words,) = json.loads((run / "review/report.json").read_text())["scorers"].items()
    assert (words[0], words[1]["same"]["count"], words[1]["same"]["value"]) == ("words", 6, 0.0)


def test_what_is_sampled_again_is_asked_about_beside_what_was_there(server: str, tmp_path: Path) -> None:
    asks = config(tmp_path, server, "again", "sampling.max_resamples=1")
    with pytest.raises(Waiting, match="6 of 6"):
        play(asks, tmp_path)
    ann = Reviewer(server, "again: pairs")
    ann.answer(ann.items(), lambda a, b: "tie")
    with pytest.raises(Waiting, match="24 of 30"):
        play(asks, tmp_path)
    ann.answer(ann.items(), fewer_good)  # of the first ones, too, which are corrected so
    events = play(asks, tmp_path)
    assert not [event for event in events if event in ("sample a", "sample b")]  # of an earlier start
    _, scores = read_candidates(run_path(asks.run) / "rounds/0001/candidates-1.parquet")
    assert len(scores) == 12 and {score.value for score in scores} == {0.1, 0.5, 0.9}


def test_pairs_are_sent_once_and_agreement_is_measured(server: str, tmp_path: Path) -> None:
    asks = config(tmp_path, server, "sends")
    with pytest.raises(Waiting):
        play(asks, tmp_path)
    ann = Reviewer(server, "sends: pairs")
    ann.answer(ann.items(), fewer_good)
    play(asks, tmp_path)
    run = str(run_path(asks.run))
    for _ in range(2):  # every pair was asked about as a score
        sent = review("send", run, "--by", "random", "--count", "4")
        assert sent.exit_code == 0 and sent.output.startswith("0 pairs chosen by random, 0 sent; the queue has 6")
    refused = review("send", run, "--by", "disagreement")
    assert refused.exit_code == 1 and "people aside, contradict each other" in refused.output
    bob = Reviewer(server, "sends: pairs", "bob")
    bob.answer(bob.items(), lambda a, b: "A")
    pulled = review("pull", run)
    report = json.loads((Path(run) / "review/report.json").read_text())
    assert "12 answers of 2 reviewers" in pulled.output
    assert report["between_people"]["count"] == 6


def test_a_server_that_is_away_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    asks = config(tmp_path, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RaylignError, match=r"MLflow at http://127.*, where people answer, fails") as error:
        RunReview(asks)
    assert "run the same command again" in error.value.cure


def test_waiting_has_a_status_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def waits(config: OnlineDpoConfig) -> None:
        raise Waiting("waiting for people: 3 of 6 questions")

    monkeypatch.setattr("recipes.online_dpo.require_answers", waits)
    (tmp_path / "asks.yaml").write_text("scoring: {type: human}\n")
    ended = CliRunner().invoke(app, ["run", str(tmp_path / "asks.yaml"), f"run.dir={tmp_path}"])
    assert ended.exit_code == WAITING == 3
    assert ended.output.strip() == "waiting for people: 3 of 6 questions"

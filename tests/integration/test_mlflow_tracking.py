"""A campaign through Tracker into a real MLflow on sqlite: what a person finds there, and what an outage costs."""

import json
import logging
import math
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.data
import pytest
import requests
import yaml
from mlflow.entities import Dataset, Run
from mlflow.tracking import MlflowClient

from raylign.config import dump_config, parse_config
from raylign.records import RoundReport
from raylign.tracking.facts import flatten
from raylign.tracking.feed import MlflowFeed
from raylign.tracking.journal import Journal, read_events
from raylign.tracking.tracker import Tracker, open_tracker
from raylign.tracking.uri import default_uri, sqlite_path
from tests.integration.played_runs import (
    ATTACK,
    CONFIG,
    DIGEST,
    EVENTS,
    all_runs,
    all_traces,
    assert_recorded_once,
    campaign_and_rounds,
    evaluation,
    history,
    open_run,
    play_round,
    play_run,
    start,
)
from tests.mlflow_servers import put_database, wait_until


def artifact_names(client: MlflowClient, run: Run, folder: str = "") -> set[str]:
    return {file.path for file in client.list_artifacts(run.info.run_id, folder or None)}


def datasets(run: Run) -> list[Dataset]:
    assert run.inputs is not None
    return [item.dataset for item in run.inputs.dataset_inputs]


def profile(dataset: Dataset) -> dict[str, int]:
    assert dataset.profile is not None
    return dict(json.loads(dataset.profile))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "my runs" / "demo"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def uri(run_dir: Path) -> str:
    uri = default_uri(CONFIG.tracking, run_dir)
    assert put_database(sqlite_path(uri)) == uri
    return uri


@pytest.fixture
def closed_uri() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def requesting(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread of each request to a server, as it begins."""
    threads: list[threading.Thread] = []
    send = requests.Session.send

    def noted(self: requests.Session, *arguments: Any, **options: Any) -> requests.Response:
        threads.append(threading.current_thread())
        return send(self, *arguments, **options)

    monkeypatch.setattr(requests.Session, "send", noted)
    return threads


@pytest.fixture
def silent_uri() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that is wholly in MLflow, in a database that its tracker has made."""
    path = tmp_path_factory.mktemp("my runs") / "demo"
    path.mkdir()
    tracker = open_tracker(path, CONFIG.tracking)
    play_run(tracker, path)
    assert tracker.close("FINISHED", timeout_s=120) == 0
    return path


@pytest.fixture
def client(finished: Path) -> MlflowClient:
    """Of the database with the finished run."""
    return MlflowClient(tracking_uri=default_uri(CONFIG.tracking, finished))


def test_a_campaign_is_a_run_with_a_run_per_round(finished: Path, client: MlflowClient) -> None:
    assert_recorded_once(client)
    parent, rounds = campaign_and_rounds(client)
    assert parent.info.run_name == "demo"
    assert parent.data.params.keys() == flatten(CONFIG.model_dump(mode="json")).keys()
    assert parent.data.params["loss.beta"] == "0.1"
    assert parent.data.params["sampling.max_new_tokens"] == "64"
    assert parent.data.tags["mlflow.source.git.commit"] == parent.data.tags["git.sha"] == "abc123"
    assert parent.data.tags["raylign.run_dir"] == str(finished)
    events = list(read_events(finished / "events.jsonl"))
    assert len(events) == EVENTS
    assert parent.info.start_time == int(events[0].time * 1000)
    assert parent.info.end_time == int(events[-1].time * 1000)
    assert rounds[0].info.end_time <= rounds[1].info.start_time


def test_capability_has_metrics_of_its_own(run_dir: Path, uri: str) -> None:
    tracker = open_tracker(run_dir, CONFIG.tracking)
    tracker.run_started(CONFIG, {})
    tracker.baseline(replace(evaluation(0.1), capability={"perplexity": 12.5, "perplexity_low": 11.0}))
    tracker.round_started(1)
    told = {"perplexity": 12.0, "perplexity_low": 11.0, "perplexity_change": -0.5}
    after = replace(evaluation(0.2), capability=told)
    tracker.round_finished(RoundReport(1, 1, {"preferences": 1}, (), {}, after, {}))
    assert tracker.close("FINISHED", timeout_s=120) == 0
    client = MlflowClient(tracking_uri=uri)
    parent, rounds = campaign_and_rounds(client)
    assert history(client, parent, "eval/capability/perplexity") == [(0, 12.5), (1, 12.0)]
    assert rounds[0].data.metrics["run/capability/perplexity_change"] == -0.5
    assert rounds[0].data.metrics["run/capability/perplexity_low"] == 11.0


def test_the_page_of_a_run_tells_what_came_of_it(run_dir: Path, uri: str) -> None:
    """Description, source and tags as a person finds them, renewed after each round; the figures are artifacts."""
    tracker = open_run(run_dir, uri)
    start(tracker, run_dir)
    play_round(tracker, run_dir, 1)
    wait_until((run_dir.parent / "mlflow.db").exists)  # made whole by the feed; a client would make its own
    client = MlflowClient(tracking_uri=uri)

    def note() -> str:
        if client.get_experiment_by_name("tests") is None:
            return ""
        found = [run for run in all_runs(client) if "raylign.round" not in run.data.tags]
        return found[0].data.tags.get("mlflow.note.content", "") if found else ""

    wait_until(lambda: "1 of 5 rounds, running" in note())
    play_round(tracker, run_dir, 2)
    assert tracker.close("KILLED", timeout_s=120) == 0
    parent, _ = campaign_and_rounds(client)
    tags = parent.data.tags
    assert "held-out score went from 0.100 [0.000, 0.200] to 0.500 [0.400, 0.600] in 2 of 5 rounds" in (
        tags["mlflow.note.content"].replace("\\", "")
    )
    assert "2 of 5 rounds, killed." in tags["mlflow.note.content"]
    assert f"run_uuid={parent.info.run_id}" in tags["mlflow.note.content"]
    expected = {"recipe": "online_dpo", "loss": "sigmoid", "verdict": "better", "status": "killed", "rounds": "2 of 5"}
    assert {name: tags[name] for name in expected} == expected
    assert {"model", "scorer"} <= tags.keys()
    assert (tags["mlflow.source.type"], tags["mlflow.source.name"]) == ("LOCAL", "recipe.yaml")
    assert artifact_names(client, parent, "figures") == {
        f"figures/{name}.png" for name in ("score", "frontier", "margins", "yield", "seconds")
    }
    page = Path(client.download_artifacts(parent.info.run_id, "report.html")).read_text()
    assert page.count("data:image/png;base64,") == 5
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None and "Model training" in experiment.tags["mlflow.note.content"]


def test_a_damaged_report_costs_the_page_and_nothing_else(
    run_dir: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_run(run_dir, uri)
    play_run(tracker, run_dir)
    (run_dir / "rounds/0000/report.json").write_text("{")
    assert tracker.close("FINISHED", timeout_s=120) == 0
    (run_dir / "mlflow.json").unlink()
    assert MlflowFeed(run_dir, uri, "tests").close(timeout_s=120) == 0
    assert_recorded_once(MlflowClient(tracking_uri=uri))
    assert "the run's page in MLflow stays as it is" in caplog.text


def test_datasets_and_artifacts_can_be_opened(finished: Path, client: MlflowClient) -> None:
    parent, rounds = campaign_and_rounds(client)
    (prompts,) = datasets(parent)
    assert (prompts.name, prompts.digest) == ("prompts", DIGEST[:36])
    assert profile(prompts) == {"train": 100, "held_out": 32}
    (preferences,) = datasets(rounds[1])
    assert preferences.name == "preferences-round-2"
    assert profile(preferences) == {"num_rows": 3}
    source = Path(mlflow.data.get_source(preferences).load())
    assert source == finished / "rounds/0002/preferences.parquet"
    assert parent.info.artifact_uri.startswith((finished.parent / "mlartifacts").as_uri())
    config = Path(client.download_artifacts(parent.info.run_id, "config.yaml")).read_text()
    assert yaml.safe_load(config) == yaml.safe_load(dump_config(CONFIG))
    folder = "rounds/0002"
    stems = ("preferences.parquet", "preferences.html", "samples.jsonl", "samples.parquet", "samples.html")
    assert artifact_names(client, rounds[1], folder) == {f"{folder}/{stem}" for stem in stems}
    for name in ("preferences", "samples"):
        page = Path(client.download_artifacts(rounds[1].info.run_id, f"{folder}/{name}.html")).read_text()
        assert "<script" not in page and "&lt;script&gt;" in page


def test_traces_are_found_by_tag_text_and_feedback(client: MlflowClient) -> None:
    def prompts(condition: str) -> list[str]:
        return [trace.info.trace_metadata["prompt_id"] for trace in all_traces(client, condition)]

    held_out = "trace.name = 'held-out'"
    assert prompts(f"tag.round = '2' AND {held_out}") == ["h000000", "h000001", "h000002"]
    assert prompts(f"tag.version = '1' AND {held_out} AND trace.text LIKE '%answer 2 <script>%'") == ["h000002"]
    assert prompts("feedback.score > 2.001") == ["h000002"]
    assert prompts("feedback.`training.margin` > 0.6 AND tag.round = '1'") == ["h000001", "h000002"]
    assert len(prompts("metadata.mlflow.trace.session LIKE 'demo-%'")) == 10
    newest = all_traces(client)[0]
    assert newest.info.tags["round"] == "2"
    assert newest.data.spans[0].inputs == {"messages": [{"role": "user", "content": "question 0"}]}
    assert newest.data.spans[0].outputs["choices"][0]["message"]["content"] == f"answer 0 {ATTACK}"
    (unscored,) = [
        trace for trace in all_traces(client, f"tag.round = '2' AND {held_out}") if trace.info.assessments[0].error
    ]
    assert unscored.info.assessments[0].rationale == "no answer within 5 s"
    assert len({trace.info.trace_metadata["mlflow.trace.session"] for trace in all_traces(client)}) == 1


def test_no_traces_where_they_are_off(run_dir: Path, uri: str) -> None:
    tracker = open_run(run_dir, uri)
    start(
        tracker, run_dir, parse_config(CONFIG.model_dump(), ["tracking.traces=false", "tracking.traced_preferences=0"])
    )
    play_round(tracker, run_dir, 1)
    assert tracker.close("FINISHED", timeout_s=120) == 0
    assert all_traces(MlflowClient(tracking_uri=uri)) == []


def test_an_outage_blocks_nothing_and_loses_nothing(
    run_dir: Path, uri: str, closed_uri: str, requesting: list[threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tracker = open_run(run_dir, closed_uri)
        play_run(tracker, run_dir)
        wait_until(lambda: len(requesting) > 1)  # it has been tried again
        assert tracker.close("FINISHED", timeout_s=1.0) == EVENTS
    (ours,) = [record.getMessage() for record in caplog.records if record.name.startswith("raylign")]
    assert "the run goes on" in ours
    assert [record.name for record in caplog.records if record.name.startswith("urllib3")] == []

    assert MlflowFeed(run_dir, uri, "tests").close(timeout_s=120) == 0
    assert_recorded_once(MlflowClient(tracking_uri=uri))


@pytest.mark.parametrize("server", ["closed_uri", "silent_uri"])
def test_tracker_never_waits_for_mlflow(
    run_dir: Path, server: str, requesting: list[threading.Thread], request: pytest.FixtureRequest
) -> None:
    """Another thread makes the requests, and its end is waited for as long as is said."""
    tracker = open_run(run_dir, request.getfixturevalue(server))
    start(tracker, run_dir)
    tracker.round_started(1)
    for step in range(1, 101):
        tracker.step(1, step, {"loss": 0.5})
    wait_until(lambda: requesting != [])
    assert tracker.close("KILLED", timeout_s=1.0) == 106
    assert threading.current_thread() not in requesting


def test_replaying_everything_again_adds_nothing(run_dir: Path, uri: str) -> None:
    tracker = open_run(run_dir, uri)
    play_run(tracker, run_dir)
    assert tracker.close("FINISHED", timeout_s=120) == 0
    (run_dir / "mlflow.json").unlink()
    assert MlflowFeed(run_dir, uri, "tests").close(timeout_s=120) == 0
    client = MlflowClient(tracking_uri=uri)
    assert_recorded_once(client)
    _, rounds = campaign_and_rounds(client)
    assert len(datasets(rounds[0])) == 1


def test_a_run_deleted_in_mlflow_is_sent_again(run_dir: Path, uri: str) -> None:
    tracker = open_run(run_dir, uri)
    play_run(tracker, run_dir)
    assert tracker.close("FINISHED", timeout_s=120) == 0
    client = MlflowClient(tracking_uri=uri)
    for run in all_runs(client):
        client.delete_run(run.info.run_id)
    assert MlflowFeed(run_dir, uri, "tests").close(timeout_s=120) == 0
    assert_recorded_once(client)


def test_a_killed_campaign_resumes_in_the_same_run(run_dir: Path, uri: str) -> None:
    journal = Journal(run_dir / "events.jsonl")
    feed = MlflowFeed(run_dir, uri, "tests")
    killed = Tracker(journal, feed)
    start(killed, run_dir)
    killed.round_started(1)
    killed.step(1, 1, {"loss": 9.0, "grad_norm": math.inf})
    journal.close()  # no campaign_finished
    assert feed.close(timeout_s=120) == 0

    longer = parse_config(CONFIG.model_dump(), ["schedule.rounds=7"])
    resumed = open_run(run_dir, uri)
    start(resumed, run_dir, longer)
    play_round(resumed, run_dir, 1)
    resumed.round_started(2)
    assert resumed.close("KILLED", timeout_s=120) == 0

    parent, rounds = campaign_and_rounds(MlflowClient(tracking_uri=uri))
    assert [run.data.tags["raylign.round"] for run in rounds] == ["1", "2"]
    assert [run.info.status for run in [parent, *rounds]] == ["KILLED", "FINISHED", "KILLED"]
    assert parent.data.params["schedule.rounds"] == "5"
    assert parent.data.tags["changed.schedule.rounds"] == "7"
    client = MlflowClient(tracking_uri=uri)
    assert history(client, rounds[0], "loss") == [(1, 9.0), (2, 0.5)]
    assert history(client, rounds[0], "non_finite") == [(1, 1)]
    assert history(client, rounds[0], "grad_norm") == []
    assert history(client, rounds[0], "run/seconds/sample") == [(1, 2.5)]


def test_a_finished_round_that_is_trained_again_stays_as_it_is(run_dir: Path, uri: str) -> None:
    tracker = open_run(run_dir, uri)
    play_run(tracker, run_dir)
    assert tracker.close("FINISHED", timeout_s=120) == 0
    again = open_run(run_dir, uri)
    start(again, run_dir)
    again.round_started(2)
    again.artifact(run_dir / "rounds/0002/preferences.parquet", "preferences", 2)
    again.step(2, 1, {"loss": 0.5})
    again.stage(2, "train", 9.0)
    assert again.close("FINISHED", timeout_s=120) == 0
    client = MlflowClient(tracking_uri=uri)
    parent, rounds = campaign_and_rounds(client)
    assert [run.info.status for run in (parent, *rounds)] == ["FINISHED"] * 3
    assert history(client, rounds[1], "loss") == [(1, 0.5), (2, 0.3)]
    assert history(client, rounds[1], "run/seconds/train") == [(2, 1.5)]
    assert len(datasets(parent)) == len(datasets(rounds[1])) == 1


def test_what_the_guard_did_is_a_tag_of_its_round(run_dir: Path, uri: str) -> None:
    tracker = open_run(run_dir, uri)
    start(tracker, run_dir)
    play_round(tracker, run_dir, 1)
    tracker.guard(1, ["kl is 3, above 2: warning", "gold_drop is 1, above 0.5: the run ends here"])
    assert tracker.close("FINISHED") == 0
    parent, _ = campaign_and_rounds(MlflowClient(uri))
    told = "kl is 3, above 2: warning; gold_drop is 1, above 0.5: the run ends here"
    assert parent.data.tags["guard.round_1"] == told and parent.info.status == "FINISHED"

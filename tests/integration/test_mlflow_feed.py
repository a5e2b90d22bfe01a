"""The MLflow feed against real stores: shared ones, long journals, and requests it cannot make."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric, Run
from mlflow.tracking import MlflowClient

from raylign.errors import RaylignError
from raylign.tracking.feed import MlflowFeed, load_state
from raylign.tracking.journal import Journal, read_events
from tests.integration.played_runs import all_runs, history
from tests.mlflow_servers import put_database

CAMPAIGN = {"campaign": "c1", "name": "demo", "params": {}, "tags": {}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    path.mkdir()
    return path


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return put_database(tmp_path / "mlflow.db")


def round_run(client: MlflowClient) -> Run:
    (run,) = [run for run in all_runs(client) if "mlflow.parentRunId" in run.data.tags]
    return run


def test_runs_that_start_together_share_a_new_database(run_dir: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    start_feed = "import sys, pathlib; from raylign.tracking.feed import MlflowFeed as F; " + (
        "sys.exit(F(pathlib.Path(sys.argv[1]), sys.argv[2], 'tests').close(60))"
    )
    processes = []
    for name in ("a", "b"):
        with Journal(run_dir.parent / name / "events.jsonl") as journal:
            journal.append("campaign_started", {"campaign": name, "name": name, "params": {}, "tags": {}})
        command = [sys.executable, "-c", start_feed, str(journal.path.parent), uri]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(str(run.info.run_name) for run in all_runs(MlflowClient(tracking_uri=uri))) == ["a", "b"]
    assert [output for output in outputs if "INFO" in output] == []


def test_many_steps_are_sent_in_few_calls(run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(run_dir / "events.jsonl") as journal:
        journal.append("campaign_started", CAMPAIGN)
        journal.append("round_started", {"round": 1})
        for step in range(1, 601):
            journal.append(
                "step", {"round": 1, "step": step, "metrics": {"loss": step / 8, "lr": 1e-6, "odd name*": 1}}
            )
    sizes: list[int] = []
    log_batch = MlflowClient.log_batch

    def counted(self: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), **rest: Any) -> None:
        sizes.append(len(metrics))
        log_batch(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    assert MlflowFeed(run_dir, uri, "tests").close(timeout_s=120) == 0
    assert sum(sizes) == 1800 and max(sizes) <= 1000 and len(sizes) < 10
    client = MlflowClient(tracking_uri=uri)
    run = round_run(client)
    assert history(client, run, "loss") == [(step, step / 8) for step in range(1, 601)]
    assert run.data.metrics["odd name_"] == 1
    assert load_state(run_dir, uri).sequence == 602


def test_an_error_of_ours_surfaces_at_close_and_the_journal_is_whole(run_dir: Path, uri: str) -> None:
    with Journal(run_dir / "events.jsonl") as journal:
        journal.append("round_started", {"round": 1})
        feed = MlflowFeed(run_dir, uri, "tests")
        journal.append("campaign_finished", {"status": "FAILED"})
    with pytest.raises(RaylignError, match="event 1 .* before campaign_started"):
        feed.close(timeout_s=120)
    assert [event.name for event in read_events(run_dir / "events.jsonl")] == ["round_started", "campaign_finished"]


def test_what_mlflow_calls_invalid_is_missing_and_said(
    run_dir: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Journal(run_dir / "events.jsonl") as journal:
        journal.append("campaign_started", CAMPAIGN)
        journal.append("round_started", {"round": 1})
        journal.append("step", {"round": 1, "step": 1, "metrics": {"/absolute": 1.0}})
    assert MlflowFeed(run_dir, uri, "tests").close(timeout_s=120) == 3
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("raylign")]
    assert "takes no more of this run" in line and "absolute" in line

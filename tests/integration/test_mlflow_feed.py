"""The MLflow feed against real stores: shared and dying ones, long journals, and requests it cannot make."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from raylign.tracking.feed import MlflowFeed
from raylign.tracking.journal import Journal, read_events
from raylign.tracking.state import load_state

CAMPAIGN = {"campaign": "c1", "name": "demo", "params": {}, "tags": {}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    path.mkdir()
    return path


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def all_runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def round_run(client: MlflowClient) -> Run:
    (run,) = [run for run in all_runs(client) if "mlflow.parentRunId" in run.data.tags]
    return run


def history(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def wait_until(ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"not ready within {timeout_s} s"
        time.sleep(0.2)


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A server that is killed, not asked to stop, at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def healthy() -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=2).ok
        except requests.RequestException:
            return False

    try:
        wait_until(healthy)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_a_server_that_dies_and_returns_misses_nothing(run_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    with Journal(run_dir / "events.jsonl") as journal:
        journal.append("campaign_started", CAMPAIGN)
        journal.append("round_started", {"round": 1})
        with mlflow_server(tmp_path, port):
            feed = MlflowFeed(run_dir, uri, "tests")
            wait_until(lambda: load_state(run_dir, uri).sequence == 2)
        for step in range(1, 21):
            journal.append("step", {"round": 1, "step": step, "metrics": {"loss": step / 8}})
        time.sleep(3.0)
        assert load_state(run_dir, uri).sequence == 2
    with mlflow_server(tmp_path, port):
        assert feed.close(timeout_s=60) == 0
        client = MlflowClient(tracking_uri=uri)
        assert history(client, round_run(client), "loss") == [(step, step / 8) for step in range(1, 21)]


def test_runs_that_start_together_share_a_new_database(run_dir: Path, uri: str) -> None:
    start_feed = "import sys, pathlib; from raylign.tracking.feed import MlflowFeed as F; " + (
        "sys.exit(F(pathlib.Path(sys.argv[1]), sys.argv[2], 'tests').close(60))"
    )
    processes = []
    for name in ("a", "b"):
        with Journal(run_dir.parent / name / "events.jsonl") as journal:
            journal.append("campaign_started", {"campaign": name, "name": name, "params": {}, "tags": {}})
        command = [sys.executable, "-c", start_feed, str(journal.path.parent), uri]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[1] for process in processes]
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
    with pytest.raises(KeyError, match="campaign"):
        feed.close(timeout_s=120)
    assert [event.name for event in read_events(run_dir / "events.jsonl")] == ["round_started", "campaign_finished"]


def test_what_mlflow_calls_invalid_surfaces_at_close(run_dir: Path, uri: str) -> None:
    with Journal(run_dir / "events.jsonl") as journal:
        journal.append("campaign_started", CAMPAIGN)
        journal.append("round_started", {"round": 1})
        journal.append("step", {"round": 1, "step": 1, "metrics": {"/absolute": 1.0}})
    with pytest.raises(MlflowException, match="absolute"):
        MlflowFeed(run_dir, uri, "tests").close(timeout_s=120)

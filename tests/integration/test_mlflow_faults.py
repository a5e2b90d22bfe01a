"""MLflow away, slow or silent, and a driver that is killed: the journal is whole, `raylign sync` brings the rest."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner, Result

from raylign.config import OnlineDpoConfig, parse_config
from raylign.tracking.feed import load_state
from raylign.tracking.journal import read_events
from recipes.commands.cli import app
from tests import faults
from tests.integration.played_runs import (
    EVENTS,
    TRACKING,
    all_runs,
    all_traces,
    assert_recorded_once,
    campaign_and_rounds,
    history,
    open_run,
    play_round,
    play_run,
    start,
)
from tests.mlflow_servers import START_S, free_port, mlflow_server, put_database, slow_proxy, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DELAY_S = 2.0


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("healthy"), free_port()) as uri:
        yield uri


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    path.mkdir()
    return path


def tracked_at(uri: str) -> OnlineDpoConfig:
    return parse_config({"run": {"name": "demo"}, "tracking": {**TRACKING, "uri": uri}})


def sync(run_dir: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["sync", str(run_dir), *options])


def journal_length(run_dir: Path) -> int:
    """Events in the journal, whose sequence has no gaps."""
    sequence = [event.sequence for event in read_events(run_dir / "events.jsonl")]
    assert sequence == list(range(1, len(sequence) + 1))
    return len(sequence)


def seconds_until_noticed(caplog: pytest.LogCaptureFixture) -> float:
    """Seconds from now until the feed says that MLflow fails."""
    began = time.monotonic()
    wait_until(lambda: "the run goes on" in caplog.text)
    return time.monotonic() - began


@pytest.mark.fault
def test_a_server_that_dies_and_returns(run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with mlflow_server(tmp_path, port) as uri:
        tracker = open_run(run_dir, uri)
        start(tracker, run_dir, tracked_at(uri))
        play_round(tracker, run_dir, 1)
        before = journal_length(run_dir)
        wait_until(lambda: load_state(run_dir, uri).sequence == before)
    play_round(tracker, run_dir, 2)
    detected = seconds_until_noticed(caplog)
    assert load_state(run_dir, uri).sequence == before
    with mlflow_server(tmp_path, port):
        back = time.monotonic()
        assert tracker.close("FINISHED", timeout_s=60) == 0
        recovered = time.monotonic() - back
        assert_recorded_once(MlflowClient(tracking_uri=uri))
    assert journal_length(run_dir) == EVENTS
    faults.record(
        "MLflow server away in the middle of a run",
        "kill -9 of the server, later the same server again",
        detected_s=detected,
        recovered_s=recovered,
        lost="nothing; every event once",
    )


@pytest.mark.fault
def test_a_server_that_never_returns(
    run_dir: Path, tmp_path: Path, healthy: str, caplog: pytest.LogCaptureFixture
) -> None:
    with mlflow_server(tmp_path, free_port()) as uri:
        tracker = open_run(run_dir, uri)
        start(tracker, run_dir, tracked_at(uri))
        wait_until(lambda: load_state(run_dir, uri).sequence == journal_length(run_dir))
    play_round(tracker, run_dir, 1)
    detected = seconds_until_noticed(caplog)
    play_round(tracker, run_dir, 2)
    missing = tracker.close("FINISHED", timeout_s=1)
    assert journal_length(run_dir) == EVENTS and missing == EVENTS - load_state(run_dir, uri).sequence > 0

    away = sync(run_dir, "--timeout", "2")
    assert away.exit_code == 1
    assert f"error: MLflow at {uri} failed for 2 s" in away.stderr
    assert f"it misses {missing} of {EVENTS} events" in away.stderr

    began = time.monotonic()
    elsewhere = sync(run_dir, "--uri", healthy)
    recovered = time.monotonic() - began
    assert elsewhere.exit_code == 0, elsewhere.output
    assert f"sent {EVENTS} of {EVENTS} events to MLflow at {healthy}" in elsewhere.stdout
    assert "status FINISHED" in elsewhere.stdout
    assert f"sent 0 of {EVENTS} events" in sync(run_dir, "--uri", healthy).stdout
    assert_recorded_once_at(healthy, run_dir)
    faults.record(
        "MLflow server gone for good",
        "kill -9 of the server; after the run `raylign sync RUN --uri` to another one",
        detected_s=detected,
        recovered_s=recovered,
        lost="nothing; every event once",
    )


def assert_recorded_once_at(uri: str, run_dir: Path) -> None:
    """The server has other runs, too: the one of `run_dir` gets an experiment of its own by name."""
    client = MlflowClient(tracking_uri=uri)
    assert_recorded_once(client)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    client.rename_experiment(experiment.experiment_id, f"tests of {run_dir.parent.name}")


@pytest.mark.fault
def test_a_slow_server_is_not_waited_for(run_dir: Path, tmp_path: Path, healthy: str) -> None:
    with slow_proxy(healthy, DELAY_S, tmp_path) as slow:
        tracker = open_run(run_dir, slow)
        play_run(tracker, run_dir)
        assert load_state(run_dir, slow).sequence < EVENTS, "events must not wait for answers"
        wait_until(lambda: has_runs(healthy))
        assert tracker.close("FINISHED", timeout_s=1) > 0
    assert journal_length(run_dir) == EVENTS

    began = time.monotonic()
    synced = sync(run_dir, "--uri", healthy)
    assert synced.exit_code == 0, synced.output
    assert_recorded_once_at(healthy, run_dir)
    faults.record(
        "MLflow server slow",
        f"a proxy that holds every answer back for {DELAY_S:g} s; after the run `raylign sync RUN`",
        recovered_s=time.monotonic() - began,
        lost="nothing; every event once",
    )


def has_runs(uri: str) -> bool:
    client = MlflowClient(tracking_uri=uri)
    return client.get_experiment_by_name("tests") is not None and all_runs(client) != []


DRIVER = """
import sys, time
from pathlib import Path
from raylign.run.directory import RunDirectory
from tests.integration.played_runs import CONFIG, open_run, play_round, start
run_dir = Path(sys.argv[1])
with RunDirectory(run_dir).locked():
    tracker = open_run(run_dir, sys.argv[2])
    start(tracker, run_dir)
    play_round(tracker, run_dir, 1)
    tracker.round_started(2)
    tracker.step(2, 1, {"loss": 0.5})
    print("started", flush=True)
    time.sleep(600)
"""


@pytest.mark.fault
def test_a_killed_driver(run_dir: Path, tmp_path: Path) -> None:
    uri = put_database(tmp_path / "mlflow.db")
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(run_dir), uri], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None and driver.stdout.readline() == "started\n"
        refused = sync(run_dir)
        assert refused.exit_code == 1
        assert "is being worked on by another process; it sends its events itself" in refused.stderr
    finally:
        driver.kill()
        driver.wait()
    before, began = journal_length(run_dir), time.monotonic()
    synced = sync(run_dir)
    recovered = time.monotonic() - began
    assert synced.exit_code == 0, synced.output
    assert "status KILLED" in synced.stdout
    assert journal_length(run_dir) == before + 1
    last = list(read_events(run_dir / "events.jsonl"))[-2]
    parent, rounds = campaign_and_rounds(MlflowClient(tracking_uri=uri))
    assert [run.info.status for run in (parent, *rounds)] == ["KILLED", "FINISHED", "KILLED"]
    assert parent.info.end_time == rounds[1].info.end_time == int(last.time * 1000)
    assert f"sent 0 of {before + 1} events" in sync(run_dir).stdout
    faults.record(
        "driver killed, and not started again",
        "kill -9; then `raylign sync RUN`",
        recovered_s=recovered,
        lost="nothing; the run and its open round are KILLED as of the last event",
    )

    resumed = open_run(run_dir, uri)
    start(resumed, run_dir)
    resumed.round_started(2)
    wait_until(lambda: load_state(run_dir, uri).sequence == journal_length(run_dir))
    client = MlflowClient(tracking_uri=uri)
    parent, rounds = campaign_and_rounds(client)
    assert [run.info.status for run in (parent, *rounds)] == ["RUNNING", "FINISHED", "RUNNING"]
    resumed.step(2, 1, {"loss": 0.5})
    resumed.step(2, 2, {"loss": 0.25})
    assert resumed.close("FINISHED", timeout_s=60) == 0
    parent, rounds = campaign_and_rounds(client)
    assert [run.info.status for run in (parent, *rounds)] == ["FINISHED"] * 3
    assert history(client, rounds[1], "loss") == [(1, 0.5), (2, 0.25)]


TRACING = """
import sys, time
from pathlib import Path
from raylign.records import Prompt
from raylign.run.directory import RunDirectory
from raylign.tracking import feed
from tests.integration.played_runs import CONFIG, open_run, start, write_held_out
feed._TRACES_SHARE *= 8  # a trace a second or two, not one in ten
run_dir = Path(sys.argv[1])
with RunDirectory(run_dir).locked():
    tracker = open_run(run_dir, sys.argv[2])
    start(tracker, run_dir)
    prompts = [Prompt(f"h{number:06d}", ({"role": "user", "content": "ask"},), (1,)) for number in range(80)]
    write_held_out(run_dir / "samples.parquet", prompts, 0)
    tracker.artifact(run_dir / "samples.parquet", "samples")
    print("started", flush=True)
    for round in range(1, 1000):
        time.sleep(1)
        tracker.round_started(round)
"""


@pytest.mark.fault
def test_traces_come_once_through_kills_of_server_and_driver(run_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with ExitStack() as processes:
        first = processes.enter_context(ExitStack())
        first.enter_context(mlflow_server(tmp_path, port))
        driver = subprocess.Popen([sys.executable, "-c", TRACING, str(run_dir), uri], stdout=subprocess.PIPE, text=True)
        processes.callback(driver.wait)
        processes.callback(driver.kill)
        assert driver.stdout is not None and driver.stdout.readline() == "started\n"
        client = MlflowClient(tracking_uri=uri)
        wait_until(lambda: has_runs(uri) and len(all_traces(client, spans=False)) >= 3)
        first.close()
        with mlflow_server(tmp_path, port):
            before = len(all_traces(client, spans=False))
            wait_until(lambda: len(all_traces(client, spans=False)) > before)
            driver.kill()
            driver.wait()
            halfway = len(all_traces(client, spans=False))
            assert 3 <= halfway < 80, "killed in the middle"
            state = load_state(run_dir, uri)
            assert state.sequence > state.sent, "events behind the traces do not wait for them"
            began = time.monotonic()
            synced = sync(run_dir, "--uri", uri)
            assert synced.exit_code == 0, synced.output
            traces = all_traces(client)
            assert len(traces) == len({trace.info.trace_metadata["prompt_id"] for trace in traces}) == 80
            assert all(len(trace.data.spans) == 1 for trace in traces)
            assert Counter(len(trace.info.assessments) for trace in traces) == {2: 79, 1: 1}
            faults.record(
                "MLflow server and driver killed while traces are sent",
                "kill -9 of the server, later of the driver; then `raylign sync RUN`",
                recovered_s=time.monotonic() - began,
                lost="nothing; every trace once",
            )


CLOSING = """
import sys
from pathlib import Path
from tests.integration.played_runs import open_run, play_run
run_dir = Path(sys.argv[1])
tracker = open_run(run_dir, sys.argv[2])
play_run(tracker, run_dir)
print(tracker.close("FINISHED", timeout_s=1), flush=True)
"""


def test_a_process_ends_although_a_request_hangs(run_dir: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
        command = [sys.executable, "-c", CLOSING, str(run_dir), uri]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_S)
        assert (done.returncode, done.stdout) == (0, f"{EVENTS}\n"), done.stderr

        away = sync(run_dir, "--uri", uri, "--timeout", "1")
        assert away.exit_code == 1 and "failed for 1 s" in away.stderr


def test_ctrl_c_ends_a_sync_that_waits(run_dir: Path, interruptible: None) -> None:
    tracker = open_run(run_dir, put_database(run_dir.parent / "mlflow.db"))
    play_run(tracker, run_dir)
    assert tracker.close("FINISHED", timeout_s=60) == 0
    uri = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "recipes.commands.cli", "sync", str(run_dir), "--uri", uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "trying for 60 s" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.communicate(timeout=START_S)[1]
        assert process.returncode == 130

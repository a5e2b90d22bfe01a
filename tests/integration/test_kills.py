"""kill -9 of the driver in every stage, and of every kind of actor: the run ends as if nothing had happened."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from raylign.run.directory import RunDirectory, open_run
from raylign.tracking.journal import Event, read_events
from tests.faults import record
from tests.integration.tiny import SMALLEST, SPREAD_SCORES, START_S, Watched, campaign_record, script, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.long_fault, pytest.mark.timeout(1200)]

NAME = "kills"
SETTINGS = (
    "schedule.rounds=2",
    "schedule.prompts_per_round=24",
    "sampling.num_generations=4",
    "sampling.max_new_tokens=120",
    "prompts.held_out=12",
    "trainer.num_train_epochs=4",
    "trainer.per_device_train_batch_size=1",
    "scoring.batch_size=4",
    "scoring.function=spread:score",
    "generators.max_num_seqs=16",
    "run.dir=runs",
    f"run.name={NAME}",
)
SLOW_SCORES = "import time\n" + SPREAD_SCORES.replace("    return", "    time.sleep(0.25)\n    return")


def command(served_llama: str, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "spread.py").write_text(SLOW_SCORES)
    return script(*SMALLEST, f"model.path={served_llama}", *SETTINGS)


def finished(folder: Path) -> RunDirectory:
    return open_run(folder / "runs" / NAME)


@pytest.fixture(scope="module")
def expected(served_llama: str, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Watched(command(served_llama, folder), folder) as run:
        status, _ = run.finish(START_S)
        assert status == 0, run.output
    return finished(folder)


def assert_same(found: RunDirectory, expected: RunDirectory) -> None:
    """The same candidates, preferences, steps and weights, each once on record."""
    for index in (1, 2):
        for table in ("candidates", "preferences", "samples"):
            left, right = (d.round(index) / f"{table}.parquet" for d in (found, expected))
            assert pq.read_table(left).equals(pq.read_table(right)), (index, table)
    for left_report, right_report in zip(found.reports(), expected.reports(), strict=True):
        assert left_report.steps == right_report.steps
        assert left_report.evaluation == right_report.evaluation and left_report.counts == right_report.counts
    name = "adapter_model.safetensors"
    weights, wanted = (load_file(d.checkpoint(2) / name) for d in (found, expected))
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted) and weights.keys() == wanted.keys()


def assert_recorded_once(folder: Path, expected: RunDirectory) -> None:
    """MLflow has one run per round, and every step of it once."""
    campaign = campaign_record(folder / "runs")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs/mlflow.db'}")
    children = client.search_runs(
        [campaign.info.experiment_id], f"tags.`mlflow.parentRunId` = '{campaign.info.run_id}'"
    )
    assert campaign.info.status == "FINISHED"
    assert sorted(run.data.tags["raylign.round"] for run in children) == ["1", "2"]
    for run in children:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        count = len(expected.reports()[int(run.data.tags["raylign.round"]) - 1].steps)
        assert sorted(steps) == list(range(1, count + 1))


def assert_nothing_left(run: Watched) -> None:
    wait_until(lambda: not run.processes(), 30, lambda: f"left: {run.processes()}")


def test_the_driver_is_killed_in_every_stage(served_llama: str, expected: RunDirectory, tmp_path: Path) -> None:
    stages = {
        "sample": "round 0: held-out score",
        "score": "round 1 sample 24/24",
        "train": "round 1 reference ",
        "publish": "round 1 train ",
        "evaluate": "round 1 publish ",
    }
    restarts = []
    for line in stages.values():
        started = time.monotonic()
        with Watched(command(served_llama, tmp_path), tmp_path) as run:
            run.wait_for(line)
            restarts.append(time.monotonic() - started)
            time.sleep(0.3)
            run.send(signal.SIGKILL, to_group=False)
            run.finish(20)
            assert_nothing_left(run)
    with Watched([sys.executable, "-m", "recipes.commands.cli", "resume", f"runs/{NAME}"], tmp_path) as run:
        status, _ = run.finish(START_S)
        assert status == 0, run.output
    assert_same(finished(tmp_path), expected)
    assert_recorded_once(tmp_path, expected)
    assert not list(Path("/dev/shm").glob(f"raylign-{NAME}-*"))
    record(
        "driver killed in sample, score, train, publish, evaluate",
        "kill -9, then the same command; at last raylign resume",
        recovered_s=max(restarts[1:]),
        lost="nothing: same candidates, steps and weights",
    )


def processes(run: Watched, title: str) -> list[int]:
    return [pid for pid, line in run.processes().items() if line.startswith(f"ray::{title}")]


def incidents(folder: Path) -> list[Event]:
    journal = folder / "runs" / NAME / "events.jsonl"
    return [event for event in read_events(journal) if event.name == "incident"] if journal.is_file() else []


SOON_S = 60.0
"""By the end of a process: the deadlines of its work are at 600."""
KILLS: dict[str, tuple[str, str, str]] = {
    "generator": ("Generator", "round 0: held-out score", "generator"),
    "scorer": ("ScorerProcess", "round 1 sample 24/24", "scorer"),
    "trainer": ("TrainerRank", "round 1 reference ", "trainer"),
}


@pytest.fixture(scope="module")
def disturbed(served_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, float]]]:
    """One campaign in which an actor of every kind is killed while it works; when each was killed."""
    folder = tmp_path_factory.mktemp("disturbed")
    moments = {}
    with Watched(command(served_llama, folder), folder) as run:
        for role, (title, line, _) in KILLS.items():
            run.wait_for(line)
            time.sleep(0.4)
            victims = processes(run, title)
            assert victims, f"no {title} among {run.processes()}"
            moments[role] = time.time()
            os.kill(victims[0], signal.SIGKILL)
        status, _ = run.finish(START_S)
        assert status == 0, run.output
    yield folder, moments


@pytest.mark.parametrize("role", KILLS)
def test_a_killed_actor_is_replaced(role: str, disturbed: tuple[Path, dict[str, float]]) -> None:
    folder, moments = disturbed
    found = [event for event in incidents(folder) if event.payload["role"] == KILLS[role][2]]
    assert [event.payload["happened"] for event in found] == ["lost", "recovered"]
    detected = found[0].time - moments[role]
    assert 0 <= detected < SOON_S
    record(
        f"{role} process killed at work",
        "kill -9",
        detected_s=detected,
        recovered_s=found[1].payload["seconds"],
        lost="nothing: same candidates, steps and weights",
    )


def test_killed_actors_change_no_number(disturbed: tuple[Path, Any], expected: RunDirectory) -> None:
    assert_same(finished(disturbed[0]), expected)
    assert_recorded_once(disturbed[0], expected)

"""`raylign submit` from a machine that is in no cluster: the job is stopped, submitted again, and goes on.

The driver is where Ray puts it, on the head; adapters travel to the generator of one node from the ranks of another.
"""

import re
import sys
from pathlib import Path

import pytest

from raylign.run.directory import open_run
from raylign.tracking.journal import Event, read_events
from tests.cluster.conftest import Cluster
from tests.cluster.nodes import DASHBOARD_PORT, Program
from tests.cluster.sampled import assert_complete, assert_published
from tests.integration.tiny import RECIPE, START_S, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

NAME = "submitted"
STEPS = 200
"""Of a round, two an epoch: some are left when the job is stopped, and the second round besides."""
SETTINGS = (
    "generators.weight_sync.transport=lora",
    "schedule.rounds=2",
    "placement.mode=disaggregated",
    "trainer.ranks=2",
    "trainer.zero_stage=2",
    "trainer.per_device_train_batch_size=1",
    f"trainer.num_train_epochs={STEPS // 2}",
    "trainer.learning_rate=0.001",
)
STOP_S = 400.0
SUBMIT = (sys.executable, "-P", "-m", "recipes.commands.cli", "submit", RECIPE)


def submit(cluster: Cluster) -> Program:
    return cluster.nodes.outside.run([*SUBMIT, *cluster.settings(NAME, *SETTINGS)], env=cluster.environment)


def events(run: Path, name: str) -> list[Event]:
    journal = run / "events.jsonl"
    return [event for event in read_events(journal) if event.name == name] if journal.is_file() else []


def test_without_the_token_nothing_is_submitted(cluster: Cluster) -> None:
    address = f"http://{cluster.nodes.head.address}:{DASHBOARD_PORT}"
    command = [*SUBMIT, *cluster.settings(NAME, *SETTINGS), "--address", address]
    refused = cluster.nodes.outside.run(command, env={"RAY_AUTH_MODE": "disabled"})
    assert refused.finish(START_S) == 1
    assert "asks for a token and got none" in refused.output and not (cluster.runs / NAME).exists()


def test_a_stopped_job_is_submitted_again_and_goes_on(cluster: Cluster) -> None:
    run = cluster.runs / NAME
    first = submit(cluster)
    wait_until(lambda: len(events(run, "step")) > 1 or first.ended, 2 * START_S, lambda: first.output)
    assert not first.ended, first.output
    (job,) = re.findall(r"job (raysubmit_\w+)$", first.output.partition("\n")[0])
    assert "was stopped" in cluster.job("stop", job, timeout_s=STOP_S)
    assert first.finish(STOP_S) != 0
    (stopped,) = events(run, "campaign_finished")
    assert stopped.payload["status"] == "KILLED" and stopped.round is None
    sampled = run / "rounds/0001/candidates.parquet"
    before = (sampled.stat().st_ino, sampled.read_bytes())

    second = submit(cluster)
    assert second.finish(2 * START_S) == 0, second.output
    assert "with status 0" in second.output
    assert (sampled.stat().st_ino, sampled.read_bytes()) == before
    directory = open_run(run)
    assert [len(report.steps) for report in directory.reports()] == [STEPS, STEPS]
    for index in (1, 2):
        assert_complete(directory, index, 4, 3)
    assert_published(directory, cluster.model)
    cluster.assert_memory_is_free()

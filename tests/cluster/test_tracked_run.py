"""A run whose driver, generator and trainer ranks are on three nodes, with MLflow and the reward service on others.

Full weights, two ranks under ZeRO 2, two rounds: what version 1 sampled must be what its checkpoint says.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from raylign.run.directory import RunDirectory, open_run
from tests.cluster.conftest import Cluster
from tests.cluster.nodes import Program
from tests.cluster.sampled import assert_complete, assert_published
from tests.integration.tiny import START_S, foreign_lines

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

NAME = "across"
MLFLOW_PORT = 5000
SETTINGS = (
    "model.lora=null",
    "schedule.rounds=2",
    "placement.mode=disaggregated",
    "trainer.ranks=2",
    "trainer.zero_stage=2",
    "trainer.per_device_train_batch_size=1",
    "trainer.learning_rate=0.01",
)
ROLES = ("ray::Generator", "ray::TrainerRank")
ASK = (
    "import json, sys, urllib.request as u\n"
    "def post(path, **body):\n"
    "    r = u.Request(sys.argv[1] + '/api/2.0/mlflow/' + path, json.dumps(body).encode(), "
    "{'Content-Type': 'application/json'})\n"
    "    return json.load(u.urlopen(r, timeout=60))\n"
    "found = post('experiments/search', max_results=10)['experiments']\n"
    "print(json.dumps(post('runs/search', experiment_ids=[e['experiment_id'] for e in found])['runs']))\n"
)


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and where each role was once the team was ready: node names by role, once a process."""

    program: Program
    status: int
    places: dict[str, list[str]]
    directory: RunDirectory


@pytest.fixture(scope="module")
def mlflow(cluster: Cluster) -> Iterator[str]:
    """The URI of a server on the head, reached from every node."""
    head, uri = cluster.nodes.head, f"http://{cluster.nodes.head.address}:{MLFLOW_PORT}"
    store = ["--backend-store-uri", "sqlite:////tmp/server.db", "--artifacts-destination", "/tmp/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", head.address]
    server = head.run(
        [*command, "--port", str(MLFLOW_PORT), *store], env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    )
    server.wait_for("Application startup complete", START_S)
    yield uri
    server.stop()


@pytest.fixture(scope="module")
def ended(cluster: Cluster, mlflow: str) -> Ended:
    run = cluster.run(NAME, *SETTINGS, f"tracking.uri={mlflow}")
    run.wait_for("team ready", START_S)
    places = {
        role: [node.name for node in cluster.nodes for line in node.processes().values() if line.startswith(role)]
        for role in (*ROLES, "recipes.commands.cli")
    }
    return Ended(run, run.finish(START_S), places, open_run(cluster.runs / NAME))


def test_every_role_is_on_a_node_of_its_own(ended: Ended) -> None:
    (generator,) = ended.places["ray::Generator"]
    first, second = ended.places["ray::TrainerRank"]
    assert first == second and {generator, first} == {"worker-1", "worker-2"}


def test_completions_are_scored_by_a_service_of_another_node(cluster: Cluster, ended: Ended) -> None:
    assert_complete(ended.directory, 1, 4, 3)
    asked = [line.split()[2] for line in cluster.service.output.splitlines() if line.startswith("asked by")]
    assert asked and set(asked) <= {node.address for node in cluster.nodes}


def test_full_weights_reach_the_generator_of_another_node(cluster: Cluster, ended: Ended) -> None:
    assert ended.status == 0, ended.program.output
    assert foreign_lines(ended.program.output) == []
    assert_complete(ended.directory, 2, 4, 3)
    assert_published(ended.directory, cluster.model)
    cluster.assert_memory_is_free()


def test_mlflow_on_the_head_says_that_the_run_is_finished(cluster: Cluster, mlflow: str, ended: Ended) -> None:
    runs = json.loads(cluster.nodes.outside.call([sys.executable, "-c", ASK, mlflow], timeout_s=120))
    assert [run["info"]["status"] for run in runs] == ["FINISHED"] * 3, "the run and its two rounds"

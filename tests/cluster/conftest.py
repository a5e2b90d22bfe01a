"""One Ray cluster of three nodes for the tests of this folder; where there can be none, they are skipped or fail."""

import os
import secrets
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from raylign.models import resolve_model
from tests.cluster.nodes import (
    BIN,
    DASHBOARD_PORT,
    HEAD_PORT,
    REQUIRED,
    Node,
    Nodes,
    Program,
    three_nodes,
    token_environment,
    why_none,
)
from tests.integration.tiny import SMALLEST, command_line, random_llama, wait_until

SERVICE_PORT = 8000
WORKER_CPUS = 2
ENDED_S = 120.0


@pytest.fixture(scope="session", autouse=True)
def nodes_are_possible() -> None:
    reason = why_none()
    if reason and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but there can be no nodes: {reason}")
    if reason:
        pytest.skip(reason)


@dataclass(frozen=True)
class Cluster:
    """Ray with a token: a head without CPUs, two workers of two; a reward service and a client on the outside."""

    nodes: Nodes
    token: Path
    model: Path
    service: Program

    @property
    def runs(self) -> Path:
        return self.nodes.shared / "runs"

    @property
    def environment(self) -> dict[str, str]:
        """For Ray's and raylign's commands on the outside."""
        dashboard = f"http://{self.nodes.head.address}:{DASHBOARD_PORT}"
        return {**token_environment(self.token), "RAY_ADDRESS": dashboard}

    def settings(self, name: str, *more: str) -> list[str]:
        """A small run of the random model, scored by the service, in the shared folder."""
        scoring = f"{{type: http, url: 'http://{self.nodes.outside.address}:{SERVICE_PORT}/score'}}"
        own = (f"model.path={self.model}", f"scoring={scoring}", f"run.dir={self.runs}", f"run.name={name}")
        return [*SMALLEST, *own, "placement.generator_cpus=2", *more]

    def run(self, name: str, *more: str) -> Program:
        """`raylign run` with a driver on the head."""
        environment = {**token_environment(self.token), "RAY_ADDRESS": f"{self.nodes.head.address}:{HEAD_PORT}"}
        return self.nodes.head.run(command_line(*self.settings(name, *more)), env=environment)

    def start_worker(self, worker: Node) -> None:
        worker.start_ray(head=self.nodes.head.address, num_cpus=WORKER_CPUS, token=self.token)

    def job(self, *arguments: str, timeout_s: float) -> str:
        """Output of a `ray job` command on the outside, which must succeed."""
        command = [str(BIN / "ray"), "job", *arguments]
        return self.nodes.outside.call(command, env=self.environment, timeout_s=timeout_s)

    def assert_memory_is_free(self) -> None:
        """No weights and no queues of engines are left in the shared memory of a node."""

        def left() -> list[str]:
            names = [(node.name, name) for node in self.nodes for name in node.call(["ls", "/dev/shm"]).split()]
            return [f"{node}: {name}" for node, name in names if name.startswith(("raylign-", "psm_", "sem."))]

        wait_until(lambda: not left(), ENDED_S, lambda: f"left in shared memory: {left()}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with three_nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        token = nodes.shared / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        serve = [sys.executable, "-m", "tests.cluster.reward_service", nodes.outside.address, str(SERVICE_PORT)]
        model, service = nodes.shared / "model", nodes.outside.run(serve)
        random_llama(model, resolve_model("embedded:smollm2-135m"), vocabulary=49152, width=128, spread=0.1)
        service.wait_for("serving", 60)
        nodes.head.start_ray(num_cpus=0, token=token)
        made = Cluster(nodes, token, model, service)
        with ThreadPoolExecutor() as pool:
            list(pool.map(made.start_worker, nodes.workers))
        yield made

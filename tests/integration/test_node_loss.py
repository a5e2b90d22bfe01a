"""A node of the cluster goes away with all its processes, and another one comes later."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.cluster import actor_environment
from actors.placement import plan_team
from actors.supervision.incidents import Incidents
from actors.supervision.processes import process_of
from actors.team import team
from raylign.config import OnlineDpoConfig, parse_config
from raylign.config.blocks import RecoveryBlock
from raylign.records import Candidate
from raylign.roles import Generator
from tests.faults import record
from tests.integration.test_generator_faults import DECODING, film_prompts
from tests.integration.tiny import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.long_fault, pytest.mark.timeout(900)]

START_S = 90


@pytest.fixture
def nodes(no_cluster: None) -> Iterator[Cluster]:
    """A head and two workers of one core each, all on this machine."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        ray.init(address=made.address, runtime_env={"env_vars": actor_environment(private=True)}, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def config_of(folder: Path) -> OnlineDpoConfig:
    return parse_config(
        {
            "run": {"dir": str(folder), "name": "nodes"},
            "model": {"dtype": "float32"},
            "generators": {"count": 2, "max_model_len": 512, "max_num_seqs": 8, "kv_cache_gb": 0.1}
            | {"start_timeout_s": START_S},
            "placement": {"mode": "disaggregated", "generator_cpus": 1, "trainer_cpus": 1},
        }
    )


def test_a_node_is_lost_and_another_comes(nodes: Cluster, served_llama: str, tmp_path: Path) -> None:
    """One of two generators goes with it: the other works alone, publishes too, until a node takes its place."""
    entries: list[tuple[float, str, Any]] = []
    config = config_of(tmp_path)
    prompts = film_prompts(served_llama)

    def note(role: str, happened: str, detail: Any) -> None:
        if role == "generator":  # the scorer may have been on that node, too
            entries.append((time.monotonic(), happened, detail))

    with team(
        config,
        folder=served_llama,
        pad_id=2,
        canary_ids=tuple(prompt.token_ids for prompt in prompts[:2]),
        plan=plan_team(config, ray.cluster_resources()),
        incidents=Incidents(RecoveryBlock(), note),
    ) as roles:

        def sample(after_first: Any = lambda: None) -> list[Candidate]:
            waiting = [after_first]
            return roles.generators.sample(
                prompts,
                DECODING,
                seed=3,
                round_index=1,
                version=0,
                advance=lambda count: waiting.pop()() if waiting else None,
            )

        expected = sample()
        workers = {node.node_id: node for node in nodes.worker_nodes}
        victim = next(
            workers[node] for handle in roles.generators.handles if (node := process_of(handle).node) in workers
        )
        moments: list[float] = []

        def lose() -> None:
            moments.append(time.monotonic())
            nodes.remove_node(victim, allow_graceful=False)

        assert [c.token_ids for c in sample(lose)] == [c.token_ids for c in expected]
        assert {happened for _, happened, _ in entries} == {"lost"}
        detected = entries[0][0] - moments[0]
        assert detected < config.generators.request_timeout_s / 10
        gaps = roles.publisher.publish(1)
        assert gaps["logprob_gap_mean"] < 0.05
        nodes.add_node(num_cpus=1)

        def back() -> bool:
            roles.generators.look_after_starting()
            return entries[-1][1] == "recovered"

        wait_until(back, 2 * START_S, lambda: f"a replacement among {entries}")
        assert roles.generators.call("version", 30.0, Generator.version) == [1, 1]
    record(
        f"node lost with a generator; the next one comes after {START_S} s",
        "its Ray processes killed",
        detected_s=detected,
        recovered_s=entries[-1][2]["seconds"],
        lost="nothing: the other generator works alone meanwhile, same candidates",
    )

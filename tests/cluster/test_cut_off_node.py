"""One of two generators is cut off the network while it samples, and its node comes back with a new raylet."""

import time
from pathlib import Path

import pytest

from raylign.run.directory import open_run
from raylign.tracking.journal import Event, read_events
from tests.cluster.conftest import Cluster
from tests.cluster.nodes import Node
from tests.cluster.sampled import assert_complete, assert_published
from tests.faults import record
from tests.integration.tiny import START_S, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.long_fault, pytest.mark.timeout(1800)]

NAME = "cut-off"
PROMPTS, GENERATIONS = 12, 4
SETTINGS = (
    "schedule.rounds=2",
    f"schedule.prompts_per_round={PROMPTS}",
    f"sampling.num_generations={GENERATIONS}",
    "sampling.max_new_tokens=100",
    "generators.count=2",
    "generators.max_num_seqs=4",
    "trainer.learning_rate=0.001",
    "trainer.per_device_train_batch_size=1",
)
LOST_S = 240.0


def incidents(run: Path, happened: str) -> list[Event]:
    """Of generators; the scorer may have been on the node too."""
    found = [event for event in read_events(run / "events.jsonl") if event.name == "incident"]
    return [e for e in found if (e.payload["role"], e.payload["happened"]) == ("generator", happened)]


def has(node: Node, role: str) -> bool:
    return any(line.startswith(role) for line in node.processes().values())


def test_a_generator_is_cut_off_while_it_samples(cluster: Cluster) -> None:
    """Both nodes have a generator, one the trainer too; the driver is on the head."""
    run, directory = cluster.run(NAME, *SETTINGS), cluster.runs / NAME
    run.wait_for("round 0: held-out score", 2 * START_S)
    (alone,) = [node for node in cluster.nodes.workers if not has(node, "ray::TrainerRank")]
    assert all(has(node, "ray::Generator") for node in cluster.nodes.workers)
    sampled = directory / "rounds/0001/sampled.jsonl"
    wait_until(lambda: sampled.is_file() and sampled.stat().st_size > 0, START_S, lambda: run.output)
    alone.cut()
    began = time.time()
    assert sampled.read_bytes().count(b"\n") < PROMPTS, "it was cut too late"
    wait_until(lambda: bool(incidents(directory, "lost")) or run.ended, LOST_S, lambda: run.output)
    (lost,) = incidents(directory, "lost")
    alone.join()
    wait_until(lambda: alone.ray_ended, LOST_S, lambda: "the raylet that was given up is still there")
    wait_until(lambda: not has(alone, "VLLM"), LOST_S, lambda: f"an engine is left: {alone.processes()}")
    cluster.start_worker(alone)

    wait_until(lambda: bool(incidents(directory, "recovered")) or run.ended, 2 * START_S, lambda: run.output)
    status, found = run.finish(2 * START_S), open_run(directory)
    assert_complete(found, 1, PROMPTS, GENERATIONS)
    assert status == 0, run.output
    (recovered,) = incidents(directory, "recovered")
    assert recovered.payload["actor"] == lost.payload["actor"]
    assert_complete(found, 2, PROMPTS, GENERATIONS)
    assert_published(found, cluster.model)
    cluster.assert_memory_is_free()
    record(
        "a node with a generator cut off the network, and a new raylet there later",
        "its cable pulled while it samples",
        detected_s=lost.time - began,
        recovered_s=recovered.payload["seconds"],
        lost="nothing: every candidate once",
    )

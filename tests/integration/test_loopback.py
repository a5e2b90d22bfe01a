"""A run's own cluster can be reached from this machine alone, and asks for a token even here."""

import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import ray_constants
from ray.actor import ActorHandle

from actors.generator.actor import EngineSpec, GeneratorActor
from actors.supervision.processes import process_of
from actors.trainer.actor import free_address
from actors.weight_sync.transports import ShmTransport
from tests.integration.listeners import Member, listening
from tests.integration.tiny import clean_environment
from tests.processes import descendants

BIN = Path(sys.executable).parent
RAY_PARTS = ("gcs_server", "raylet", "ray::")
"""Words of command lines; without listeners of these the test would have looked at the wrong processes."""
Listeners = dict[tuple[str, int], str]


def outside(found: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    return {place: name for place, name in found.items() if not _is_loopback(place[0])}


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def test_ray_and_a_process_group_listen_on_loopback_alone(resources: dict[str, float]) -> None:
    find = ray.remote(free_address)
    address, port = ray.get(find.remote())
    members = [Member.options(num_cpus=0).remote(rank, address, port) for rank in range(2)]
    assert ray.get([member.sum.remote() for member in members]) == [3.0, 3.0]
    found = listening()
    assert (address, port) in found, "the group's store"
    for part in RAY_PARTS:
        assert any(part in name for name in found.values()), f"no listener of {part} in {found}"
    assert outside(found) == {}
    for member in members:
        ray.kill(member)


@pytest.fixture(scope="module")
def engine(
    resources: dict[str, float], served_llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ActorHandle[Any], Listeners]]:
    """A generator, and who listened before it."""
    spec = EngineSpec(
        model=served_llama,
        dtype="float32",
        device="cpu",
        transport=ShmTransport.engine,
        lora_rank=0,
        tensor_parallel_size=1,
        max_model_len=64,
        max_num_seqs=4,
        gpu_memory_utilization=0.5,
        kv_cache_gb=0.1,
        enforce_eager=True,
        sleeps=False,
        trust_remote_code=False,
        seed=0,
        threads=1,
        stacks=str(tmp_path_factory.mktemp("stacks")),
    )
    before = listening()
    generator = GeneratorActor.options(num_cpus=1).remote(spec, "generator-0")
    ray.get(generator.ready.remote())
    yield generator, before
    ray.get(generator.shutdown.remote())
    ray.kill(generator)


@pytest.mark.slow
def test_an_engine_listens_on_loopback_alone(engine: tuple[ActorHandle[Any], Listeners]) -> None:
    found = listening()
    assert found.keys() - engine[1].keys(), "the engine's own listeners"
    assert outside(found) == {}


@pytest.mark.slow
def test_an_engine_is_a_fork_of_a_process_that_imported_vllm(engine: tuple[ActorHandle[Any], Listeners]) -> None:
    """Spawned by vLLM it would import it once more, after the actor has."""
    actor = psutil.Process(process_of(engine[0]).pid)
    (core,) = [process for process, line in descendants(actor).items() if "EngineCore" in line]
    parent = psutil.Process(core.ppid())
    assert "forkserver" in " ".join(parent.cmdline()) and parent.ppid() == actor.pid


def test_actors_have_the_priority_of_their_driver(resources: dict[str, float]) -> None:
    """Beside a busy program a lower one would make every start and step look like a hang."""
    priority = ray.remote(lambda: os.nice(0))
    assert ray.get(priority.remote()) == os.nice(0)


def test_the_cluster_turns_away_who_has_no_token(resources: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("f" * 64)
    address = ray.get_runtime_context().gcs_address
    assert ipaddress.ip_address(address.rpartition(":")[0]).is_loopback
    for name, extra in {
        "none": {"RAY_AUTH_MODE": "disabled"},
        "wrong": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
    }.items():
        done = subprocess.run(
            [BIN / "ray", "status", "--address", address],
            # Ray would ask the outer address of this machine otherwise, where the cluster does not listen.
            env=clean_environment({**extra, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode != 0, f"admitted with {name} token: {done.stdout}"
        assert "uthenticat" in done.stdout + done.stderr, name


def test_no_command_line_shows_the_token(resources: dict[str, float]) -> None:
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray/auth_token")).read_text().strip()
    assert len(token) > 20
    lines = list(descendants().values())
    assert any("raylet" in line for line in lines), lines
    assert [line for line in lines if token in line] == []

"""A run's own cluster can be reached from this machine alone, and asks for a token even here."""

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import ray
from ray._private import ray_constants

from actors.trainer.actor import free_address
from tests.integration.listeners import Member, listening, outside
from tests.integration.tiny import clean_environment
from tests.processes import descendants

BIN = Path(sys.executable).parent
RAY_PARTS = ("gcs_server", "raylet", "ray::")
"""Words of command lines; without listeners of these the test would have looked at the wrong processes."""


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

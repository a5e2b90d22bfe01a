"""How a private cluster is started on a machine that is busy."""

import os
import subprocess
import sys
from typing import Any

import pytest
from ray._private import parameter, services

from actors import cluster
from raylign.errors import PlacementError

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def starts(monkeypatch: pytest.MonkeyPatch, failures: list[Exception]) -> list[dict[str, Any]]:
    """`ray.init` fails so often; what it was asked."""
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        if failures:
            raise failures.pop(0)

    monkeypatch.setattr("ray.init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return asked


def test_a_node_that_is_slow_to_start_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = starts(monkeypatch, [Exception(LATE), Exception(LATE)])
    cluster._join(num_cpus=2)
    assert len(asked) == 3 and all(one == asked[0] for one in asked)


def test_a_node_that_never_starts_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = starts(monkeypatch, [Exception(LATE)] * 9)
    with pytest.raises(PlacementError, match=r"Ray cannot start on this machine .*timed out.*too busy"):
        cluster._join(num_cpus=2)
    assert len(asked) == 4


def test_other_failures_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = starts(monkeypatch, [Exception("no such disk")])
    with pytest.raises(Exception, match="no such disk"):
        cluster._join(num_cpus=2)
    assert len(asked) == 1


def test_ray_begins_in_groups_of_its_own_with_the_environment_of_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    said, popen = [], services.ConsolePopen
    code = "import os; print(os.getpgrp() == os.getpid(), os.environ['VLLM_HOST_IP'])"

    def init(**options: Any) -> None:
        command = [sys.executable, "-c", code]
        with services.ConsolePopen(command, stdout=subprocess.PIPE, text=True) as begun:
            said.append(begun.communicate()[0].split())

    monkeypatch.setattr("ray.init", init)
    for name in ("RAY_ADDRESS", "VLLM_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    cluster._join(num_cpus=1)
    assert said == [["True", "127.0.0.1"]]
    assert "VLLM_HOST_IP" not in os.environ and services.ConsolePopen is popen


def test_a_cluster_that_is_joined_gets_the_environment_of_actors_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = starts(monkeypatch, [])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster._join(num_cpus=None)
    assert [one["runtime_env"] for one in asked] == [{"env_vars": cluster.actor_environment()}]
    assert "VLLM_HOST_IP" not in cluster.actor_environment()


def test_no_process_that_only_watches_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real: Any = parameter.RayParams, services.start_api_server

    def init(**options: Any) -> None:
        made: Any = parameter.RayParams(num_cpus=options["num_cpus"])
        start: Any = services.start_api_server
        asked.append((made.include_log_monitor, made.no_monitor, *start(None, False)))

    monkeypatch.setattr("ray.init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster._join(num_cpus=1)
    assert asked == [(False, True, "", None)]
    assert real == (parameter.RayParams, services.start_api_server)

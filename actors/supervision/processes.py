"""The processes behind actors: which they are, and how they are ended and signalled."""

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True, slots=True)
class ActorProcess:
    """`pid` is 0 while the actor has no process."""

    pid: int
    node: str


def process_of(handle: ActorHandle[Any]) -> ActorProcess:
    """As Ray's control service has it; the public API for it needs a dashboard, which private clusters lack."""
    known: dict[str, Any] = state.actors(handle._actor_id.hex()) or {}
    return ActorProcess(known.get("Pid", 0), known.get("Address", {}).get("NodeID", ""))


def send_signal(process: ActorProcess, number: signal.Signals, timeout_s: float) -> None:
    """Signal the process from its node. Raises OSError when it has ended or is somebody else's, RayError when another
    node does not do it within `timeout_s`.
    """
    if process.node == ray.get_runtime_context().get_node_id():
        os.kill(process.pid, number)  # a task of Ray waits until a busy machine has started a process for it
        return
    place = NodeAffinitySchedulingStrategy(process.node, soft=False)
    send = ray.remote(_send).options(num_cpus=0, scheduling_strategy=place)
    ray.get(send.remote(process.pid, int(number)), timeout=timeout_s)


def _send(pid: int, number: int) -> None:
    os.kill(pid, number)


def kill(handles: Sequence[ActorHandle[Any]]) -> None:
    """End actors that may have ended already; Ray kills within seconds those that do not react."""
    for handle in handles:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(handle)

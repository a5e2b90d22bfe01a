"""The processes behind actors: which they are, how they are ended and signalled, and where each of them stands."""

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ray
from ray._private import state
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

FOLDER = "stacks"
_OPEN: list[IO[str]] = []
"""Files of this process that the signal writes to; they stay open as long as it lives."""
_SEND_S = 60.0
_ANSWER_S = 5.0
_POLL_S = 0.1


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


def enable_stack_dumps(folder: str, name: str) -> None:
    """Let SIGUSR1 append the stacks of this process's threads to `folder`/`name`-PID.txt."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = (Path(folder) / f"{name}-{os.getpid()}.txt").open("a")
    _OPEN.append(file)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def dump_stacks(handle: ActorHandle[Any], folder: Path, name: str) -> str:
    """Make the actor behind `handle` write its stacks; returns where they are, or why there are none."""
    process = process_of(handle)
    if not process.pid:
        return "no stacks: it has no process"
    try:
        send_signal(process, signal.SIGUSR1, _SEND_S)
    except (RayError, OSError) as error:
        return f"no stacks: process {process.pid} cannot be signalled ({type(error).__name__})"
    path = folder / f"{name}-{process.pid}.txt"
    if _filled(path):
        return f"its stacks are in {path}"
    return f"process {process.pid} writes no stacks: it is stopped, hangs in the kernel, or has no access to {folder}"


def _filled(path: Path) -> bool:
    """Whether the file gets something within a few seconds."""
    deadline = time.monotonic() + _ANSWER_S
    while not (path.is_file() and path.stat().st_size):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def remove_empty(folder: Path) -> None:
    """Actors that were never asked leave empty files."""
    for path in folder.glob("*.txt"):
        if not path.stat().st_size:
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()

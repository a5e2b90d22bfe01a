"""What a stuck actor is doing: a signal makes it write the stacks of all its threads into the run directory."""

import faulthandler
import os
import signal
from pathlib import Path
from typing import IO, Any

import ray
import ray.util.state
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

FOLDER = "stacks"
_OPEN: list[IO[str]] = []
"""Files of this process that the signal writes to; they stay open as long as it lives."""
_ANSWER_S = 5.0


def enable_stack_dumps(folder: str, name: str) -> None:
    """Let SIGUSR1 append the stacks of this process's threads to `folder`/`name`-PID.txt."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = (Path(folder) / f"{name}-{os.getpid()}.txt").open("a")
    _OPEN.append(file)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def dump_stacks(handle: ActorHandle[Any], folder: Path, name: str) -> str:
    """Make the actor behind `handle` write its stacks; returns where they are, or why there are none."""
    found = ray.util.state.get_actor(handle._actor_id.hex(), timeout=int(_ANSWER_S))
    if found is None or not found.pid or not found.node_id:
        return "no stacks: Ray does not know its process"
    place = NodeAffinitySchedulingStrategy(found.node_id, soft=False)
    send = ray.remote(_send).options(num_cpus=0, scheduling_strategy=place)
    try:
        ray.get(send.remote(found.pid), timeout=_ANSWER_S)
    except RayError as error:
        return f"no stacks: its node does not answer ({type(error).__name__})"
    path = folder / f"{name}-{found.pid}.txt"
    if path.is_file() and path.stat().st_size:
        return f"its stacks are in {path}"
    return f"process {found.pid} does not answer signals: it is stopped or hangs in the kernel"


def _send(pid: int) -> None:
    import time  # noqa: PLC0415 - runs in a worker that has only this function

    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)


def remove_empty(folder: Path) -> None:
    """Actors that were never asked leave empty files."""
    for path in folder.glob("*.txt"):
        if not path.stat().st_size:
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
